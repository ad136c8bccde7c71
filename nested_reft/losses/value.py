"""The critic of PPO: the advantages that its values give, and what it learns itself.

The critic is a head on the policy's own trunk. It costs a vector of parameters and no pass of its own; a critic with
a trunk of its own, as in DR-PO's release, would double memory and time. V_t is read off the state that predicts token
t, so it has seen the prompt, what was forced, and the tokens before t.

    r_t = -beta log(pi_old / pi_ref)_t + [t is last] reward
    A_t, R_t = GAE(r, V_old)                                            `estimators.gae`
    value loss = 1/2 max[ (V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2 ]

Nested rollouts: pi_old is the full model, whoever drew the tokens. The policy's terms carry the importance weight. The
values are regressed without one, so they are those of the policy that samples. The divergence that `kl_target` holds is
the sum of rho_t k3_t over a completion's own tokens, rho = pi_old / pi_b: KL(pi_old || pi_ref) at the states that the
sampler reached, and never negative.

Source: PPO (Schulman et al., 2017, arXiv 1707.06347), with the rewards and the value clip of RLHF (Ziegler et al.,
2019, arXiv 1909.08593). Departure from the released code of DR-PO: forced tokens enter no part of it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nested_reft.estimators.gae import gae, token_rewards, whitened
from nested_reft.estimators.kl import kl_estimate
from nested_reft.types import TrainBatch


@dataclass(frozen=True)
class CriticConfig:
    """How values become advantages, and how they are learnt.

    Attributes:
        gamma: discount of a token, in [0, 1].
        gae_lambda: lambda of GAE, in [0, 1].
        value_coefficient: weight of the value loss, more than 0; its gradient reaches the trunk too.
        value_clip: c; how far a value may move in the updates of one batch before it loses its gradient. None for no
            limit.
        kl_coefficient: beta of the reward; 0 for none. With a target it is where the control begins.
        kl_target: KL(pi || pi_ref), summed over the tokens of a completion that the policy chose, in nats, that
            `kl_control` holds by changing beta. None leaves beta alone.
        kl_gain: the largest relative change of beta in a step is 0.2 times this.
        whiten_rewards: scale the token rewards of a batch to the variance 1, with their mean kept.
        whiten_advantages: give the advantages of a batch the mean 0 and the variance 1.
    """

    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_coefficient: float = 0.1
    value_clip: float | None = 0.2
    kl_coefficient: float = 0.0
    kl_target: float | None = None
    kl_gain: float = 0.1
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    def __post_init__(self):
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.critic.{name} is {getattr(self, name)}; allowed is 0 to 1")
        for name in ("value_coefficient", "value_clip", "kl_target", "kl_gain"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                none = ", or None" if name in ("value_clip", "kl_target") else ""
                raise ValueError(f"loss.critic.{name} is {value}; allowed is more than 0{none}")
        if not (math.isfinite(self.kl_coefficient) and self.kl_coefficient >= 0):
            raise ValueError(f"loss.critic.kl_coefficient is {self.kl_coefficient}; allowed is a number, 0 or more")
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError(
                f"loss.critic.kl_target is {self.kl_target} and kl_coefficient 0, which no factor changes; set a"
                " kl_coefficient to begin with"
            )


def with_advantages(batch: TrainBatch, config: CriticConfig, kl_coefficient: float | Float[Array, ""]) -> TrainBatch:
    """The batch with an advantage and a return for each token; see the module.

    Args:
        batch: whole, since whitening is over all of it. Its signal is the reward, NaN or any value where the
            completion does not count. It needs the old values, and with a penalty log pi_old and log pi_ref.
        config: the parts.
        kl_coefficient: beta of this batch.
    """
    assert batch.old_value_BGC is not None  # the learner scores it for every objective with a critic
    mask_BGC = batch.mask_BGC
    kl_BGC = jnp.zeros(mask_BGC.shape)
    if config.kl_coefficient:
        assert batch.old_logprob_BGC is not None and batch.reference_logprob_BGC is not None
        kl_BGC = kl_estimate(batch.old_logprob_BGC, batch.reference_logprob_BGC, "k1")
    score_BG = jnp.where(mask_BGC.any(axis=-1), batch.signal_BG, 0.0)
    reward_BGC = token_rewards(score_BG, kl_BGC, mask_BGC, kl_coefficient)
    if config.whiten_rewards:
        reward_BGC = whitened(reward_BGC, mask_BGC, shift_mean=False)
    advantage_BGC, return_BGC = gae(reward_BGC, batch.old_value_BGC, mask_BGC, config.gamma, config.gae_lambda)
    if config.whiten_advantages:
        advantage_BGC = whitened(advantage_BGC, mask_BGC)
    return dataclasses.replace(batch, token_signal_BGC=advantage_BGC, return_BGC=return_BGC)


def value_loss(
    value_BGC: Float[Array, "B G C"],
    old_value_BGC: Float[Array, "B G C"],
    return_BGC: Float[Array, "B G C"],
    value_clip: float | None,
) -> tuple[Float[Array, "B G C"], Bool[Array, "B G C"]]:
    """Half the squared error of each token's value, the larger one of the value as it is and as it is clipped.

    Args:
        value_BGC: V, differentiated.
        old_value_BGC: V before the batch's first update.
        return_BGC: R, no gradient.
        value_clip: c; None for no limit.

    Returns:
        The loss of each token, not reduced; and True where the clip took its gradient.
    """
    error_BGC = (value_BGC - return_BGC) ** 2
    if value_clip is None:
        return error_BGC / 2, jnp.zeros(error_BGC.shape, bool)
    near_BGC = jnp.clip(value_BGC, old_value_BGC - value_clip, old_value_BGC + value_clip)
    clipped_error_BGC = (near_BGC - return_BGC) ** 2
    # Where the value has moved beyond the limit and towards the return, the clipped error is the larger one.
    is_clipped_BGC = clipped_error_BGC > error_BGC
    return jnp.where(is_clipped_BGC, clipped_error_BGC, error_BGC) / 2, is_clipped_BGC
