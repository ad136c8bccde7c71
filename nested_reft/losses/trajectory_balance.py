"""Trajectory balance: the policy's log-probabilities are fitted to those of the best KL-regularised policy.

The policy that maximises E[r] - beta KL(pi || pi_ref) is known but for its normaliser:

    pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x)

Trajectory balance makes both sides of log pi = log pi* agree on the completions at hand, whoever sampled them. So
there is no importance weight: completions may be old, replayed, nested or drawn from a mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nested_reft.estimators.importance import token_log_ratio
from nested_reft.literals import check_choice, check_whole
from nested_reft.losses.objective import LossOutput, Needs, TargetPass
from nested_reft.types import Rollouts, Scored, TrainBatch, Weighted
from nested_reft.untrusted import MAX_WHOLE

Kind = Literal["trajectory_balance"]


@dataclass(frozen=True)
class TrajectoryBalanceConfig:
    """Trajectory balance with VarGrad's normaliser, as TBA trains with it.

    Source: Bartoldson et al. (2025, arXiv 2503.18929, section 3); VarGrad: Richter et al. (2020, arXiv 2010.10436).

    Attributes:
        beta: weight of the KL to the reference, more than 0. Rewards are divided by it, so a smaller beta lets the
            policy move further.
        beta_final: what beta becomes, linearly, over `beta_decay_steps`; None keeps beta. It changes the policy that
            is aimed at.
        beta_decay_steps: batches learnt from until then.
        reference_reset_every: batches learnt from between two times that the policy becomes the reference; None
            keeps the policy at the start of reinforcement.
        kind: tells this objective from the others; it has one value.
    """

    beta: float
    beta_final: float | None = None
    beta_decay_steps: int | None = None
    reference_reset_every: int | None = None
    kind: Kind = "trajectory_balance"

    def __post_init__(self):
        check_choice("loss.kind", self.kind, Kind)
        for name in ("beta", "beta_final"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"loss.{name} is {value}; allowed is more than 0")
        if (self.beta_final is None) != (self.beta_decay_steps is None):
            raise ValueError(
                f"loss.beta_final is {self.beta_final} and loss.beta_decay_steps {self.beta_decay_steps}; a schedule"
                " needs both, and a constant beta neither"
            )
        for name in ("beta_decay_steps", "reference_reset_every"):
            if getattr(self, name) is not None:
                check_whole(f"loss.{name}", getattr(self, name), 1, MAX_WHOLE)

    def beta_at(self, batches: int) -> float:
        """Beta of the next batch.

        Args:
            batches: learnt from before it.
        """
        if self.beta_final is None or self.beta_decay_steps is None:
            return self.beta
        share = min(batches / self.beta_decay_steps, 1.0)
        return self.beta + share * (self.beta_final - self.beta)


class TrajectoryBalance:
    """The trajectory-balance objective of one configuration.

        log Zhat_b = mean_g [ r_bg / beta - S_bg ],      S_bg = sum_t log pi(y_t) - log pi_ref(y_t)
        L = mean_{b,g} ( log Zhat_b + S_bg - r_bg / beta )^2

    in squared nats, with sums over the tokens that the policy chose and means over the completions that count. No
    gradient passes through log Zhat, which would not change it: L is the variance of the residual within the group.
    The gradient is

        grad L = - (2 / beta) mean_{b,g} A_bg grad S_bg,  A_bg = (r_bg - rbar_b) - beta (S_bg - Sbar_b)

    On-policy, its mean is - (2 / beta) (G - 1) / G times the gradient of E[r] - beta KL(pi || pi_ref), as of
    REINFORCE with the group's mean. At pi* it is zero wherever the completions came from.

    Departures from the paper's code: groups are the batch's G axis and not a stride, so any number of prompts fits
    into a micro-batch, and the reference is scored when the batch is trained on, so that nothing stored outlives a
    reset of the reference. A group with one completion that counts has the loss zero.
    """

    def __init__(self, config: TrajectoryBalanceConfig):
        """Args:
        config: beta, its schedule, and when the reference is reset.
        """
        self._config = config

    def needs(self, updates_per_batch: int) -> Needs:
        """The reference's log-probabilities, and beta; no policy of the past."""
        return Needs(
            logprobs=("reference_logprob_BGC",),
            beta=self._config.beta_at,
            reference_reset_every=self._config.reference_reset_every,
        )

    def signal(self, groups: Scored) -> Float[Array, "B G"]:
        """The reward of each completion, NaN where it could not be computed.

        Args:
            groups: their total rewards count.

        Raises:
            ValueError: a group's completions begin with different forced prefixes.
        """
        _check_prefixes(groups.rollouts)
        return jnp.asarray(np.where(groups.scored_BG, groups.reward_BG, np.nan), jnp.float32)

    def metrics(self, parts: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """The parts; the mean square of the residual becomes its standard deviation.

        Args:
            parts: the mean of each part over the whole batch.
        """
        parts = dict(parts)
        return parts | {"residual_std": jnp.sqrt(parts.pop("residual_square"))}

    def loss(self, target: TargetPass, batch: TrainBatch) -> LossOutput:
        """The sum of squared residuals and their number; see the class.

        Args:
            target: gives the log-probability of every token.
            batch: its signal is the reward; with `reference_logprob_BGC` and `beta_B`.

        Raises:
            ValueError: the batch lacks one of them.
        """
        reference_BGC, beta_B = batch.reference_logprob_BGC, batch.beta_B
        if reference_BGC is None or beta_B is None:
            missing = "reference_logprob_BGC" if reference_BGC is None else "beta_B"
            raise ValueError(f"trajectory balance needs batch.{missing}")
        counts_BG = batch.counted_BG & ~jnp.isnan(batch.signal_BG)
        mask_BGC = batch.mask_BGC & counts_BG[..., None]
        # Both are cleared outside the mask before they are summed: a masked NaN times 0 would still be NaN.
        log_ratio_BGC = jnp.where(mask_BGC, token_log_ratio(target.logprob_BGC, reference_BGC), 0.0)
        log_ratio_BG = log_ratio_BGC.astype(jnp.float32).sum(axis=-1)
        aim_BG = jnp.where(counts_BG, batch.signal_BG / beta_B[:, None], 0.0)
        count_B = counts_BG.sum(axis=-1)
        log_z_B = jnp.where(counts_BG, aim_BG - log_ratio_BG, 0.0).sum(axis=-1) / jnp.maximum(count_B, 1)
        log_z_B = jax.lax.stop_gradient(log_z_B)
        residual_BG = jnp.where(counts_BG, log_z_B[:, None] + log_ratio_BG - aim_BG, 0.0)
        number = counts_BG.sum(dtype=jnp.float32)
        total = Weighted((residual_BG**2).sum(), number)
        parts = {
            "residual_square": total,
            "log_z": Weighted(log_z_B.sum(), (count_B > 0).sum(dtype=jnp.float32)),
            "reference_log_ratio": Weighted(log_ratio_BG.sum(), number),
            "beta": Weighted(beta_B.sum(), jnp.asarray(beta_B.size, jnp.float32)),
        }
        return LossOutput(total, parts, mask_BGC.astype(jnp.float32))


def _check_prefixes(rollouts: Rollouts) -> None:
    """One normaliser serves a group only where all its completions go on from the same tokens."""
    tokens_BGC, forced_BG = np.asarray(rollouts.tokens_BGC), np.asarray(rollouts.forced_BG)
    if not forced_BG.any():
        return
    is_forced_BGC = np.arange(tokens_BGC.shape[-1]) < forced_BG[..., None]
    prefix_BGC = np.where(is_forced_BGC, tokens_BGC, -1)
    differs_B = (prefix_BGC != prefix_BGC[:, :1]).any(axis=(1, 2))
    if differs_B.any():
        raise ValueError(
            f"{int(differs_B.sum())} of {len(differs_B)} groups have completions with different forced prefixes;"
            " loss.kind 'trajectory_balance' estimates one normaliser per group, so all of its completions must share"
            " theirs"
        )
