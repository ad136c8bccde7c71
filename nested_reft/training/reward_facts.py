"""What a reward model is worth on held-out pairs, and what normalises its rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.data.written import completion_tokens, pair, written_batch
from nested_reft.heartbeat import beat
from nested_reft.losses.bradley_terry import PAIR_SIGNALS
from nested_reft.reward_model import RewardModel
from nested_reft.rewards.pair_report import PairScores, longer_wins, pair_report
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import to_host
from nested_reft.training.config import Config
from nested_reft.training.setup import RunData


def reward_facts(policy: Policy, data: RunData, config: Config) -> dict[str, Any]:
    """The report of each source, and what normalises rewards.

    The mean is that of held-out preferred answers, as in DR-PO. The standard deviation is that of all held-out answers:
    preferred ones alone may all get much the same reward.

    Args:
        policy: the reward model.
        data: its pairs.
        config: gives the size of a batch.

    Returns:
        JSON-able values: `mean`, `std`, the number of `references` that the mean is of, and `sources`, the
        `pair_report` of each by name.
    """
    batch_size = config.prompts_per_micro_batch
    encode, sources, found = policy.tokenizer.encode, dict[str, Any](), list[PairScores]()
    for name, train, heldout in zip(data.source_names, data.train_examples, data.heldout_examples, strict=True):
        scores = pair_scores(RewardModel(policy), heldout, data.prompt_size, batch_size)
        # What the baseline bets on follows from training pairs, whose lengths need no model.
        lengths_E2 = np.array([[completion_tokens(text, encode) for text in pair(e.example)] for e in train])
        sources[name] = pair_report(scores, longer_wins(lengths_E2[:, 0] - lengths_E2[:, 1]))
        found.append(scores)
    chosen, rejected = (np.concatenate([getattr(s, f"{name}_E") for s in found]) for name in ("chosen", "rejected"))
    # Equal rewards, such as those of a model that was not trained, have no scale of their own.
    std = float(np.concatenate([chosen, rejected]).astype(np.float64).std()) or 1.0
    mean = float(chosen.astype(np.float64).mean())
    return {"mean": mean, "std": std, "references": len(chosen), "sources": sources}


def pair_scores(
    model: RewardModel, examples: Sequence[EncodedExample], prompt_size: int, batch_size: int
) -> PairScores:
    """Rewards and lengths of the pairs of one source, in one compiled shape.

    Args:
        model: what scores.
        examples: pairs, at least one.
        prompt_size: P.
        batch_size: pairs of a batch.
    """
    tokenizer = model.policy.tokenizer
    size = max(completion_tokens(text, tokenizer.encode) for e in examples for text in pair(e.example))
    rewards, lengths = list[np.ndarray](), list[np.ndarray]()
    for start in range(0, len(examples), batch_size):
        chunk = list(examples[start : start + batch_size])
        padded = chunk + [chunk[-1]] * (batch_size - len(chunk))
        prompts = batch_prompts(padded, [0] * batch_size, prompt_size)
        texts_BG = [pair(encoded.example) for encoded in padded]
        batch = written_batch(prompts, texts_BG, PAIR_SIGNALS, tokenizer.encode, tokenizer.stop_ids[0], size)
        found = model.rewards(batch.prompt_BP, batch.prompt_length_B, batch.tokens_BGC, batch.length_BG)
        rewards.append(to_host(found)[: len(chunk)])
        beat()
        lengths.append(to_host(batch.length_BG)[: len(chunk)])
    (chosen_E, rejected_E), (chosen_tokens_E, rejected_tokens_E) = (
        np.concatenate(parts).T for parts in (rewards, lengths)
    )
    return PairScores(chosen_E, rejected_E, chosen_tokens_E, rejected_tokens_E)
