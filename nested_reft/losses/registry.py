"""From a configuration's `loss` to the objective that it describes.

A new objective is a configuration with a `kind` of its own, a class, and one line in each of the two tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.objective import Objective
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.losses.supervised import Supervised, SupervisedConfig

ObjectiveConfig = PolicyGradientConfig | SupervisedConfig

OBJECTIVE_CONFIGS: dict[str, type[ObjectiveConfig]] = {
    "policy_gradient": PolicyGradientConfig,
    "supervised": SupervisedConfig,
}
"""What configures each kind of objective."""

_OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "policy_gradient": PolicyGradient,
    # A rollout is not a demonstration until it is found right, so `demonstrations` stays False here.
    "supervised": lambda config: Supervised(),
}


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a training run.

    Args:
        config: one member of the union; its kind says which objective it is.
    """
    return _OBJECTIVES[config.kind](config)
