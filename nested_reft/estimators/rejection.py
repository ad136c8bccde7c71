"""Masks: which samples are too far from the policy that they correct, apart from how the others are weighted.

With rho = pi / pi_b of a token, where pi_b sampled it, and |y| the counted tokens of a completion:

    reject_by        value                                   judges      bounds
    token_ratio      rho_t                                   tokens      below and above 1
    sequence_ratio   w(y) = prod_t rho_t                     completions below and above 1
    geometric_mean   w(y)^(1 / |y|)                          completions below and above 1
    sequence_k3      mean over t of rho_t - 1 - log rho_t    completions above 0 alone

The last is the k3 estimate of KL(pi_b || pi) per token: unlike a product it does not let high ratios make up for low
ones. A mask is biased as truncation is, and more so at the same bound, since what it takes is gone whole. It helps
where a huge ratio means a fault rather than a rare token.

Sources: masked importance sampling and the geometric mask: Liu and Li et al. (2025), "When Speed Kills Stability";
masks by k3: verl's rollout correction; by token ratio on both sides: IcePop (Zhao et al., 2025; arXiv 2510.18855).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nested_reft.estimators.importance import LOG_RATIO_LIMIT, Level, importance_log_weight, token_log_ratio
from nested_reft.estimators.kl import kl_estimate

RejectBy = Literal["token_ratio", "sequence_ratio", "geometric_mean", "sequence_k3"]

LEVELS: dict[RejectBy, Level] = {"token_ratio": "token", "sequence_ratio": "sequence", "geometric_mean": "geometric"}
"""The level of the `base` weight that each ratio equals; a divergence equals none."""

KEPT_SHARES = (0.95, 0.99)  # of the samples, for which `keeping_bounds` finds bounds


def mismatch(
    target_logprob_BGC: Float[Array, "B G C"],
    behavior_logprob_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
    reject_by: RejectBy,
) -> Float[Array, "B G C"]:
    """What a mask judges: a row of the module's table.

    Args:
        target_logprob_BGC: log pi, in nats.
        behavior_logprob_BGC: log pi_b of the same tokens, in nats.
        mask_BGC: the tokens that count; the others enter no product and no mean.
        reject_by: the row.

    Returns:
        Ratios, from exp(-20) to exp(20), or nats. All tokens of a completion have its value where completions are
        judged.
    """
    if reject_by in LEVELS:
        log_ratio_BGC = token_log_ratio(target_logprob_BGC, behavior_logprob_BGC)
        log_value_BGC = importance_log_weight(log_ratio_BGC, mask_BGC, "base", LEVELS[reject_by])
        return jnp.exp(jnp.clip(log_value_BGC, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    # The samples are the behavior policy's, so it is the one that the divergence is taken from.
    k3_BGC = jnp.where(mask_BGC, kl_estimate(behavior_logprob_BGC, target_logprob_BGC, "k3"), 0.0)
    mean_BG1 = k3_BGC.sum(axis=-1, keepdims=True) / jnp.maximum(mask_BGC.sum(axis=-1, keepdims=True), 1)
    return jnp.broadcast_to(mean_BG1, k3_BGC.shape)


def accepted(
    value_BGC: Float[Array, "B G C"], reject_below: float | None, reject_above: float | None
) -> Bool[Array, "B G C"]:
    """True where a mask keeps the token; a value on a bound is kept.

    Args:
        value_BGC: of `mismatch`.
        reject_below, reject_above: the bounds; None for none.
    """
    # What is asked is whether a value lies outside, so that NaN, which means a broken model, is kept and shows.
    rejected_BGC = jnp.zeros(value_BGC.shape, bool)
    if reject_below is not None:
        rejected_BGC |= value_BGC < reject_below
    if reject_above is not None:
        rejected_BGC |= value_BGC > reject_above
    return ~rejected_BGC


def keeping_bounds(
    target_logprob_BGC: Float[Array, "B G C"],
    behavior_logprob_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
) -> dict[str, Float[Array, "4"]]:
    """For each way to judge, the bounds that would keep 95 % and 99 % of these samples.

    Ratios lose equal shares at both ends; a divergence loses its largest values alone.

    Args:
        target_logprob_BGC: log pi, in nats.
        behavior_logprob_BGC: log pi_b of the same tokens, in nats.
        mask_BGC: the tokens that count.

    Returns:
        By the names of `RejectBy`: lower and upper bound for 95 %, then both for 99 %; zeros where no token counts.
    """
    found = {}
    for reject_by in get_args(RejectBy):
        value_BGC, present_BGC = mismatch(target_logprob_BGC, behavior_logprob_BGC, mask_BGC, reject_by), mask_BGC
        if reject_by != "token_ratio":
            # Long completions would count more if each token brought the value of its completion.
            value_BGC, present_BGC = value_BGC[..., :1], mask_BGC.any(axis=-1, keepdims=True)
        sides = 1 if reject_by == "sequence_k3" else 2
        ends = [end for share in KEPT_SHARES for end in ((1 - share) * (sides - 1) / 2, 1 - (1 - share) / sides)]
        # NaN marks what does not count: a selection of the rest would have a shape that depends on values.
        quantile_4 = jnp.nanquantile(jnp.where(present_BGC, value_BGC, jnp.nan), jnp.array(ends))
        if sides == 1:
            quantile_4 = quantile_4 * jnp.array([0.0, 1.0] * len(KEPT_SHARES))
        found[reject_by] = jnp.where(mask_BGC.any(), quantile_4, 0.0)
    return found
