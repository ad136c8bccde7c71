"""The nesting controller: each decision by hand, and its budget on synthetic plants."""

import dataclasses
import json
import math

import numpy as np
import pytest

from nested_reft.estimators.health import Health
from nested_reft.nesting_control import (
    HIGHEST_EXCESS,
    NestingControlConfig,
    NestingControlState,
    excess,
    initial_state,
    unmet_budget,
    update,
)

ESS = NestingControlConfig("ess_token", budget=0.5, max_skipped=6, patience=3, margin=0.2, window=2)
TAIL = NestingControlConfig("ratio_tail", budget=0.1, max_skipped=6, patience=2, margin=0.2, window=2)
KL = NestingControlConfig("kl_behavior_target", budget=1.0, max_skipped=6, patience=2, margin=0.2, window=2)


def health(**readings):
    """A step's health with these values; all others are 1, which no rule of these tests may read."""
    return Health(**{field.name: 1.0 for field in dataclasses.fields(Health)} | readings)


def after(config, readings, start=0):
    """The state after these readings of the held metric, and the sizes that each was read at."""
    state, sizes = initial_state(config, start), []
    for reading in readings:
        sizes.append(state.num_skipped)
        state = update(state, config, health(**{config.hold: reading}))
    return state, sizes


def on_plant(config, plant, steps, start=0, seed=0):
    """Sizes and readings of the controller on `plant(size, step, generator)`."""
    generator, state = np.random.default_rng(seed), initial_state(config, start)
    sizes, readings = [], []
    for step in range(steps):
        sizes.append(state.num_skipped)
        readings.append(plant(state.num_skipped, step, generator))
        state = update(state, config, health(**{config.hold: readings[-1]}))
        state = NestingControlState.from_json(json.loads(json.dumps(state.to_json())))
    return np.array(sizes), np.array(readings), state


def test_raises_by_one_after_patience_steps():
    state, sizes = after(KL, [0.1] * 5)
    assert sizes == [0, 0, 1, 1, 2] and state.num_skipped == 2
    assert after(KL, [0.1] * 4)[0].reason == (
        "kl_behavior_target 0.100 (mean of 2; budget 1), within budget for 2 steps: from 1 to 2 layers left out"
    )


def test_lowers_by_one_at_once():
    state, sizes = after(KL, [1.01, 0.1], start=3)
    assert sizes == [3, 2]
    assert after(KL, [1.01], start=3)[0].reason.endswith("over budget: from 3 to 2 layers left out")
    assert state.failures == (0, 0, 0, 1, 0, 0, 0)


def test_ess_is_over_budget_when_it_is_small():
    assert after(ESS, [0.49], start=2)[0].num_skipped == 1
    assert after(ESS, [0.51], start=2)[0].num_skipped == 2
    # The margin is on -log: 0.8 * -log 0.5 = 0.5545, an ESS of 0.574. Of 0.8 * 0.5 = 0.4 it would be met by all.
    assert after(ESS, [0.57] * 20, start=2)[1][-1] == 2
    assert after(ESS, [0.58] * 4, start=2)[1][-1] == 3


def test_the_tail_is_over_budget_when_it_is_large():
    state = after(TAIL, [0.11], start=2)[0]
    assert state.num_skipped == 1
    assert state.reason == "ratio_tail 0.110 (mean of 1; budget 0.1), over budget: from 2 to 1 layers left out"
    assert after(TAIL, [0.09] * 20, start=2)[1][-1] == 2  # more than 0.8 * 0.1: inside the margin
    assert after(TAIL, [0.07] * 2, start=2)[0].num_skipped == 3
    assert after(TAIL, [0.0] * 2, start=2)[0].num_skipped == 3  # an excess of -log 0 would be infinite


def test_the_mean_is_over_the_window_at_this_size():
    # 1.2 alone is over; after 0.6 the mean of two is 0.9: within.
    assert after(KL, [0.6, 1.2], start=3)[0].num_skipped == 3
    assert after(KL, [0.6, 1.6], start=3)[0].num_skipped == 2
    # A reading of another size does not count: were 1.6 still in the mean, 2 would be left too.
    assert after(KL, [1.6, 0.9], start=3)[0].num_skipped == 2


def test_inside_the_margin_it_stays():
    state, sizes = after(KL, [0.81] * 50, start=3)
    assert set(sizes) == {3} and "inside the margin: stay at 3" in state.reason
    state, sizes = after(KL, [0.1, 0.81, 0.81, 0.79, 0.79], start=3)  # means 0.1, 0.455 -> raised
    assert sizes == [3, 3, 4, 4, 4]


def test_each_failure_of_a_size_doubles_the_wait():
    # Size 1 is always over budget: 2, 4, 8 and 16 steps at 0 between the single steps at 1.
    sizes, _, state = on_plant(KL, lambda size, step, _: 2.0 * size, 40)
    assert np.flatnonzero(sizes == 1).tolist() == [2, 7, 16, 33]
    assert state.failures[1] == 4
    assert "of 32 steps, longer since 1 failed 4 times" in state.reason


def test_a_trial_lets_a_size_recover_from_its_first_reading():
    patient = dataclasses.replace(KL, window=3, trial=3)
    state, sizes = after(patient, [1.9, 0.5, 0.5], start=3)  # means 1.9, 1.2, 0.967
    assert sizes == [3, 3, 3] and state.num_skipped == 3
    assert "over budget, judged after 3 steps: stay at 3" in after(patient, [1.9], start=3)[0].reason
    assert after(patient, [1.9, 0.5, 0.7], start=3)[0].num_skipped == 2  # mean 1.033


def test_bounds():
    bounded = NestingControlConfig("ess_token", budget=0.5, min_skipped=1, max_skipped=2, patience=1)
    state, sizes = after(bounded, [0.9] * 5)
    assert sizes == [1, 2, 2, 2, 2] and state.reason.endswith("stay at 2, the most allowed")
    state, sizes = after(bounded, [0.1] * 3, start=9)
    assert sizes == [2, 1, 1] and state.reason.endswith("stay at 1, the fewest allowed")
    assert state.failures[1] == 0


def test_a_budget_that_no_plan_meets_is_said():
    bounded = NestingControlConfig("ess_token", budget=0.5, min_skipped=1, max_skipped=3, patience=1, trial=2)
    assert unmet_budget(after(bounded, [0.1], start=1)[0], bounded) is None  # judged after two steps
    assert unmet_budget(after(bounded, [0.1] * 2, start=2)[0], bounded) is None  # fewer are to be tried yet
    assert unmet_budget(after(bounded, [0.9], start=1)[0], bounded) is None
    state = after(bounded, [0.1] * 2, start=1)[0]
    assert unmet_budget(state, bounded) == (
        "no plan meets nesting_control.budget: ess_token 0.100 (mean of 2; budget 0.5), over budget: stay at 1, the"
        " fewest allowed. Loosen the budget, or lower nesting_control.min_skipped, which is 1"
    )
    none_fewer = dataclasses.replace(bounded, min_skipped=0)
    assert str(unmet_budget(after(none_fewer, [0.1] * 2)[0], none_fewer)).endswith("Loosen the budget")


def test_without_a_budget_nothing_changes():
    off = NestingControlConfig()
    assert unmet_budget(initial_state(off, 0), off) is None
    state = initial_state(off, 3)
    assert update(state, off, health()) is state and state.num_skipped == 3 and state.reason == ""


def test_a_step_without_anything_to_learn_from_changes_nothing():
    """It has no health; were it taken for zero, an effective sample size would be over every budget."""
    state, _ = after(ESS, [0.9, 0.8], start=2)
    assert update(state, ESS, None) is state


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_broken_reading_is_over_budget_and_stays_json(value):
    state, _ = after(ESS, [value], start=2)
    assert state.num_skipped == 1
    assert json.loads(json.dumps(state.to_json(), allow_nan=False))
    assert excess(KL, math.nan) == excess(KL, math.inf) == HIGHEST_EXCESS


def noisy_ess(cost, noise):
    """ESS exp(-cost_per_layer(step) * size^1.5) under noise: falling in size, faster than additively."""

    def plant(size, step, generator):
        mean = cost(step) * size**1.5
        return float(np.exp(-mean * np.exp(noise * generator.standard_normal())))

    return plant


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [0, 6])
def test_holds_the_budget_of_a_noisy_plant_without_oscillating(seed, start):
    # -log ESS is 0.1 size^1.5: 0.283 at 2, 0.520 at 3, 0.8 at 4; the limit -log 0.5 is 0.693. So 3 is right.
    sizes, readings, state = on_plant(ESS, noisy_ess(lambda step: 0.1, 0.15), 300, start, seed)
    assert (sizes[50:] == 3).mean() > 0.85 and set(sizes[50:]) <= {2, 3, 4}
    assert np.exp(np.log(readings[50:]).mean()) > 0.5
    # At most log2(T / patience + 2) = 6.7 failures of a size, and so few changes.
    assert max(state.failures) <= 6
    assert np.count_nonzero(np.diff(sizes[50:])) <= 12


def test_failures_are_few_on_the_worst_plant():
    """A plant that always allows waiting and never the next size: the bound of the module holds."""
    _, _, state = on_plant(ESS, lambda size, step, _: 0.99 if size == 0 else 0.01, 1000)
    assert state.failures[1] == math.floor(math.log2(1000 / ESS.patience + 2))


@pytest.mark.parametrize("seed", range(3))
def test_follows_a_plant_that_drifts(seed):
    """Training makes layers cheaper: the right size rises from 2 to 6, and back when they get dear again."""

    def cost(step):
        return 0.2 * 0.2 ** (step / 200) if step < 200 else 0.2

    right = np.array([max(k for k in range(7) if cost(step) * k**1.5 <= -math.log(0.5)) for step in range(300)])
    assert right[0] == 2 and right[199] == 6 and right[200] == 2
    sizes, readings, _ = on_plant(ESS, noisy_ess(cost, 0.1), 300, seed=seed)
    assert sizes[199] >= 5
    assert np.mean(sizes[:200] > right[:200]) < 0.1  # over budget only in the steps that find out
    assert np.abs(sizes - right)[20:200].mean() < 1
    assert (sizes[206:] <= 2).mean() > 0.9  # one layer a step down to what is affordable
    assert np.mean(readings < 0.5) < 0.15


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0.5}, "nesting_control.budget is 0.5 and nesting_control.hold None"),
        ({"hold": "ess_token", "budget": 0.5}, "nesting_control.max_skipped is None and .*hold ess_token"),
        ({"hold": "ess_token", "budget": 1.5, "max_skipped": 2}, "budget is 1.5; allowed is 0 < budget < 1"),
        ({"hold": "kl_behavior_target", "budget": 0.0, "max_skipped": 2}, "budget is 0.0; allowed is more than 0"),
        ({"hold": "ratio_tail", "budget": 1.0, "max_skipped": 2}, "budget is 1.0; allowed is 0 < budget < 1"),
        ({"hold": "ess_token", "budget": math.nan, "max_skipped": 2}, "budget is nan"),
        ({"min_skipped": -1}, "nesting_control.min_skipped is -1"),
        ({"hold": "ess_token", "budget": 0.5, "min_skipped": 3, "max_skipped": 2}, "max_skipped is 2; allowed is .* 3"),
        ({"patience": 0}, "nesting_control.patience is 0; allowed is 1 or more steps"),
        ({"window": 0}, "nesting_control.window is 0"),
        ({"trial": 6}, "nesting_control.trial is 6; allowed is 1 to nesting_control.window, which is 5"),
        ({"margin": 1.0}, "nesting_control.margin is 1.0; allowed is 0 <= margin < 1"),
        # What is wrong with what was given comes before what was not given.
        ({"hold": "ess_token", "budget": 7.0}, "nesting_control.budget is 7.0; allowed is 0 < budget < 1"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        NestingControlConfig(**fields)


def test_refuses_plans_that_cannot_follow():
    with pytest.raises(ValueError, match=r"nesting_control.hold is 'ess_token', but nesting.choice 'fixed'"):
        ESS.validate_for("fixed", 6)
    with pytest.raises(ValueError, match=r"nesting_control.max_skipped is 6; allowed is up to 4"):
        ESS.validate_for("uniform", 4)
    ESS.validate_for("uniform", 6)
    NestingControlConfig().validate_for("fixed", 1)
