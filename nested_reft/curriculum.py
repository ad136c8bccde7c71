"""Which source each prompt slot draws from, and how that changes as training goes on.

A pure rule on a small state: `update` takes in what a step brought, `probabilities` says how
likely each source is next, `choose` draws from them. A new rule changes the first two only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class CurriculumConfig:
    """The rule that chooses sources.

    Attributes:
        kind: `uniform` gives every source the same probability, always; `easy_to_hard` takes the
            sources in their order, one level at a time.
        promote_at: mean accuracy at which `easy_to_hard` moves on to the next level, in (0, 1].
        window: latest responses of the level that the mean is taken over.
    """

    kind: Literal["uniform", "easy_to_hard"]
    promote_at: float = 0.9
    window: int = 128

    def __post_init__(self):
        if self.kind not in ("uniform", "easy_to_hard"):
            raise ValueError(f"curriculum.kind is '{self.kind}'; allowed are uniform, easy_to_hard")
        if not 0 < self.promote_at <= 1:
            raise ValueError(f"curriculum.promote_at is {self.promote_at}; allowed is 0 < promote_at <= 1")
        if self.window < 1:
            raise ValueError(f"curriculum.window is {self.window}; allowed is 1 or more")


@dataclass(frozen=True)
class CurriculumState:
    """All that the rule remembers.

    Attributes:
        num_sources: M.
        level: the source that `easy_to_hard` trains on; 0 under `uniform`.
        recent_accuracy: accuracies of that level's latest responses, oldest first.
    """

    num_sources: int
    level: int = 0
    recent_accuracy: tuple[float, ...] = ()

    def __post_init__(self):
        if not 0 <= self.level < self.num_sources:
            raise ValueError(f"curriculum level {self.level} with {self.num_sources} sources; allowed is 0 to one less")

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        return asdict(self) | {"recent_accuracy": list(self.recent_accuracy)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CurriculumState:
        """The state that `to_json` wrote."""
        return cls(value["num_sources"], value["level"], tuple(value["recent_accuracy"]))


def update(
    state: CurriculumState,
    config: CurriculumConfig,
    source_B: Int[np.ndarray, " B"],
    accuracy_BG: Float[np.ndarray, "B G"],
    scored_BG: Bool[np.ndarray, "B G"],
) -> CurriculumState:
    """Takes in the scored responses of one step.

    `easy_to_hard` promotes once the mean over a full window reaches `promote_at`, one level at
    most per step; the last level stays. The window then starts anew: no level inherits another's
    successes. Responses of other levels (late ones, from an asynchronous searcher) do not count.

    Args:
        state: before the step.
        config: the rule.
        source_B: the source of each prompt.
        accuracy_BG: raw accuracy of each response, before any shaping.
        scored_BG: False where accuracy could not be computed; those responses do not count.

    Returns:
        The state after the step; `uniform` keeps no memory.
    """
    if config.kind == "uniform":
        return state
    counted_BG = scored_BG & (source_B == state.level)[:, None]
    new = tuple(float(accuracy) for accuracy in accuracy_BG[counted_BG])
    recent = (state.recent_accuracy + new)[-config.window :]
    mastered = len(recent) == config.window and sum(recent) / len(recent) >= config.promote_at
    if mastered and state.level + 1 < state.num_sources:
        return replace(state, level=state.level + 1, recent_accuracy=())
    return replace(state, recent_accuracy=recent)


def probabilities(state: CurriculumState, config: CurriculumConfig) -> Float[np.ndarray, " M"]:
    """The probability of each source, M of them: equal, or all on the current level."""
    if config.kind == "uniform":
        return np.full(state.num_sources, 1 / state.num_sources, dtype=np.float32)
    return np.eye(state.num_sources, dtype=np.float32)[state.level]


def choose(state: CurriculumState, config: CurriculumConfig, key: jax.Array, num_prompts: int) -> Int[np.ndarray, " B"]:
    """Draws the source of each prompt slot, independently, from `probabilities`.

    Args:
        state, config: the rule and what it remembers.
        key: PRNG key of this step.
        num_prompts: B.

    Returns:
        B source indices.
    """
    probability_M = jnp.asarray(probabilities(state, config))
    return np.asarray(jax.random.choice(key, state.num_sources, (num_prompts,), p=probability_M))
