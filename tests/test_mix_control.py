"""The share of the importance weight: its closed form against a search, and the rule over steps."""

import dataclasses
import json
import math

import numpy as np
import pytest

from nested_reft.estimators.health import Health
from nested_reft.mix_control import (
    MixControlConfig,
    MixControlState,
    at_another_depth,
    initial_state,
    largest_share,
    update,
)

HALF = MixControlConfig(ess=0.5, window=2)


def health(**changes) -> Health:
    """Everything unread is NaN, so that reading it would show."""
    unread = dict.fromkeys((field.name for field in dataclasses.fields(Health)), math.nan)
    return Health(**unread | changes)


def effective(share, ratios):
    mixed = 1 - share + share * ratios
    return mixed.mean() ** 2 / (mixed**2).mean()


@pytest.mark.parametrize("ess", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 1.0])
def test_the_closed_form_against_a_search(ess, spread, shift):
    """Means of the ratio from 0.1 to 100 among them: what was sampled need not have the mean 1."""
    ratios = np.exp(np.random.default_rng(0).normal(shift, spread, 200))
    found = largest_share(ratios.mean(), (ratios**2).mean(), ess)
    grid = np.linspace(0, 1, 2001)
    fits = np.array([effective(share, ratios) >= ess for share in grid])
    assert fits[0] and found == pytest.approx(grid[fits].max(), abs=1e-3)
    if found < 1:
        assert effective(found, ratios) == pytest.approx(ess, rel=1e-9)


def test_the_share_by_hand():
    """Ratios 0 and 2: mean 1, deviation 1. ESS 0.8 allows c = 1/2, so a = 1/2: weights 1/2 and 3/2, ESS 1 / 1.25."""
    assert largest_share(1.0, 2.0, 0.8) == pytest.approx(0.5)
    assert largest_share(1.0, 2.0, 0.5) == pytest.approx(1.0)
    assert largest_share(1.0, 2.0, 0.3) == 1.0


@pytest.mark.parametrize(("mean", "square"), [(math.nan, 1.0), (1.0, math.inf)])
def test_what_is_not_finite_is_not_trusted(mean, square):
    assert largest_share(mean, square, 0.5) == 0.0


def test_equal_ratios_need_no_mixing():
    assert largest_share(1.3, 1.3**2 - 1e-12, 0.99) == 1.0


def test_moments_are_averaged_and_forgotten():
    """m2 = m^2 / ESS: 1 / 0.5 = 2, then 1 / 0.1 = 10. Their mean 6 has deviation sqrt 5, and r = 1."""
    state = initial_state(HALF, None)
    assert state.share == 0
    state = update(state, HALF, "token", health(ratio_mean=1.0, ess_token=0.5))
    assert state.share == pytest.approx(1.0)
    state = update(state, HALF, "token", health(ratio_mean=1.0, ess_token=0.1))
    assert state.share == pytest.approx(1 / math.sqrt(5)) and "budget 0.5" in state.reason
    state = update(state, HALF, "token", health(ratio_mean=1.0, ess_token=0.1))
    assert state.share == pytest.approx(1 / 3)  # the first step is beyond the window


def test_each_level_reads_its_own_ratios():
    both = health(ratio_mean=1.0, ess_token=0.5, sequence_ratio_mean=1.0, ess_sequence=0.1)
    shares = [update(MixControlState(0.0), HALF, level, both).share for level in ("token", "sequence")]
    assert shares == pytest.approx([1.0, 1 / 3])


def test_nothing_held_or_known_changes_nothing():
    state = initial_state(MixControlConfig(), 0.3)
    assert state.share == 0.3
    assert update(state, MixControlConfig(), "token", health(ratio_mean=1.0, ess_token=0.1)) == state
    assert update(state, HALF, "token", None) == state
    assert update(state, HALF, "token", health(ratio_mean=0.0, ess_token=0.0)) == state


def test_another_depth_forgets_the_moments_and_keeps_the_share():
    state = update(MixControlState(0.0), HALF, "token", health(ratio_mean=1.0, ess_token=0.1))
    moved = at_another_depth(state)
    assert (moved.share, moved.recent) == (state.share, ()) and len(state.recent) == 1


def test_the_state_goes_through_json():
    state = update(MixControlState(0.0), HALF, "token", health(ratio_mean=1.0, ess_token=0.1))
    assert MixControlState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ess": 1.0}, "mix_control.ess is 1.0; allowed is 0 < ess < 1"),
        ({"ess": math.nan}, "mix_control.ess is nan"),
        ({"window": 0}, "mix_control.window is 0; allowed is 1 or more"),
        ({"window": 7}, "mix_control.window is 7, but mix_control.ess is None, so no share is chosen"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        MixControlConfig(**changes)
