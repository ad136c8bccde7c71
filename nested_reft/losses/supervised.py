"""Supervised learning: the target repeats completions that are known to be good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from nested_reft.literals import check_choice
from nested_reft.losses.objective import LossOutput, Needs, TargetPass
from nested_reft.types import Scored, TrainBatch, Weighted

Kind = Literal["supervised"]


@dataclass(frozen=True)
class SupervisedConfig:
    """Cross-entropy on right completions only: expert iteration, also known as RAFT.

    Each update imitates those of the policy's own completions that are right. There is no importance
    weight: a completion that passes the check is a demonstration, whoever wrote it.

    Source: Anthony et al. (2017, arXiv 1705.08439); for language models RAFT (arXiv 2304.06767).

    Attributes:
        kind: tells this objective from the others in a stored configuration; it has one value.
    """

    kind: Kind = "supervised"

    def __post_init__(self):
        check_choice("loss.kind", self.kind, Kind)


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning: cross-entropy of what the sources give, without rollouts.

    Attributes:
        kind: tells this objective from the others in a stored configuration; it has one value.
    """

    kind: Literal["sft"] = "sft"

    def __post_init__(self):
        check_choice("loss.kind", self.kind, Literal["sft"])


class Supervised:
    """The supervised objective, for demonstrations (warm start) and for right rollouts alike.

        L = - sum_{b,g,t} s_bg log pi(y_t | x, y_<t) / sum_{b,g,t} s_bg

    with s = 1 for a demonstration and 0 for every other completion: the mean over the tokens of the
    demonstrations, in nats.
    """

    def __init__(self, demonstrations: bool = False):
        """Args:
        demonstrations: every completion is one, so that no behavior policy is measured against.
        """
        self._demonstrations = demonstrations

    def needs(self, updates_per_batch: int) -> Needs:
        """The target's own log-probabilities and nothing else."""
        return Needs(off_policy=not self._demonstrations, signal_is_weight=True)

    def signal(self, groups: Scored) -> Float[Array, "B G"]:
        """1 for a right completion, 0 for every other. What could not be checked is not imitated.

        Args:
            groups: their raw accuracy decides, since shaping does not make a demonstration.
        """
        return jnp.asarray((groups.accuracy_BG >= 1) & groups.scored_BG, jnp.float32)

    def metrics(self, parts: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """The parts as they are.

        Args:
            parts: the mean of each part over the whole batch.
        """
        return parts

    def loss(self, target: TargetPass, batch: TrainBatch) -> LossOutput:
        """The sum of the tokens' cross-entropies and their number; see the class.

        Args:
            target: gives the log-probability of every token.
            batch: its signal is the weight of each completion.
        """
        weight_BGC = batch.mask_BGC * batch.signal_BG[..., None]
        # Where the weight is zero, the log-probability may be -inf: it must not become NaN.
        term_BGC = jnp.where(weight_BGC > 0, target.logprob_BGC, 0.0) * weight_BGC
        total = Weighted(-term_BGC.sum(), weight_BGC.sum())
        return LossOutput(total, {"cross_entropy": total}, weight_BGC)
