"""Intervals of shares and means, by hand."""

import numpy as np
import pytest

from nested_reft.intervals import of_mean, wilson


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        # Of none of n: 0 and z^2 / (n + z^2) = 3.841 / 103.841. Half of 100 is the textbook's 0.404 to 0.596.
        (0.0, 100, (0.0, 0.03699)),
        (1.0, 100, (0.96301, 1.0)),
        (0.5, 100, (0.40383, 0.59617)),
        # Centre (0.8 + 3.8415/20) / 1.38415 = 0.71674, half width 1.96 sqrt(0.016 + 3.8415/400) / 1.38415 = 0.22657.
        # The normal interval would end at 1.048, which is no share.
        (0.8, 10, (0.49016, 0.94332)),
    ],
)
def test_wilson(share, count, expected):
    assert wilson(share, count) == pytest.approx(expected, abs=1e-4)


def test_the_interval_of_a_mean():
    """Of 0, 0.5, 0.5 and 1 the mean is 0.5 and the variance 1/6, so the half width is 1.96 sqrt(1/24) = 0.40008."""
    assert of_mean(np.array([0.0, 0.5, 0.5, 1.0])) == pytest.approx((0.09992, 0.90008), abs=1e-4)
    assert of_mean(np.array([1.0, 0.0] * 50)) == wilson(0.5, 100)
    assert of_mean(np.array([1.0])) == wilson(1.0, 1)
