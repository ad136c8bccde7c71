"""Rewards from preferences: the answer that people preferred has the higher score (Bradley & Terry, 1952).

A pair is a group of two completions. Their signals say which one was preferred: +1 and -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nested_reft.literals import check_choice
from nested_reft.losses.objective import LossOutput, Needs, TargetPass
from nested_reft.types import TrainBatch, Weighted

Kind = Literal["bradley_terry"]
PAIR_SIGNALS = (1.0, -1.0)
"""The signals of a pair's completions: first the chosen one, then the rejected one."""


@dataclass(frozen=True)
class BradleyTerryConfig:
    """A reward model: a scalar head on the trunk, learnt from preference pairs.

    Source: DR-PO (arXiv 2404.08495, section 3); Ouyang et al. (2022, arXiv 2203.02155, eq. 1).

    Attributes:
        kind: tells this objective from the others in a stored configuration; it has one value.
    """

    kind: Kind = "bradley_terry"

    def __post_init__(self):
        check_choice("loss.kind", self.kind, Kind)


class BradleyTerry:
    """The objective of a reward model.

        L = - sum_b log sigmoid(r_b,chosen - r_b,rejected) / pairs

    with r the value of the state after the last token of the answer, which is its stop token.
    """

    def needs(self, updates_per_batch: int) -> Needs:
        """The values, and nothing else."""
        return Needs(off_policy=False, values=True)

    def metrics(self, parts: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """The parts as they are.

        Args:
            parts: the mean of each part over the whole batch.
        """
        return parts

    def loss(self, target: TargetPass, batch: TrainBatch) -> LossOutput:
        """The sum over pairs and their number; see the class.

        Args:
            target: gives the values.
            batch: pairs, with room for one token more than the longest completion has.
        """
        assert target.value_BGC is not None  # `needs` asks for it
        return pair_loss(score_at_end(target.value_BGC, batch.length_BG), batch)


def score_at_end(value_BGC: Float[Array, "B G C"], length_BG: Array) -> Float[Array, "B G"]:
    """The value of the state after each completion's last token.

    Args:
        value_BGC: of the state before each token; C is more than the longest completion.
        length_BG: tokens of each completion.
    """
    # `value[..., t]` has seen the tokens before t, so the whole completion is seen at its length.
    return jnp.take_along_axis(value_BGC, length_BG[..., None], axis=-1)[..., 0]


def pair_loss(score_BG: Float[Array, "B G"], batch: TrainBatch, scale: float = 1.0) -> LossOutput:
    """-log sigmoid of the margin by which a pair's preferred completion has the higher score.

    Args:
        score_BG: differentiated; anything where a completion does not count.
        batch: its signals say which completion was preferred. A pair counts where both its completions do.
        scale: what a token's log-probability adds to its completion's score, for the logged weights.

    Returns:
        The sum over pairs and their number, and the parts that are logged: `pair_accuracy` (equal scores are half
        right), `margin`, `chosen_score` and `rejected_score`.
    """
    counts_B = batch.counted_BG.all(axis=-1)
    # Scores of padding may be anything, and must not reach the sums even times zero.
    score_BG = jnp.where(counts_B[:, None], score_BG, 0.0)
    margin_B = (batch.signal_BG * score_BG).sum(axis=-1)
    loss_B = jnp.where(counts_B, jax.nn.softplus(-margin_B), 0.0)
    pairs = counts_B.sum(dtype=jnp.float32)
    frozen_B, frozen_BG = jax.lax.stop_gradient((margin_B, score_BG))

    def mean(value_B: Array) -> Weighted:
        return Weighted(jnp.where(counts_B, value_B, 0.0).sum(), pairs)

    parts = {
        "pair_accuracy": mean((1 + jnp.sign(frozen_B)) / 2),
        "margin": mean(frozen_B),
        "chosen_score": mean(jnp.where(batch.signal_BG > 0, frozen_BG, 0.0).sum(axis=-1)),
        "rejected_score": mean(jnp.where(batch.signal_BG < 0, frozen_BG, 0.0).sum(axis=-1)),
    }
    # d(-log sigmoid(m)) / dm = -sigmoid(-m): pairs that are ordered well already teach little.
    weight_BG = scale * batch.signal_BG * jax.nn.sigmoid(-frozen_B)[:, None]
    return LossOutput(Weighted(loss_B.sum(), pairs), parts, weight_BG[..., None] * batch.mask_BGC)
