"""KL(pi || pi_ref) from the log-probabilities of sampled tokens: values, and what they are as losses.

With l = log pi - log pi_ref of a token drawn from pi (Schulman, "Approximating KL divergence", 2020):

    value   formula             as an estimate of KL(pi || pi_ref)
    k1      l                   unbiased, high variance, may be negative
    k2      l^2 / 2             biased, low variance
    k3      exp(-l) - 1 + l     unbiased, low variance, never negative

A good value is not a good loss. Differentiating through log pi, at fixed tokens:

    penalty        gradient per token              is the gradient of
    k1 as a loss   grad log pi                     nothing: its mean is zero; not offered
    k1_in_reward   (sum_{s>=t} l_s) grad log pi    KL(pi || pi_ref) of whole completions, exactly: the
                                                   policy gradient of the reward -l. As unbiased as
                                                   the importance weight that multiplies it
    k2_loss        l grad log pi                   the same without later tokens: the exact KL gradient of
                                                   each next-token distribution at the sampled prefixes
    k3_loss        (1 - exp(-l)) grad log pi       KL(pi_ref || pi) instead, at the sampled prefixes;
                                                   close to `k2_loss` while l is small (GRPO, eq. 4)

`k2_loss` and `k3_loss` are added unweighted, as GRPO does: their statements hold for on-policy tokens.

Where both distributions are at hand over the whole vocabulary, nothing needs estimating: see `exact_kl`.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nested_reft.estimators.importance import LOG_RATIO_LIMIT, token_log_ratio

KlEstimator = Literal["k1", "k2", "k3"]
KlPenalty = Literal["k1_in_reward", "k2_loss", "k3_loss"]


def kl_estimate(
    target_logprob: Float[Array, "*rows"], reference_logprob: Float[Array, "*rows"], estimator: KlEstimator
) -> Float[Array, "*rows"]:
    """The named value per token, in nats, differentiable wherever it is finite.

    k1 is clamped to +-20 nats, because it is a reward. The other two are penalties and must pull where pi and
    pi_ref are furthest apart. Below l = -20 the exponential of k3 goes on as the line that touches it there, so
    that it does not overflow.

    Args:
        target_logprob: log pi of tokens that were drawn from pi, in nats.
        reference_logprob: log pi_ref of the same tokens, in nats.
        estimator: a row of the module's first table.

    Returns:
        One value per token, not reduced. `k1` may be negative; `k2` and `k3` may not.
    """
    log_ratio = token_log_ratio(target_logprob, reference_logprob)
    if estimator == "k1":
        # One token outside the reference's support would otherwise outweigh every other reward.
        return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k2":
        return log_ratio**2 / 2
    # Near l = 0 `exp(-l) - 1` cancels and loses its digits; expm1 keeps them.
    curve = jnp.expm1(-jnp.maximum(log_ratio, -LOG_RATIO_LIMIT)) + log_ratio
    # exp(-l) is steepest where l is most negative, and only there can it overflow.
    line = math.expm1(LOG_RATIO_LIMIT) + math.exp(LOG_RATIO_LIMIT) * (-LOG_RATIO_LIMIT - log_ratio) + log_ratio
    return jnp.where(log_ratio < -LOG_RATIO_LIMIT, line, curve)


def exact_kl(logits: Float[Array, "*rows V"], other_logits: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), with p and q the softmax of the two logits.

    A token that p excludes (logit -inf) adds nothing.

    Args:
        logits: the logits of p, the distribution that the mean is under; already tempered.
        other_logits: the logits of q, over the same vocabulary.

    Returns:
        The divergence of each row in nats, never negative but for rounding.
    """
    logprob, other_logprob = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(other_logits, axis=-1)
    present = logprob > -jnp.inf
    # 0 log 0 counts as 0: -inf - (-inf) would be NaN, so both logs are replaced first. A token that only q excludes
    # stays, and makes the divergence infinite, as it should.
    difference = jnp.where(present, logprob, 0.0) - jnp.where(present, other_logprob, 0.0)
    return jnp.sum(jnp.exp(logprob) * difference, axis=-1)


def self_distillation_kl(
    full_logits: Float[Array, "*rows V"], nested_logits: Float[Array, "*rows V"]
) -> Float[Array, "*rows"]:
    """KL(stop_gradient(pi_full) || pi_nested) of each next-token distribution, in nats.

    Minimised, it pulls the nested policy towards the full one and not the other way round. Its
    gradient with respect to the nested logits is pi_nested - pi_full; the layers that the plan skips
    take no part in it. (The full policy still changes: the two share the layers that are kept.)

    Source: self-distillation with the exact forward KL, as Hinton et al. (2015) at equal temperatures;
    LayerSkip (arXiv 2404.16710) trains its sub-networks on the labels instead.

    Args:
        full_logits: what the full model, the teacher, predicts; no gradient passes through them.
        nested_logits: what the nested model, the student, predicts at the same positions.

    Returns:
        One divergence per position in nats, not reduced.
    """
    return exact_kl(jax.lax.stop_gradient(full_logits), nested_logits)
