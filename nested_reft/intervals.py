"""Intervals of shares and means."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

Z95 = 1.959964  # of the normal distribution: 95 % lie within so many standard deviations


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, which keeps within 0 and 1 also where all or none are right (Wilson, 1927).

    Args:
        share: that was observed, from 0 to 1.
        count: of independent trials, 1 or more.
    """
    square = Z95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(max(share * (1 - share), 0.0) / count + square / (4 * count))
    # Where none or all are right, rounding would leave a trace of the exact bound.
    return 0.0 if share == 0 else max(middle - half, 0.0), 1.0 if share == 1 else min(middle + half, 1.0)


def of_mean(values_N: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """The 95 % interval of a mean of values from 0 to 1, by the normal distribution; Wilson's where all are 0 or 1.

    Args:
        values_N: independent of one another, at least one.
    """
    mean, count = float(values_N.mean()), len(values_N)
    if np.isin(values_N, (0.0, 1.0)).all():
        return wilson(mean, count)
    half = Z95 * float(values_N.std(ddof=1)) / math.sqrt(count)
    return max(mean - half, 0.0), min(mean + half, 1.0)
