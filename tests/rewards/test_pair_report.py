"""Accuracy, calibration and length bias of a reward model, by hand."""

import math

import numpy as np
import pytest

from nested_reft.intervals import wilson
from nested_reft.rewards.pair_report import PairScores, longer_wins, pair_report, reliability


def test_calibration_by_hand():
    """Four claims of 0.6 of which one is right, and one of 0.9 that is right:
    ECE = 4/5 |0.25 - 0.6| + 1/5 |1 - 0.9| = 0.3. A mean over bins would give 0.225."""
    low, high = math.log(0.6 / 0.4), math.log(0.9 / 0.1)
    found = reliability(np.array([low, -low, -low, -low, high]))
    assert found["ece"] == pytest.approx(0.3)
    assert found["bins"] == [
        {"pairs": 4, "claimed": pytest.approx(0.6), "right": 0.25},
        {"pairs": 1, "claimed": pytest.approx(0.9), "right": 1.0},
    ]


def test_a_certain_claim_is_in_the_last_bin():
    assert reliability(np.array([800.0]))["bins"] == [{"pairs": 1, "claimed": 1.0, "right": 1.0}]


def test_the_report_by_hand():
    """Margins +1, -1, 0 and +2: 2.5 of 4 are right. The longer answer has the higher reward in the first and not in
    the second, where it is the rejected one that wins; in the third rewards are equal; the fourth has equal lengths."""
    pairs = PairScores(
        np.array([1.0, 0.0, 1.0, 3.0]), np.array([0.0, 1.0, 1.0, 1.0]), np.array([5, 6, 2, 4]), np.array([3, 2, 4, 4])
    )
    report = pair_report(pairs, longer_wins=True)
    assert report["accuracy"] == 0.625 and report["accuracy_interval"] == list(wilson(0.625, 4))
    assert report["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in (1, -1, 0, 2)]))
    assert report["prefers_longer"] == 0.5  # 1, 0 and a half, of three
    # A bet on the longer answer: right, right, wrong and a half.
    assert report["length_baseline"]["accuracy"] == 0.625 and report["length_baseline"]["bets_on"] == "longer"
    assert pair_report(pairs, longer_wins=False)["length_baseline"]["accuracy"] == 0.375


def test_the_bet_follows_from_training_pairs():
    assert longer_wins(np.array([3, 1, -1])) and not longer_wins(np.array([-3, 1, -1]))


def test_what_does_not_vary_has_no_correlation():
    same = PairScores(np.zeros(3), np.zeros(3), np.full(3, 4), np.full(3, 4))
    report = pair_report(same, longer_wins=True)
    assert report["length_correlation"] is None and report["prefers_longer"] is None and report["accuracy"] == 0.5
