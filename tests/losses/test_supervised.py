"""The supervised loss by hand: which completions are demonstrations, and what their tokens weigh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.losses.objective import TargetPass
from nested_reft.losses.supervised import Supervised
from tests.losses.batches import one_group
from tests.scored_groups import scored


def loss(target_BGC, batch):
    return Supervised().loss(TargetPass(target_BGC, jnp.zeros_like(target_BGC)), batch)


def test_only_right_completions_that_were_scored_are_demonstrations():
    """Partial credit is not right, whatever the reward says of it; a wrong reward would make 0.9 a demonstration."""
    groups = scored([[1.0, 0.9, 0.0, 1.0]], reward_BG=[[5.0] * 4], scored_BG=[[True, True, True, False]])
    assert Supervised().signal(groups).tolist() == [[1, 0, 0, 0]]


def test_the_mean_is_over_the_tokens_of_demonstrations():
    """Demonstrations of 2 and 1 tokens, -log pi of 1, 2 and 6: the mean is 3. Over completions it would be 3.75,
    over all five tokens of the batch 1.8."""
    target_BGC = -jnp.array([[[1.0, 2.0], [6.0, 50.0], [9.0, 9.0]]])
    _, batch = one_group(np.ones((3, 2)), [1.0, 1.0, 0.0], [2, 1, 2])
    output = loss(target_BGC, batch)
    assert float(output.total.mean()) == pytest.approx(3)
    assert float(output.parts["cross_entropy"].mean()) == pytest.approx(3)
    gradient_BGC = jax.grad(lambda t: loss(t, batch).total.mean())(target_BGC)
    np.testing.assert_allclose(gradient_BGC[0], -np.array([[1, 1], [1, 0], [0, 0]]) / 3, rtol=1e-6)
    assert output.weight_BGC[0].tolist() == [[1, 1], [1, 0], [0, 0]]


def test_forced_tokens_and_completions_that_do_not_count_are_not_imitated():
    target_BGC = -jnp.array([[[1.0, 2.0], [4.0, 8.0]]])
    _, batch = one_group(np.ones((2, 2)), [1.0, 1.0])
    assert float(
        loss(target_BGC, dataclasses.replace(batch, forced_BG=jnp.array([[1, 0]]))).total.mean()
    ) == pytest.approx(14 / 3)
    assert (
        float(loss(target_BGC, dataclasses.replace(batch, counted_BG=jnp.array([[True, False]]))).total.mean()) == 1.5
    )


def test_finite_where_a_token_without_weight_is_impossible():
    """0 times -inf is NaN: the token must leave the sum before it is multiplied."""
    target_BGC = jnp.array([[[-1.0, -jnp.inf], [-jnp.inf, -jnp.inf]]])
    _, batch = one_group(np.ones((2, 2)), [1.0, 0.0], [1, 2])
    value, gradient_BGC = jax.value_and_grad(lambda t: loss(t, batch).total.mean())(target_BGC)
    assert float(value) == 1 and jnp.all(jnp.isfinite(gradient_BGC))
    nothing = loss(target_BGC, dataclasses.replace(batch, signal_BG=jnp.zeros((1, 2)))).total
    assert float(nothing.mean()) == 0 and float(nothing.weight) == 0


def test_a_demonstration_needs_no_behavior_policy():
    target_BGC, batch = one_group(np.ones((2, 2)), [1.0, 1.0])
    assert float(loss(target_BGC, dataclasses.replace(batch, behavior_logprob_BGC=None)).total.mean()) == 1
    assert Supervised().needs(2).logprobs == ()
