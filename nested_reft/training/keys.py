"""Random keys by purpose: everything random in a run follows from its seed and the step number.

A key is never used twice. Each purpose folds a number of its own into the key of its step, so that a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

# These numbers decide what a seed means: changing one changes every run.
_CURRICULUM, _PLAN, _ROLLOUT, _EVALUATION, _WARM_START, _THROUGHPUT, _SPLIT = range(7)
_FIRST_GENERATION = 100  # and up: the generation batches of a step
_FIRST_STEP = 1000  # and up: the steps of a run


@dataclass(frozen=True)
class BatchKeys:
    """Keys of one generation batch: `curriculum` draws its sources, `rollout` its completions."""

    curriculum: jax.Array
    rollout: jax.Array


class RunKeys:
    """The keys of a run."""

    def __init__(self, key: jax.Array):
        """Args:
        key: made from the run's seed.
        """
        self._key = key
        self.warm_start = jax.random.fold_in(key, _WARM_START)
        self.split = jax.random.fold_in(key, _SPLIT)
        self.throughput = jax.random.fold_in(key, _THROUGHPUT)

    def step(self, number: int) -> StepKeys:
        """The keys of step `number`, counted from 0."""
        return StepKeys(jax.random.fold_in(self._key, _FIRST_STEP + number))


class StepKeys:
    """The keys of one training step."""

    def __init__(self, key: jax.Array):
        """Args:
        key: of the step.
        """
        self._key = key
        self.plan = jax.random.fold_in(key, _PLAN)
        self.evaluation = jax.random.fold_in(key, _EVALUATION)

    def batch(self, number: int) -> BatchKeys:
        """The keys of the step's generation batch `number`, counted from 0."""
        # The offset keeps the batches apart from the purposes above, which are folded into the same key.
        key = jax.random.fold_in(self._key, _FIRST_GENERATION + number)
        return BatchKeys(jax.random.fold_in(key, _CURRICULUM), jax.random.fold_in(key, _ROLLOUT))
