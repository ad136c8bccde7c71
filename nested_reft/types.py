"""The values that flow through one training step, and the key to array suffixes.

Dimension key (used as suffixes of array names and as jaxtyping axes):

    B  prompts               G  completions per prompt     N  B * G
    P  prompt tokens         C  completion tokens          T  sequence tokens
    V  vocabulary            D  width                      F  hidden width
    H  query heads           J  key/value heads            K  head size
    L  layers                S  steps of a plan            E  measured examples
    A  steps with attention  R  rows being decoded         W  slots of a cache

In `models/layer.py`, R is the H / J query heads of one key head. `verification/` has axes of its own, such as X for
prompts; they are explained where they first stand.

Host values (text, answers) are plain dataclasses; what enters a compiled function is a
`flax.struct` dataclass of arrays. Masks are built from lengths, never from token values:
in several vocabularies the padding token is also the end-of-text token.

Every field of `Prompts`, `Rollouts` and `Scored` has one entry per group along its first axis, but for
`Scored.stats`, which is of a whole batch. So `take` and `concat` work on all of them. Only the two
functions that make rollouts name all their fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int8

_SCORED_COMPLETION_FIELDS = ("reward_BG", "accuracy_BG", "scored_BG")
_OF_THE_BATCH = {"of_the_batch": True}  # marks the one field that has no entry per group


@struct.dataclass
class ForcedPrefixes:
    """The first tokens of completions, given instead of sampled (dataset reset).

    Attributes:
        tokens_BGF: token ids, right-padded to F, the longest prefix that fits.
        length_BG: valid tokens of each row, 0 to F; 0 lets the whole completion be sampled.
    """

    tokens_BGF: Int[Array, "B G F"]
    length_BG: Int[Array, "B G"]


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, on the host.

    Attributes:
        tokens_BP: token ids, right-padded.
        length_B: valid tokens of each row.
        source_B: index of the data source that each prompt came from.
        texts: the prompts as the model reads them, for the sample log.
        answers: the gold answers that the reward checks against.
        metadata: per prompt, whatever its source's verifier needs beyond the answer.
        references: known-good completions (dataset reset starts from them); None where there is none.
        checkers: how each answer is checked; None leaves it to the reward.
        forced: prefixes that the completions must begin with; None samples whole completions.
        reference_length_B: tokens of each reference as a completion, 0 where none can serve; None without resets.
        reference_score_B: what decided how often each reference serves; None where all serve alike.
    """

    tokens_BP: Int[np.ndarray, "B P"]
    length_B: Int[np.ndarray, " B"]
    source_B: Int[np.ndarray, " B"]
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    references: tuple[str | None, ...] = ()
    checkers: tuple[str | None, ...] = ()
    forced: ForcedPrefixes | None = None
    reference_length_B: Int[np.ndarray, " B"] | None = None
    reference_score_B: Float[np.ndarray, " B"] | None = None

    def __post_init__(self):
        # An empty tuple stands for None in every row, so that rows can be taken and batches joined.
        for name in ("references", "checkers"):
            # The class is frozen, so the field is set past its guard.
            object.__setattr__(self, name, getattr(self, name) or (None,) * len(self.answers))

    def __len__(self) -> int:
        return len(self.answers)


@struct.dataclass
class Rollouts:
    """Sampled completions of a batch of prompts, `G` per prompt.

    Groups of several batches can stand side by side, so each group says which policy made it.

    Attributes:
        prompt_BP, prompt_length_B: the prompts, stored once per group, right-padded.
        tokens_BGC: completion token ids, forced ones included; zero at or after `length_BG`.
        length_BG: valid tokens, the stop token included.
        finished_BG: True where a stop token ended the row, False where it was cut off.
        forced_BG: number of leading tokens that were given, not sampled (no gradient).
        counted_BG: True where the completion enters the loss; its reward counts for its group either way.
        behavior_logprob_BGC: log pi_b(y_t | x, y_<t) in nats, of the distribution that the
            token was drawn from (temperature applied); zero at forced tokens and after the end.
        nested_BG: True where the nested policy drew the completion, False where the full model did
            (defensive mixture, exact rollouts).
        full_share_BG: probability with which the completion was to be drawn from the full model:
            0 for nested rollouts, alpha for a defensive mixture, 1 for exact rollouts.
        part_BGL: what its nested policy runs of each layer, as a `Part`, also where the full model drew it; with
            exact rollouts, what drafted.
        version_BG: number of updates that the sampled weights had seen in their phase.
        temperature_BG: at which it was sampled.

    The last four are equal within a group that was searched at once. Replay joins completions of several.
    """

    prompt_BP: Int[Array, "B P"]
    prompt_length_B: Int[Array, " B"]
    tokens_BGC: Int[Array, "B G C"]
    length_BG: Int[Array, "B G"]
    finished_BG: Bool[Array, "B G"]
    forced_BG: Int[Array, "B G"]
    counted_BG: Bool[Array, "B G"]
    behavior_logprob_BGC: Float[Array, "B G C"]
    nested_BG: Bool[Array, "B G"]
    full_share_BG: Float[Array, "B G"]
    part_BGL: Int8[Array, "B G L"]
    version_BG: Int[Array, "B G"]
    temperature_BG: Float[Array, "B G"]


def completion_fields() -> tuple[str, ...]:
    """The fields of `Rollouts` that have a value for each completion; the others have one for each group."""
    names = [f.name for f in dataclasses.fields(Rollouts)]
    return tuple(name for name in names if name.rpartition("_")[2].startswith("BG"))


@dataclass(frozen=True)
class SearchStats:
    """What it took to find one batch of rollouts.

    Attributes:
        rollout_seconds: seconds of sampling, scoring left out.
        drafts_tested, drafts_accepted: of exact rollouts, the draft tokens that the full model tested and kept.
        scoring_seconds: seconds of decoding and scoring.
        sync_seconds: seconds until the weights had come to a searcher that works beside the learner.
        mismatch: how far the samples are from the full model of the same version, by the names of `Health`; None where
            it was not measured.
    """

    rollout_seconds: float
    drafts_tested: int = 0
    drafts_accepted: int = 0
    scoring_seconds: float = 0.0
    sync_seconds: float = 0.0
    mismatch: dict[str, float] | None = field(default=None, kw_only=True)

    @property
    def seconds(self) -> float:
        """All time that the batch took at its searcher."""
        return self.rollout_seconds + self.scoring_seconds + self.sync_seconds


@dataclass(frozen=True)
class Scored:
    """Rollouts with their rewards, all on the host.

    Attributes:
        prompts: what was asked.
        rollouts: what was scored, as NumPy arrays.
        texts: decoded completions, `texts[b][g]`; untrusted.
        reward_BG: total reward that the signal of an update is computed from.
        accuracy_BG: 1.0 where the answer is right, before any shaping.
        scored_BG: False where the reward could not be computed (never counted as wrong).
        parts: each reward component by name.
        stats: what it took to find the batch; None where groups were taken out or joined.
    """

    prompts: Prompts
    rollouts: Rollouts
    texts: tuple[tuple[str, ...], ...]
    reward_BG: Float[np.ndarray, "B G"]
    accuracy_BG: Float[np.ndarray, "B G"]
    scored_BG: Bool[np.ndarray, "B G"]
    parts: dict[str, Float[np.ndarray, "B G"]] = field(default_factory=dict)
    stats: SearchStats | None = field(default=None, metadata=_OF_THE_BATCH)

    def __len__(self) -> int:
        return len(self.prompts)

    def to_plain(self) -> dict[str, Any]:
        """Nested dictionaries of plain values and arrays, as a checkpoint holds them; `from_plain` reads them back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> Scored:
        """The groups that `to_plain` wrote.

        Args:
            value: what `to_plain` returned, with lists in place of tuples where it went through JSON.
        """
        prompts, stats, shape = dict(value["prompts"]), value["stats"], np.shape(value["reward_BG"])
        forced = prompts.pop("forced")
        rows: dict[str, Any] = {
            name: tuple(column) if isinstance(column, list) else column for name, column in prompts.items()
        }
        return cls(
            **value
            | {
                "prompts": Prompts(**rows, forced=None if forced is None else ForcedPrefixes(**forced)),
                # Checkpoints of earlier versions do not say at which temperature a completion was sampled.
                "rollouts": Rollouts(**{"temperature_BG": np.full(shape, np.nan, np.float32)} | value["rollouts"]),
                "texts": tuple(tuple(group) for group in value["texts"]),
                "stats": None if stats is None else SearchStats(**stats),
            }
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


Groups = TypeVar("Groups", Prompts, Rollouts, Scored)


def take(groups: Groups, rows: Sequence[int] | Int[np.ndarray, " R"]) -> Groups:
    """The groups at `rows`, in that order: every field of a host value, indexed along its first axis.

    Args:
        groups: B groups whose arrays are on the host.
        rows: indices, each from 0 to B - 1; one may come twice.
    """
    index_R = np.asarray(rows, np.int64)  # an empty list has no integers to tell its type by
    return _by_field(lambda column: _rows_of(column, index_R), groups)


def concat(batches: Sequence[Groups]) -> Groups:
    """The groups of several host values, one after the other.

    Args:
        batches: at least one; with equal sizes of every axis but the first, and equal reward parts.

    Raises:
        ValueError: there is no batch, some have forced prefixes and others none, or their reward parts differ.
    """
    if not batches:
        raise ValueError("concat got no batches; give at least one")
    return _by_field(_joined, *batches)


def over_completions(combine: Callable[..., Any], first: Scored, *others: Scored) -> Scored:
    """The groups of `first` with other completions: every field that has one value per completion is combined.

    Args:
        combine: takes that field of each value, as an array `[B, G, ...]`, and gives the new one.
        first: its prompts stay.
        others: of the same prompts.
    """
    columns = [completion_columns(value) for value in (first, *others)]
    return with_completions(first, {name: combine(*(column[name] for column in columns)) for name in columns[0]})


def completion_columns(groups: Scored) -> dict[str, np.ndarray]:
    """Every field that has one value per completion, as an array `[B, G, ...]`; `with_completions` takes them back.

    Args:
        groups: at least one.
    """
    rollouts = {f"rollouts.{name}": np.asarray(getattr(groups.rollouts, name)) for name in completion_fields()}
    parts = {f"parts.{name}": part_BG for name, part_BG in groups.parts.items()}
    values = {name: getattr(groups, name) for name in _SCORED_COMPLETION_FIELDS}
    return rollouts | parts | values | {"texts": _text_array(groups.texts)}


def with_completions(groups: Scored, columns: dict[str, np.ndarray]) -> Scored:
    """The groups with these completions in place of their own.

    Args:
        groups: their prompts stay.
        columns: of the names that `completion_columns` gives, for as many groups.
    """

    def under(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in columns.items() if name.startswith(prefix)}

    return dataclasses.replace(
        groups,
        rollouts=dataclasses.replace(groups.rollouts, **under("rollouts.")),
        texts=tuple(tuple(group) for group in columns["texts"]),
        parts=under("parts."),
        stats=None,
        **{name: columns[name] for name in _SCORED_COMPLETION_FIELDS},
    )


def _text_array(texts: tuple[tuple[str, ...], ...]) -> np.ndarray:
    # A plain conversion would make an array of fixed-width characters, as wide as the longest text.
    array_BG = np.empty((len(texts), len(texts[0])), object)
    array_BG[:] = texts
    return array_BG


def _by_field(combine: Callable[..., Any], first: Any, *others: Any) -> Any:
    """`combine` applied to the leaves of equal values: dataclasses and dictionaries are gone through by name."""
    # A dataclass that is missing in some of the values is a leaf, for which `combine` has the message.
    if dataclasses.is_dataclass(first) and not isinstance(first, type) and all(value is not None for value in others):
        return dataclasses.replace(
            first,
            **{
                # What describes a whole batch means nothing once its groups are taken apart or joined.
                f.name: None
                if _OF_THE_BATCH.items() <= f.metadata.items()
                else _by_field(combine, *(getattr(value, f.name) for value in (first, *others)))
                for f in dataclasses.fields(first)
            },
        )
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in others):
            parts = ", ".join(sorted({str(list(value)) for value in (first, *others)}))
            raise ValueError(f"concat got batches with different reward parts: {parts}")
        return {name: _by_field(combine, *(value[name] for value in (first, *others))) for name in first}
    return combine(first, *others) if others else combine(first)


def _rows_of(column: Any, index_R: Int[np.ndarray, " R"]) -> Any:
    if column is None:
        return None
    # Texts are tuples, one entry per group; all else is an array.
    return tuple(column[row] for row in index_R) if isinstance(column, tuple) else np.asarray(column)[index_R]


def _joined(*columns: Any) -> Any:
    if any(column is None for column in columns):
        if all(column is None for column in columns):
            return None
        raise ValueError("concat got batches with and without forced prefixes; pad the ones without with length 0")
    if isinstance(columns[0], tuple):
        return tuple(entry for column in columns for entry in column)
    return np.concatenate([np.asarray(column) for column in columns])


@struct.dataclass
class TrainBatch:
    """What one update reads: completions as arrays, and a signal for each of them.

    Attributes:
        prompt_BP, prompt_length_B, tokens_BGC, length_BG, forced_BG, counted_BG: as in `Rollouts`.
        signal_BG: what the objective learns from: an advantage A(y), a reward that becomes one within the loss, the
            weight of a demonstration, or 1 and -1 of a pair's preferred and other completion; no gradient.
        behavior_logprob_BGC: as in `Rollouts`; `None` for demonstrations, which no policy sampled.
        full_share_BG: as in `Rollouts`, where the objective weighs by the density of a mixture.
        old_logprob_BGC: log pi_{theta_old} of the full model just before the batch's first update. `None` when one
            update follows one rollout: then theta_old = theta and the update's own pass gives it.
        reference_logprob_BGC: log pi_ref, or `None` without a KL penalty.
        nested_logprob_BGC: for a defensive mixture, log pi_{theta_old, plan} of every completion,
            also of those that the full model sampled; `behavior_logprob_BGC` stays that of the
            component which sampled. `None` otherwise.
        acceptance_draw_BGC: uniform in [0, 1), independent of the completions, where the objective rejects at random.
        mix_share_B: in [0, 1], the share of the importance weight, where the objective mixes it with 1.
        beta_B: weight of the KL to the reference, where the objective divides rewards by it. It is data, so that a
            schedule compiles nothing.
        token_signal_BGC: A_t of a value-based estimator, no gradient; replaces `signal_BG`.
            `None` where the signal is one for the whole completion.
        old_value_BGC: V_t of the critic before the batch's first update; `None` without a critic.
        return_BGC: R_t, what the critic learns, no gradient; `None` without one.
        segment_BGC: the text that each token belongs to, where a row holds several (`data.packing`); `None` where a row
            is one completion.
        learnt_BGC: True at the answers' tokens of such a row; `None` as well.
    """

    prompt_BP: Int[Array, "B P"]
    prompt_length_B: Int[Array, " B"]
    tokens_BGC: Int[Array, "B G C"]
    length_BG: Int[Array, "B G"]
    forced_BG: Int[Array, "B G"]
    counted_BG: Bool[Array, "B G"]
    signal_BG: Float[Array, "B G"]
    behavior_logprob_BGC: Float[Array, "B G C"] | None = None
    full_share_BG: Float[Array, "B G"] | None = None
    old_logprob_BGC: Float[Array, "B G C"] | None = None
    reference_logprob_BGC: Float[Array, "B G C"] | None = None
    nested_logprob_BGC: Float[Array, "B G C"] | None = None
    acceptance_draw_BGC: Float[Array, "B G C"] | None = None
    mix_share_B: Float[Array, " B"] | None = None
    beta_B: Float[Array, " B"] | None = None
    token_signal_BGC: Float[Array, "B G C"] | None = None
    old_value_BGC: Float[Array, "B G C"] | None = None
    return_BGC: Float[Array, "B G C"] | None = None
    segment_BGC: Int[Array, "B G C"] | None = None
    learnt_BGC: Bool[Array, "B G C"] | None = None

    @property
    def mask_BGC(self) -> Bool[Array, "B G C"]:
        """True at the tokens that enter the loss."""
        mask_BGC = gradient_mask(self.length_BG, self.forced_BG, self.counted_BG, self.tokens_BGC.shape[-1])
        return mask_BGC if self.learnt_BGC is None else mask_BGC & self.learnt_BGC


@struct.dataclass
class Weighted:
    """A sum and the weight it is a sum over, so that parts add up before the one division.

    `mean` of added micro-batches and devices equals the mean of the whole batch, whatever the
    split; averaging means would not.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: Weighted) -> Weighted:
        return Weighted(self.sum + other.sum, self.weight + other.weight)

    def mean(self) -> Float[Array, ""]:
        """`sum / weight`, and zero when the weight is zero."""
        # The inner `where` keeps the branch that is not taken finite, and its gradient with it.
        return jnp.where(self.weight == 0, 0.0, self.sum / jnp.where(self.weight == 0, 1.0, self.weight))


def valid_mask(length: Int[Array, "*rows"], size: int) -> Bool[Array, "*rows size"]:
    """True at positions before each row's length: `mask[..., t] = t < length[...]`.

    Args:
        length: valid tokens of each row, 0 to `size`; of any shape.
        size: length of the new last axis.
    """
    # Token values say nothing about padding, which in some vocabularies is the end-of-text token.
    return jnp.arange(size) < length[..., None]


def gradient_mask(
    length_BG: Int[Array, "B G"], forced_BG: Int[Array, "B G"], counted_BG: Bool[Array, "B G"], size: int
) -> Bool[Array, "B G C"]:
    """True at the tokens that the policy chose, after the forced prefix and before the end, of counted completions.

    Args:
        length_BG: valid tokens, forced ones included.
        forced_BG: leading tokens that were given, at most `length_BG`.
        counted_BG: False where the completion does not enter the loss.
        size: C.
    """
    position_C = jnp.arange(size)
    # A completion that does not count has no position between its start and its end.
    start_BG = jnp.where(counted_BG, forced_BG, length_BG)
    return (position_C >= start_BG[..., None]) & (position_C < length_BG[..., None])
