"""Group-relative advantages against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.advantages import group_advantages

BASELINES = ("leave_one_out", "group_mean", "group_std")


def advantages(rewards, advantage, scored=None):
    reward_BG = jnp.array([rewards], jnp.float32)
    scored_BG = jnp.ones(reward_BG.shape, bool) if scored is None else jnp.array([scored])
    return np.asarray(group_advantages(reward_BG, scored_BG, advantage))[0]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("no_baseline", [1, 0, 0, 0]),
        # The others of the first are all 0; of the second 1, 0, 0 with mean 1/3. Against the whole mean: 3/4.
        ("leave_one_out", [1, -1 / 3, -1 / 3, -1 / 3]),
        ("group_mean", [3 / 4, -1 / 4, -1 / 4, -1 / 4]),
        # Sum of squares 9/16 + 3/16 = 3/4, over n - 1 = 3: std 1/2. Over n it would be 0.433, the first 1.732.
        ("group_std", [1.5, -0.5, -0.5, -0.5]),
    ],
)
def test_one_right_of_four(advantage, expected):
    np.testing.assert_allclose(advantages([1, 0, 0, 0], advantage), expected, rtol=1e-5)


@pytest.mark.parametrize("advantage", BASELINES)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [0.0] * 4, [0.7]])
def test_nothing_to_compare_gives_exactly_zero(advantage, rewards):
    """The mean of seven times 0.1 is not 0.1 in float32: centring alone would leave 7e-9, divided by its std more."""
    assert np.array_equal(advantages(rewards, advantage), np.zeros(len(rewards)))


def test_single_sample_without_baseline_keeps_its_reward():
    assert advantages([0.7], "no_baseline") == pytest.approx(0.7)


@pytest.mark.parametrize("advantage", ("no_baseline", *BASELINES))
def test_unscored_completions_enter_nothing(advantage):
    rewards, scored = [1.0, np.nan, 0.0, 0.5], [True, False, True, True]
    with_gap = advantages(rewards, advantage, scored)
    np.testing.assert_allclose(with_gap[[0, 2, 3]], advantages([1.0, 0.0, 0.5], advantage), rtol=1e-6)
    assert with_gap[1] == 0
    assert np.array_equal(advantages([np.nan, np.nan], advantage, [False, False]), [0, 0])


def test_leave_one_out_baseline_ignores_the_own_reward():
    """A_1 = R_1 - b with b free of R_1: raising R_1 by 1 raises A_1 by exactly 1. Group mean: by 1 - 1/n only."""
    rise = advantages([3.0, 0.2, 0.6], "leave_one_out")[0] - advantages([2.0, 0.2, 0.6], "leave_one_out")[0]
    assert rise == pytest.approx(1, abs=1e-6)
    rise = advantages([3.0, 0.2, 0.6], "group_mean")[0] - advantages([2.0, 0.2, 0.6], "group_mean")[0]
    assert rise == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("advantage", BASELINES)
def test_adding_a_constant_to_all_rewards_changes_nothing(advantage):
    np.testing.assert_allclose(advantages([1, 0, 2], advantage), advantages([8, 7, 9], advantage), atol=1e-5)


def test_groups_do_not_mix(key):
    reward_BG = jax.random.normal(key, (3, 4))
    whole = group_advantages(reward_BG, jnp.ones((3, 4), bool), "group_std")
    for b in range(3):
        np.testing.assert_allclose(whole[b], advantages(np.asarray(reward_BG[b]), "group_std"), rtol=1e-6)
