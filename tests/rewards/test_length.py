"""DAPO's soft overlong punishment at its boundaries."""

import numpy as np
import pytest

from nested_reft.rewards.length import overlong_punishment


def test_punishment_is_zero_then_linear_then_minus_one():
    # L_max 20, L_cache 8: it begins after 12 tokens, is half at 16 and full at 20; a sign turned round gives +0.5.
    length_BG = np.array([[0, 1, 11, 12], [13, 16, 19, 20], [21, 40, 12, 16]], np.int32)
    expected = [[0, 0, 0, 0], [-1 / 8, -0.5, -7 / 8, -1], [-1, -1, 0, -0.5]]
    punishment_BG = overlong_punishment(length_BG, max_tokens=20, cache_tokens=8)
    np.testing.assert_array_equal(punishment_BG, expected)
    assert punishment_BG.dtype == np.float32


@pytest.mark.parametrize("cache_tokens", [1, 20])
def test_the_smallest_and_the_largest_cache(cache_tokens):
    length_BG = np.array([[20 - cache_tokens, 20]], np.int32)
    np.testing.assert_array_equal(overlong_punishment(length_BG, 20, cache_tokens), [[0, -1]])
