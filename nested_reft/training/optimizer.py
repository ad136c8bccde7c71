"""The optimizer: optax AdamW with warm-up, a schedule and global-norm clipping."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import optax

from nested_reft.literals import check_choice

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        learning_rate: the peak.
        schedule: `constant`, or `linear` or `cosine` decay to zero over the run's updates.
        warmup_steps: updates over which the rate rises linearly: update u of them, counted from 1, has u / warmup_steps
            of the peak.
        weight_decay: decoupled, on matrices and norms alike.
        beta1, beta2: decay of the first and second moment.
        max_gradient_norm: gradients of larger global norm are scaled down to it.
    """

    learning_rate: float
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    max_gradient_norm: float = 1.0

    def __post_init__(self):
        check_choice("optimizer.schedule", self.schedule, Schedule)
        for name in ("learning_rate", "max_gradient_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"optimizer.{name} is {value}; allowed is more than 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}; allowed is 0 or more")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps is {self.warmup_steps}; allowed is 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; allowed is 0 <= {name} < 1")


# Equal settings give one object, by which `make_update` tells that tasks are equal.
@functools.lru_cache(maxsize=32)
def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW under the schedule.

    Args:
        config: what to build.
        total_steps: updates of the whole run, where a decaying schedule reaches zero.

    Returns:
        A transformation of gradients into updates that are added to the parameters.
    """
    # A run that is all warm-up has no decay, and optax's cosine refuses a decay over 0 steps.
    decay_steps = max(total_steps - config.warmup_steps, 1)
    # Functions, so that only the schedule that is asked for is made.
    after_warmup = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, decay_steps),
    }[config.schedule]()
    # optax counts updates from 0. A first rate of zero would waste an update, so the rise begins one step up and ends
    # with the last update of the warm-up. Without warm-up the boundary is at 0, and this schedule is never read.
    first = config.learning_rate / max(config.warmup_steps, 1)
    warmup = optax.linear_schedule(first, config.learning_rate, max(config.warmup_steps - 1, 1))
    schedule = optax.join_schedules([warmup, after_warmup], [config.warmup_steps])
    return optax.chain(
        # The clip comes first, so that one huge gradient does not enter the moments.
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.adamw(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay),
    )
