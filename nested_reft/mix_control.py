"""How much of the importance weight the next batch uses: as much as a budget on its noise allows.

The mix of the weights 1 and rho, with share a in [0, 1],

    h = 1 - a + a rho

has the bias of `one` at a = 0 and that of `base` at a = 1; its expected gradient lies on the line between theirs.
With m and s the mean and the standard deviation of rho over a batch, the effective sample size of h is

    ESS(a) = 1 / (1 + c(a)^2),    c(a) = a s / (1 + a (m - 1))

which falls as a grows. So the largest a whose ESS is at least T has a closed form: with r = sqrt(1 / T - 1),

    a = min(1, r / (s - r (m - 1)))    and 1 where the denominator is not positive

Nesting control holds the noise by skipping fewer layers, which costs time. This rule holds it by correcting less,
which costs bias.

Source: AIS (arXiv 2605.13907) mixes the uncorrected and the weighted gradient by a coefficient per batch, which it
combines from reliability of the weights, divergence and amplification of variance. Departure: one budget, on the
effective sample size that results, and the moments of earlier steps, so that a does not depend on the batch it weighs.

A pure rule on a small state, as `nesting_control` is.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from nested_reft.estimators.health import Health
from nested_reft.literals import check_whole

MixLevel = Literal["token", "sequence"]
DEFAULT_WINDOW, MAX_WINDOW = 5, 10**6


@dataclass(frozen=True)
class MixControlConfig:
    """The budget of the mix.

    Attributes:
        ess: T, the smallest effective sample size that the mixed weight should have, in (0, 1); None holds
            nothing and leaves the share as `loss.mix_share` has it.
        window: latest steps that the moments are taken over.
    """

    ess: float | None = None
    window: int = DEFAULT_WINDOW

    def __post_init__(self):
        if self.ess is not None and not 0 < self.ess < 1:
            raise ValueError(f"mix_control.ess is {self.ess}; allowed is 0 < ess < 1, as a share, or None")
        check_whole("mix_control.window", self.window, 1, MAX_WINDOW)
        # A setting that nothing reads is refused: the user would believe that it works.
        if self.ess is None and self.window != DEFAULT_WINDOW:
            raise ValueError(
                f"mix_control.window is {self.window}, but mix_control.ess is None, so no share is chosen; set ess, or"
                " leave window out"
            )


@dataclass(frozen=True)
class MixControlState:
    """All that the rule remembers.

    Attributes:
        share: a of the next batch.
        recent: mean and mean square of rho in the latest steps, oldest first.
        reason: the last decision, in words.
    """

    share: float
    recent: tuple[tuple[float, float], ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        return {"share": self.share, "recent": [list(moments) for moments in self.recent], "reason": self.reason}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> MixControlState:
        """The state that `to_json` wrote.

        Args:
            value: what `to_json` returned, also after a way through a file.
        """
        return cls(value["share"], tuple((mean, square) for mean, square in value["recent"]), value["reason"])


def initial_state(config: MixControlConfig, share: float | None) -> MixControlState:
    """Starts at the configured share. A controller starts at 0, because nothing is known of the ratios yet.

    Args:
        config: the rule.
        share: `loss.mix_share`, which a controller does not read.
    """
    return MixControlState(0.0 if config.ess is not None or share is None else share)


def at_another_depth(state: MixControlState) -> MixControlState:
    """The same share, without the moments: ratios of another depth say nothing about those to come.

    Args:
        state: when the depth of the nested policy changes.
    """
    return dataclasses.replace(state, recent=())


def largest_share(ratio_mean: float, ratio_square_mean: float, ess: float) -> float:
    """The largest a in [0, 1] at which the effective sample size of 1 - a + a rho is at least `ess`; see the module.

    Args:
        ratio_mean: mean of rho, 0 or more.
        ratio_square_mean: mean of rho^2, at least the square of the mean but for rounding.
        ess: T, in (0, 1).

    Returns:
        a; 0 where the moments are not finite.
    """
    if not (math.isfinite(ratio_mean) and math.isfinite(ratio_square_mean)):
        return 0.0
    # Equal ratios may leave a difference of rounding below zero.
    deviation = math.sqrt(max(ratio_square_mean - ratio_mean**2, 0.0))
    allowed = math.sqrt(1 / ess - 1)
    # c(a) <= r is a (s - r (m - 1)) <= r. Where the bracket is not positive, every a fulfils it.
    slope = deviation - allowed * (ratio_mean - 1)
    return 1.0 if slope <= allowed else allowed / slope


def update(state: MixControlState, config: MixControlConfig, level: MixLevel, health: Health | None) -> MixControlState:
    """Takes in the health of one step.

    Args:
        state: before the step.
        config: the rule.
        level: of the weight, whose ratios count.
        health: of the step's rollouts; None where it had nothing to learn from, or where another policy sampled than
            the next batch's.

    Returns:
        The state after the step, with its reason; unchanged where nothing is held or known.
    """
    if health is None or config.ess is None:
        return state
    mean, size = (
        (health.ratio_mean, health.ess_token) if level == "token" else (health.sequence_ratio_mean, health.ess_sequence)
    )
    mean, size = float(mean), float(size)
    # Kish's effective sample size is mean^2 / mean square. A step without any weight says nothing.
    if not size > 0:
        return state
    recent = (*state.recent, (mean, mean**2 / size))[-config.window :]
    # Moments of equal numbers of samples add up, while effective sample sizes do not.
    first, second = (sum(values) / len(recent) for values in zip(*recent, strict=True))
    share = largest_share(first, second, config.ess)
    alone = first**2 / second if second > 0 else 0.0
    reason = (
        f"ESS of rho {alone:.3f} (over {len(recent)} steps; budget {config.ess:g}): share {share:.2f} of the weight is"
        " rho, the rest 1"
    )
    return MixControlState(share, recent, reason)
