"""How many layers the next batch leaves out: as many as a budget on off-policyness allows.

The budget is on one field of a step's `Health`. Each is turned into an *excess* u, which is 0 on-policy and
grows as the behavior policy moves away from the target, roughly by as much for each layer left out:

    hold                u                 limit U
    kl_behavior_target  the metric        budget
    ratio_tail          the metric        budget
    ess_token           -log(metric)      -log(budget)
    ess_sequence        -log(metric)      -log(budget)

With m the mean of the latest `window` excesses at the present size k, after each step:

    lower    to k - 1 at once when m > U, from the first reading at k on (or the `trial`-th)
    raise    to k + 1 when m <= (1 - margin) U for patience * 2^f steps in a row, where f
             counts how often size k + 1 was left for being over budget
    stay     else

It does not oscillate: the margin is the hysteresis, and since each failure doubles the wait, a size is
left for being over budget at most log2(T / patience + 2) times in T steps, whatever the readings are.
It follows a drift: the next try of a size waits for at most as many steps as had passed when it last
failed, and 2 * patience more.

A pure rule on a small state, as `curriculum` is: `update` takes in a step's health, and the state says how
many layers the next batch leaves out. Which layers is `layer_skip.draw_plan`'s to draw.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nested_reft.estimators.health import Health
from nested_reft.literals import check_choice

Held = Literal["ess_token", "ess_sequence", "kl_behavior_target", "ratio_tail"]

HIGHEST_EXCESS = 1e6  # stands for metrics that are not finite: the state must stay JSON


@dataclass(frozen=True)
class NestingControlConfig:
    """The budget, and how carefully to use it up.

    Attributes:
        hold: the metric that the budget is on, as `estimators.health` defines it; None leaves the number
            of layers left out as `nesting` has it.
        budget: for an effective sample size the smallest that is fine, in (0, 1); for the KL the
            largest, in nats per token; for `ratio_tail` the largest share of tokens, in (0, 1).
        min_skipped, max_skipped: the sizes to move between, both included.
        patience: steps within budget before one more layer is left out.
        margin: in [0, 1): the share of the budget that must be unused for that.
        window: latest steps at the present size that the mean is taken over.
        trial: in [1, window]: steps at a size before its mean can be over budget. 1 lowers at the first
            bad reading; more where single readings say little, because it matters which layers a plan
            skips.
    """

    hold: Held | None = None
    budget: float | None = None
    min_skipped: int = 0
    max_skipped: int | None = None
    patience: int = 5
    margin: float = 0.2
    window: int = 5
    trial: int = 1

    def __post_init__(self):
        if self.hold is not None:
            check_choice("nesting_control.hold", self.hold, Held)
        if self.hold is not None and self.budget is not None:
            is_kl = self.hold == "kl_behavior_target"
            if not (math.isfinite(self.budget) and self.budget > 0 and (is_kl or self.budget < 1)):
                allowed = "more than 0 (nats per token)" if is_kl else f"0 < budget < 1, as a share, for '{self.hold}'"
                raise ValueError(f"nesting_control.budget is {self.budget}; allowed is {allowed}")
        for name in ("budget", "max_skipped"):
            if (self.hold is None) != (getattr(self, name) is None):
                raise ValueError(
                    f"nesting_control.{name} is {getattr(self, name)} and nesting_control.hold {self.hold}:"
                    " a controller needs hold, budget and max_skipped; leave all three out for none"
                )
        if self.min_skipped < 0:
            raise ValueError(f"nesting_control.min_skipped is {self.min_skipped}; allowed is 0 or more")
        if self.max_skipped is not None and self.max_skipped < self.min_skipped:
            raise ValueError(
                f"nesting_control.max_skipped is {self.max_skipped}; allowed is nesting_control.min_skipped,"
                f" which is {self.min_skipped}, or more"
            )
        for name in ("patience", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"nesting_control.{name} is {getattr(self, name)}; allowed is 1 or more steps")
        if not 1 <= self.trial <= self.window:
            raise ValueError(
                f"nesting_control.trial is {self.trial}; allowed is 1 to nesting_control.window, which is {self.window}"
            )
        if not 0 <= self.margin < 1:
            raise ValueError(f"nesting_control.margin is {self.margin}; allowed is 0 <= margin < 1")

    def validate_for(self, choice: str, most_skipped: int) -> None:
        """Refuses a controller that the plans cannot follow.

        Args:
            choice: `nesting.choice`.
            most_skipped: layers that a plan may skip at most.

        Raises:
            ValueError: the plans are fixed, or skip fewer layers than the controller may ask for.
        """
        if self.max_skipped is None:
            return
        if choice == "fixed":
            raise ValueError(
                f"nesting_control.hold is '{self.hold}', but nesting.choice 'fixed' always skips the same layers;"
                " allowed are uniform, per_layer, measured"
            )
        if self.max_skipped > most_skipped:
            raise ValueError(
                f"nesting_control.max_skipped is {self.max_skipped}; allowed is up to {most_skipped}, the model's"
                " layers less those that nesting.border keeps"
            )


@dataclass(frozen=True)
class NestingControlState:
    """All that the rule remembers.

    Attributes:
        num_skipped: layers that the next batch skips.
        recent_excess: the latest excesses at this size, oldest first.
        steps_within: steps in a row at this size whose mean left the margin unused.
        failures: `failures[k]` counts how often size k was left for being over budget.
        reason: the last decision, in words.
    """

    num_skipped: int
    recent_excess: tuple[float, ...] = ()
    steps_within: int = 0
    failures: tuple[int, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        return asdict(self) | {"recent_excess": list(self.recent_excess), "failures": list(self.failures)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> NestingControlState:
        """The state that `to_json` wrote.

        Args:
            value: what `to_json` returned, also after a way through a file.
        """
        return cls(
            value["num_skipped"],
            tuple(value["recent_excess"]),
            value["steps_within"],
            tuple(value["failures"]),
            value["reason"],
        )


def initial_state(config: NestingControlConfig, num_skipped: int) -> NestingControlState:
    """Starts at `num_skipped`, or at the nearest size that the controller allows.

    Args:
        config: the rule.
        num_skipped: layers that `nesting.skip_ratio` asks for.

    Returns:
        The state before the first step.
    """
    if config.max_skipped is None:
        return NestingControlState(num_skipped)
    # The skip ratio may lie outside the sizes that the controller moves between.
    start = min(max(num_skipped, config.min_skipped), config.max_skipped)
    # `failures` has one entry for each size from 0 to the largest.
    return NestingControlState(start, failures=(0,) * (config.max_skipped + 1))


def excess(config: NestingControlConfig, value: float) -> float:
    """u of the module's table, for a value of the held metric or for the budget itself.

    Args:
        config: says which metric is held.
        value: an effective sample size in (0, 1], a KL in nats per token, or a share of tokens.

    Returns:
        u, 0 on-policy and always finite.
    """
    if _is_sample_size(config):
        # Each layer left out multiplies an effective sample size by about the same factor, so its log is nearly linear
        # in layers. NaN fails the comparison and counts as infinitely far off.
        value = -math.log(value) if value > 0 else math.inf
    return value if math.isfinite(value) else HIGHEST_EXCESS


def update(state: NestingControlState, config: NestingControlConfig, health: Health | None) -> NestingControlState:
    """Takes in the health of one step, which skipped `state.num_skipped` layers; see the module.

    Args:
        state: before the step.
        config: the rule.
        health: how far off-policy the step's rollouts were; None where it had nothing to learn from.

    Returns:
        The state after the step, with its reason; unchanged where nothing is held or known.
    """
    if health is None or config.hold is None or config.budget is None or config.max_skipped is None:
        return state
    size, limit = state.num_skipped, excess(config, config.budget)
    # Readings beyond the window are forgotten.
    recent = (*state.recent_excess, excess(config, float(getattr(health, config.hold))))[-config.window :]
    mean = sum(recent) / len(recent)
    # Every branch that keeps the size keeps this reading too.
    stays = replace(state, recent_excess=recent)
    found = _found(config, mean, len(recent))

    # Too many layers left out harm every update, so lowering comes first and waits for nothing.
    if mean > limit:
        if len(recent) < config.trial:
            reason = f"{found}, over budget, judged after {config.trial} steps: stay at {size}"
            return replace(stays, steps_within=0, reason=reason)
        if size == config.min_skipped:
            return replace(stays, steps_within=0, reason=f"{found}, over budget: stay at {size}, the fewest allowed")
        # The size that is left has failed; the next try of it waits twice as long.
        failures = tuple(count + (k == size) for k, count in enumerate(state.failures))
        # The new state has no readings, because those of another size say nothing about this one.
        return NestingControlState(
            size - 1, failures=failures, reason=f"{found}, over budget: from {size} to {size - 1} layers left out"
        )
    if size == config.max_skipped:
        return replace(stays, reason=f"{found}, within budget: stay at {size}, the most allowed")
    # Inside the margin one more layer would probably break the budget, and the count of steps in a row begins anew.
    if mean > (1 - config.margin) * limit:
        return replace(stays, steps_within=0, reason=f"{found}, within budget but inside the margin: stay at {size}")
    within, failed = state.steps_within + 1, state.failures[size + 1]
    wait = config.patience * 2**failed
    if within < wait:
        again = f", longer since {size + 1} failed {failed} times" if failed else ""
        reason = f"{found}, within budget for {within} of {wait} steps{again}: stay at {size}"
        return replace(stays, steps_within=within, reason=reason)
    return NestingControlState(
        size + 1,
        failures=state.failures,
        reason=f"{found}, within budget for {within} steps: from {size} to {size + 1} layers left out",
    )


def unmet_budget(state: NestingControlState, config: NestingControlConfig) -> str | None:
    """In words, that even the fewest layers left out are over budget, with a remedy; None where they are not.

    Args:
        state: after a step.
        config: the rule.
    """
    recent = state.recent_excess
    if config.budget is None or len(recent) < config.trial or state.num_skipped > config.min_skipped:
        return None
    if sum(recent) / len(recent) <= excess(config, config.budget):
        return None
    fewer = f", or lower nesting_control.min_skipped, which is {config.min_skipped}" if config.min_skipped else ""
    return f"no plan meets nesting_control.budget: {state.reason}. Loosen the budget{fewer}"


def _is_sample_size(config: NestingControlConfig) -> bool:
    """Whether the held metric falls, and not rises, as the policies move apart."""
    return config.hold in ("ess_token", "ess_sequence")


def _found(config: NestingControlConfig, mean: float, count: int) -> str:
    """The held metric as its excesses' mean has it, beside its budget."""
    # The exponential of a mean log is the geometric mean of the readings.
    value = math.exp(-mean) if _is_sample_size(config) else mean
    return f"{config.hold} {value:.3f} (mean of {count}; budget {config.budget:g})"
