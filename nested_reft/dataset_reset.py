"""Which prefix of a known-good completion each rollout starts from (dataset reset).

A rollout from the prompt alone rarely reaches what a hard task rewards. With probability beta it starts from the
first h tokens of the prompt's reference instead:

    y_{<=h} = reference_{<=h} (given),    y_t ~ pi_b(. | x, y_{<t}) for t > h

What was given is prefilled, never sampled, and carries no gradient. The reward is that of the whole text.

With n the tokens of the reference, its stop token included, h is never 0 and never n:

    schedule   h                                                                      source
    uniform    uniform on {1, ..., n - 1}                                             DR-PO (arXiv 2404.08495, alg. 1)
    fixed      f n, rounded
    annealed   f (1 - s / S) n, rounded; from step s = S on nothing is reset
    backward   (1 - k / K) n, rounded, for stage k = 0, ..., K; at K nothing is reset  Salimans & Chen (1812.03381),
                                                                                      R3 (arXiv 2402.05808)

`backward` starts at the end of the references. It moves a stage towards their start each time the reset completions
of a window are right often enough.

A score of each reference can decide how often it serves (`prefer`). With q the quantile of its score among the
references of a batch, it serves with the probability

    q^(1/beta - 1),    averaged over the quantiles that it takes

Its mean over the batch is beta whatever the scores, and references of one score serve alike.

Departure from the released code of DR-PO: forced tokens enter neither the KL penalty nor what a loss is divided by.

Pure rules on a small state: `choose` puts prefixes on prompts, `update` takes in what came of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from nested_reft.literals import check_choice, check_whole
from nested_reft.types import ForcedPrefixes, Prompts, Scored

Schedule = Literal["uniform", "fixed", "annealed", "backward"]
Per = Literal["group", "completion"]
References = Literal["given", "answers", "replay"]
Prefer = Literal["none", "reward", "short", "long", "likely", "unlikely", "distinct"]

MAX_STEPS = 10**8
# The fields that a schedule reads; the others do not, so there they stay None.
_FIELDS: dict[str, tuple[str, ...]] = {
    "fixed": ("fraction",),
    "annealed": ("fraction", "steps"),
    "backward": ("stages",),
}


@dataclass(frozen=True)
class ResetConfig:
    """Which rollouts start inside a reference, and where.

    Attributes:
        share: beta, the probability that a group (or a completion) is reset; 0 turns resets off. Where a prompt has no
            reference that can serve, it is not reset.
        references: `given` takes the references that sources have (`reference_field` of a JSONL file, the solutions of
            published datasets, `answer_cot` of a task); `answers` takes the gold answers themselves; `replay` takes the
            policy's own best right completion of the prompt among those that are kept for replay, and resets nothing
            before there is one.
        only_right: leave out references that the run's verifier does not find right; those of `replay` always are.
        prefer: which references serve more often; the module has the rule. `none` treats them alike. The others prefer
            a high reward, by the run's own `reward`; few tokens (`short`) or many (`long`); what the policy as it is
            finds `likely` or `unlikely`, per token; or what shares few n-grams with the others (`distinct`).
        per: `group` gives all completions of a prompt one prefix, so that they are comparable; `completion` draws for
            each of them anew, so that a baseline of the group compares completions that started elsewhere.
        schedule: where a reset starts; see the module's table.
        fraction: f, in (0, 1): of the reference; `annealed` starts there.
        steps: S of `annealed`: from this step on nothing is reset.
        stages: K of `backward`.
        promote_at: mean accuracy of the reset completions at which `backward` moves on, in (0, 1].
        window: latest reset completions that this mean is taken over, all reset as one stage says.
    """

    share: float = 0.0
    references: References = "given"
    only_right: bool = False
    prefer: Prefer = "none"
    per: Per = "group"
    schedule: Schedule = "uniform"
    fraction: float | None = None
    steps: int | None = None
    stages: int | None = None
    promote_at: float = 0.8
    window: int = 128

    def __post_init__(self):
        choices_of = {"references": References, "prefer": Prefer, "per": Per, "schedule": Schedule}
        for name, choices in choices_of.items():
            check_choice(f"reset.{name}", getattr(self, name), choices)
        if not 0 <= self.share <= 1:
            raise ValueError(f"reset.share is {self.share}; allowed is 0 <= share <= 1, a probability")
        if self.share == 1 and self.prefer != "none":
            raise ValueError(
                f"reset.prefer is '{self.prefer}' and reset.share 1: every reference serves every time, so none can"
                " serve more often; lower the share, or set prefer 'none'"
            )
        for name in ("fraction", "steps", "stages"):
            self._check_is_read(name)
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"reset.fraction is {self.fraction}; allowed is 0 < fraction < 1, of the reference")
        for name in ("steps", "stages"):
            if getattr(self, name) is not None:
                check_whole(f"reset.{name}", getattr(self, name), 1, MAX_STEPS)
        check_whole("reset.window", self.window, 1, MAX_STEPS)
        if not 0 < self.promote_at <= 1:
            raise ValueError(f"reset.promote_at is {self.promote_at}; allowed is 0 < promote_at <= 1")

    def _check_is_read(self, name: str) -> None:
        """A field is set where the schedule reads it, and nowhere else."""
        is_read, value = name in _FIELDS.get(self.schedule, ()), getattr(self, name)
        if is_read and value is None:
            raise ValueError(f"reset.{name} is not set; reset.schedule '{self.schedule}' needs it")
        if not is_read and value is not None:
            readers = " or ".join(f"'{schedule}'" for schedule, names in _FIELDS.items() if name in names)
            raise ValueError(
                f"reset.{name} is {value}, but reset.schedule is '{self.schedule}'; only {readers} reads it"
            )

    @property
    def is_on(self) -> bool:
        """Whether any rollout may be reset."""
        return self.share > 0


@dataclass(frozen=True)
class ResetState:
    """What is remembered of the rollouts so far.

    Attributes:
        stage: k, stages that `backward` has mastered.
        recent: accuracies of the latest completions that were reset as this stage says, oldest first (`backward`).
        served: the references that rollouts have started from; what stands for one is short and the same in every run.
        candidates: references that could serve.
    """

    stage: int = 0
    recent: tuple[float, ...] = ()
    served: frozenset[str] = frozenset()
    candidates: int = 0

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"served": sorted(self.served)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ResetState:
        """The state that `to_json` wrote.

        Args:
            value: what `to_json` returned, also after a way through a file.
        """
        # Earlier versions did not count which references had served.
        served = frozenset(value.get("served", ()))
        return cls(value["stage"], tuple(value["recent"]), served, value.get("candidates", 0))


def reference_tokens(reference: str | None, encode: Callable[[str], list[int]], stop_id: int) -> list[int]:
    """A reference as the policy would have written it: its tokens and a stop token; empty where there is none.

    Args:
        reference: the text.
        encode: turns text into tokens.
        stop_id: the token that ends a completion.
    """
    return [] if reference is None else [*encode(reference), stop_id]


def why_no_start(tokens: Sequence[int], max_completion_tokens: int) -> str | None:
    """In words, why a reference cannot serve; None where it can.

    Args:
        tokens: of `reference_tokens`.
        max_completion_tokens: C, which the whole reference must fit into: its end is known to be good as well.
    """
    if not tokens:
        return "missing"
    if len(tokens) < 2:
        return "shorter than two tokens"
    if len(tokens) > max_completion_tokens:
        return f"longer than rollout.max_completion_tokens ({max_completion_tokens})"
    return None


def forced_fraction(state: ResetState, config: ResetConfig, step: int) -> float | None:
    """The share of a reference that a reset forces now, 0 to 1; None where it is drawn for each reset.

    Args:
        state: what is remembered.
        config: the rule.
        step: of the run, counted from 0.
    """
    if config.schedule == "uniform":
        return None
    if config.schedule == "backward":
        assert config.stages is not None  # the configuration has checked it
        return 1 - state.stage / config.stages
    assert config.fraction is not None
    if config.schedule == "fixed":
        return config.fraction
    assert config.steps is not None
    return config.fraction * max(1 - step / config.steps, 0.0)


def serving_shares(score_N: Float[np.ndarray, " N"], share: float) -> Float[np.ndarray, " N"]:
    """How often each reference serves, by its score; see the module.

    With a and b the shares of the references that are scored lower, and at most as high, this is the mean of
    q^(1/beta - 1) from a to b:

        beta (b^(1/beta) - a^(1/beta)) / (b - a)

    Args:
        score_N: any numbers; only their order counts.
        share: beta, more than 0.

    Returns:
        Probabilities with the mean beta.
    """
    ordered_N, number = np.sort(score_N), len(score_N)
    lower_N = np.searchsorted(ordered_N, score_N, side="left") / number
    upper_N = np.searchsorted(ordered_N, score_N, side="right") / number
    return share * (upper_N ** (1 / share) - lower_N ** (1 / share)) / (upper_N - lower_N)


def choose(
    state: ResetState,
    config: ResetConfig,
    prompts: Prompts,
    tokens: Sequence[Sequence[int]],
    key: jax.Array,
    step: int,
    group_size: int,
    forced_size: int,
    score_B: Float[np.ndarray, " B"] | None = None,
) -> Prompts:
    """The prompts with the prefixes that their completions must begin with.

    Args:
        state, config: the rule and what it remembers.
        prompts: B prompts without prefixes.
        tokens: the reference of each prompt as a completion; empty where it has none that can serve.
        key: PRNG key of the batch.
        step: of the run, counted from 0.
        group_size: G.
        forced_size: F, the same for all batches of a run, so that they compile one program; at least the longest
            reference less one token.
        score_B: decides how often each reference serves; None lets all serve alike.

    Returns:
        The same prompts; with resets off exactly the same.
    """
    if not config.is_on:
        return prompts
    length_B = np.array([len(reference) for reference in tokens], np.int32)
    share_B1 = np.full((len(prompts), 1), config.share)
    if score_B is not None and length_B.any():
        share_B1[length_B > 0, 0] = serving_shares(score_B[length_B > 0], config.share)
    draws = (len(prompts), group_size if config.per == "completion" else 1)
    # Whether and where are drawn apart, so that a change of one leaves the other as it was.
    resets_key, start_key = jax.random.split(key)
    fraction = forced_fraction(state, config, step)
    # A schedule that has reached the prompt resets nothing.
    resets = (np.asarray(jax.random.uniform(resets_key, draws)) < share_B1) & (fraction != 0)
    start = _start(np.asarray(jax.random.uniform(start_key, draws), np.float64), length_B[:, None], fraction)
    forced_BG = np.broadcast_to(np.where(resets & (length_B[:, None] > 0), start, 0), (len(prompts), group_size))
    tokens_BF = np.zeros((len(prompts), forced_size), np.int32)
    for row_F, reference in zip(tokens_BF, tokens, strict=True):
        # The last token is never forced, so a prefix always leaves something to choose.
        row_F[: max(len(reference) - 1, 0)] = reference[:-1]
    given_BGF = np.arange(forced_size) < forced_BG[..., None]
    forced = ForcedPrefixes(np.where(given_BGF, tokens_BF[:, None], 0).astype(np.int32), forced_BG.astype(np.int32))  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(prompts, forced=forced, reference_length_B=length_B, reference_score_B=score_B)


def _start(
    uniform: Float[np.ndarray, "B draws"], length_B1: Int[np.ndarray, "B 1"], fraction: float | None
) -> Int[np.ndarray, "B draws"]:
    """h of each draw, from 1 to n - 1; uniform draws are used where no fraction is given."""
    last_B1 = length_B1 - 1
    # Half a token rounds up, where NumPy would round to even.
    start = 1 + uniform * last_B1 if fraction is None else fraction * length_B1 + 0.5 + 0 * uniform
    return np.clip(np.floor(start), 1, np.maximum(last_B1, 1)).astype(np.int32)


def update(state: ResetState, config: ResetConfig, scored: Scored) -> ResetState:
    """What is remembered after one batch of rollouts, trained on or not.

    Args:
        state: before the batch.
        config: the rule.
        scored: what was generated; completions without a score do not count for `backward`.

    Returns:
        The state after it, at most one stage further.
    """
    if not config.is_on:
        return state
    state = dataclasses.replace(state, served=state.served | _served(scored))
    if config.schedule != "backward":
        return state
    assert config.stages is not None
    recent = (*state.recent, *_accuracies(state, config, scored))[-config.window :]
    # A window that is not full yet could promote by a lucky start.
    is_mastered = len(recent) == config.window and math.fsum(recent) >= config.promote_at * config.window
    if is_mastered and state.stage < config.stages:
        # What was right from later starts says nothing of the earlier ones.
        return dataclasses.replace(state, stage=state.stage + 1, recent=())
    return dataclasses.replace(state, recent=recent)


def _accuracies(state: ResetState, config: ResetConfig, scored: Scored) -> list[float]:
    """Of the completions that were reset as the present stage says; searchers that are ahead may have an earlier one's.

    Two stages may have one start where a reference is short; to this rule they are alike there.
    """
    forced_BG, length_B = np.asarray(scored.rollouts.forced_BG), scored.prompts.reference_length_B
    assert length_B is not None  # every batch of a run with resets has it
    start_B1 = _start(np.zeros((len(scored), 1)), length_B[:, None], forced_fraction(state, config, 0))
    return scored.accuracy_BG[(forced_BG == start_B1) & is_reset(scored) & scored.scored_BG].tolist()


def _served(scored: Scored) -> set[str]:
    """What stands for the references that a batch's rollouts started from: a hash, since a run may have many."""
    prompts = scored.prompts
    return {
        hashlib.sha256(repr((int(prompts.source_B[b]), prompts.texts[b], prompts.answers[b])).encode()).hexdigest()[:16]
        for b in np.flatnonzero(is_reset(scored).any(axis=1))
    }


def is_reset(scored: Scored) -> np.ndarray:
    """True at the completions that started inside a reference.

    Args:
        scored: on the host.
    """
    return np.asarray(scored.rollouts.forced_BG) > 0


def step_metrics(state: ResetState, config: ResetConfig, found: Scored) -> dict[str, Any]:
    """Where the rollouts of a step started, and how the two kinds did.

    Args:
        state: after the step.
        config: the rule, which is on.
        found: everything that was generated.
    """
    reset_BG, forced_BG = is_reset(found), np.asarray(found.rollouts.forced_BG)
    length_B = found.prompts.reference_length_B
    assert length_B is not None  # every batch of a run with resets has it
    metrics: dict[str, Any] = {
        "reset/share": float(reset_BG.mean()),
        "reset/referenced": float((length_B > 0).mean()),
        "reset/forced_tokens": int(forced_BG.sum()),
        "reset/coverage": len(state.served) / max(state.candidates, 1),
    }
    if reset_BG.any():
        fraction = (forced_BG / np.maximum(length_B, 1)[:, None])[reset_BG]
        metrics["reset/fraction"] = [round(float(x), 4) for x in np.quantile(fraction, (0.05, 0.25, 0.5, 0.75, 0.95))]
    for name, value_B in (("length", length_B), ("score", found.prompts.reference_score_B)):
        bias = None if value_B is None else _bias(value_B[length_B > 0], reset_BG[length_B > 0])
        if bias is not None:
            metrics[f"reset/{name}_bias"] = bias
    for name, chosen_BG in (("reset/accuracy", reset_BG), ("reset/free_accuracy", ~reset_BG)):
        chosen_BG = chosen_BG & found.scored_BG
        if chosen_BG.any():
            metrics[name] = float(found.accuracy_BG[chosen_BG].mean())
    return metrics | ({"reset/stage": state.stage} if config.schedule == "backward" else {})


def _bias(value_N: np.ndarray, reset_NG: np.ndarray) -> float | None:
    """How far the references that served lie above all of the step, in standard deviations; None where they are none
    or all alike. One that served twice as many completions counts twice."""
    weight_N = reset_NG.sum(axis=1)
    if not weight_N.any() or (deviation := value_N.std()) == 0:
        return None
    return float((np.average(value_N, weights=weight_N) - value_N.mean()) / deviation)
