"""Advantages of tokens: by hand with the wrong values named, against a slow loop, and at the ends of lambda."""

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.gae import gae, token_rewards, whitened


def rows(*values) -> jnp.ndarray:
    """One group of completions."""
    return jnp.array([values], jnp.float32)


def test_advantages_by_hand():
    """Three tokens, r = (0, 0, 1), V = (0.5, 0.4, 0.2), gamma 1, lambda 1/2.

    delta = (0.4 - 0.5, 0.2 - 0.4, 1 - 0.2) = (-0.1, -0.2, 0.8), so A_3 = 0.8, A_2 = -0.2 + 0.4 = 0.2 and
    A_1 = -0.1 + 0.1 = 0. Wrong: values after the action, V_{t+1} of the padding, 9 here, give A_3 = 1 + 9 - 0.2;
    without lambda in the recursion A_1 is 0.5, and returns without it (r summed) are 1 throughout.
    """
    mask = jnp.array([[[True, True, True, False]]])
    found, returns = gae(rows([0, 0, 1, 7]), rows([0.5, 0.4, 0.2, 9]), mask, 1.0, 0.5)
    np.testing.assert_allclose(found, rows([0, 0.2, 0.8, 0]), atol=1e-6)
    np.testing.assert_allclose(returns, rows([0.5, 0.6, 1.0, 0]), atol=1e-6)


def test_discount_by_hand():
    """gamma 1/2, lambda 1: the return is 0.5 * 1 at the first of two tokens. Discounting lambda alone would give 1."""
    found, returns = gae(rows([0, 1]), rows([0.3, 0.0]), jnp.ones((1, 1, 2), bool), 0.5, 1.0)
    np.testing.assert_allclose(returns, rows([0.5, 1.0]), atol=1e-6)
    np.testing.assert_allclose(found, rows([0.2, 1.0]), atol=1e-6)


def test_forced_tokens_take_no_part():
    """The values of two given tokens change nothing, and neither they nor an empty completion have an advantage."""
    reward, value = rows([0, 0, 0, 1], [0, 0, 0, 1]), rows([5.0, -7.0, 0.5, 0.2], [1.0, 2.0, 3.0, 4.0])
    mask = jnp.array([[[False, False, True, True], [False] * 4]])
    found, returns = gae(reward, value, mask, 1.0, 1.0)
    np.testing.assert_allclose(found, rows([0, 0, 0.5, 0.8], [0, 0, 0, 0]), atol=1e-6)
    np.testing.assert_allclose(returns, rows([0, 0, 1, 1], [0, 0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.97, 1.0)])
def test_a_slow_loop_agrees(gamma, gae_lambda):
    """A_t as the sum over k of (gamma lambda)^k delta_{t+k}, which is no recursion."""
    generator = np.random.default_rng(0)
    reward, value = generator.normal(size=(2, 2, 3, 7)).astype(np.float32)
    start, end = generator.integers(0, 3, (2, 3)), generator.integers(3, 8, (2, 3))
    mask = (np.arange(7) >= start[..., None]) & (np.arange(7) < end[..., None])
    expected = np.zeros((2, 3, 7))
    for b, g, t in np.argwhere(mask):
        for k in range(int(end[b, g]) - int(t)):
            after = value[b, g, t + k + 1] if t + k + 1 < end[b, g] else 0.0
            delta = reward[b, g, t + k] + gamma * after - value[b, g, t + k]
            expected[b, g, t] += (gamma * gae_lambda) ** k * delta
    found, returns = gae(jnp.asarray(reward), jnp.asarray(value), jnp.asarray(mask), gamma, gae_lambda)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + value, 0), atol=1e-5)


def test_rewards_by_hand():
    """beta = 0.5. The score stands at the last token of the policy's own, not at the end of the array; a completion
    without such a token has no reward. What padding and given tokens diverge by does not count."""
    mask = jnp.array([[[False, True, True, False], [False] * 4]])
    kl = rows([9, 0.2, -0.4, 9], [9, 9, 9, 9])
    found = token_rewards(rows(1.0, 1.0)[..., :], kl, mask, 0.5)
    np.testing.assert_allclose(found, rows([0, -0.1, 1.2, 0], [0, 0, 0, 0]), atol=1e-6)


def test_whitening_by_hand():
    """0 and 4 have mean 2 and variance 4; what is masked has no part. With the mean kept they are 2 -+ 1. Dividing by
    the deviation alone would give 0 and 2, whose mean is 1."""
    values, mask = rows([0, 4, 99]), jnp.array([[[True, True, False]]])
    np.testing.assert_allclose(whitened(values, mask), rows([-1, 1, 0]), atol=1e-5)
    np.testing.assert_allclose(whitened(values, mask, shift_mean=False), rows([1, 3, 0]), atol=1e-5)
    equal = rows([2, 2, 5])
    assert not whitened(equal, mask).any()
    np.testing.assert_allclose(whitened(equal, mask, shift_mean=False), rows([2, 2, 0]))
    assert np.isfinite(whitened(values, jnp.zeros_like(mask))).all()
