"""Charts as data: what is drawn, apart from how. `svg` draws them for a page, and `figures` as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Number = int | float
MOST_POINTS = 400  # of a curve; more could not be told apart
LEAST_SMOOTHED = 12  # points of a curve that is smoothed
WINDOWS = 12  # that a smoothed curve consists of
LEAST_SPAN = 0.002  # of an axis, relative to its values
Z95 = 1.959964  # standard deviations on either side of a mean that hold 95 %


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps.

    Attributes:
        label: in the legend; untrusted.
        colour: its number.
        steps, values: the points.
        bars: lower and upper end of each point's error bar; None without.
        smooth: the line is a running mean; else it connects the points.
        dashed: to be told from another of its colour.
        right: it belongs to the axis on the right.
    """

    label: str
    colour: int
    steps: Sequence[Number]
    values: Sequence[Number]
    bars: Sequence[tuple[Number, Number]] | None = None
    smooth: bool = True
    dashed: bool = False
    right: bool = False


@dataclass(frozen=True)
class Heatmap:
    """Shares by column and row.

    Attributes:
        cells: (first step, last step, row, share from 0 to 1) of each cell that is not 0.
        rows: how many there are.
        row_size: how many numbers a row stands for.
    """

    cells: Sequence[tuple[Number, Number, int, Number]]
    rows: int
    row_size: int = 1


@dataclass(frozen=True)
class Panel:
    """One pair of axes over the steps.

    Attributes:
        label: of the axis on the left: what it shows, with its unit.
        curves: in the order of the legend.
        limits: of the axis on the left; None lets the data decide.
        right_label: of the axis on the right, where a curve belongs to it.
        heatmap: in the place of curves.
    """

    label: str
    curves: Sequence[Curve] = ()
    limits: tuple[Number, Number] | None = None
    right_label: str = ""
    heatmap: Heatmap | None = None


@dataclass(frozen=True)
class Chart:
    """Panels that are read together.

    Attributes:
        name: of its file.
        title, note: in words; a note may be empty.
        panels: from top to bottom.
    """

    name: str
    title: str
    note: str
    panels: Sequence[Panel]


def smoothed(curve: Curve) -> tuple[list[Number], list[Number]]:
    """The line of a curve: its running mean where it has points enough, over a window around it.

    Args:
        curve: whose points are in the order of their steps.
    """
    steps, values = list(curve.steps), list(curve.values)
    half = len(values) // WINDOWS // 2
    if not curve.smooth or len(values) < LEAST_SMOOTHED or half == 0:
        return thinned(steps, values)
    # Sums from the start on make the mean of a window two look-ups.
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = list[Number]()
    for index in range(len(values)):
        # At the ends the window gets shorter on one side: the mean of one value would be as noisy as the points.
        start, end = max(index - half, 0), min(index + half + 1, len(values))
        means.append((sums[end] - sums[start]) / (end - start))
    return thinned(steps, means)


def thinned(steps: Sequence[Number], values: Sequence[Number]) -> tuple[list[Number], list[Number]]:
    """At most `MOST_POINTS` of the points, evenly spread, the first and the last among them.

    Args:
        steps, values: the points.
    """
    picked = spread(len(steps), MOST_POINTS)
    return [steps[index] for index in picked], [values[index] for index in picked]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spread, the first and the last among them.

    Args:
        count: how many there are.
        most: 2 or more.
    """
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def wilson(share: Number, count: int) -> tuple[Number, Number]:
    """The 95 % interval of a share, which keeps within 0 and 1 also where all or none are right (Wilson, 1927).

    Args:
        share: that was observed, from 0 to 1.
        count: of independent trials, 1 or more.
    """
    square = Z95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(max(share * (1 - share), 0.0) / count + square / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def limits(panel: Panel, right: bool = False) -> tuple[Number, Number]:
    """The lower and upper end of an axis, with some room.

    Args:
        panel: with curves.
        right: the axis on the right.
    """
    if panel.limits is not None and not right:
        return panel.limits
    chosen = [curve for curve in panel.curves if curve.right == right]
    values = [value for curve in chosen for value in curve.values]
    values += [end for curve in chosen for bar in curve.bars or () for end in bar]
    low, high = min(values, default=0.0), max(values, default=1.0)
    # Without some width, roundings of equal values would fill the axis.
    room = max((high - low) * 0.05, (LEAST_SPAN * max(abs(low), abs(high)) - (high - low)) / 2) or 1.0
    bounds = low - room, high + room
    # What is never negative has an axis that ends at 0, if it comes near it.
    return (0.0, bounds[1]) if 0 <= low < high / 4 else bounds


def ticks(low: Number, high: Number, most: int = 5) -> list[Number]:
    """Round numbers between two limits.

    Args:
        low, high: of the axis.
        most: about as many.
    """
    span = high - low
    if not 0 < span < math.inf:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    if power == 0:
        return [low, high]
    step = next((factor * power for factor in (1, 2, 5, 10) if factor * power >= rough), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, first + 3 * most) if index * step <= high + 1e-9 * span]
