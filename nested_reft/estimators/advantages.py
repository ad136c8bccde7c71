"""Group-relative advantages: A(y) = R(y) - baseline, from the G completions of one prompt.

An estimator with a value function gives an advantage for each token instead. The loss reads it from
`TrainBatch.token_signal_BGC` where it is given; nothing here fills it.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Advantage = Literal["no_baseline", "leave_one_out", "group_mean", "group_std", "weighted_leave_one_out"]

# GRPO divides by std + epsilon. A group of equal rewards then gives 0 / 1e-6 = 0 and not 0 / 0.
STD_EPSILON = 1e-6
SQUARE_EPSILON = 1e-12  # of squared weights whose usual size is 1


def group_advantages(
    reward_BG: Float[Array, "B G"], scored_BG: Bool[Array, "B G"], advantage: Advantage
) -> Float[Array, "B G"]:
    """Advantage of each completion relative to the others of its prompt.

    With n scored completions of mean m:

    * `no_baseline`: R_i. Unbiased, most variance; the only one that a group of one can use
      (REINFORCE; Williams, 1992).
    * `leave_one_out`: R_i - mean of the other n - 1. The baseline does not depend on y_i, so the
      gradient stays unbiased (RLOO; Kool et al., 2019; Ahmadian et al., 2024).
    * `group_mean`: R_i - m = (n - 1) / n * `leave_one_out`. Scales the expected gradient by
      (n - 1) / n and leaves its direction (Dr. GRPO, arXiv 2503.20783).
    * `group_std`: (R_i - m) / (std + 1e-6), std with n - 1 in the denominator. Biased: it weights
      prompts, and groups of one prompt, by 1 / std (GRPO, arXiv 2402.03300).
    * `weighted_leave_one_out`: R_i, NaN without a score. `weighted_advantages` subtracts the baseline in the
      loss, where the weights are known.

    Args:
        reward_BG: rewards.
        scored_BG: False where there is no reward; such completions enter no baseline and get
            advantage zero.
        advantage: one of the above.

    Returns:
        Advantages. But for `no_baseline` and `weighted_leave_one_out`, exactly zero for a group with fewer than two
        scored completions or with equal rewards.
    """
    if advantage == "weighted_leave_one_out":
        return jnp.where(scored_BG, reward_BG, jnp.nan)
    scored = scored_BG.astype(jnp.float32)
    # An unscored reward may be NaN, and 0 * NaN is NaN, so it is replaced before any sum.
    reward_BG = jnp.where(scored_BG, reward_BG, 0.0)
    if advantage == "no_baseline":
        return reward_BG
    count_B1 = scored.sum(axis=-1, keepdims=True)
    # A group without any scored completion divides 0 by 1.
    mean_B1 = reward_BG.sum(axis=-1, keepdims=True) / jnp.maximum(count_B1, 1)
    # Compared, not subtracted: the mean of equal rewards may differ from them by a rounding, which
    # the division by a standard deviation of the same size would blow up.
    highest_B1 = jnp.max(reward_BG, axis=-1, keepdims=True, initial=-jnp.inf, where=scored_BG)
    lowest_B1 = jnp.min(reward_BG, axis=-1, keepdims=True, initial=jnp.inf, where=scored_BG)
    centered_BG = jnp.where(scored_BG & (highest_B1 > lowest_B1), reward_BG - mean_B1, 0.0)
    if advantage == "group_mean":
        return centered_BG
    # A group of one has no others; its centred reward is 0, so the divisor 1 changes nothing.
    others_B1 = jnp.maximum(count_B1 - 1, 1)
    if advantage == "leave_one_out":
        # R_i - (n m - R_i) / (n - 1) = (R_i - m) n / (n - 1), so the centred rewards serve this baseline too.
        return centered_BG * count_B1 / others_B1
    # Unscored entries of `centered_BG` are 0 and add nothing to the sum of squares.
    std_B1 = jnp.sqrt((centered_BG**2).sum(axis=-1, keepdims=True) / others_B1)
    return centered_BG / (std_B1 + STD_EPSILON)


def weighted_advantages(reward_BG: Float[Array, "B G"], weight_BGC: Float[Array, "B G C"]) -> Float[Array, "B G C"]:
    """R_i less the mean of the others' rewards, weighted by the squares of their importance weights.

        A_it = R_i - b_it,    b_it = sum_{j != i} h_jt^2 R_j / sum_{j != i} h_jt^2

    The variance of h (R - b) grad log pi is least at b = E[h^2 |grad log pi|^2 R] / E[h^2 |grad log pi|^2], which is
    estimated here from the other completions, without the norms of the gradients. Like the plain leave-one-out
    mean, b_it does not depend on y_i, so the estimator keeps its expectation. Where weights are equal, the two agree;
    where few weights are large, the plain mean is of rewards that hardly enter the gradient.

    Source: the optimal constant baseline (Greensmith et al., 2004, theorem 8) with importance weights. Departure: the
    weights of each position stand in for those of the whole sum over tokens.

    Args:
        reward_BG: rewards; NaN where there is none, which enters no baseline.
        weight_BGC: h, 0 or more, no gradient. At token and prefix level, positions after a completion's end need the
            weight that a token of ratio 1 would have (`losses.token_weights.baseline_weight`); these do not depend on
            the other completions either.

    Returns:
        Advantages; zero without a reward, in groups with fewer than two of them, and where all rewards are equal.
    """
    scored_BG = ~jnp.isnan(reward_BG)
    reward_BG = jnp.where(scored_BG, reward_BG, 0.0)
    # Differences make equal rewards give exactly zero, and leave out the completion itself.
    difference_BGG = reward_BG[:, :, None] - reward_BG[:, None, :]
    # Where all other weights are zero, the small number makes it the plain mean.
    square_BGC = jnp.where(scored_BG[..., None], weight_BGC**2 + SQUARE_EPSILON, 0.0)
    # A total less the completion's own part would lose the others' digits where its weight is large.
    others_GG = 1.0 - jnp.eye(reward_BG.shape[1])
    total_BGC = jnp.einsum("ij,bjc->bic", others_GG, square_BGC)
    advantage_BGC = jnp.einsum("bij,bjc->bic", difference_BGG, square_BGC)
    # Without any other completion 0 is divided by 1.
    return jnp.where(scored_BG[..., None], advantage_BGC / jnp.where(total_BGC == 0, 1.0, total_BGC), 0.0)
