"""Which of the groups that were found an update trains on.

Pure rules on a small value: `add` puts a batch into the buffer, `ready` says whether an update can go
ahead, `draw` takes its groups out. The plain on-policy run is the buffer of one batch.

Dynamic sampling is one of the rules (DAPO, arXiv 2503.14476, eq. 11). A group whose completions are all
right or all wrong has advantage zero throughout, so it costs an update and gives no gradient. Dynamic
sampling keeps the groups with 0 < #correct < G and generates again until a batch is full of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from nested_reft.literals import check_choice
from nested_reft.types import Scored, concat, take

AtLimit = Literal["train", "stop"]


class GenerationLimitError(RuntimeError):
    """The limit of generation batches was reached, and the configuration says to stop there."""


@dataclass(frozen=True)
class DynamicSamplingConfig:
    """How long to generate for one update.

    Attributes:
        max_generation_batches: batches generated for one update at most; 1 turns dynamic sampling off
            (every group of the one batch is trained on).
        at_limit: with too few mixed groups by then, `train` on those there are, or `stop` the run.
    """

    max_generation_batches: int = 1
    at_limit: AtLimit = "train"

    def __post_init__(self):
        if self.max_generation_batches < 1:
            raise ValueError(
                f"dynamic_sampling.max_generation_batches is {self.max_generation_batches}; allowed is 1 or more"
            )
        check_choice("dynamic_sampling.at_limit", self.at_limit, AtLimit)

    @property
    def filters_groups(self) -> bool:
        """Whether only mixed groups are trained on; otherwise every group of one batch is."""
        return self.max_generation_batches > 1


@dataclass(frozen=True)
class Buffer:
    """What was found and not yet trained on.

    Attributes:
        batches: in the order of generation.
    """

    batches: tuple[Scored, ...] = ()

    def to_plain(self) -> list[dict[str, Any]]:
        """Plain values and arrays, as a checkpoint holds them; `from_plain` reads them back."""
        return [scored.to_plain() for scored in self.batches]

    @classmethod
    def from_plain(cls, value: list[dict[str, Any]]) -> Buffer:
        """The buffer that `to_plain` wrote.

        Args:
            value: what `to_plain` returned, also after a way through a checkpoint.
        """
        return cls(tuple(Scored.from_plain(scored) for scored in value))


def add(buffer: Buffer, scored: Scored) -> Buffer:
    """The buffer with one more batch, behind the others.

    Args:
        buffer: what was found before; it stays as it is.
        scored: one generation batch.
    """
    return Buffer((*buffer.batches, scored))


def mixed_groups(scored: Scored) -> Bool[np.ndarray, " B"]:
    """True where a group has right and wrong completions.

    Judged by raw accuracy: under a shaped reward, an all-wrong group of unequal lengths would pass.
    Completions without a score do not count.
    """
    # One right and one wrong answer are enough: the group then has advantages that differ.
    right_B = (scored.scored_BG & (scored.accuracy_BG > 0)).any(axis=1)
    wrong_B = (scored.scored_BG & (scored.accuracy_BG <= 0)).any(axis=1)
    return np.asarray(right_B & wrong_B)


def num_mixed(buffer: Buffer) -> int:
    """How many groups of the buffer have something to teach."""
    return sum(int(mixed_groups(scored).sum()) for scored in buffer.batches)


def ready(buffer: Buffer, config: DynamicSamplingConfig, num_groups: int) -> bool:
    """Whether an update can go ahead with what is in the buffer.

    Args:
        buffer: what was generated for this update.
        config: the rule.
        num_groups: B, groups that the update trains on.

    Raises:
        GenerationLimitError: it cannot, and the limit is reached with `at_limit` = stop.
    """
    num_batches = len(buffer.batches)
    if not config.filters_groups:
        return num_batches == 1
    # The groups are counted over all batches, because an update may take some from each.
    mixed = num_mixed(buffer)
    # Below the limit, only the number of mixed groups decides; what follows is the limit.
    if mixed >= num_groups or num_batches < config.max_generation_batches:
        return mixed >= num_groups
    if config.at_limit == "stop":
        raise GenerationLimitError(
            f"{num_batches} generation batches gave {mixed} groups with right and wrong completions, and an update"
            f" takes {num_groups}: the prompts are too easy or too hard for this policy. Change data.sources, raise"
            " dynamic_sampling.max_generation_batches, or set dynamic_sampling.at_limit to 'train'"
        )
    return True


def draw(buffer: Buffer, config: DynamicSamplingConfig, num_groups: int) -> tuple[Scored, Buffer]:
    """The groups to train on, and what stays in the buffer.

    With dynamic sampling, the first `num_groups` mixed groups in the order of generation. Order, not time
    of completion, decides, so short answers have no advantage. Where there are too few, other groups fill
    the batch, since its shape is compiled; their completions do not count, so that they enter neither the
    gradient nor what it is divided by.

    Args:
        buffer: `ready` for this update.
        config: the rule.
        num_groups: B.

    Returns:
        B groups, and the buffer after them: empty, since the next update's groups must be on-policy.
    """
    if not config.filters_groups:
        # Every group of the one batch is trained on, mixed or not, so nothing is sorted or copied.
        return buffer.batches[0], Buffer()
    found = concat(buffer.batches)
    mixed_M = mixed_groups(found)
    # A stable sort puts the mixed groups first and keeps each kind in its order.
    chosen = np.argsort(~mixed_M, kind="stable")[:num_groups]
    groups = take(found, chosen)
    # The groups that fill the batch have advantage zero but would still enter the divisor, so they are masked.
    counted_BG = groups.rollouts.counted_BG & mixed_M[chosen][:, None]
    return dataclasses.replace(groups, rollouts=dataclasses.replace(groups.rollouts, counted_BG=counted_BG)), Buffer()


def shortfall(num_mixed: int, config: DynamicSamplingConfig, num_groups: int) -> str | None:
    """In words, that the limit left an update short of groups to train on; None where it did not.

    Args:
        num_mixed: groups with right and wrong completions that were generated for the update.
        config: the rule.
        num_groups: B, groups that the update takes.
    """
    if not config.filters_groups or num_mixed >= num_groups:
        return None
    return (
        f"the limit of {config.max_generation_batches} generation batches left {num_mixed} of {num_groups} groups"
        " with right and wrong completions to train on"
    )
