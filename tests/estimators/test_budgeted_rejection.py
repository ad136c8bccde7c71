"""Budgeted rejection against sums over small distributions, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.budgeted_rejection import accepted_log_weight, is_accepted
from nested_reft.estimators.importance import limited_weight

BEHAVIOR = np.array([0.5, 0.3, 0.15, 0.05])
TARGET = np.array([0.25, 0.3, 0.15, 0.3])
RATIO = TARGET / BEHAVIOR  # 0.5, 1, 1, 6


def budgeted_weight(log_ratio, draw, obrs_lambda):
    """As the loss makes it, where weights are clamped as all weights are."""
    weight = limited_weight(accepted_log_weight(log_ratio, obrs_lambda)[None, None])[0, 0]
    return jnp.where(is_accepted(log_ratio, draw, obrs_lambda), weight, 0.0)


def accepting(ratio, obrs_lambda):
    """Of a fine grid of draws, the share that accepts, and the mean weight."""
    draws = (np.arange(100_000) + 0.5) / 100_000
    log_ratio = jnp.full(draws.shape, float(np.log(ratio)))
    accepted = is_accepted(log_ratio, jnp.asarray(draws), obrs_lambda)
    return float(accepted.mean()), float(
        np.asarray(budgeted_weight(log_ratio, jnp.asarray(draws), obrs_lambda), np.float64).mean()
    )


@pytest.mark.parametrize("obrs_lambda", [0.4, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 6.0])
def test_the_mean_over_the_draw_is_the_ratio(ratio, obrs_lambda):
    share, mean = accepting(ratio, obrs_lambda)
    assert share == pytest.approx(min(1, ratio / obrs_lambda), abs=2e-5)
    # The wrong correction, rho alone, would give rho min(1, rho / lambda).
    assert mean == pytest.approx(ratio, rel=1e-4)


def test_accepted_samples_weigh_by_hand():
    draw = jnp.array([0.2, 0.3, 0.9, 0.99])
    found = budgeted_weight(jnp.log(jnp.asarray(RATIO)), draw, 2.0)
    # Accepted with 1/4, 1/2, 1/2 and 1: the first, not the second and third's later draws, and the last always.
    np.testing.assert_allclose(found, [2.0, 2.0, 0.0, 6.0], rtol=1e-6)


def test_accepted_samples_are_closer_to_the_target():
    """What is accepted comes from min(q, p / lambda) / Z: between q and p, and p where lambda is the largest ratio."""
    divergences = []
    for obrs_lambda in (0.5, 1.0, 2.0, 6.0):
        accepted = BEHAVIOR * [accepting(ratio, obrs_lambda)[0] for ratio in RATIO]
        np.testing.assert_allclose(accepted, np.minimum(BEHAVIOR, TARGET / obrs_lambda), atol=2e-5)
        divergences.append((TARGET * np.log(TARGET / (accepted / accepted.sum()))).sum())
    assert divergences == sorted(divergences, reverse=True) and divergences[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("obrs_lambda", [1.0, 2.0, 6.0])
def test_rejection_adds_variance(obrs_lambda):
    """E[h^2] = E[rho max(rho, lambda)] > E[rho^2], for any number of samples that were drawn."""
    draws = (np.arange(100_000) + 0.5) / 100_000
    squares = []
    for ratio in RATIO:
        log_ratio = jnp.full(draws.shape, float(np.log(ratio)))
        weights = np.asarray(budgeted_weight(log_ratio, jnp.asarray(draws), obrs_lambda), np.float64)
        squares.append((weights**2).mean())
    found = (BEHAVIOR * squares).sum()
    assert found == pytest.approx((BEHAVIOR * RATIO * np.maximum(RATIO, obrs_lambda)).sum(), rel=1e-4)
    assert found > (BEHAVIOR * RATIO**2).sum()


@pytest.mark.parametrize("log_ratio", [-jnp.inf, -1e4, 0.0, 1e4])
def test_extreme_ratios_leave_numbers(log_ratio):
    found = budgeted_weight(jnp.array([log_ratio, log_ratio]), jnp.array([0.0, 0.999]), 2.0)
    assert np.isfinite(found).all()
    if log_ratio == 1e4:
        assert np.all(np.asarray(found) > 1e8)


def test_a_broken_model_shows():
    assert np.isnan(budgeted_weight(jnp.array([jnp.nan]), jnp.array([0.5]), 2.0)).all()
