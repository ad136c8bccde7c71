"""Which training questions have a known-good completion that a rollout can start from (dataset reset)."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nested_reft import dataset_reset
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.rewards.reward import RewardConfig, score
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.config import Config

logger = logging.getLogger(__name__)


def usable_references(
    config: Config, train: Sequence[Sequence[EncodedExample]], tokenizer: Tokenizer
) -> tuple[list[list[EncodedExample]], int]:
    """The training examples with those references alone that can serve; the others are reported and removed.

    Args:
        config: says which references there are, how long a completion may be, and what is right.
        train: encoded training examples of each source.
        tokenizer: turns references into tokens.

    Returns:
        The examples, and F, the longest prefix that a reset can force.

    Raises:
        ValueError: no reference of any source can serve.
    """
    if config.reset.references == "replay":
        # They are the policy's own, so there are none yet; any but the last of their tokens may be forced.
        return [list(examples) for examples in train], config.rollout.max_completion_tokens - 1
    found, longest, reasons = list[list[EncodedExample]](), 0, Counter[str]()
    for examples in train:
        if config.reset.references == "answers":
            examples = [_with_reference(encoded, encoded.example.answer) for encoded in examples]
        texts = [encoded.example.reference for encoded in examples]
        tokens = [dataset_reset.completion_tokens(text, tokenizer.encode, tokenizer.stop_ids[0]) for text in texts]
        why = [dataset_reset.why_unusable(each, config.rollout.max_completion_tokens) for each in tokens]
        if config.reset.only_right:
            _add_wrong_ones(why, examples, config.reward)
        _report_unusable(examples, why)
        reasons.update(reason for reason in why if reason is not None)
        longest = max([longest, *(len(each) for each, reason in zip(tokens, why, strict=True) if reason is None)])
        # What cannot serve is removed here, so that all later steps see usable references only.
        kept = zip(examples, why, strict=True)
        found.append([encoded if reason is None else _with_reference(encoded, None) for encoded, reason in kept])
    if not longest:
        raise ValueError(
            f"reset.share is {config.reset.share}, and no training question has a reference to start from"
            f" ({_counts(reasons)}); name the reference_field of a JSONL source, or set reset.references to 'answers'"
        )
    return found, longest - 1


def _with_reference(encoded: EncodedExample, reference: str | None) -> EncodedExample:
    return dataclasses.replace(encoded, example=dataclasses.replace(encoded.example, reference=reference))


def _add_wrong_ones(why: list[str | None], examples: Sequence[EncodedExample], reward: RewardConfig) -> None:
    """Marks the references that the verifier does not find right, among those that could serve so far."""
    rows = [row for row, reason in enumerate(why) if reason is None]
    if not rows:
        return
    chosen = [examples[row] for row in rows]
    prompts = batch_prompts(chosen, [0] * len(chosen), max(len(encoded.tokens) for encoded in chosen))
    texts = [[encoded.example.reference or ""] for encoded in chosen]
    # Neither a learned reward nor the punishment of long completions has a part in being right, and both would need
    # more than texts.
    reward = dataclasses.replace(reward, model=(), overlong_cache_tokens=0)
    _, accuracy_BG, scored_BG, _ = score(texts, prompts, np.ones((len(chosen), 1), bool), reward)
    for row, is_right in zip(rows, (scored_BG & (accuracy_BG >= 1))[:, 0], strict=True):
        why[row] = None if is_right else "not right"


def _report_unusable(examples: Sequence[EncodedExample], why: Sequence[str | None]) -> None:
    """Says how many references of a source cannot serve, and names the first question."""
    unusable = [(encoded.example, reason) for encoded, reason in zip(examples, why, strict=True) if reason is not None]
    if unusable:
        first = unusable[0][0]
        logger.warning(
            "source '%s': %d of %d training questions have no reference to start from (%s); the first is %.80r",
            first.source,
            len(unusable),
            len(examples),
            _counts(Counter(reason for _, reason in unusable)),
            first.question,
        )


def _counts(reasons: Counter[str]) -> str:
    """Such as "3 missing, 1 not right"."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
