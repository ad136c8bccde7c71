"""Diversity of texts, against values by hand."""

import itertools
import math

import numpy as np
import pytest

from nested_reft.diversity import embedding_distance, self_bleu


@pytest.mark.parametrize(
    ("texts", "order", "expected"),
    [
        # Equal texts, and texts that share no character.
        (["abcde", "abcde", "abcde"], 4, 1.0),
        (["ab", "cd"], 1, 0.0),
        # abcd: a, b, c of 4 characters and ab, bc of 3 pairs are in abce; xyz shares nothing.
        (["abcd", "abce", "xyz"], 2, 2 * math.sqrt(3 / 4 * 2 / 3) / 3),
        # A pair of two texts has to come from one of them, not one half from each.
        (["ab", "ax", "xb"], 2, 0.0),
        # ab is all in abc, but shorter: exp(1 - 3/2). Of abc, 2 of 3 characters and 1 of 2 pairs are in ab.
        (["ab", "abc"], 2, (math.exp(1 - 3 / 2) + math.sqrt(2 / 3 * 1 / 2)) / 2),
        # An n-gram counts as often as the one text that has it most often: aaa has two a's from aab, not four from two.
        (["aaa", "aab", "aab"], 1, (2 / 3 + 1 + 1) / 3),
        # 4 characters lie between texts of 3 and of 5: the shorter one counts, so nothing is taken off.
        (["abcd", "abc", "abcde"], 1, (1 + math.exp(1 - 4 / 3) + 4 / 5) / 3),
        # No text of one character has a pair.
        (["a", "a"], 2, 0.0),
        (["", "a", "a"], 1, 2 / 3),
    ],
)
def test_self_bleu_by_hand(texts, order, expected):
    assert self_bleu(texts, order) == pytest.approx(expected, abs=1e-12)
    assert self_bleu([[*text] for text in reversed(texts)], order) == pytest.approx(expected, abs=1e-12)


def test_embedding_distance_is_the_mean_over_pairs():
    embedding_ND = np.random.default_rng(0).normal(size=(7, 3))
    pairs = [1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in itertools.combinations(embedding_ND, 2)]
    assert embedding_distance(embedding_ND) == pytest.approx(np.mean(pairs))
    assert embedding_distance(np.array([[1.0, 0], [0, 3.0]])) == pytest.approx(1)
    assert embedding_distance(np.array([[1.0, 1], [3.0, 3]])) == pytest.approx(0)


def test_what_has_no_diversity_is_refused():
    with pytest.raises(ValueError, match="self-BLEU got 1 texts and max_order 4"):
        self_bleu(["a"])
    with pytest.raises(ValueError, match="embedding_distance got 2 embeddings, the shortest 0"):
        embedding_distance(np.zeros((2, 3)))
