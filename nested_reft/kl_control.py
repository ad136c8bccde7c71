"""How heavy the KL penalty on token rewards is next: as heavy as a divergence of a completion asks for.

    e      = clip(KL / target - 1, -0.2, 0.2)
    beta  <- beta (1 + gain e)

Source: Ziegler et al. (2019, arXiv 1909.08593, section 2.2), with gain 0.1 there.

A pure rule on a small state, as `mix_control` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.registry import ObjectiveConfig
from nested_reft.losses.value import CriticConfig

LARGEST_ERROR = 0.2  # of one step, relative to the target


@dataclass(frozen=True)
class KlControlState:
    """All that the rule remembers.

    Attributes:
        coefficient: beta of the next batch.
    """

    coefficient: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        return {"coefficient": self.coefficient}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> KlControlState:
        """The state that `to_json` wrote.

        Args:
            value: what `to_json` returned, also after a way through a file.
        """
        return cls(value["coefficient"])


def initial_state(loss: ObjectiveConfig) -> KlControlState:
    """Starts at the configured coefficient.

    Args:
        loss: the objective; only one with a critic has such a penalty.
    """
    critic = _critic(loss)
    return KlControlState(0.0 if critic is None else critic.kl_coefficient)


def update(state: KlControlState, loss: ObjectiveConfig, completion_kl: float | None) -> KlControlState:
    """Takes in the divergence that one step measured.

    Args:
        state: before the step.
        loss: the objective.
        completion_kl: KL(pi || pi_ref) of a completion, in nats; None where the step measured none.

    Returns:
        The state after the step; unchanged where nothing is held or known.
    """
    critic = _critic(loss)
    if critic is None or critic.kl_target is None or completion_kl is None or not math.isfinite(completion_kl):
        return state
    # A single batch may be far off the target, and must not move beta by much.
    error = min(max(completion_kl / critic.kl_target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return KlControlState(state.coefficient * (1 + critic.kl_gain * error))


def _critic(loss: ObjectiveConfig) -> CriticConfig | None:
    return loss.critic if isinstance(loss, PolicyGradientConfig) else None
