"""How far off-policy a batch is, and what to do when it is too far."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from nested_reft.estimators.importance import LOG_RATIO_LIMIT, token_log_ratio

# The median and both tails are logged, because a mean hides the few large ratios that matter.
RATIO_QUANTILES = (0.05, 0.5, 0.95)
RATIO_BOUND = 2.0  # `ratio_tail` is the share of tokens whose ratio lies outside [1/2, 2]


Number = Float[Array, ""] | Float[np.ndarray, ""] | float  # on the devices within an update, on the host after it


@struct.dataclass
class Health:
    """How far samples are from the target policy, whatever weight the loss gives them.

    With rho = pi / pi_b of each counted token, and w(y) = prod_t rho_t over each completion:

    Attributes:
        ess_token, ess_sequence: effective sample size (sum w)^2 / (n sum w^2), in (0, 1] (Kish, 1965),
            of the tokens' ratios and of the completions'; 1 when on-policy.
        ratio_mean: of rho. It is 1 in expectation; below 1 it tells of rare, heavy ratios that were not sampled.
        sequence_ratio_mean: of w(y), likewise.
        ratio_max: the largest rho.
        kl_behavior_target: mean of log pi_b - log pi over the sampled tokens, in nats: an unbiased
            estimate of KL(pi_b || pi) per token.
        ratio_quantile_05, ratio_quantile_50, ratio_quantile_95: of rho.
        ratio_tail: share of the tokens with rho outside [1/2, 2]. A mean or an effective sample size over few
            tokens does not see how many are far off; this does.
    """

    ess_token: Number
    ess_sequence: Number
    ratio_mean: Number
    sequence_ratio_mean: Number
    ratio_max: Number
    kl_behavior_target: Number
    ratio_quantile_05: Number
    ratio_quantile_50: Number
    ratio_quantile_95: Number
    ratio_tail: Number


def off_policy_health(
    target_logprob_BGC: Float[Array, "B G C"],
    behavior_logprob_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
) -> Health:
    """`Health` of the masked tokens; all zero when no token counts.

    Under a mixture the behavior policy is, for each completion, the component that sampled it. What
    the loss made of the ratios (weights after truncation, clipped share) is in its own parts; see
    `policy_gradient_loss` and `kish`.

    Args:
        target_logprob_BGC: log pi, in nats.
        behavior_logprob_BGC: log pi_b of the distribution that each token was drawn from, in nats.
        mask_BGC: the tokens that count.
    """
    # An empty mask gives 0 / 1 in the means below and not 0 / 0.
    count = jnp.maximum(mask_BGC.sum(), 1)
    # Padding holds log-probabilities of token 0, so it is cleared before any sum or maximum.
    log_ratio_BGC = jnp.where(mask_BGC, token_log_ratio(target_logprob_BGC, behavior_logprob_BGC), 0.0)
    # The exponential of a clamped log is finite, so one broken token cannot make the mean infinite.
    clamped_BGC = jnp.clip(log_ratio_BGC, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BGC = jnp.where(mask_BGC, jnp.exp(clamped_BGC), 0.0)
    # NaN marks the tokens that do not count: a selection of the others would have a shape that depends on values.
    # A batch without any token has NaN for every quantile, which becomes 0.
    quantiles = jnp.nanquantile(jnp.where(mask_BGC, ratio_BGC, jnp.nan), jnp.array(RATIO_QUANTILES))
    # The comparison is turned around, so that a NaN lies outside.
    outside_BGC = mask_BGC & ~(jnp.abs(log_ratio_BGC) <= math.log(RATIO_BOUND))
    # A completion counts where one of its tokens does.
    present_BG = mask_BGC.any(axis=-1)
    sequence_log_ratio_BG = jnp.where(present_BG, log_ratio_BGC.sum(axis=-1), -jnp.inf)
    sequence_ratio_BG = jnp.exp(jnp.minimum(sequence_log_ratio_BG, LOG_RATIO_LIMIT))
    low, middle, high = (jnp.where(mask_BGC.any(), value, 0.0) for value in quantiles)
    return Health(
        ess_token=effective_sample_size(jnp.where(mask_BGC, log_ratio_BGC, -jnp.inf)),
        ess_sequence=effective_sample_size(sequence_log_ratio_BG),
        ratio_mean=ratio_BGC.sum() / count,
        sequence_ratio_mean=sequence_ratio_BG.sum() / jnp.maximum(present_BG.sum(), 1),
        ratio_max=ratio_BGC.max(),
        kl_behavior_target=-log_ratio_BGC.sum() / count,
        ratio_quantile_05=low,
        ratio_quantile_50=middle,
        ratio_quantile_95=high,
        ratio_tail=outside_BGC.sum() / count,
    )


def effective_sample_size(log_weight: Float[Array, "..."]) -> Float[Array, ""]:
    """(sum w)^2 / (n sum w^2) from log-weights, over those above -inf; zero when there are none.

    Args:
        log_weight: log w in nats, of any shape; -inf where there is no sample.

    Returns:
        The share of the n samples that would carry as much without weights, in [0, 1].
    """
    # A log-weight of -inf means that there is no sample at this place, as opposed to one of tiny weight.
    present = log_weight > -math.inf
    # The result does not depend on the scale of the weights, so the largest is made 1 and nothing overflows. With no
    # sample the maximum would be -inf, and -inf - (-inf) is NaN; the finite `initial` prevents that.
    shifted = log_weight - jnp.max(jnp.where(present, log_weight, -jnp.inf), initial=-1e30)
    weight = jnp.where(present, jnp.exp(shifted), 0.0)
    return kish(weight.sum() / jnp.maximum(present.sum(), 1), (weight**2).sum() / jnp.maximum(present.sum(), 1))


def kish(weight_mean: Float[Array, ""], weight_square_mean: Float[Array, ""]) -> Float[Array, ""]:
    """Effective sample size mean(w)^2 / mean(w^2), in [0, 1] (Kish, 1965); zero when all weights are.

    Args:
        weight_mean: mean(w) of the n samples.
        weight_square_mean: mean(w^2) of the same samples.

    Returns:
        The effective sample size as a share of n: 1 where all weights are equal, 1 / n where one is
            alone.
    """
    # The inner `where` keeps the branch that is not taken finite. Otherwise its NaN gradient would reach the result.
    safe = jnp.where(weight_square_mean == 0, 1.0, weight_square_mean)
    return jnp.where(weight_square_mean == 0, 0.0, weight_mean**2 / safe)


def health_warning(health: Health, ess_weight: float | None, threshold: float) -> str | None:
    """What to tell the user when a step is too far off-policy, or None when it is not.

    Two things can be wrong. The loss's own weights may be spread so widely that few samples carry
    the update (`ess_weight`): noise, which bounded weights cure. Or those weights are bounded, but
    the ratios behind them are spread (`ess_token`): the update is calm and biased, which only a
    closer behavior policy, or a mixture with the full one, cures.

    Args:
        health: one step's, as numbers.
        ess_weight: effective sample size of the loss's weights; None where the objective has none.
        threshold: smallest effective sample size, as a share of the batch, in (0, 1), that is fine.

    Returns:
        One sentence with the metric, its value and the fields to change; None where both metrics are
        fine.

    Raises:
        ValueError: the threshold is not in (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"the threshold of the effective sample size is {threshold}; allowed is 0 < threshold < 1")
    # The test is `not >=` and not `<`, so that NaN gives a warning too.
    sizes = {"ess_weight": ess_weight, "ess_token": float(health.ess_token)}
    name = next((name for name, size in sizes.items() if size is not None and not size >= threshold), None)
    if name is None:
        return None
    where = f" (KL(behavior || target) is {float(health.kl_behavior_target):.2f} nats per token)"
    trouble = f"{name} is {sizes[name]:.3f}, under {threshold}{where}: "
    if name == "ess_weight":
        return trouble + (
            "few samples carry this update. Lower nesting.skip_ratio (nesting_control can hold a budget), set"
            " nesting.choice to 'measured', or bound the weights: loss.bias_mitigation 'mixture' with"
            " rollout.mixture_alpha (unbiased) or 'retrace', or loss.truncate_at (both biased)"
        )
    return trouble + (
        "the loss's weights are bounded, so the update is biased rather than noisy. Lower nesting.skip_ratio, set"
        " nesting.choice to 'measured', or use loss.bias_mitigation 'mixture' with rollout.mixture_alpha"
    )
