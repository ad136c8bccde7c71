"""Dividing a source: parts that differ, nothing lost, nothing random."""

import dataclasses
import itertools

import numpy as np
import pytest

from nested_reft.data.sources import difficulty_ladder, exactly
from nested_reft.data.splits import SplitConfig, split_by_pass_rate


def everything(parts: list[list[int]], size: int) -> bool:
    return sorted(index for part in parts for index in part) == list(range(size))


def test_pass_rates_are_cut_into_even_parts_easiest_first():
    rate_E = np.array([0.0, 1.0, 0.25, 0.75, 0.5, 0.9, 0.1, 0.6])
    assert split_by_pass_rate(rate_E, 4) == [[1, 5], [3, 7], [2, 4], [0, 6]]


def test_questions_of_equal_pass_rate_stay_together():
    """Six of eight are never right: cutting by rank alone would put them into three parts."""
    rate_E = np.array([0.0, 0.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    assert split_by_pass_rate(rate_E, 4) == [
        [2, 4],
        [0, 1, 3, 5, 6, 7],
    ]  # middles of the three groups: 0.5, 1.5, 5 of 8
    assert split_by_pass_rate(np.zeros(5), 3) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_pass_rate_parts_lose_nothing_and_are_ordered(parts):
    rate_E = np.random.default_rng(parts).integers(0, 9, 50) / 8
    found = split_by_pass_rate(rate_E, parts)
    assert 1 < len(found) <= parts and everything(found, 50)
    for easier, harder in itertools.pairwise(found):
        assert rate_E[easier].min() > rate_E[harder].max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": 1}, "data.split.parts is 1; allowed is 2 or more"),
        ({"samples": 0}, "data.split.samples is 0; allowed is 1 or more"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SplitConfig(), **changes)


def test_a_ladder_makes_a_source_of_each_level():
    levels = {"easy": exactly(terms=2, digits=1), "hard": {"min_terms": 3, "max_terms": 5}}
    easy, hard = difficulty_ladder("chain_sum", levels, train_size=9, heldout_size=4, seed=2)
    assert easy.parameters == {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert (hard.name, hard.task, hard.train_size, hard.heldout_size, hard.seed) == ("hard", "chain_sum", 9, 4, 2)
