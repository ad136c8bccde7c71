"""Weights between 1 and the ratio, and samples that are accepted at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.losses.config import PolicyGradientConfig, claims_unbiased
from nested_reft.losses.policy_gradient import PolicyGradient, policy_gradient_loss
from tests.losses.batches import one_group, random_batch

EXACT = PolicyGradientConfig("leave_one_out", "base", "sequence", "fixed_length", fixed_length_tokens=5)
MIXED = dataclasses.replace(EXACT, bias_mitigation="interpolated")
BUDGETED = dataclasses.replace(EXACT, obrs_lambda=2.0)
TOKEN = dataclasses.replace(EXACT, level="token")


def mixed(batch, share):
    return dataclasses.replace(batch, mix_share_B=jnp.full(len(batch.length_BG), share))


def drawn(batch, draw):
    return dataclasses.replace(batch, acceptance_draw_BGC=jnp.broadcast_to(jnp.asarray(draw), batch.tokens_BGC.shape))


def weights(target_BGC, batch, config):
    return np.asarray(policy_gradient_loss(target_BGC, batch, config).weight_BGC)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_mixed_weight_against_its_formula(key, level, share):
    """1 - a + a w of the counted tokens; `base` at a = 1, and 1 at a = 0."""
    target_BGC, batch = random_batch(key)
    base = weights(target_BGC, batch, dataclasses.replace(EXACT, level=level))
    found = weights(target_BGC, mixed(batch, share), dataclasses.replace(MIXED, level=level))
    np.testing.assert_allclose(found, np.where(batch.mask_BGC, 1 - share + share * base, 0), rtol=1e-5)


def test_the_mixed_gradient_lies_between(key):
    """It is linear in the weight, so it is the same mix of the two gradients."""
    target_BGC, batch = random_batch(key)

    def gradient(config, batch=batch):
        return jax.grad(lambda x: policy_gradient_loss(x, batch, config).mean())(target_BGC)

    none, whole = gradient(dataclasses.replace(TOKEN, bias_mitigation="one")), gradient(EXACT)
    np.testing.assert_allclose(gradient(MIXED, mixed(batch, 0.3)), 0.7 * none + 0.3 * whole, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_extreme_ratios_leave_numbers(share):
    target_BGC, batch = one_group([[1e-30, 1e30], [1.0, 1.0]], [1.0, -1.0])
    loss, gradient = jax.value_and_grad(lambda x: policy_gradient_loss(x, mixed(batch, share), MIXED).mean())(
        target_BGC
    )
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_accepted_completions_by_hand():
    """Ratios of completions 1/2, 6 and 1, lambda 2: accepted below 1/4, always, and below 1/2, by the first draw."""
    target_BGC, batch = one_group([[0.5, 1.0], [2.0, 3.0], [1.0, 1.0]], [1.0, 1.0, 1.0])
    draw_BGC = jnp.array([[[0.2, 0.9], [0.99, 0.0], [0.7, 0.1]]])
    np.testing.assert_allclose(weights(target_BGC, drawn(batch, draw_BGC), BUDGETED)[0], [[2, 2], [6, 6], [0, 0]])
    output = policy_gradient_loss(target_BGC, drawn(batch, draw_BGC), BUDGETED)
    parts = PolicyGradient(BUDGETED).metrics({name: part.mean() for name, part in output.parts.items()})
    # What is rejected stays in the divisor: two of three completions, and mean weights over 6 and over 4 tokens.
    assert float(parts["accepted_completions"]) == pytest.approx(2 / 3)
    assert float(parts["weight_mean"]) == pytest.approx(16 / 6) and float(parts["kept_weight_mean"]) == pytest.approx(4)
    assert float(output.total.weight) == 3


def test_accepted_tokens_by_hand():
    """The same ratios token by token: 1/2 and 1 are accepted below 1/4 and 1/2; 2 and 3 always."""
    config = dataclasses.replace(BUDGETED, level="token")
    target_BGC, batch = one_group([[0.5, 1.0], [2.0, 3.0], [1.0, 1.0]], [1.0, 1.0, 1.0])
    draw_BGC = jnp.array([[[0.2, 0.9], [0.99, 0.5], [0.7, 0.1]]])
    np.testing.assert_allclose(weights(target_BGC, drawn(batch, draw_BGC), config)[0], [[2, 0], [2, 3], [0, 2]])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_mean_over_draws_is_the_plain_gradient(key, level):
    """Over a grid of draws, for each completion or token by itself: rejection adds no bias to its level."""
    target_BGC, batch = random_batch(key)

    def gradient(config, batch):
        return jax.grad(lambda x: policy_gradient_loss(x, batch, config).mean())(target_BGC)

    config = dataclasses.replace(EXACT, level=level)
    budgeted = dataclasses.replace(config, obrs_lambda=1.5)
    draws = (jnp.arange(2000) + 0.5) / 2000
    found = jax.vmap(lambda draw: gradient(budgeted, drawn(batch, draw)))(draws)
    np.testing.assert_allclose(found.mean(axis=0), gradient(config, batch), atol=2e-3)


def test_three_policies_accept_by_the_sampler_alone(key):
    """With three policies rho is pi_old / pi_b, so a target that moves accepts the same samples."""
    target_BGC, batch = random_batch(key)
    config = dataclasses.replace(BUDGETED, clip_policies="three", clip_low=0.2, clip_high=0.2)
    accepted = [
        np.asarray(policy_gradient_loss(moved, drawn(batch, 0.6), config).parts["accepted_tokens"].sum)
        for moved in (target_BGC, target_BGC - 0.7)
    ]
    assert accepted[0] == accepted[1] > 0


@pytest.mark.parametrize(
    ("start", "changes", "message"),
    [
        (MIXED, {"level": "prefix"}, "set 'token' or 'sequence'"),
        (MIXED, {"mix_share": 1.5}, "mix_share is 1.5; allowed is 0 <= mix_share <= 1"),
        (EXACT, {"mix_share": 0.5}, "mix_share is 0.5, but bias_mitigation is 'base'; only 'interpolated' reads it"),
        (EXACT, {"obrs_lambda": 0.0}, "obrs_lambda is 0.0; allowed is from 2.1e-9 to 4.8e8"),
        (BUDGETED, {"level": "prefix"}, "use bias_mitigation 'base' and level 'token' or 'sequence'"),
        (BUDGETED, {"bias_mitigation": "mixture"}, "obrs_lambda is set with bias_mitigation 'mixture'"),
        (BUDGETED, {"reject_by": "sequence_ratio", "reject_above": 3.0}, "set beside reject_by 'sequence_ratio'"),
        (BUDGETED, {"truncate_at": 2.0}, "accepted weights are at least obrs_lambda, so all would be truncated"),
        (BUDGETED, {"clip_high": 0.2}, "clip_high is set with clip_policies 'two'"),
    ],
)
def test_refusals(start, changes, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(start, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"), [(MIXED, "needs batch.mix_share_B"), (BUDGETED, "pass batch.acceptance_draw_BGC")]
)
def test_a_batch_without_what_is_needed(key, config, message):
    with pytest.raises(ValueError, match=message):
        policy_gradient_loss(*random_batch(key), config)


def test_random_rejection_claims_what_the_weight_claims():
    assert claims_unbiased(BUDGETED) and not claims_unbiased(dataclasses.replace(BUDGETED, level="token"))
    assert not claims_unbiased(dataclasses.replace(MIXED, mix_share=1.0))
