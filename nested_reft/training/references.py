"""Which training questions have a known-good completion that a rollout can start from, and which of these serve more
often (dataset reset)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from nested_reft import dataset_reset
from nested_reft.data.examples import Example, counted_by_reason
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.diversity import bleu_of_each
from nested_reft.reward_model import score_rollouts
from nested_reft.rewards.reward import score
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import shard_batch, to_host
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.config import Config
from nested_reft.types import Prompts

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
    found, longest, unusable = list[list[EncodedExample]](), 0, list[tuple[Example, str]]()
    for examples in train:
        if config.reset.references == "answers":
            examples = [_with_reference(encoded, encoded.example.answer) for encoded in examples]
        texts = [encoded.example.reference for encoded in examples]
        tokens = [dataset_reset.reference_tokens(text, tokenizer.encode, tokenizer.stop_ids[0]) for text in texts]
        why = [dataset_reset.why_no_start(each, config.rollout.max_completion_tokens) for each in tokens]
        _add_wrong_ones(why, examples, config)
        removed = [(e.example, reason) for e, reason in zip(examples, why, strict=True) if reason is not None]
        _report(removed, len(examples))
        unusable += removed
        longest = max([longest, *(len(each) for each, reason in zip(tokens, why, strict=True) if reason is None)])
        # What cannot serve is removed here, so that all later steps see usable references only.
        kept = zip(examples, why, strict=True)
        found.append([encoded if reason is None else _with_reference(encoded, None) for encoded, reason in kept])
    if not longest:
        other = (
            "name the reference_field of a JSONL source, or set reset.references to 'answers'"
            if config.reset.references == "given"
            else "set reset.references to 'given' and name the reference_field of a JSONL source"
        )
        raise ValueError(
            f"reset.share is {config.reset.share}, and no training question has a reference to start from:"
            f" {counted_by_reason(unusable)}; {other}"
        )
    return found, longest - 1


def num_candidates(config: Config, train: Sequence[Sequence[EncodedExample]]) -> int:
    """How many references could serve: those that are left of the training examples.

    Args:
        config: says which references there are; of `replay`, every prompt may come to have one.
        train: what `usable_references` returned.
    """
    if not config.reset.is_on:
        return 0
    # Two pairs of a prompt may have one preferred answer, which is one reference.
    return len(
        {
            (source, encoded.text, encoded.example.answer)
            for source, examples in enumerate(train)
            for encoded in examples
            if config.reset.references == "replay" or encoded.example.reference is not None
        }
    )


@dataclass(frozen=True)
class _Completions:
    """One completion of each prompt, as scoring reads it."""

    tokens_BGC: Int[np.ndarray, "B 1 C"]
    length_BG: Int[np.ndarray, "B 1"]
    finished_BG: Bool[np.ndarray, "B 1"]


def reference_scores(
    config: Config, policy: Policy, prompts: Prompts, tokens: Sequence[Sequence[int]], size: int, shared_prefix: int
) -> Float[np.ndarray, " B"]:
    """The score by which references serve more or less often (`reset.prefer`); higher is more often.

    Args:
        config: names the score, other than `none`, and the reward.
        policy: the one that is trained, as it is now.
        prompts: B prompts.
        tokens: the reference of each as a completion; empty where it has none.
        size: C, the same for all batches of a run, so that they compile one program; at least the longest reference.
        shared_prefix: leading tokens that all prompts have in common.

    Returns:
        The scores, which mean nothing where there is no reference.
    """
    prefer, length_B = config.reset.prefer, np.array([len(each) for each in tokens], np.int32)
    if prefer in ("short", "long"):
        return np.where(prefer == "long", length_B, -length_B).astype(np.float32)
    if prefer == "distinct":
        return _distinctness(tokens)
    tokens_B1C = np.zeros((len(tokens), 1, size), np.int32)
    for row_C, reference in zip(tokens_B1C[:, 0], tokens, strict=True):
        row_C[: len(reference)] = reference
    if prefer == "reward":
        given = _Completions(tokens_B1C, length_B[:, None], np.ones((len(tokens), 1), bool))
        limit = config.rollout.max_completion_tokens
        _, reward_BG, *_ = score_rollouts(policy, prompts, given, config.reward, limit)
        return reward_BG[:, 0]
    placed = shard_batch((prompts.tokens_BP, prompts.length_B, tokens_B1C), policy.mesh)
    logprob_BC = to_host(policy.logprobs(*placed, shared_prefix=shared_prefix))[:, 0]
    total_B = np.where(np.arange(size) < length_B[:, None], logprob_BC, 0).sum(axis=1)
    likelihood_B = (total_B / np.maximum(length_B, 1)).astype(np.float32)
    return likelihood_B if prefer == "likely" else -likelihood_B


def _distinctness(tokens: Sequence[Sequence[int]]) -> Float[np.ndarray, " B"]:
    """Less the BLEU of each reference against the batch's others."""
    score_B, rows = np.zeros(len(tokens), np.float32), [row for row, each in enumerate(tokens) if each]
    # A single reference has nothing to differ from.
    if len(rows) > 1:
        score_B[rows] = -bleu_of_each([tokens[row] for row in rows])
    return score_B


def _with_reference(encoded: EncodedExample, reference: str | None) -> EncodedExample:
    return dataclasses.replace(encoded, example=dataclasses.replace(encoded.example, reference=reference))


def _add_wrong_ones(why: list[str | None], examples: Sequence[EncodedExample], config: Config) -> None:
    """Marks the references that the verifier is asked about and does not find right, of those that could serve so far.

    `reset.only_right` has it asked about all.
    """
    rows = [
        row
        for row, encoded in enumerate(examples)
        if why[row] is None and (config.reset.only_right or _may_be_no_completion(encoded.example, config))
    ]
    if not rows:
        return
    chosen = [examples[row] for row in rows]
    prompts = batch_prompts(chosen, [0] * len(chosen), max(len(encoded.tokens) for encoded in chosen))
    texts = [[encoded.example.reference or ""] for encoded in chosen]
    # Neither a learned reward nor the punishment of long completions has a part in being right, and both would need
    # more than texts.
    reward = dataclasses.replace(config.reward, model=(), overlong_cache_tokens=0)
    _, accuracy_BG, scored_BG, _ = score(texts, prompts, np.ones((len(chosen), 1), bool), reward)
    for row, is_right in zip(rows, (scored_BG & (accuracy_BG >= 1))[:, 0], strict=True):
        why[row] = None if is_right else "not right"


def _may_be_no_completion(example: Example, config: Config) -> bool:
    """Whether a gold answer, as it is written, might be no right completion.

    `math` reads only marked answers, and some tasks have no one answer. To `exact` every gold answer is right, which
    `check_answers` has seen to; preferred answers have no verifier.
    """
    return config.reset.references == "answers" and (example.checker or config.reward.checker) in ("math", "task")


def _report(removed: Sequence[tuple[Example, str]], number: int) -> None:
    """Says how many references of a source cannot serve, and why."""
    if removed:
        logger.warning(
            "source '%s': %d of %d training questions have no reference to start from: %s",
            removed[0][0].source,
            len(removed),
            number,
            counted_by_reason(removed),
        )
