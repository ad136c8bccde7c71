"""The closed form of natural policy gradient against the problem it solves, and against the optimum it must reach."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.verification.tabular_npg import action_values, npg_iterates, npg_step, text_logprobs

LAMBDA, ETA = 0.3, 2.0


def random_policy(seed: int, *shape: int) -> jax.Array:
    return jax.nn.log_softmax(1.5 * jax.random.normal(jax.random.key(seed), shape), axis=-1)


def kl(p, log_q):
    return (p * (jnp.log(p) - log_q)).sum(axis=-1)


def objective(p, q, logprob, reference):
    return -(p * q).sum(axis=-1) + LAMBDA * kl(p, reference) + kl(p, logprob) / ETA


def test_a_step_minimises_its_objective():
    """Against 2000 other policies near and far, and by the condition of an optimum: the gradient is constant in a."""
    logprob, reference, q = random_policy(0, 4), random_policy(1, 4), jnp.array([1.0, -0.5, 0.2, 0.0])
    found = jnp.exp(npg_step(logprob, reference, q, LAMBDA, ETA))
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)
    gradient = jax.grad(objective)(found, q, logprob, reference)
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-5)
    noise = jax.random.normal(jax.random.key(2), (2000, 4)) * jnp.geomspace(1e-3, 3, 2000)[:, None]
    others = jax.nn.softmax(jnp.log(found) + noise, axis=-1)
    assert (objective(others, q, logprob, reference) >= objective(found, q, logprob, reference) - 1e-6).all()


def test_a_step_by_hand():
    """Two actions, lambda = 1 and eta = 1: pi is proportional to sqrt(pi_ref pi_t e^Q), here sqrt(0.5 * 0.2 * e^2) and
    sqrt(0.5 * 0.8). Without the reference's half it would be 0.2 e^2 against 0.8."""
    step = npg_step(jnp.log(jnp.array([0.2, 0.8])), jnp.log(jnp.array([0.5, 0.5])), jnp.array([2.0, 0.0]), 1.0, 1.0)
    weight = np.sqrt([0.5 * 0.2 * np.exp(2), 0.5 * 0.8])
    np.testing.assert_allclose(jnp.exp(step), weight / weight.sum(), rtol=1e-6)


def test_an_infinite_step_forgets_the_policy():
    reference, q = random_policy(1, 3, 4), jax.random.normal(jax.random.key(4), (3, 4))
    expected = jax.nn.log_softmax(reference + q / LAMBDA, axis=-1)
    for seed in (5, 6):
        found = npg_step(random_policy(seed, 3, 4), reference, q, LAMBDA, float("inf"))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_without_a_penalty_the_reference_has_no_part():
    logprob, q = random_policy(0, 4), jnp.array([1.0, -0.5, 0.2, 0.0])
    found = npg_step(logprob, random_policy(7, 4), q, 0.0, ETA)
    np.testing.assert_allclose(found, jax.nn.log_softmax(logprob + ETA * q), rtol=1e-5)


def test_equal_values_leave_the_reference_alone():
    """With r = 0 the start is the optimum already, however many steps are taken."""
    reference = [random_policy(0, 3), random_policy(1, 3, 3)]
    *_, last = npg_iterates(reference, jnp.zeros((3, 3)), LAMBDA, ETA, 5)
    for now, start in zip(last, reference, strict=True):
        np.testing.assert_allclose(now, start, atol=1e-5)


def test_values_by_hand():
    """Two tokens of two: Q(a) = sum_b pi(b | a) (r(a, b) - lambda log(pi / ref)), with pi = ref = 1/2: the mean reward.
    A policy that always takes b = 1 pays lambda log 2."""
    half, reward = jnp.log(jnp.full((2, 2), 0.5)), jnp.array([[0.0, 1.0], [2.0, 3.0]])
    start = jnp.log(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(action_values([start, half], [start, half], reward, 1.0)[0], [0.5, 2.5])
    certain = jnp.log(jnp.array([[1e-12, 1.0], [1e-12, 1.0]]))
    first = action_values([start, certain], [start, half], reward, 1.0)[0]
    np.testing.assert_allclose(first, np.array([1.0, 3.0]) - np.log(2), rtol=1e-5)


@pytest.mark.parametrize("step_size", [1.0, float("inf")])
def test_iterates_reach_the_optimum_over_whole_texts(step_size):
    """pi*(y) is proportional to pi_ref(y) exp(r(y) / lambda), which no step was told; the objective never falls."""
    shape = (3, 3, 3)
    reference = [random_policy(depth, *shape[: depth + 1]) for depth in range(3)]
    reward = jax.random.uniform(jax.random.key(9), shape)
    iterates = npg_iterates(reference, reward, LAMBDA, step_size, 40)
    optimum = jax.nn.log_softmax((text_logprobs(reference) + reward / LAMBDA).ravel()).reshape(shape)
    np.testing.assert_allclose(text_logprobs(iterates[-1]), optimum, atol=1e-4)
    reached = []
    for policy in iterates:
        logprob = text_logprobs(policy)
        reached.append(float((jnp.exp(logprob) * (reward - LAMBDA * (logprob - text_logprobs(reference)))).sum()))
    assert all(after >= before - 1e-6 for before, after in itertools.pairwise(reached))
    assert reached[-1] > reached[0] + 0.05


@pytest.mark.parametrize(("kl_coefficient", "step_size"), [(-0.1, 1.0), (0.1, 0.0), (0.0, float("inf"))])
def test_steps_without_a_solution_are_refused(kl_coefficient, step_size):
    policy = random_policy(0, 4)
    with pytest.raises(ValueError, match="allowed is"):
        npg_step(policy, policy, policy, kl_coefficient, step_size)
