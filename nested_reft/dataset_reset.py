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

Departure from the released code of DR-PO: forced tokens enter neither the KL penalty nor what a loss is divided by.

Pure rules on a small state: `choose` puts prefixes on prompts, `update` takes in what came of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from nested_reft.literals import check_choice, check_whole
from nested_reft.types import ForcedPrefixes, Prompts, Scored

Schedule = Literal["uniform", "fixed", "annealed", "backward"]
Per = Literal["group", "completion"]
References = Literal["given", "answers", "replay"]

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
        per: `group` gives all completions of a prompt one prefix, so that they are comparable; `completion` draws for
            each of them anew, so that a baseline of the group compares completions that started elsewhere.
        schedule: where a reset starts; see the module's table.
        fraction: f, in (0, 1): of the reference; `annealed` starts there.
        steps: S of `annealed`: from this step on nothing is reset.
        stages: K of `backward`.
        promote_at: mean accuracy of the reset completions at which `backward` moves on, in (0, 1].
        window: latest reset completions that this mean is taken over, all of one stage.
    """

    share: float = 0.0
    references: References = "given"
    only_right: bool = False
    per: Per = "group"
    schedule: Schedule = "uniform"
    fraction: float | None = None
    steps: int | None = None
    stages: int | None = None
    promote_at: float = 0.8
    window: int = 128

    def __post_init__(self):
        for name, choices in (("references", References), ("per", Per), ("schedule", Schedule)):
            check_choice(f"reset.{name}", getattr(self, name), choices)
        if not 0 <= self.share <= 1:
            raise ValueError(f"reset.share is {self.share}; allowed is 0 <= share <= 1, a probability")
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
    """All that `backward` remembers; the other schedules need nothing.

    Attributes:
        stage: k, stages that were mastered.
        recent: accuracies of the latest reset completions of this stage, oldest first.
    """

    stage: int = 0
    recent: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ResetState:
        """The state that `to_json` wrote.

        Args:
            value: what `to_json` returned, also after a way through a file.
        """
        return cls(value["stage"], tuple(value["recent"]))


def completion_tokens(reference: str | None, encode: Callable[[str], list[int]], stop_id: int) -> list[int]:
    """A reference as the policy would have written it: its tokens and a stop token; empty where there is none.

    Args:
        reference: the text.
        encode: turns text into tokens.
        stop_id: the token that ends a completion.
    """
    return [] if reference is None else [*encode(reference), stop_id]


def why_unusable(tokens: Sequence[int], max_completion_tokens: int) -> str | None:
    """In words, why a reference cannot serve; None where it can.

    Args:
        tokens: of `completion_tokens`.
        max_completion_tokens: C, which the whole reference must fit into: its end is known to be good as well.
    """
    if not tokens:
        return "missing"
    if len(tokens) < 2:
        return "shorter than two tokens"
    if len(tokens) > max_completion_tokens:
        return f"longer than rollout.max_completion_tokens, which is {max_completion_tokens}"
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


def choose(
    state: ResetState,
    config: ResetConfig,
    prompts: Prompts,
    tokens: Sequence[Sequence[int]],
    key: jax.Array,
    step: int,
    group_size: int,
    forced_size: int,
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

    Returns:
        The same prompts; with resets off exactly the same.
    """
    if not config.is_on:
        return prompts
    length_B = np.array([len(reference) for reference in tokens], np.int32)
    draws = (len(prompts), group_size if config.per == "completion" else 1)
    # Whether and where are drawn apart, so that a change of one leaves the other as it was.
    is_reset_key, start_key = jax.random.split(key)
    fraction = forced_fraction(state, config, step)
    # A schedule that has reached the prompt resets nothing.
    is_reset = (np.asarray(jax.random.uniform(is_reset_key, draws)) < config.share) & (fraction != 0)
    start = _start(np.asarray(jax.random.uniform(start_key, draws), np.float64), length_B[:, None], fraction)
    forced_BG = np.broadcast_to(np.where(is_reset & (length_B[:, None] > 0), start, 0), (len(prompts), group_size))
    tokens_BF = np.zeros((len(prompts), forced_size), np.int32)
    for row_F, reference in zip(tokens_BF, tokens, strict=True):
        # The last token is never forced, so a prefix always leaves something to choose.
        row_F[: max(len(reference) - 1, 0)] = reference[:-1]
    given_BGF = np.arange(forced_size) < forced_BG[..., None]
    forced = ForcedPrefixes(np.where(given_BGF, tokens_BF[:, None], 0).astype(np.int32), forced_BG.astype(np.int32))  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(prompts, forced=forced, reference_length_B=length_B)


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
        scored: what was generated; completions without a score do not count.

    Returns:
        The state after it, at most one stage further; unchanged but for `backward`.
    """
    if not config.is_on or config.schedule != "backward":
        return state
    assert config.stages is not None
    counted_BG = is_reset(scored) & scored.scored_BG
    recent = (*state.recent, *(float(value) for value in scored.accuracy_BG[counted_BG]))[-config.window :]
    # A window that is not full yet could promote by a lucky start.
    is_mastered = len(recent) == config.window and math.fsum(recent) >= config.promote_at * config.window
    if is_mastered and state.stage < config.stages:
        # What was right from later starts says nothing of the earlier ones.
        return ResetState(state.stage + 1)
    return ResetState(state.stage, recent)


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
    }
    if reset_BG.any():
        fraction = (forced_BG / np.maximum(length_B, 1)[:, None])[reset_BG]
        metrics["reset/fraction"] = [round(float(x), 4) for x in np.quantile(fraction, (0.05, 0.25, 0.5, 0.75, 0.95))]
    for name, chosen_BG in (("reset/accuracy", reset_BG), ("reset/free_accuracy", ~reset_BG)):
        chosen_BG = chosen_BG & found.scored_BG
        if chosen_BG.any():
            metrics[name] = float(found.accuracy_BG[chosen_BG].mean())
    return metrics | ({"reset/stage": state.stage} if config.schedule == "backward" else {})
