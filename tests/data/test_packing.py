"""Several demonstrations in one row: which share one, and what the row says of its tokens."""

import numpy as np
import pytest

from nested_reft.data.packing import fitted, packed_batch
from nested_reft.types import Prompts


def prompts_of(*tokens: list[int]) -> Prompts:
    count, size = len(tokens), max(map(len, tokens))
    nothing = ("",) * count
    padded = np.array([row + [0] * (size - len(row)) for row in tokens], np.int32)
    return Prompts(
        padded, np.array([len(row) for row in tokens]), np.zeros(count, int), nothing, nothing, ({},) * count
    )


def encode(text: str) -> list[int]:
    return [int(digit) for digit in text]


def test_the_longest_come_first_and_each_takes_the_first_room():
    """Rows of 10: 7 with 3, 6 with 4; in the given order 3, 6 would be a row and 4 another, which wastes one."""
    assert fitted([3, 6, 4, 7], 10) == [[3, 0], [1, 2]]
    assert fitted([], 10) == []


def test_every_text_has_a_place_and_no_row_is_too_long():
    lengths = np.random.default_rng(0).integers(1, 40, 300).tolist()
    rows = fitted(lengths, 40)
    assert sorted(index for row in rows for index in row) == list(range(300))
    assert all(sum(lengths[index] for index in row) <= 40 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 40


@pytest.mark.parametrize("shared", [0, 2])
def test_a_packed_row_by_hand(shared):
    """Three prompts that begin with 8 8, their answers, and the stop token 9. With `shared` they are given once."""
    prompts = prompts_of([8, 8, 1], [8, 8, 2, 3], [8, 8, 4])
    batch = packed_batch(prompts, ["5", "", "66"], encode, 9, shared, size=10 - shared, multiple=4)
    whole = [[[8, 8, 4], [6, 6, 9]], [[8, 8, 1], [5, 9]], [[8, 8, 2, 3], [9]]]
    texts = [(prompt[shared:], answer) for prompt, answer in whole]
    # Lengths are 6, 5, 5 of 10 and, without the shared tokens, 4, 3, 3 of 8: one row holds two of them.
    rows = [texts[:1], texts[1:]] if shared == 0 else [texts[:2], texts[2:]]
    assert batch.tokens_BGC.shape == (4, 1, 10 - shared)
    for row, held in enumerate(rows):
        tokens = [token for text in held for part in text for token in part]
        segments = [number for number, text in enumerate(held, 1) for part in text for _ in part]
        learnt = [part is text[1] for text in held for part in text for _ in part]
        length = int(batch.length_BG[row, 0])
        assert batch.tokens_BGC[row, 0, :length].tolist() == tokens
        assert batch.segment_BGC is not None and batch.segment_BGC[row, 0, :length].tolist() == segments
        assert batch.mask_BGC[row, 0, :length].tolist() == learnt and not batch.mask_BGC[row, 0, length:].any()
    assert not batch.counted_BG[2:].any() and not batch.mask_BGC[2:].any()
    assert batch.prompt_length_B.tolist() == [shared] * 4 and batch.prompt_BP.shape == (4, max(shared, 1))
    assert shared == 0 or batch.prompt_BP.tolist() == [[8, 8]] * 4
