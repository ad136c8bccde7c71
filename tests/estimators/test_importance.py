"""Importance weights against numbers worked out by hand, slow loops, and the bound of the mixture."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.importance import (
    importance_log_weight,
    limited_weight,
    mixture_log_weight,
    token_log_ratio,
)

RATIOS = [2.0, 0.5, 3.0]


def weights(ratios, variant, level, mask=None, retrace_lambda=1.0):
    log_ratio_BGC = jnp.log(jnp.array([[ratios]], jnp.float32))
    mask_BGC = jnp.ones(log_ratio_BGC.shape, bool) if mask is None else jnp.array([[mask]])
    return np.exp(np.asarray(importance_log_weight(log_ratio_BGC, mask_BGC, variant, level, retrace_lambda)))[0, 0]


@pytest.mark.parametrize(
    ("variant", "level", "retrace_lambda", "expected"),
    [
        ("base", "token", 1.0, [2, 0.5, 3]),
        ("base", "prefix", 1.0, [2, 1, 3]),  # 2, 2 * 0.5, 2 * 0.5 * 3
        ("base", "sequence", 1.0, [3, 3, 3]),
        ("base", "geometric", 1.0, [3 ** (1 / 3)] * 3),  # an arithmetic mean of the ratios would give 1.83
        ("practical", "prefix", 1.0, [2, 1, 3]),
        ("one", "token", 1.0, [1, 1, 1]),
        ("retrace", "token", 0.8, [0.8, 0.4, 0.8]),  # min(1, 0.8 * rho) would give 1, 0.4, 1
        ("retrace", "prefix", 0.5, [0.5, 0.125, 0.0625]),  # 1/2, 1/2 * 1/4, 1/2 * 1/4 * 1/2
    ],
)
def test_by_hand(variant, level, retrace_lambda, expected):
    np.testing.assert_allclose(weights(RATIOS, variant, level, None, retrace_lambda), expected, rtol=1e-6)


def test_masked_tokens_enter_no_product():
    """A forced first token and padding at the end: |y| is 2, not 4."""
    ratios, mask = [9.0, 2.0, 0.5, 7.0], [False, True, True, False]
    np.testing.assert_allclose(weights(ratios, "base", "prefix", mask)[1:3], [2, 1], rtol=1e-6)
    np.testing.assert_allclose(weights(ratios, "base", "sequence", mask)[1:3], [1, 1], rtol=1e-6)
    np.testing.assert_allclose(weights([9.0, 4.0, 4.0, 7.0], "base", "geometric", mask)[1:3], [4, 4], rtol=1e-6)
    np.testing.assert_allclose(weights(ratios, "retrace", "prefix", mask, 0.5)[1:3], [0.5, 0.125], rtol=1e-6)


@pytest.mark.parametrize(("variant", "level"), itertools.product(("base", "practical"), ("prefix", "geometric")))
def test_no_token_at_all_is_finite(variant, level):
    assert np.all(weights(RATIOS, variant, level, [False] * 3) == 1)


def test_levels_agree_for_one_token():
    for level in ("token", "prefix", "sequence", "geometric"):
        assert weights([1.7], "base", level) == pytest.approx(1.7)


def test_truncation_by_hand():
    log_weight_BGC = jnp.log(jnp.array([[[0.4, 0.5, 1.0, 2.0, 2.1]]]))
    np.testing.assert_allclose(limited_weight(log_weight_BGC, truncate_at=2.0)[0, 0], [0.4, 0.5, 1, 2, 2], rtol=1e-6)


def test_huge_log_weights_are_finite():
    weight = limited_weight(jnp.array([[[-1e4, -100.0, 100.0, 1e4]]]))[0, 0]
    np.testing.assert_allclose(weight, np.exp([-20.0, -20.0, 20.0, 20.0]), rtol=1e-5)


def test_log_ratio_outside_the_supports():
    ratio = token_log_ratio(jnp.array([-jnp.inf, -1.0, -jnp.inf, jnp.nan]), jnp.array([-1.0, -jnp.inf, -jnp.inf, -1.0]))
    assert ratio[0] < -1000 and ratio[1] > 1000 and ratio[2] == 0
    assert np.isnan(ratio[3]), "a broken model must show"


def mixture(target, full, nested, alpha):
    def logs(probability):
        return jnp.log(jnp.array([[probability]], jnp.float32))

    mask_BGC = jnp.ones((1, 1, len(target)), bool)
    alpha_BG = jnp.array([[alpha]])
    return np.exp(np.asarray(mixture_log_weight(logs(target), logs(full), logs(nested), mask_BGC, alpha_BG)))[0, 0]


def test_mixture_by_hand():
    """pi = 0.5 * 0.4 = 0.2, nested 0.5 * 0.1 = 0.05: 0.2 / (0.2 / 4 + 0.05 * 3 / 4) = 16 / 7.

    With alpha on the wrong side it would be 0.2 / (0.15 + 0.0125) = 1.23; weighting each component by its own
    density 1 or 4; per token, 1 for the first.
    """
    np.testing.assert_allclose(mixture([0.5, 0.4], [0.5, 0.4], [0.5, 0.1], 0.25), [16 / 7] * 2, rtol=1e-6)
    # The target has moved: pi = 0.3, so the weight is 0.3 / 0.0875.
    np.testing.assert_allclose(mixture([0.6, 0.5], [0.5, 0.4], [0.5, 0.1], 0.25), [0.3 / 0.0875] * 2, rtol=1e-6)


def test_each_group_has_a_share_of_its_own():
    """Replayed groups stand side by side: one nested, one from a mixture, one from the full model alone.

    At share 0 the weight is `base`'s: 0.2 / 0.05 = 4. At 1 it is the ratio to the full model: 0.2 / 0.16 = 5 / 4.
    At 1/2 it is 0.2 / (0.08 + 0.025) = 40 / 21. One share for all groups would give one number three times.
    """

    def logs(probability_C):
        return jnp.broadcast_to(jnp.log(jnp.array(probability_C, jnp.float32)), (3, 1, 2))

    target, full, nested = logs([0.5, 0.4]), logs([0.4, 0.4]), logs([0.5, 0.1])
    alpha_BG = jnp.array([[0.0], [0.5], [1.0]])
    mask_BGC = jnp.ones((3, 1, 2), bool)
    found = np.asarray(mixture_log_weight(target, full, nested, mask_BGC, alpha_BG))
    np.testing.assert_allclose(np.exp(found[:, 0]), [[4] * 2, [40 / 21] * 2, [5 / 4] * 2], rtol=1e-6)
    for row, denominator in ((0, nested), (2, full)):
        base = importance_log_weight(token_log_ratio(target, denominator), mask_BGC, "base", "sequence")
        np.testing.assert_allclose(found[row], base[row], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_shares_at_both_ends_are_finite(alpha):
    """log 0 of a share must not become NaN, whichever policy excludes a completion."""
    minus, plain = jnp.full((1, 1, 2), -jnp.inf), -jnp.ones((1, 1, 2))
    mask_BGC = jnp.ones((1, 1, 2), bool)
    for target, full, nested in itertools.product((minus, plain), repeat=3):
        assert np.all(np.isfinite(mixture_log_weight(target, full, nested, mask_BGC, jnp.array([[alpha]]))))


def test_mixture_of_the_full_model_alone_is_the_plain_ratio():
    np.testing.assert_allclose(mixture([0.6], [0.5], [1e-30], 1.0), [1.2], rtol=1e-6)


def test_mixture_weight_is_bounded_at_the_old_policy():
    """w <= 1 / alpha whatever the nested model does: 20,000 random completions, differences up to hundreds of nats."""
    random = np.random.default_rng(0)
    for alpha in (0.01, 0.1, 0.5, 0.9, 1.0):
        spread = random.choice([0.1, 1.0, 10.0, 200.0], size=(4000, 1, 1))
        full_BGC = jnp.array(-random.exponential(1.0, (4000, 1, 6)) * spread, jnp.float32)
        nested_BGC = jnp.array(-random.exponential(1.0, (4000, 1, 6)) * spread, jnp.float32)
        mask_BGC = jnp.array(random.random((4000, 1, 6)) < 0.8)
        log_weight_BGC = mixture_log_weight(full_BGC, full_BGC, nested_BGC, mask_BGC, jnp.full((4000, 1), alpha))
        assert np.all(np.asarray(log_weight_BGC) <= -math.log(alpha) + 1e-6)
        assert np.all(np.isfinite(limited_weight(log_weight_BGC)))


def test_mixture_outside_the_supports_is_finite():
    minus = -jnp.inf * jnp.ones((1, 1, 2))
    plain = -jnp.ones((1, 1, 2))
    mask_BGC = jnp.ones((1, 1, 2), bool)
    for target, full, nested in itertools.product((minus, plain), repeat=3):
        assert np.all(np.isfinite(mixture_log_weight(target, full, nested, mask_BGC, jnp.array([[0.5]]))))
