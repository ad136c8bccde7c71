"""Importance weights that turn nested rollouts into gradients for the full model.

With pi_b the nested behavior policy that sampled, pi_old the full model at sampling time and pi the
full model now, the per-token ratio of Nested-ReFT (arXiv 2508.10123) is

    rho_t = pi(y_t | x, y_<t) / pi_b(y_t | x, y_<t)

and the weight h_t of token t is a *variant* of it, combined over tokens by a *level*:

    variant    factor c_t               what it corrects
    base       rho_t                    the nesting, and updates since the rollout
    one        1                        nothing: rollouts are taken as on-policy
    practical  pi / pi_old              updates since the rollout, not the nesting; equal to `one` when
                                        one update follows one rollout
    retrace    lambda * min(1, rho_t)   like `base`, but never above lambda

`interpolated` is 1 - a + a w instead, with w `base` at its level and a share a. `mixture` has the weight of
`mixture_log_weight`, for groups drawn from both the nested and the full model.

    level      weight h_t               bias and variance of `base` at that level
    token      c_t                      exact for the token, not for its prefix or what follows: biased;
                                        variance does not grow with length
    prefix     prod_{s <= t} c_s        exact up to the token, not for what follows, which the reward
                                        depends on: biased; variance grows with t
    sequence   prod_s c_s = w(y)        unbiased; variance grows exponentially with length
    geometric  (prod_s c_s)^(1 / |y|)   not an importance weight (its mean is not 1): biased; variance
                                        shrinks with length (GSPO, arXiv 2507.18071, eq. 7)

`practical` at each level has that level's variance in pi / pi_old and, on top, the bias of ignoring
the nesting. `retrace` at `token` level is Nested-ReFT's; at `prefix` level it is the trace of
Retrace(lambda) (Munos et al., 2016); both are bounded by lambda and biased towards tokens that the
behavior policy prefers. `mixture` exists at `sequence` level, is unbiased, and at theta = theta_old
bounded. `PolicyGradientConfig` refuses the combinations that mean nothing. `nested-reft verify-estimators`
prints the exact bias and variance of each on an enumerable model.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BiasMitigation = Literal["base", "one", "practical", "retrace", "interpolated", "mixture"]
Level = Literal["token", "prefix", "sequence", "geometric"]

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: beyond it a float32 sum over tokens carries nothing else
LOGPROB_FLOOR = -1e4  # stands in for log 0, so that differences of log-probabilities stay numbers


def token_log_ratio(
    target_logprob: Float[Array, "*rows"], denominator_logprob: Float[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """log rho = log pi - log pi_denominator in nats; finite where either is -inf.

    A token outside both supports counts as equally likely (0); one outside the target's alone gets
    a ratio of practically zero. NaN passes through: it means a broken model.

    Args:
        target_logprob: log pi of each token, the numerator, in nats.
        denominator_logprob: log-probability of the same token under the policy to divide by, in nats.

    Returns:
        log rho in nats: positive where the target likes the token more than the other policy does.
    """
    return jnp.maximum(target_logprob, LOGPROB_FLOOR) - jnp.maximum(denominator_logprob, LOGPROB_FLOOR)


def importance_log_weight(
    log_ratio_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
    variant: Literal["base", "one", "practical", "retrace"],
    level: Level,
    retrace_lambda: float = 1.0,
) -> Float[Array, "B G C"]:
    """log h_t of the module's tables, before any limit.

    Args:
        log_ratio_BGC: log rho_t, or log(pi / pi_old) for `practical`, in nats.
        mask_BGC: the tokens that count; the others enter no product.
        variant, level: a row of each table.
        retrace_lambda: in (0, 1]; only `retrace` reads it.

    Returns:
        Nats; at `sequence` and `geometric` level the same for all tokens of a completion.
    """
    log_factor_BGC = jnp.where(mask_BGC, log_ratio_BGC, 0.0)
    if variant == "one":
        # The weight 1 has the log-weight 0 at every level.
        return jnp.zeros_like(log_factor_BGC)
    if variant == "retrace":
        # In logs min(1, rho) is min(log rho, 0), which cannot overflow. The mask comes again because a token that
        # does not count must not bring in a factor lambda.
        log_factor_BGC = jnp.where(mask_BGC, math.log(retrace_lambda) + jnp.minimum(log_factor_BGC, 0.0), 0.0)
    if level == "token":
        return log_factor_BGC
    if level == "prefix":
        # The product over a prefix is a running sum of logs, to which masked tokens add 0.
        return jnp.cumsum(log_factor_BGC, axis=-1)
    log_weight_BG1 = log_factor_BGC.sum(axis=-1, keepdims=True)
    if level == "geometric":
        # A completion without counted tokens divides 0 by 1.
        log_weight_BG1 = log_weight_BG1 / jnp.maximum(mask_BGC.sum(axis=-1, keepdims=True), 1)
    # The loss multiplies token by token, so each token carries the weight of its whole completion.
    return jnp.broadcast_to(log_weight_BG1, log_factor_BGC.shape)


def interpolated_log_weight(
    log_weight_BGC: Float[Array, "B G C"], mix_share_B: Float[Array, " B"]
) -> Float[Array, "B G C"]:
    """log(1 - a + a w): between no correction and that of `base`, whose bias and noise it shares by a.

    Args:
        log_weight_BGC: log w of `base` at the wanted level, in nats.
        mix_share_B: a, in [0, 1].

    Returns:
        log h in nats; 0 at a = 0 and log w at a = 1, whatever w is.
    """
    share_B11 = mix_share_B[:, None, None]
    # Both ends take the log of zero, which `logaddexp` handles, and which no gradient passes through.
    return jnp.logaddexp(jnp.log1p(-share_B11), jnp.log(share_B11) + log_weight_BGC)


def mixture_log_weight(
    target_logprob_BGC: Float[Array, "B G C"],
    full_logprob_BGC: Float[Array, "B G C"],
    nested_logprob_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
    alpha_BG: Float[Array, "B G"],
) -> Float[Array, "B G C"]:
    """log of the balance-heuristic weight of a defensive mixture.

        w(y) = pi(y) / (alpha * pi_full(y) + (1 - alpha) * pi_nested(y))

    for completions each drawn from the full model with probability alpha and from the nested one
    otherwise, independently: that makes the denominator the density every completion has, whichever
    component it came from. Unbiased; and at theta = theta_old, where pi = pi_full, at most 1 / alpha
    however far the nested model is off. With a fixed number of full completions per group the
    leave-one-out baseline depends on the component, and a small bias returns.

    Source: balance heuristic (Veach and Guibas, 1995), defensive importance sampling (Hesterberg,
    1995; Owen and Zhou, 2000); their use for nested rollouts is this project's own.

    Args:
        target_logprob_BGC: log pi, the policy being trained.
        full_logprob_BGC, nested_logprob_BGC: log-probabilities of every completion under both
            components, full and nested model at rollout time.
        mask_BGC: the tokens that were drawn (not forced).
        alpha_BG: in [0, 1], probability of the full model; at 0 the weight is `base`'s.

    Returns:
        log w in nats, the same for all tokens of a completion.
    """

    def completion_log_ratio(numerator_BGC, denominator_BGC):
        return jnp.where(mask_BGC, token_log_ratio(numerator_BGC, denominator_BGC), 0.0).sum(axis=-1, keepdims=True)

    # All is relative to pi_full. Sums of log-ratios between close models stay small and keep their digits, while the
    # log-probability of a long completion is in the hundreds.
    target_over_full_BG1 = completion_log_ratio(target_logprob_BGC, full_logprob_BGC)
    nested_over_full_BG1 = completion_log_ratio(nested_logprob_BGC, full_logprob_BGC)
    alpha_BG1 = alpha_BG[..., None]
    # log(alpha + (1 - alpha) pi_nested / pi_full), without leaving the logs.
    mixture_over_full_BG1 = jnp.logaddexp(jnp.log(alpha_BG1), jnp.log1p(-alpha_BG1) + nested_over_full_BG1)
    return jnp.broadcast_to(target_over_full_BG1 - mixture_over_full_BG1, target_logprob_BGC.shape)


def limited_weight(log_weight_BGC: Float[Array, "B G C"], truncate_at: float | None = None) -> Float[Array, "B G C"]:
    """The weight h, truncated: min(h, C).

    Truncation bounds the variance; it is biased against what the behavior policy under-samples (Ionides, 2008; as TIS
    in language models: Yao et al., 2025). What takes weights away whole is a mask; see `estimators.rejection`.

    log h is first clamped to +-20, so the weight is finite whatever the inputs.

    Args:
        log_weight_BGC: log h in nats, of `importance_log_weight` or `mixture_log_weight`.
        truncate_at: C, more than 0; None leaves the weight as it is.

    Returns:
        h, more than 0 and at most exp(20).
    """
    weight_BGC = jnp.exp(jnp.clip(log_weight_BGC, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return weight_BGC if truncate_at is None else jnp.minimum(weight_BGC, truncate_at)
