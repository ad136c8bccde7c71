"""From a configuration's `loss` to the objective that it describes."""

from __future__ import annotations

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.objective import Objective
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.losses.supervised import Supervised, SupervisedConfig

ObjectiveConfig = PolicyGradientConfig | SupervisedConfig


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a training run.

    Args:
        config: one member of the union; its type says which objective it is.
    """
    # A rollout is not a demonstration until it is found right, so `demonstrations` stays False here.
    return PolicyGradient(config) if isinstance(config, PolicyGradientConfig) else Supervised()
