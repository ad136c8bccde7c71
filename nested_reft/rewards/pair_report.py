"""How well a reward model orders preference pairs: accuracy, calibration, and what it owes to length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nested_reft.intervals import wilson

BINS = 5  # of confidence, from 0.5 to 1


@dataclass(frozen=True)
class PairScores:
    """Rewards and lengths of E preference pairs.

    Attributes:
        chosen_E, rejected_E: rewards of the preferred and of the other answers.
        chosen_tokens_E, rejected_tokens_E: their lengths, with stop tokens.
    """

    chosen_E: Float[np.ndarray, " E"]
    rejected_E: Float[np.ndarray, " E"]
    chosen_tokens_E: Int[np.ndarray, " E"]
    rejected_tokens_E: Int[np.ndarray, " E"]

    @property
    def margin_E(self) -> Float[np.ndarray, " E"]:
        """By how much the preferred answer has the higher reward."""
        return np.asarray(self.chosen_E, np.float64) - np.asarray(self.rejected_E, np.float64)

    @property
    def more_tokens_E(self) -> Int[np.ndarray, " E"]:
        """By how many tokens the preferred answer is longer."""
        return np.asarray(self.chosen_tokens_E, np.int64) - np.asarray(self.rejected_tokens_E, np.int64)


def pair_report(pairs: PairScores, longer_wins: bool) -> dict[str, Any]:
    """What is reported of a reward model on held-out pairs.

    Args:
        pairs: at least one.
        longer_wins: what the length-only baseline bets on; chosen on training pairs, never on these.

    Returns:
        JSON-able values. `accuracy` with `accuracy_interval` (95 %, Wilson; equal rewards are half right); `loss`, in
        nats a pair; `calibration` as `reliability` gives it; `length_correlation` of reward and length over all
        answers; `margin_length_correlation` of the two differences within pairs; `prefers_longer`, the share of pairs
        of unequal length whose longer answer has the higher reward; `length_baseline`, what it bets on and its
        accuracy.
    """
    right_E, count = _right(pairs.margin_E), len(pairs.chosen_E)
    baseline_E = _right(pairs.more_tokens_E if longer_wins else -pairs.more_tokens_E)
    tokens = np.concatenate([pairs.chosen_tokens_E, pairs.rejected_tokens_E])
    differs_E = pairs.more_tokens_E != 0
    longer_E = _right(pairs.margin_E * np.sign(pairs.more_tokens_E))[differs_E]
    return {
        "pairs": count,
        "accuracy": float(right_E.mean()),
        "accuracy_interval": list(wilson(float(right_E.mean()), count)),
        "loss": float(np.logaddexp(0, -pairs.margin_E).mean()),
        "calibration": reliability(pairs.margin_E),
        "length_correlation": correlation(np.concatenate([pairs.chosen_E, pairs.rejected_E]), tokens),
        "margin_length_correlation": correlation(pairs.margin_E, pairs.more_tokens_E),
        "prefers_longer": float(longer_E.mean()) if differs_E.any() else None,
        "length_baseline": {
            "bets_on": "longer" if longer_wins else "shorter",
            "accuracy": float(baseline_E.mean()),
            "accuracy_interval": list(wilson(float(baseline_E.mean()), count)),
        },
    }


def longer_wins(more_tokens_E: Int[np.ndarray, " E"]) -> bool:
    """Whether the longer answer is preferred more often than the shorter one; for the length-only baseline.

    Args:
        more_tokens_E: of training pairs, by how many tokens the preferred answer is longer.
    """
    return float(_right(more_tokens_E).mean()) >= 0.5


def reliability(margin_E: Float[np.ndarray, " E"], bins: int = BINS) -> dict[str, Any]:
    """How often a model is right where it claims a probability, and the expected calibration error.

    The model claims sigmoid(|margin|) for the answer that it gives the higher reward. Bins of that claim have equal
    width over [0.5, 1]. ECE = sum_bins (pairs of the bin / pairs) |share right - mean claim|.

    Args:
        margin_E: reward of the preferred answer, minus that of the other one.
        bins: how many.

    Returns:
        `ece`, and `bins` that are not empty, each with `pairs`, `claimed` and `right`.
    """
    claimed_E, right_E = 1 / (1 + np.exp(-np.abs(margin_E))), _right(margin_E)
    # A claim of 1 belongs to the last bin, which has no bin after it.
    bin_E = np.minimum(((claimed_E - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for index in range(bins):
        inside_E = bin_E == index
        if inside_E.any():
            claimed, right = float(claimed_E[inside_E].mean()), float(right_E[inside_E].mean())
            found.append({"pairs": int(inside_E.sum()), "claimed": claimed, "right": right})
    ece = sum(each["pairs"] * abs(each["right"] - each["claimed"]) for each in found) / len(margin_E)
    return {"ece": float(ece), "bins": found}


def correlation(x_E: np.ndarray, y_E: np.ndarray) -> float | None:
    """Pearson's correlation; None where one of the two does not vary.

    Args:
        x_E, y_E: as many values of each.
    """
    x_E, y_E = np.asarray(x_E, np.float64), np.asarray(y_E, np.float64)
    if len(x_E) < 2 or x_E.std() == 0 or y_E.std() == 0:
        return None
    return float(np.corrcoef(x_E, y_E)[0, 1])


def _right(margin_E: np.ndarray) -> Float[np.ndarray, " E"]:
    """1 where the margin is positive, and a half where there is none."""
    return (1 + np.sign(margin_E)) / 2
