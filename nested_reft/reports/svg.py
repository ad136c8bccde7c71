"""Charts drawn as SVG within a page. Colours are classes of the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from nested_reft.reports.charts import Chart, Curve, Heatmap, Number, Panel, limits, smoothed, thinned, ticks
from nested_reft.untrusted import printable

# Lengths in the units of the drawing, which is as wide as its place allows: letters stay legible at half the width.
WIDTH, HEIGHT = 480, 196  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 28, 30
RIGHT_AXIS = 48  # in the place of `RIGHT`
MOST_MARKED = 60  # points of a line that goes through them all
MOST_LABEL = 80  # characters of a name in a legend
Scale = Callable[[Number], float]


def figure(chart: Chart) -> str:
    """A chart as a `figure` element, with its title, legends and note.

    Args:
        chart: whose labels are untrusted.
    """
    panels, before = "", ""
    for panel in chart.panels:
        legend = _legend(panel)
        # Panels under each other often have the same curves, which are named once.
        panels += f'<div class="panel">{"" if legend == before else legend}{_panel(panel)}</div>'
        before = legend
    note = f'<p class="note">{text(chart.note)}</p>' if chart.note else ""
    return f'<figure id="{text(chart.name)}"><figcaption>{text(chart.title)}</figcaption>{panels}{note}</figure>'


def text(words: str) -> str:
    """Untrusted words as the text of an element or an attribute.

    Args:
        words: of any content.
    """
    return escape(printable(words))


def _legend(panel: Panel) -> str:
    """The names of the curves; nothing where there is but one that the axis names."""
    # A name with a slash is that of a source or of a part, which no axis has.
    if len(panel.curves) < 2 and not any("/" in curve.label for curve in panel.curves):
        return ""
    entries = "".join(
        f'<li><svg class="key" viewBox="0 0 18 8"><path class="line {_look(curve)}" d="M1 4H17"/></svg>'
        f"{text(_short(curve.label))}{' (right axis)' if curve.right else ''}</li>"
        for curve in panel.curves
    )
    return f'<ul class="legend">{entries}</ul>'


def _short(label: str) -> str:
    return label if len(label) <= MOST_LABEL else f"{label[: MOST_LABEL - 1]}…"


def _look(curve: Curve) -> str:
    return f"c{curve.colour}{' dashed' if curve.dashed else ''}"


def _panel(panel: Panel) -> str:
    right = RIGHT_AXIS if panel.right_label else RIGHT
    x_low, x_high = _steps(panel)
    across = _scale(x_low, x_high, LEFT, WIDTH - right)
    parts = [_x_axis(x_low, x_high, across)]
    if panel.heatmap is not None:
        parts.append(_heatmap(panel.heatmap, across))
    else:
        low, high = limits(panel)
        up = _scale(low, high, HEIGHT - BOTTOM, TOP)
        parts.append(_y_axis(low, high, up, LEFT, WIDTH - right))
        parts += [_curve(curve, across, up) for curve in panel.curves if not curve.right]
        if panel.right_label:
            low, high = limits(panel, right=True)
            up = _scale(low, high, HEIGHT - BOTTOM, TOP)
            parts.append(_right_axis(low, high, up, panel.right_label))
            parts += [_curve(curve, across, up) for curve in panel.curves if curve.right]
    title = f'<text class="axis" x="4" y="13">{text(panel.label)}</text>'
    label = text(panel.label)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{title}{"".join(parts)}</svg>'


def _steps(panel: Panel) -> tuple[Number, Number]:
    """First and last step of a panel, with half a step around the cells of a heatmap."""
    if panel.heatmap is not None:
        ends = [end for first, last, _, _ in panel.heatmap.cells for end in (first - 0.5, last + 0.5)]
    else:
        ends = [step for curve in panel.curves for step in curve.steps]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _scale(low: Number, high: Number, start: Number, end: Number) -> Scale:
    """From values to places."""

    def place(value: Number) -> float:
        return start + (end - start) * (value - low) / (high - low)

    return place


def _x_axis(low: Number, high: Number, across: Scale) -> str:
    bottom = HEIGHT - BOTTOM
    # A step is a whole number, so there is nothing between two of them to mark.
    shown = [tick for tick in ticks(low, high, 6) if tick == round(tick)]
    marks = "".join(
        f'<text x="{across(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{number(tick, high - low)}</text>'
        for tick in shown
    )
    label = f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">step</text>'
    return marks + label


def _y_axis(low: Number, high: Number, up: Scale, left: Number, right: Number) -> str:
    return "".join(
        f'<path class="grid" d="M{left} {up(tick):.1f}H{right}"/>'
        f'<text x="{left - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick, high - low)}</text>'
        for tick in ticks(low, high)
    )


def _right_axis(low: Number, high: Number, up: Scale, label: str) -> str:
    place = WIDTH - RIGHT_AXIS
    marks = "".join(
        f'<text x="{place + 5}" y="{up(tick) + 4:.1f}">{number(tick, high - low)}</text>' for tick in ticks(low, high)
    )
    return f'{marks}<text class="axis" x="{WIDTH - 4}" y="13" text-anchor="end">{text(label)}</text>'


def _curve(curve: Curve, across: Scale, up: Scale) -> str:
    """Raw points, error bars, and the line over them."""
    parts = list[str]()
    if curve.bars is not None:
        ends = [
            f"M{across(step):.1f} {up(low):.1f}V{up(high):.1f}"
            for step, (low, high) in zip(curve.steps, curve.bars, strict=True)
        ]
        parts.append(f'<path class="bar c{curve.colour}" d="{"".join(ends)}"/>')
    line = _points(*smoothed(curve), across, up)
    points = _points(*thinned(curve.steps, curve.values), across, up)
    # A point is a line of no length, whose round ends are seen; one path takes less room than many circles.
    faint = " faint" if curve.smooth and len(points) > 1 else ""
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    # Where the line goes through every point, many dots would only make it thick.
    if faint or len(points) <= MOST_MARKED:
        parts.append(f'<path class="dots{faint} c{curve.colour}" d="{dots}"/>')
    parts.append(f'<path class="line {_look(curve)}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in line)}"/>')
    return "".join(parts)


def _points(steps: Sequence[Number], values: Sequence[Number], across: Scale, up: Scale) -> list[tuple[Number, Number]]:
    return [(across(step), up(value)) for step, value in zip(steps, values, strict=True)]


def _heatmap(heatmap: Heatmap, across: Scale) -> str:
    bottom = HEIGHT - BOTTOM
    height = (bottom - TOP) / heatmap.rows
    frame = f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - RIGHT - LEFT}" height="{bottom - TOP}"/>'
    cells = list[str]()
    for first, last, row, share in heatmap.cells:
        start, end = across(first - 0.5), across(last + 0.5)
        # The first row stands at the bottom, as layers do in a stack.
        place = f'x="{start:.2f}" y="{bottom - (row + 1) * height:.2f}"'
        size = f'width="{end - start:.2f}" height="{height:.2f}"'
        cells.append(f'<rect {place} {size} fill-opacity="{min(0.12 + 0.88 * share, 1):.2f}"/>')
    shown = sorted({round(tick) for tick in ticks(0, max(heatmap.rows - 1, 1), 6)})
    labels = "".join(
        f'<text x="{LEFT - 5}" y="{bottom - (row + 0.5) * height + 4:.1f}" text-anchor="end">'
        f"{row * heatmap.row_size}</text>"
        for row in shown
        if row < heatmap.rows
    )
    return f'{frame}<g class="cells">{"".join(cells)}</g>{labels}'


def number(value: Number, span: Number) -> str:
    """A tick's number in few characters, but enough to tell it from its neighbours.

    Args:
        value: finite.
        span: of the axis.
    """
    size = abs(value)
    if size < span * 1e-9:
        return "0"
    if size >= 1e7 or size < 1e-4:
        return f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    if size >= 10_000:
        return f"{value / 1000:g}k"
    # A tick's distance from the next is more than a twentieth of the axis.
    shown = f"{value:.{max(-math.floor(math.log10(span / 20)), 0)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown
