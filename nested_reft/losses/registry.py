"""From a configuration's `loss` to the objective that it describes.

A new objective is a configuration with a `kind` of its own, a class, and an entry in the union and in the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

from nested_reft.losses.bradley_terry import BradleyTerry, BradleyTerryConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.dpo import Dpo, DpoConfig
from nested_reft.losses.objective import Objective
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.losses.supervised import SftConfig, Supervised, SupervisedConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalance, TrajectoryBalanceConfig

OfflineConfig = SftConfig | BradleyTerryConfig | DpoConfig
"""What learns from completions that somebody wrote, and samples none."""

ObjectiveConfig = PolicyGradientConfig | SupervisedConfig | TrajectoryBalanceConfig | OfflineConfig

_OBJECTIVES: dict[type[ObjectiveConfig], Callable[[Any], Objective]] = {
    PolicyGradientConfig: PolicyGradient,
    # A rollout is not a demonstration until it is found right, so `demonstrations` stays False here.
    SupervisedConfig: lambda config: Supervised(),
    TrajectoryBalanceConfig: TrajectoryBalance,
    SftConfig: lambda config: Supervised(demonstrations=True),
    BradleyTerryConfig: lambda config: BradleyTerry(),
    DpoConfig: Dpo,
}

OBJECTIVE_CONFIGS: dict[str, type[ObjectiveConfig]] = {config.kind: config for config in get_args(ObjectiveConfig)}
"""What configures each kind of objective."""


# Equal configurations give one object, by which compiled updates are told apart.
@functools.lru_cache(maxsize=32)
def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a training run.

    Args:
        config: one member of the union; its type says which objective it is.
    """
    return _OBJECTIVES[type(config)](config)
