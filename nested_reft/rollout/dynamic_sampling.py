"""Dynamic sampling: generate until enough groups have something to teach (DAPO, arXiv 2503.14476, eq. 11).

A group whose completions are all right or all wrong has advantage zero throughout, so it costs an
update and gives no gradient. Dynamic sampling keeps the groups with 0 < #correct < G and generates
again until a batch is full of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool

from nested_reft.types import Prompts, Rollouts, Scored

# What differs from group to group; a step's generation batches share the rest (plan, policy version).
_GROUP_ARRAYS = (
    "prompt_BP",
    "prompt_length_B",
    "tokens_BGC",
    "length_BG",
    "finished_BG",
    "forced_BG",
    "behavior_logprob_BGC",
    "nested_BG",
)


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
    at_limit: Literal["train", "stop"] = "train"

    def __post_init__(self):
        if self.max_generation_batches < 1:
            raise ValueError(
                f"dynamic_sampling.max_generation_batches is {self.max_generation_batches}; allowed is 1 or more"
            )
        if self.at_limit not in ("train", "stop"):
            raise ValueError(f"dynamic_sampling.at_limit is '{self.at_limit}'; allowed are train, stop")


def mixed_groups(scored: Scored) -> Bool[np.ndarray, " B"]:
    """True where a group has right and wrong completions.

    Judged by raw accuracy: under a shaped reward, an all-wrong group of unequal lengths would pass.
    Completions without a score do not count.
    """
    right_B = (scored.scored_BG & (scored.accuracy_BG > 0)).any(axis=1)
    wrong_B = (scored.scored_BG & (scored.accuracy_BG <= 0)).any(axis=1)
    return np.asarray(right_B & wrong_B)


def enough(batches: Sequence[Scored], config: DynamicSamplingConfig, num_groups: int) -> bool:
    """Whether an update can go ahead with what is generated.

    Raises:
        GenerationLimitError: it cannot, and the limit is reached with `at_limit` = stop.
    """
    if config.max_generation_batches == 1:
        return len(batches) == 1
    num_mixed = sum(int(mixed_groups(scored).sum()) for scored in batches)
    if num_mixed >= num_groups or len(batches) < config.max_generation_batches:
        return num_mixed >= num_groups
    if config.at_limit == "stop":
        raise GenerationLimitError(
            f"{len(batches)} generation batches gave {num_mixed} groups with right and wrong completions, and an update"
            f" takes {num_groups}: the prompts are too easy or too hard for this policy. Change data.sources, raise"
            " dynamic_sampling.max_generation_batches, or set dynamic_sampling.at_limit to 'train'"
        )
    return True


def select_groups(batches: Sequence[Scored], config: DynamicSamplingConfig, num_groups: int) -> Scored:
    """The groups to train on: the first `num_groups` mixed ones, in the order of generation.

    Order, not time of completion, decides, so short answers have no advantage. Where there are too
    few, other groups fill the batch (its shape is compiled) with all their tokens marked as forced,
    so that they enter neither the gradient nor what it is divided by.

    Args:
        batches: what was generated for this update, under one plan and one policy.
        config: whether groups are selected at all.
        num_groups: B.
    """
    if config.max_generation_batches == 1:
        return batches[0]
    where = [(i, row) for i, scored in enumerate(batches) for row in range(len(scored.prompts))]
    mixed = np.concatenate([mixed_groups(scored) for scored in batches])
    order = np.argsort(~mixed, kind="stable")[:num_groups]
    chosen = [where[index] for index in order]
    rollouts = [jax.device_get(scored.rollouts) for scored in batches]
    groups = {name: np.stack([getattr(rollouts[i], name)[row] for i, row in chosen]) for name in _GROUP_ARRAYS}
    groups["forced_BG"] = np.where(mixed[order][:, None], groups["forced_BG"], groups["length_BG"])

    def rows(name: str) -> np.ndarray:
        return np.stack([getattr(batches[i], name)[row] for i, row in chosen])

    return Scored(
        prompts=_take_prompts([scored.prompts for scored in batches], chosen),
        rollouts=dataclasses.replace(rollouts[0], **groups),
        texts=tuple(batches[i].texts[row] for i, row in chosen),
        reward_BG=rows("reward_BG"),
        accuracy_BG=rows("accuracy_BG"),
        scored_BG=rows("scored_BG"),
        parts={name: np.stack([batches[i].parts[name][row] for i, row in chosen]) for name in batches[0].parts},
    )


def trained_groups(batches: Sequence[Scored], config: DynamicSamplingConfig, num_groups: int) -> dict[str, Any]:
    """How many mixed groups an update trains on, and in words if the limit left it short; for the log."""
    if config.max_generation_batches == 1:
        return {}
    num_mixed = sum(int(mixed_groups(scored).sum()) for scored in batches)
    metrics: dict[str, Any] = {"trained_groups": min(num_mixed, num_groups)}
    if num_mixed < num_groups:
        metrics["shortfall"] = (
            f"the limit of {config.max_generation_batches} generation batches left {num_mixed} of {num_groups} groups"
            " with right and wrong completions to train on"
        )
    return metrics


def without_gradient(rollouts: Rollouts, which_BG: Bool[np.ndarray, "B G"]) -> Rollouts:
    """Marks all tokens of some completions as forced, so that they enter neither the loss nor its divisor.

    Their rewards still count for their group's baseline. For completions that could not be scored, and for
    those that were cut off (DAPO's overlong filtering, section 3.4).
    """
    return dataclasses.replace(rollouts, forced_BG=np.where(which_BG, rollouts.length_BG, rollouts.forced_BG))


def _take_prompts(batches: Sequence[Prompts], chosen: Sequence[tuple[int, int]]) -> Prompts:
    def take(name: str) -> list:
        return [getattr(batches[i], name)[row] for i, row in chosen]

    has_references = any(prompts.references is not None for prompts in batches)
    return Prompts(
        tokens_BP=np.stack(take("tokens_BP")),
        length_B=np.array(take("length_B")),
        source_B=np.array(take("source_B")),
        texts=tuple(take("texts")),
        answers=tuple(take("answers")),
        metadata=tuple(take("metadata")),
        references=tuple((batches[i].references or ("",) * len(batches[i]))[row] for i, row in chosen)
        if has_references
        else None,
        checkers=tuple((batches[i].checkers or (None,) * len(batches[i]))[row] for i, row in chosen),
    )
