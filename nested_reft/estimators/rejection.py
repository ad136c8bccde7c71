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

import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nested_reft.estimators.importance import LOG_RATIO_LIMIT, Level, importance_log_weight, token_log_ratio
from nested_reft.estimators.kl import kl_estimate

RejectBy = Literal["token_ratio", "sequence_ratio", "geometric_mean", "sequence_k3"]

LEVELS: dict[RejectBy, Level] = {"token_ratio": "token", "sequence_ratio": "sequence", "geometric_mean": "geometric"}
"""The level of the `base` weight that each ratio equals; a divergence equals none."""

KEPT_SHARES = (0.95, 0.99)  # of the samples, for which `keeping_bounds` finds bounds
# Ratios this near to 1, and divergences this near to 0, are those of equal policies: they tell of rounding.
AGREE_RATIO, AGREE_NATS = 1e-5, 1e-6


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
    """For each way to judge, bounds that would keep at least 95 % and 99 % of these samples, and that may be set.

    Ratios lose equal shares at both ends; a divergence loses its largest values alone. Ratios of 1 are never rejected,
    so a lower bound is below 1 and an upper one above it. Of samples far off-policy nearly all have a geometric mean
    below 1: an upper bound there would reject those that the target likes best. Where one side can have no bound, the
    other loses the whole share. Where the policies agree, neither side needs one.

    Args:
        target_logprob_BGC: log pi, in nats.
        behavior_logprob_BGC: log pi_b of the same tokens, in nats.
        mask_BGC: the tokens that count.

    Returns:
        By the names of `RejectBy`: lower and upper bound for 95 %, then both for 99 %; NaN for no bound.
    """
    found = {}
    # Of each share: where both sides lose half of the rest, and where one side loses all of it.
    ends = [(1 - share) * part for share in KEPT_SHARES for part in (0.5, 1.0)]
    for reject_by in get_args(RejectBy):
        value_BGC, present_BGC = mismatch(target_logprob_BGC, behavior_logprob_BGC, mask_BGC, reject_by), mask_BGC
        if reject_by != "token_ratio":
            # Long completions would count more if each token brought the value of its completion.
            value_BGC, present_BGC = value_BGC[..., :1], mask_BGC.any(axis=-1, keepdims=True)
        # NaN marks what does not count: a selection of the rest would have a shape that depends on values.
        counted_BGC = jnp.where(present_BGC, value_BGC, jnp.nan)
        quantiles = jnp.nanquantile(counted_BGC, jnp.array([*ends, *(1 - end for end in ends)]))
        low_22, high_22 = (
            jnp.where((x > limits[0]) & (x < limits[1]), x, jnp.nan)
            for x, limits in zip(quantiles.reshape(2, -1, 2), _limits(reject_by), strict=True)
        )
        # Both sides have a bound, or one has that of the whole share.
        lacks_2 = jnp.isnan(low_22[:, 0]), jnp.isnan(high_22[:, 0])
        low_2, high_2 = (
            jnp.where(other_2 & ~jnp.isnan(x_22[:, 1]), x_22[:, 1], x_22[:, 0])
            for x_22, other_2 in zip((low_22, high_22), reversed(lacks_2), strict=True)
        )
        found[reject_by] = jnp.stack([low_2, high_2], axis=-1).reshape(-1)
    return found


def written_bounds(reject_by: str, bounds: Sequence[float | None]) -> list[float | None]:
    """Bounds as they are shown: three digits of each, and of its distance from 1 where it is a ratio.

    So a bound near 1 stays on its side of it, and what is shown may be set.

    Args:
        reject_by: what they are bounds of.
        bounds: lower and upper ones in turns; NaN or None for no bound.

    Returns:
        The rounded bounds; None for no bound, and where the configuration would refuse it.
    """
    limits, shown = _limits(reject_by), list[float | None]()
    for index, bound in enumerate(bounds):
        low, high = limits[index % 2]
        if bound is None or not low < bound < high:
            shown.append(None)
            continue
        finest = bound if reject_by == "sequence_k3" else min(bound, abs(bound - 1))
        shown.append(round(bound, 2 - math.floor(math.log10(finest))))
    return shown


def _limits(reject_by: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Between which values a lower and an upper bound may be suggested; the configuration allows a little more."""
    least, largest = math.exp(-LOG_RATIO_LIMIT) * 1.01, math.exp(LOG_RATIO_LIMIT) / 1.01
    if reject_by == "sequence_k3":
        # Nothing lies between infinity and itself: a divergence has no lower bound.
        return (math.inf, math.inf), (AGREE_NATS, largest)
    return (least, 1 - AGREE_RATIO), (1 + AGREE_RATIO, largest)
