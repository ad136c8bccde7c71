"""Generalised advantage estimation: an advantage for each token, from a critic's values and rewards along the way.

With V_t the value of the state before token t, and nothing after a completion's end:

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = delta_t + gamma lambda A_{t+1}
    R_t     = A_t + V_t                          what the critic learns

lambda 1 gives the return less the value: no bias of the critic, most variance. lambda 0 trusts the critic altogether.

Source: Schulman et al. (2016, arXiv 1506.02438, eq. 16).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

VARIANCE_EPSILON = 1e-8


def token_rewards(
    score_BG: Float[Array, "B G"],
    kl_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
    kl_coefficient: float | Float[Array, ""],
) -> Float[Array, "B G C"]:
    """The reward of each token: its share of the KL penalty, and the score of the whole text at the last one.

        r_t = -beta log(pi / pi_ref)_t + [t is last] score

    Departure from the released code of DR-PO: forced tokens cost nothing, since the policy did not choose them.

    Args:
        score_BG: reward of each completion.
        kl_BGC: log(pi / pi_ref) of each token; anything outside the mask.
        mask_BGC: the tokens that the policy chose, without gaps; a completion may have none.
        kl_coefficient: beta, 0 or more.

    Returns:
        Rewards, zero outside the mask.
    """
    # The mask has no gaps, so the last token is the one that no other follows.
    following_BGC = jnp.pad(mask_BGC[..., 1:], ((0, 0), (0, 0), (0, 1)))
    score_BGC = jnp.where(mask_BGC & ~following_BGC, score_BG[..., None], 0.0)
    return score_BGC - kl_coefficient * jnp.where(mask_BGC, kl_BGC, 0.0)


def gae(
    reward_BGC: Float[Array, "B G C"],
    value_BGC: Float[Array, "B G C"],
    mask_BGC: Bool[Array, "B G C"],
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Array, "B G C"], Float[Array, "B G C"]]:
    """Advantages and returns of the tokens that count; see the module.

    Args:
        reward_BGC: r_t.
        value_BGC: V_t, of the state before the token.
        mask_BGC: the tokens that the policy chose, without gaps. What comes before them was given, and takes no part.
        gamma: discount, in [0, 1].
        gae_lambda: lambda, in [0, 1].

    Returns:
        `(A, R)`, both zero outside the mask.
    """
    reward_BGC, value_BGC = (jnp.where(mask_BGC, values, 0.0) for values in (reward_BGC, value_BGC))

    def earlier(carry: tuple[Array, Array], now: tuple[Array, Array, Array]):
        next_advantage_BG, next_value_BG = carry
        reward_BG, value_BG, counts_BG = now
        delta_BG = reward_BG + gamma * next_value_BG - value_BG
        advantage_BG = jnp.where(counts_BG, delta_BG + gamma * gae_lambda * next_advantage_BG, 0.0)
        return (advantage_BG, value_BG), advantage_BG

    # After the end both are zero: a finished text earns nothing more, and one that was cut off counts as finished.
    nothing_BG = jnp.zeros(mask_BGC.shape[:-1])
    columns = (jnp.moveaxis(reward_BGC, -1, 0), jnp.moveaxis(value_BGC, -1, 0), jnp.moveaxis(mask_BGC, -1, 0))
    _, advantage_CBG = jax.lax.scan(earlier, (nothing_BG, nothing_BG), columns, reverse=True)
    advantage_BGC = jnp.moveaxis(advantage_CBG, 0, -1)
    return advantage_BGC, advantage_BGC + value_BGC


def whitened(
    values_BGC: Float[Array, "B G C"], mask_BGC: Bool[Array, "B G C"], shift_mean: bool = True
) -> Float[Array, "B G C"]:
    """Values scaled to the variance 1 over the tokens that count, and moved to the mean 0 unless told otherwise.

        (x - m) / sqrt(v + 1e-8),    or (x - m) / sqrt(v + 1e-8) + m, as the released code of DR-PO scales rewards

    Args:
        values_BGC: x.
        mask_BGC: the tokens that count.
        shift_mean: False keeps the mean m.

    Returns:
        Zero outside the mask. Equal values give zero, or themselves where the mean is kept.
    """
    count = jnp.maximum(mask_BGC.sum(), 1)
    mean = jnp.where(mask_BGC, values_BGC, 0.0).sum() / count
    variance = jnp.where(mask_BGC, (values_BGC - mean) ** 2, 0.0).sum() / count
    scaled_BGC = (values_BGC - mean) / jnp.sqrt(variance + VARIANCE_EPSILON)
    return jnp.where(mask_BGC, scaled_BGC if shift_mean else scaled_BGC + mean, 0.0)
