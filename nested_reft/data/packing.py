"""Several short demonstrations in one row, so that less of a batch is padding.

A row holds whole texts, one after the other: what a prompt has of its own and then its answer. Each text sees the
tokens that all prompts begin with, and itself. So an update on packed texts is the update on the same texts in rows of
their own, but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from nested_reft.data.written import Encode
from nested_reft.types import Prompts, TrainBatch


def fitted(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which texts share a row: the longest first, each into the first row with room for it.

    Args:
        lengths: of each text, at most `size`.
        size: of a row.

    Returns:
        The indices of each row's texts.
    """
    rows, room = list[list[int]](), list[int]()
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def packed_batch(
    prompts: Prompts,
    answers: Sequence[str],
    encode: Encode,
    stop_id: int,
    shared_prefix: int,
    size: int,
    multiple: int,
) -> TrainBatch:
    """A batch of demonstrations whose rows hold several of them; each row takes the place of one completion.

    Args:
        prompts: B prompts.
        answers: what follows each of them.
        encode: turns text into tokens.
        stop_id: the token that ends each answer.
        shared_prefix: Q, leading tokens that all prompts have in common; a row has them once.
        size: C, of a row: at least the longest text without these tokens.
        multiple: the number of rows is a multiple of this; rows without texts count for nothing.
    """
    own = [prompts.tokens_BP[b, shared_prefix:length].tolist() for b, length in enumerate(prompts.length_B)]
    ends = [[*encode(answer), stop_id] for answer in answers]
    rows = fitted([len(start) + len(end) for start, end in zip(own, ends, strict=True)], size)
    shape = (-(-len(rows) // multiple) * multiple, 1, size)
    tokens_BGC, segment_BGC = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    learnt_BGC, length_BG = np.zeros(shape, bool), np.zeros(shape[:2], np.int32)
    for row, texts in enumerate(rows):
        at = 0
        for segment, index in enumerate(texts, 1):
            text, answer = own[index] + ends[index], at + len(own[index])
            tokens_BGC[row, 0, at : at + len(text)] = text
            segment_BGC[row, 0, at : at + len(text)] = segment
            at += len(text)
            learnt_BGC[row, 0, answer:at] = True
        length_BG[row, 0] = at
    # A prompt has at least one token, which nothing sees where the prompts share none.
    prompt_BP = np.broadcast_to(prompts.tokens_BP[:1, : max(shared_prefix, 1)], (shape[0], max(shared_prefix, 1)))
    return TrainBatch(
        prompt_BP=jnp.asarray(prompt_BP),
        prompt_length_B=jnp.full(shape[0], shared_prefix, jnp.int32),
        tokens_BGC=jnp.asarray(tokens_BGC),
        length_BG=jnp.asarray(length_BG),
        forced_BG=jnp.zeros(shape[:2], jnp.int32),
        counted_BG=jnp.asarray(length_BG > 0),
        signal_BG=jnp.ones(shape[:2], jnp.float32),
        segment_BGC=jnp.asarray(segment_BGC),
        learnt_BGC=jnp.asarray(learnt_BGC),
    )
