"""Completions that somebody wrote, as batches to learn from: demonstrations and preference pairs.

A preference pair is an example whose metadata have a `rejected` answer beside its own. In a JSONL file with the fields
`prompt`, `chosen` and `rejected`, `question_field` is `prompt` and `answer_field` is `chosen`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from nested_reft.data.examples import Example, about, counted_by_reason
from nested_reft.data.prompts import EncodedExample
from nested_reft.types import Prompts, TrainBatch

logger = logging.getLogger(__name__)

Encode = Callable[[str], list[int]]


def demonstration(example: Example) -> list[str]:
    """The text to imitate: the reference, which may show how an answer is found, else the answer."""
    return [example.reference or example.answer]


def pair(example: Example) -> list[str]:
    """The preferred answer and the other one, which is empty where there is none."""
    rejected = example.metadata.get("rejected")
    return [example.answer, rejected if isinstance(rejected, str) else ""]


def why_unusable(texts: Sequence[str], example: Example, encode: Encode, most_tokens: int) -> str | None:
    """Why nothing can be learnt from an example, in words that follow a count; None where something can.

    Args:
        texts: of `demonstration` or `pair`.
        example: that they are of.
        encode: turns text into tokens.
        most_tokens: C, with the stop token.
    """
    if not all(text.strip() for text in texts):
        return "with an empty answer or none"
    if len(set(texts)) < len(texts):
        return "with equal answers"
    # A few published pairs part before the last reply, so their answers are not to one prompt.
    if len(texts) > 1 and "rejected_dialogue" in example.metadata:
        return "with two prompts"
    if max(completion_tokens(text, encode) for text in texts) > most_tokens:
        return f"with an answer of more than {most_tokens} tokens"
    return None


def usable(
    examples: Sequence[EncodedExample],
    texts_of: Callable[[Example], list[str]],
    encode: Encode,
    most_tokens: int,
    part: str,
) -> list[EncodedExample]:
    """The examples that can be learnt from; the others are reported and removed.

    Args:
        examples: of one source, at least one.
        texts_of: `demonstration` or `pair`.
        encode: turns text into tokens.
        most_tokens: C, the longest completion with its stop token.
        part: what they are, for messages: `train` or `heldout`.

    Raises:
        ValueError: none is left.
    """
    why = []
    for encoded in examples:
        with about(encoded.example):
            why.append(why_unusable(texts_of(encoded.example), encoded.example, encode, most_tokens))
    unusable = [(encoded.example, reason) for encoded, reason in zip(examples, why, strict=True) if reason is not None]
    if not unusable:
        return list(examples)
    listed = counted_by_reason(unusable)
    said = f"source '{unusable[0][0].source}': {len(unusable)} of {len(examples)} {part} rows cannot be learnt from"
    if len(unusable) == len(examples):
        hint = "pairs need the fields of the question, the answer and `rejected`; longer answers need a larger"
        raise ValueError(f"{said}: {listed}; {hint} rollout.max_completion_tokens")
    logger.warning("%s and are skipped: %s", said, listed)
    return [encoded for encoded, reason in zip(examples, why, strict=True) if reason is None]


def completion_tokens(text: str, encode: Encode) -> int:
    """How many tokens a completion takes, its stop token included.

    Args:
        text: the completion.
        encode: turns text into tokens.
    """
    return len(encode(text)) + 1


def written_batch(
    prompts: Prompts,
    texts_BG: Sequence[Sequence[str]],
    signals_G: Sequence[float],
    encode: Encode,
    stop_id: int,
    size: int,
) -> TrainBatch:
    """A batch of given completions, each with a stop token.

    Args:
        prompts: B prompts.
        texts_BG: G completions of each.
        signals_G: what the loss learns from each completion of a group.
        encode: turns text into tokens.
        stop_id: the token that ends each completion.
        size: C; a longer completion would be cut.
    """
    shape = (len(prompts), len(signals_G))
    tokens_BGC, length_BG = np.zeros((*shape, size), np.int32), np.zeros(shape, np.int32)
    for b, texts_G in enumerate(texts_BG):
        for g, text in enumerate(texts_G):
            # The model must learn to stop as well; any one of its stop tokens will do.
            ids = [*encode(text), stop_id][:size]
            tokens_BGC[b, g, : len(ids)], length_BG[b, g] = ids, len(ids)
    return TrainBatch(
        prompt_BP=jnp.asarray(prompts.tokens_BP),
        prompt_length_B=jnp.asarray(prompts.length_B),
        tokens_BGC=jnp.asarray(tokens_BGC),
        length_BG=jnp.asarray(length_BG),
        forced_BG=jnp.zeros(shape, jnp.int32),
        counted_BG=jnp.ones(shape, bool),
        signal_BG=jnp.tile(jnp.asarray(signals_G, jnp.float32), (shape[0], 1)),
    )
