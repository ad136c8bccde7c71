"""Group-relative advantages against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.advantages import group_advantages, weighted_advantages

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


def weighted(rewards, weights):
    """Of one group; the weights are of whole completions, or of each of their tokens."""
    weight_GC = jnp.array(weights, jnp.float32).reshape(len(rewards), -1)
    return np.asarray(weighted_advantages(jnp.array([rewards], jnp.float32), weight_GC[None]))[0]


def test_weighted_baseline_by_hand():
    """Others of the first: (1 * 0 + 9 * 0.5) / 10 = 0.45; with plain weights 1.5 / 4, without 0.25."""
    expected = [1 - 4.5 / 10, 0 - (4 * 1 + 9 * 0.5) / 13, 0.5 - (4 * 1 + 1 * 0) / 5]
    np.testing.assert_allclose(weighted([1, 0, 0.5], [2, 1, 3])[:, 0], expected, rtol=1e-6)


def test_each_position_has_its_own_weights():
    found = weighted([1, 0, 0.5], [[2, 1], [1, 1], [3, 1]])
    np.testing.assert_allclose(found[:, 0], weighted([1, 0, 0.5], [2, 1, 3])[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], advantages([1, 0, 0.5], "leave_one_out"), rtol=1e-6)


def test_equal_weights_give_the_plain_baseline(key):
    rewards = np.asarray(jax.random.normal(key, (7,)))
    np.testing.assert_allclose(weighted(rewards, [0.3] * 7)[:, 0], advantages(rewards, "leave_one_out"), atol=1e-5)


@pytest.mark.parametrize("weights", [[0, 0, 0], [0, 2, 0], [5e8, 1, 1e-3]])
def test_extreme_weights_leave_numbers(weights):
    """Where all others weigh nothing, their plain mean is left; a huge weight does not swallow the others' digits."""
    found = weighted([1, 0, 0.5], weights)
    assert np.isfinite(found).all()
    if weights[0] == 5e8:
        np.testing.assert_allclose(found[:, 0], [1 - 0.5e-6, -1, -0.5], rtol=1e-5)
    elif weights[1] == 0:
        np.testing.assert_allclose(found[:, 0], advantages([1, 0, 0.5], "leave_one_out"), rtol=1e-6)


@pytest.mark.parametrize("rewards", [[0.1] * 7, [0.7], [0.7, np.nan, np.nan], [np.nan, np.nan]])
def test_nothing_to_compare_gives_exactly_zero_with_weights_too(rewards):
    assert np.array_equal(weighted(rewards, np.linspace(0.1, 3, len(rewards))), np.zeros((len(rewards), 1)))


def test_completions_without_reward_enter_no_weighted_baseline():
    with_gap = weighted([1, np.nan, 0, 0.5], [2, 7, 1, 3])
    np.testing.assert_allclose(with_gap[[0, 2, 3]], weighted([1, 0, 0.5], [2, 1, 3]), rtol=1e-6)
    assert with_gap[1] == 0
    found = group_advantages(jnp.array([[1.0, 7.0]]), jnp.array([[True, False]]), "weighted_leave_one_out")
    np.testing.assert_array_equal(found, [[1, np.nan]])  # what the loss starts from


def test_weighted_baseline_ignores_the_own_reward_and_weight():
    rise = weighted([3, 0.2, 0.6], [2, 1, 3])[0] - weighted([2, 0.2, 0.6], [9, 1, 3])[0]
    assert rise == pytest.approx(1, abs=1e-6)


def test_weighted_baseline_approaches_the_optimal_one():
    """E[w^2 (R - b)^2] is least at b = E[w^2 R] / E[w^2]; in a large group leaving one out changes little."""
    weights, rewards = np.tile([3, 3, 1, 1], 200), np.tile([1, 0, 0, 0.75], 200)
    optimal = (weights**2 * rewards).sum() / (weights**2).sum()
    assert optimal == pytest.approx((9 + 0.75) / 20)
    np.testing.assert_allclose(rewards - weighted(rewards, weights)[:, 0], optimal, atol=2e-3)
