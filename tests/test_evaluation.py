"""Held-out accuracy: the estimate of pass@k, by hand."""

import itertools

import numpy as np
import pytest

from nested_reft.evaluation import EvaluationConfig, pass_at_k


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected", "naive"),
    [
        # 6 pairs of 4 samples; 3 of them hold the one right sample: 1/2. With replacement: 1 - (3/4)^2 = 7/16.
        (4, 1, 2, 1 / 2, 7 / 16),
        # 10 triples of 5 samples; one holds none of the two right ones: 9/10. With replacement: 1 - (3/5)^3 = 98/125.
        (5, 2, 3, 9 / 10, 98 / 125),
    ],
)
def test_pass_at_k_by_hand(samples, correct, k, expected, naive):
    """The k samples are drawn without replacement; 1 - (1 - c / n)^k, which draws with it, is biased low."""
    assert pass_at_k(samples, correct, k) == pytest.approx(expected)
    assert 1 - (1 - correct / samples) ** k == pytest.approx(naive) and naive < expected


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 3, 2), (4, 4, 1), (5, 3, 3), (8, 8, 8)])
def test_with_fewer_wrong_samples_than_k_one_is_always_right(samples, correct, k):
    assert correct > samples - k
    assert pass_at_k(samples, correct, k) == 1
    assert pass_at_k(samples, samples - k, k) < 1  # with k wrong samples, all may be drawn


@pytest.mark.parametrize(("samples", "k"), [(4, 2), (6, 1), (6, 4)])
def test_pass_at_k_counts_subsets(samples, k):
    """A slow count over all subsets; k = 1 is the share of right samples."""
    for correct in range(samples + 1):
        is_right = np.arange(samples) < correct
        subsets = list(itertools.combinations(is_right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_is_unbiased():
    """Its mean over binomial counts is 1 - (1 - p)^k; that of the naive value is less."""
    p, n, k = 0.3, 4, 2
    chance_c = [np.prod([1.0 * (n - i) / (i + 1) for i in range(c)]) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(chance_c) == pytest.approx(1)
    mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chance_c))
    naive = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chance_c))
    assert mean == pytest.approx(1 - (1 - p) ** k) and naive < mean - 0.01


def test_refusals():
    with pytest.raises(ValueError, match=r"evaluation.pass_k is 9; allowed is 1 to evaluation.samples_per_prompt"):
        EvaluationConfig(samples_per_prompt=8, pass_k=9)
    with pytest.raises(ValueError, match=r"evaluation.every_steps is 0 and evaluation.batch_size 32"):
        EvaluationConfig(every_steps=0)
