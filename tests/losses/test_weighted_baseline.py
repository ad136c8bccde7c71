"""The advantage that is made within the loss, where the weights are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.policy_gradient import policy_gradient_loss
from tests.losses.batches import one_group, random_batch

SEQUENCE = PolicyGradientConfig("weighted_leave_one_out", "base", "sequence", "fixed_length", fixed_length_tokens=5)


@pytest.mark.parametrize("changes", [{}, {"level": "token"}, {"level": "prefix"}, {"truncate_at": 1.3}])
def test_the_loss_against_a_slow_loop(key, changes):
    """Per token -h_t (R_i - b_it) / 5, over the completions; a position past the end counts as ratio 1."""
    config = dataclasses.replace(SEQUENCE, **changes)
    target_BGC, batch = random_batch(key)
    # One completion has no reward, so it does not count.
    signal_BG, counted_BG = batch.signal_BG.at[1, 2].set(jnp.nan), batch.counted_BG.at[1, 2].set(False)
    batch = dataclasses.replace(batch, signal_BG=signal_BG, counted_BG=counted_BG)
    mask_BGC = np.asarray(batch.mask_BGC)
    log_BGC = np.where(mask_BGC, np.asarray(target_BGC - batch.behavior_logprob_BGC, np.float64), 0)
    cumulated = {"token": log_BGC, "prefix": log_BGC.cumsum(axis=-1)}
    whole_BGC = np.broadcast_to(log_BGC.sum(axis=-1, keepdims=True), log_BGC.shape)
    weight_BGC = np.exp(cumulated.get(config.level, whole_BGC))
    if config.truncate_at is not None:
        weight_BGC = np.minimum(weight_BGC, config.truncate_at)
    reward_BG, expected, counted = np.asarray(batch.signal_BG, np.float64), 0.0, 0
    for b, i in np.ndindex(*reward_BG.shape):
        counted += mask_BGC[b, i].any()
        for t in np.flatnonzero(mask_BGC[b, i]):
            others = [j for j in range(3) if j != i and not np.isnan(reward_BG[b, j])]
            squares = [weight_BGC[b, j, t] ** 2 for j in others]
            baseline = np.dot(squares, reward_BG[b, others]) / np.sum(squares)
            expected -= weight_BGC[b, i, t] * (reward_BG[b, i] - baseline) / 5
    loss, gradient_BGC = jax.value_and_grad(lambda x: policy_gradient_loss(x, batch, config).mean())(target_BGC)
    assert float(loss) == pytest.approx(expected / counted, rel=1e-5)
    # The baseline is a number: the gradient is that of h_t A_t log pi alone.
    assert np.isfinite(gradient_BGC).all() and float(gradient_BGC.sum()) == pytest.approx(expected / counted, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"obrs_lambda": 0.5}, {"reject_by": "sequence_ratio", "reject_above": 1.5}])
def test_shorter_completions_keep_their_weight_past_their_end(key, changes):
    """At sequence level the baseline is one number for all tokens of a completion, whatever the others' lengths."""
    target_BGC, batch = random_batch(key)
    batch = dataclasses.replace(batch, acceptance_draw_BGC=jnp.full(target_BGC.shape, 0.6))
    config = dataclasses.replace(SEQUENCE, **changes)
    gradient_BGC = jax.grad(lambda x: policy_gradient_loss(x, batch, config).mean())(target_BGC)
    for row, mask in zip(gradient_BGC.reshape(-1, 4), batch.mask_BGC.reshape(-1, 4), strict=True):
        np.testing.assert_allclose(row[mask], row[mask][:1].repeat(mask.sum()), rtol=1e-5)
    assert len(set(np.asarray(batch.length_BG).ravel().tolist())) > 1


@pytest.mark.parametrize("level", ["token", "prefix"])
def test_the_baseline_does_not_depend_on_the_scale_of_a_position(key, level):
    """With lambda all weights of position t are lambda (token) or lambda^(t + 1) (prefix) times those without it.

    So each token's term is that many times the one at lambda 1. With the weight 1 past the end of a completion, those
    that have ended would outweigh the others, and terms beside them would differ.
    """
    target_BGC, batch = random_batch(key)
    batch = dataclasses.replace(batch, forced_BG=jnp.zeros_like(batch.forced_BG))
    plain = dataclasses.replace(SEQUENCE, bias_mitigation="retrace", level=level)

    def terms_BGC(config):
        return jax.grad(lambda x: policy_gradient_loss(x, batch, config).mean())(target_BGC)

    scale_C = 0.5 ** (np.ones(4) if level == "token" else np.arange(1, 5))
    discounted_BGC = terms_BGC(dataclasses.replace(plain, retrace_lambda=0.5))
    np.testing.assert_allclose(discounted_BGC, scale_C * terms_BGC(plain), rtol=1e-5, atol=1e-9)
    assert (batch.length_BG < 4).any() and (batch.length_BG == 4).any(), "ended completions stand beside others"


def test_forced_tokens_before_a_completion_weigh_one_factor():
    """At position 0 the second completion is forced; ratio 1 has weight lambda there, as the third's own token has.

    The others of the first have rewards 1 and 0 and equal weights, so b = 1/2 and its term is -lambda (0 - 1/2) / 5.
    """
    target_BGC, batch = one_group(np.ones((3, 2)), [0.0, 1.0, 0.0])
    batch = dataclasses.replace(batch, forced_BG=jnp.array([[0, 1, 0]]))
    config = dataclasses.replace(SEQUENCE, bias_mitigation="retrace", level="prefix", retrace_lambda=0.5)
    gradient_BGC = jax.grad(lambda x: policy_gradient_loss(x, batch, config).total.sum)(target_BGC)
    assert float(gradient_BGC[0, 0, 0]) == pytest.approx(0.5 * 0.5 / 5)


def test_equal_weights_need_no_weighted_baseline():
    with pytest.raises(ValueError, match="set 'leave_one_out', which is the same then"):
        dataclasses.replace(SEQUENCE, bias_mitigation="one", level="token")
