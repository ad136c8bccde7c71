"""The total reward of each completion, and the parts that it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from nested_reft.data.examples import Example
from nested_reft.rewards.exact_answer import exact_answer, parse_number
from nested_reft.types import Prompts


@dataclass(frozen=True)
class RewardConfig:
    """How the parts add up to the reward.

    Attributes:
        format_weight: reward for a completion that is one number, right or wrong; 0 or more.
    """

    format_weight: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.format_weight) and self.format_weight >= 0):
            raise ValueError(f"reward.format_weight is {self.format_weight}; allowed is a finite number, 0 or more")


def score(
    texts_BG: Sequence[Sequence[str]],
    prompts: Prompts,
    finished_BG: Bool[np.ndarray, "B G"],
    config: RewardConfig,
) -> tuple[
    Float[np.ndarray, "B G"],
    Float[np.ndarray, "B G"],
    Bool[np.ndarray, "B G"],
    dict[str, Float[np.ndarray, "B G"]],
]:
    """Scores the completions of a batch: reward = accuracy + format_weight * format.

    Args:
        texts_BG: decoded completions, untrusted.
        prompts: B prompts with their gold answers.
        finished_BG: False where the completion was cut off; those score zero.
        config: the weights.

    Returns:
        `(reward_BG, accuracy_BG, scored_BG, parts)` as in `types.Scored`, in float32; `parts` holds
        each component before its weight. This reward can always be computed: `scored_BG` is True.

    Raises:
        ValueError: the shapes disagree, or a gold answer is not one number.
    """
    num_prompts, group_size = finished_BG.shape
    if len(prompts) != num_prompts or [len(texts) for texts in texts_BG] != [group_size] * num_prompts:
        raise ValueError(
            f"score got {len(prompts)} prompts, {[len(texts) for texts in texts_BG]} texts per prompt and finished_BG"
            f" of shape {finished_BG.shape}; all must agree"
        )
    cells = [
        [exact_answer(text, answer, bool(finished)) for text, finished in zip(texts_G, finished_G, strict=True)]
        for texts_G, answer, finished_G in zip(texts_BG, prompts.answers, finished_BG, strict=True)
    ]
    parts = {
        name: np.array([[cell[name] for cell in row] for row in cells], dtype=np.float32).reshape(finished_BG.shape)
        for name in ("accuracy", "format")
    }
    reward_BG = parts["accuracy"] + np.float32(config.format_weight) * parts["format"]
    return reward_BG, parts["accuracy"].copy(), np.ones(finished_BG.shape, dtype=bool), parts


def check_answers(examples: Iterable[Example]) -> None:
    """Refuses, before training, examples whose gold answer the reward cannot read.

    Left in, they would make every completion wrong.

    Raises:
        ValueError: names the first such example's source, question and answer.
    """
    for example in examples:
        if parse_number(example.answer) is None:
            raise ValueError(
                f"source '{example.source}' has the gold answer {example.answer[:80]!r}, which is not one number"
                f" (question: {example.question[:200]!r}); the exact-answer reward needs numeric answers"
            )
