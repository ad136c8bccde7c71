"""KL estimators on a categorical distribution, where every expectation is a sum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.kl import KlEstimator, exact_kl, kl_estimate, self_distillation_kl

LOGITS = jnp.array([0.3, -1.0, 0.8, 0.1])
REFERENCE = jax.nn.log_softmax(jnp.array([-0.4, 0.2, 0.5, 0.9]))


def kl(left, right):
    return jnp.sum(jnp.exp(left) * (left - right))


def mean_value(estimator):
    target = jax.nn.log_softmax(LOGITS)
    return float(jnp.sum(jnp.exp(target) * kl_estimate(target, REFERENCE, estimator)))


def mean_gradient(penalty_gradient):
    """E_{token ~ pi} of the gradient of a per-token loss, with the token held fixed."""
    probability = jax.nn.softmax(LOGITS)
    gradients = jax.jacobian(lambda logits: penalty_gradient(jax.nn.log_softmax(logits)))(LOGITS)
    return np.asarray(probability @ gradients)


def test_by_hand():
    """l = log 2: k1 0.693, k2 0.240, k3 = 1/2 - 1 + 0.693 = 0.193 (ratio turned round: 0.307)."""
    target, reference = jnp.log(jnp.array([0.4])), jnp.log(jnp.array([0.2]))
    by_hand: dict[KlEstimator, float] = {"k1": 0.693147, "k2": 0.240227, "k3": 0.193147}
    for estimator, expected in by_hand.items():
        assert float(kl_estimate(target, reference, estimator)[0]) == pytest.approx(expected, rel=1e-5)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    truth = float(kl(jax.nn.log_softmax(LOGITS), REFERENCE))
    assert mean_value("k1") == pytest.approx(truth, rel=1e-5)
    assert mean_value("k3") == pytest.approx(truth, rel=1e-5)
    assert abs(mean_value("k2") - truth) > 0.01 * truth


def test_k3_is_never_negative(key):
    target, reference = -jax.random.exponential(key, (2, 1000))
    assert jnp.all(kl_estimate(target, reference, "k3") >= 0)
    assert jnp.any(kl_estimate(target, reference, "k1") < 0)


def test_gradients_are_those_of_the_table():
    forward = np.asarray(jax.grad(lambda logits: kl(jax.nn.log_softmax(logits), REFERENCE))(LOGITS))
    backward = np.asarray(jax.grad(lambda logits: kl(REFERENCE, jax.nn.log_softmax(logits)))(LOGITS))
    assert np.abs(forward - backward).max() > 0.01
    # k1 differentiated as it stands has no mean gradient at all: as a loss it would do nothing but add noise.
    np.testing.assert_allclose(mean_gradient(lambda lp: kl_estimate(lp, REFERENCE, "k1")), 0, atol=1e-6)
    np.testing.assert_allclose(mean_gradient(lambda lp: kl_estimate(lp, REFERENCE, "k2")), forward, atol=1e-6)
    np.testing.assert_allclose(mean_gradient(lambda lp: kl_estimate(lp, REFERENCE, "k3")), backward, atol=1e-6)
    in_reward = mean_gradient(lambda lp: jax.lax.stop_gradient(kl_estimate(lp, REFERENCE, "k1")) * lp)
    np.testing.assert_allclose(in_reward, forward, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("target", [-1.0, -101.0, 99.0, -jnp.inf])
def test_finite_far_away(estimator, target):
    value, gradient = jax.value_and_grad(lambda t: kl_estimate(t, jnp.array([-1.0]), estimator).sum())(
        jnp.array([target])
    )
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(
    ("estimator", "log_ratio", "value", "gradient"),
    [
        # l^2 / 2 and l: k2 has nothing that could overflow.
        ("k2", 25.0, 312.5, 25.0),
        ("k2", -25.0, 312.5, -25.0),
        # exp(-l) - 1 + l and 1 - exp(-l), which tends to 1 on this side.
        ("k3", 25.0, 24.0, 1.0),
        ("k3", -19.0, math.exp(19) - 20, 1 - math.exp(19)),
        # The line through l = -20, with the slope that k3 has there.
        ("k3", -25.0, 6 * math.exp(20) - 26, 1 - math.exp(20)),
    ],
)
def test_penalties_pull_beyond_the_limit(estimator, log_ratio, value, gradient):
    """A clamp of the log-ratio would leave no gradient just where the policies are furthest apart."""
    found = jax.value_and_grad(lambda l: kl_estimate(l, jnp.zeros(()), estimator))(jnp.float32(log_ratio))
    np.testing.assert_allclose(found, (value, gradient), rtol=1e-5)


def test_exact_kl_against_numpy(key):
    logits, other = np.asarray(jax.random.normal(key, (2, 3, 7)), np.float64) * 3
    expected = []
    for row, other_row in zip(logits, other, strict=True):
        p = np.exp(row) / sum(np.exp(value) for value in row)
        q = np.exp(other_row) / sum(np.exp(value) for value in other_row)
        expected.append(sum(p[v] * np.log(p[v] / q[v]) for v in range(7)))
    found = np.asarray(exact_kl(jnp.asarray(logits, jnp.float32), jnp.asarray(other, jnp.float32)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    turned = np.asarray(exact_kl(jnp.asarray(other, jnp.float32), jnp.asarray(logits, jnp.float32)))
    assert np.abs(turned - expected).min() > 1e-3  # the other direction is another value


def test_exact_kl_is_finite_where_both_exclude_a_token():
    logits, other = jnp.array([0.0, 1.0, -jnp.inf]), jnp.array([1.0, 0.0, -jnp.inf])
    assert float(exact_kl(logits, other)) == pytest.approx(float(kl(*map(jax.nn.log_softmax, (logits[:2], other[:2])))))
    assert jnp.all(jnp.isfinite(jax.grad(lambda x: exact_kl(logits, x))(other)))


def test_self_distillation_moves_the_nested_policy_only():
    nested = jnp.array([-0.4, 0.2, 0.5, 0.9])
    to_full, to_nested = jax.grad(lambda *both: self_distillation_kl(*both), argnums=(0, 1))(LOGITS, nested)
    assert not to_full.any()
    np.testing.assert_allclose(to_nested, jax.nn.softmax(nested) - jax.nn.softmax(LOGITS), atol=1e-6)
    assert float(self_distillation_kl(LOGITS, LOGITS)) == pytest.approx(0, abs=1e-6)
