"""What multiplies each token's advantage: its importance weight, what masks and budgets leave of it, and the clips.

See `losses.policy_gradient` for how policies, clips and masks belong together.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nested_reft.estimators.budgeted_rejection import accepted_log_weight, is_accepted
from nested_reft.estimators.importance import (
    importance_log_weight,
    interpolated_log_weight,
    limited_weight,
    mixture_log_weight,
    token_log_ratio,
)
from nested_reft.estimators.rejection import accepted, mismatch
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.types import TrainBatch


class TokenWeights(NamedTuple):
    """What multiplies each token's advantage: the product of a factor and of what the clip acts on.

    Attributes:
        factor_BGC: m, or m h with three policies.
        ratio_BGC: h, or r with three policies.
        accepted_BGC: True at the tokens that count and that the mask or the budget keeps.
        truncated_BGC: True at accepted tokens whose h truncation changed.
    """

    factor_BGC: Float[Array, "B G C"]
    ratio_BGC: Float[Array, "B G C"]
    accepted_BGC: Bool[Array, "B G C"]
    truncated_BGC: Bool[Array, "B G C"]


def token_weights(
    target_logprob_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
    batch: TrainBatch,
    config: PolicyGradientConfig,
) -> TokenWeights:
    """Weight, mask and ratio of every token, frozen; see the module's first table.

    Args:
        target_logprob_BGC: log pi, frozen.
        mask_BGC: the tokens that count.
        batch: gives the log-probabilities of the other policies.
        config: the parts.
    """
    # Without a log-probability of its own, theta_old is theta: this is the first update after the rollout.
    old_BGC = target_logprob_BGC if batch.old_logprob_BGC is None else batch.old_logprob_BGC
    is_decoupled = config.clip_policies == "three"
    # Decoupled, h corrects the sampler and no later update, so the model that it leads to stands still.
    corrected_BGC = old_BGC if is_decoupled else target_logprob_BGC
    log_weight_BGC = batch_log_weight(corrected_BGC, mask_BGC, batch, config)
    # Positions without a token are judged as well, because a weighted baseline reads the weights there.
    kept_BGC = jnp.ones_like(mask_BGC)
    if config.obrs_lambda is not None:
        assert batch.acceptance_draw_BGC is not None  # `_check_inputs` has refused a batch without it
        draw_BGC = batch.acceptance_draw_BGC
        # One draw decides for a whole completion.
        draw_BGC = jnp.broadcast_to(draw_BGC[..., :1], draw_BGC.shape) if config.level == "sequence" else draw_BGC
        kept_BGC &= is_accepted(log_weight_BGC, draw_BGC, config.obrs_lambda)
        log_weight_BGC = accepted_log_weight(log_weight_BGC, config.obrs_lambda)
    weight_BGC = limited_weight(log_weight_BGC, config.truncate_at)
    if config.reject_by is not None:
        assert batch.behavior_logprob_BGC is not None  # `_check_inputs` has refused a batch without it
        mismatch_BGC = mismatch(corrected_BGC, batch.behavior_logprob_BGC, mask_BGC, config.reject_by)
        kept_BGC &= accepted(mismatch_BGC, config.reject_below, config.reject_above)
    factor_BGC, ratio_BGC = kept_BGC.astype(jnp.float32), weight_BGC
    if is_decoupled:
        step_BGC = importance_log_weight(
            token_log_ratio(target_logprob_BGC, old_BGC), mask_BGC, "base", config.clip_level
        )
        factor_BGC, ratio_BGC = factor_BGC * weight_BGC, limited_weight(step_BGC)
    # Without a limit given, `limited_weight` sets none. What is rejected has no weight that could be limited.
    is_truncated_BGC = kept_BGC & (weight_BGC != limited_weight(log_weight_BGC))
    return TokenWeights(factor_BGC, ratio_BGC, mask_BGC & kept_BGC, is_truncated_BGC)


def baseline_weight(
    weight_BGC: Float[Array, "B G C"], mask_BGC: Bool[Array, "B G C"], config: PolicyGradientConfig
) -> Float[Array, "B G C"]:
    """The weights that a weighted baseline compares: those of the tokens, and beside them what a token of ratio 1 has.

    Multiplying all weights of a position by one constant scales the estimator and must leave its best baseline as it
    is. With lambda below 1 `retrace` has such constants: lambda at `token` level, and lambda^t at `prefix` level. So
    they belong to the positions without a token as well. If these kept the weight 1, completions that have ended would
    outweigh the others by lambda^-2, and at `prefix` level by lambda^-2t.

    Args:
        weight_BGC: whole weights, of `token_weights`; positions without a token have ratio 1 and no lambda.
        mask_BGC: the tokens that count.
        config: the parts.
    """
    if config.bias_mitigation != "retrace" or config.retrace_lambda == 1:
        return weight_BGC
    factors_BGC = jnp.where(mask_BGC, 0, 1)
    if config.level == "prefix":
        # After its end a completion's trace goes on. Before its first token (forced ones delay it) it has one factor.
        ended_BGC = ~mask_BGC & (jnp.cumsum(mask_BGC, axis=-1) > 0)
        factors_BGC = jnp.where(mask_BGC, 0, jnp.maximum(jnp.cumsum(ended_BGC, axis=-1), 1))
    return weight_BGC * config.retrace_lambda**factors_BGC


def batch_log_weight(
    target_logprob_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
    batch: TrainBatch,
    config: PolicyGradientConfig,
) -> Float[Array, "B G C"]:
    """log h of the configured variant, with the denominators that the batch carries.

    Args:
        target_logprob_BGC: log-probability of the policy that h leads to, frozen: pi, or pi_old with three policies.
        mask_BGC: the tokens that count.
        batch: gives the log-probabilities of the policies to divide by.
        config: variant, level and lambda.

    Returns:
        log h in nats, before any limit.
    """
    # Without a log-probability of its own, theta_old is theta: this is the first update after the rollout.
    old_logprob_BGC = target_logprob_BGC if batch.old_logprob_BGC is None else batch.old_logprob_BGC
    if config.bias_mitigation == "mixture":
        assert batch.nested_logprob_BGC is not None and batch.full_share_BG is not None
        return mixture_log_weight(
            target_logprob_BGC, old_logprob_BGC, batch.nested_logprob_BGC, mask_BGC, batch.full_share_BG
        )
    # `practical` ignores the nesting, while the other variants divide by the policy that sampled.
    denominator_BGC = old_logprob_BGC if config.bias_mitigation == "practical" else batch.behavior_logprob_BGC
    assert denominator_BGC is not None  # `_check_inputs` has refused a batch without it
    log_ratio_BGC = token_log_ratio(target_logprob_BGC, denominator_BGC)
    if config.bias_mitigation == "interpolated":
        assert batch.mix_share_B is not None
        base_BGC = importance_log_weight(log_ratio_BGC, mask_BGC, "base", config.level)
        return interpolated_log_weight(base_BGC, batch.mix_share_B)
    return importance_log_weight(log_ratio_BGC, mask_BGC, config.bias_mitigation, config.level, config.retrace_lambda)


def clipped_ratio(
    ratio_BGC: Float[Array, "B G C"],
    advantage_BGC: Float[Array, "B G C"],
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None,
) -> tuple[Float[Array, "B G C"], Bool[Array, "B G C"]]:
    """The ratio that PPO's pessimistic surrogate multiplies the advantage by, with a limit for each side and each sign.

        min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and at least dual_clip * A where A < 0

    is A times r limited to r <= 1 + clip_high where A > 0, and to 1 - clip_low <= r <= dual_clip where A < 0.
    A token beyond its limit has no gradient; one exactly on it has.

    Source: PPO (Schulman et al., 2017, eq. 7); clip-higher: DAPO (arXiv 2503.14476, eq. 10); dual
    clip: Ye et al. (2020, eq. 5).

    Args:
        ratio_BGC: r, or the weight h with two policies; frozen, more than 0.
        advantage_BGC: A, no gradient, zero at tokens that do not count.
        clip_low: in (0, 1); None for no limit below.
        clip_high: more than 0; None for no limit above.
        dual_clip: c, more than 1; None for no limit above where A < 0.

    Returns:
        The limited ratio, and True where a limit changed it.
    """
    # The minimum in the formula binds on one side only, and which one it is depends on the sign of A.
    highest_BGC = jnp.full(ratio_BGC.shape, jnp.inf)
    if clip_high is not None:
        highest_BGC = jnp.where(advantage_BGC > 0, 1 + clip_high, highest_BGC)
    if dual_clip is not None:
        highest_BGC = jnp.where(advantage_BGC < 0, dual_clip, highest_BGC)
    lowest_BGC = jnp.zeros(ratio_BGC.shape)
    if clip_low is not None:
        lowest_BGC = jnp.where(advantage_BGC < 0, 1 - clip_low, lowest_BGC)
    clipped_BGC = (ratio_BGC < lowest_BGC) | (ratio_BGC > highest_BGC)
    return jnp.clip(ratio_BGC, lowest_BGC, highest_BGC), clipped_BGC
