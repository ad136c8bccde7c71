"""Direct preference optimisation: the policy learns from preference pairs without a reward model or rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from nested_reft.literals import check_choice
from nested_reft.losses.bradley_terry import pair_loss
from nested_reft.losses.objective import LossOutput, Needs, TargetPass
from nested_reft.types import TrainBatch

Kind = Literal["dpo"]


@dataclass(frozen=True)
class DpoConfig:
    """DPO (Rafailov et al., 2023, arXiv 2305.18290, eq. 7).

    Attributes:
        beta: weight of the KL to the reference that the solution has, more than 0; DR-PO's baseline has 0.05. The
            reference is the policy at the start of the phase.
        kind: tells this objective from the others in a stored configuration; it has one value.
    """

    beta: float = 0.1
    kind: Kind = "dpo"

    def __post_init__(self):
        check_choice("loss.kind", self.kind, Kind)
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"loss.beta is {self.beta}; allowed is more than 0")


class Dpo:
    """Bradley-Terry on the reward that the policy itself implies.

    r(y) = beta sum_t log pi(y_t | x, y_<t) / pi_ref(y_t | x, y_<t)
    L = - sum_b log sigmoid(r_b,chosen - r_b,rejected) / pairs
    """

    def __init__(self, config: DpoConfig):
        """Args:
        config: beta.
        """
        self._beta = config.beta

    def needs(self, updates_per_batch: int) -> Needs:
        """The reference's log-probabilities."""
        return Needs(logprobs=("reference_logprob_BGC",), off_policy=False)

    def metrics(self, parts: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """The parts as they are.

        Args:
            parts: the mean of each part over the whole batch.
        """
        return parts

    def loss(self, target: TargetPass, batch: TrainBatch) -> LossOutput:
        """The sum over pairs and their number; see the class.

        Args:
            target: gives the log-probabilities.
            batch: pairs, with the reference's log-probabilities.
        """
        assert batch.reference_logprob_BGC is not None  # `needs` asks for it
        mask_BGC = batch.mask_BGC
        # Cleared before the difference: two infinities at padding would make NaN.
        logprob_BGC, reference_BGC = (
            jnp.where(mask_BGC, value_BGC, 0.0) for value_BGC in (target.logprob_BGC, batch.reference_logprob_BGC)
        )
        return pair_loss(self._beta * (logprob_BGC - reference_BGC).sum(axis=-1), batch, self._beta)
