"""Random keys by purpose: everything random in a run follows from its seed and the step number.

A key is never used twice. Each purpose folds a number of its own into the key of its step, so that a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

# These numbers decide what a seed means: changing one changes every run. `models.source` folds two others into the key
# of the seed, for parameters and adapters.
_CURRICULUM, _PLAN, _ROLLOUT, _EVALUATION, _WARM_START, _THROUGHPUT, _SPLIT, _THROUGHPUT_PLAN, _MEASUREMENT = range(9)
_ACCEPTANCE, _REPLAY, _RESET, _MINI_BATCHES = 9, 10, 11, 12
_FIRST_GENERATION = 100  # and up: the generation batches of a step
_FIRST_STEP = 1000  # and up: the steps of a run


@dataclass(frozen=True)
class BatchKeys:
    """Keys of one generation batch: `curriculum` draws its sources, `reset` where its completions start, `rollout` the
    completions."""

    curriculum: jax.Array
    rollout: jax.Array
    reset: jax.Array


class RunKeys:
    """The keys of a run, and of what is measured on its configuration.

    Attributes:
        warm_start: of its steps.
        split: of the samples that pass rates are measured on.
        throughput, throughput_plan: of the completions that the speed is measured on, and of their layers.
        measurement: of the completions that the layers' divergence is measured on.
    """

    def __init__(self, key: jax.Array):
        """Args:
        key: made from the run's seed.
        """
        self._key = key
        self.warm_start = jax.random.fold_in(key, _WARM_START)
        self.split = jax.random.fold_in(key, _SPLIT)
        self.throughput = jax.random.fold_in(key, _THROUGHPUT)
        self.throughput_plan = jax.random.fold_in(key, _THROUGHPUT_PLAN)
        self.measurement = jax.random.fold_in(key, _MEASUREMENT)

    def evaluation(self, source: int) -> jax.Array:
        """The key of a held-out evaluation that belongs to no step.

        Args:
            source: index among the configuration's sources.
        """
        return jax.random.fold_in(jax.random.fold_in(self._key, _EVALUATION), source)

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
        self.acceptance = jax.random.fold_in(key, _ACCEPTANCE)
        self.replay = jax.random.fold_in(key, _REPLAY)
        self.mini_batches = jax.random.fold_in(key, _MINI_BATCHES)

    def evaluation(self, source: int) -> jax.Array:
        """The key of a held-out evaluation before the step.

        Args:
            source: index among the configuration's sources.
        """
        return jax.random.fold_in(jax.random.fold_in(self._key, _EVALUATION), source)

    def batch(self, number: int) -> BatchKeys:
        """The keys of the step's generation batch `number`, counted from 0."""
        # The offset keeps the batches apart from the purposes above, which are folded into the same key.
        key = jax.random.fold_in(self._key, _FIRST_GENERATION + number)
        return BatchKeys(*(jax.random.fold_in(key, purpose) for purpose in (_CURRICULUM, _ROLLOUT, _RESET)))
