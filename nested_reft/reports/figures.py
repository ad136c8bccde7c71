"""Charts drawn as PNG files. It needs matplotlib, of the `report` extra, and no display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nested_reft.reports.charts import Chart, Panel, limits, smoothed
from nested_reft.untrusted import printable

PANEL_INCHES = 2.4  # height of a panel


def figure_maker() -> Callable[..., Any]:
    """matplotlib's figure class; without pyplot, so that the caller's own backend and figures stay as they are.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need the package matplotlib; run: pip install matplotlib") from error
    return Figure


def draw_chart(chart: Chart, path: Path) -> None:
    """Draws a chart, its panels one under the other.

    Args:
        chart: with one panel or more.
        path: of the PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    size = (7.5, PANEL_INCHES * len(chart.panels) + 0.6)
    figure = figure_maker()(figsize=size, layout="constrained")
    axes = figure.subplots(len(chart.panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, chart.panels, strict=True):
        _draw_panel(axis, panel)
    axes[-1].set_xlabel("step")
    figure.suptitle(label(chart.title), fontsize="medium")
    figure.savefig(path, dpi=110)


def label(name: str) -> str:
    """A name as a figure shows it: matplotlib reads $ as mathematics, and hides what begins with _.

    Args:
        name: untrusted.
    """
    return printable(name).replace("$", r"\$").lstrip("_") or " "


def _draw_panel(axis: Any, panel: Panel) -> None:
    # Beside the axis a long label would run into the next panel.
    axis.set_title(label(panel.label), loc="left", fontsize="small")
    if panel.heatmap is not None:
        _draw_heatmap(axis, panel)
        return
    axis.set_ylim(*limits(panel))
    axis.grid(alpha=0.3)
    other = axis.twinx() if panel.right_label else axis
    if panel.right_label:
        axis.set_title(label(panel.right_label), loc="right", fontsize="small")
        other.set_ylim(*limits(panel, right=True))
    handles = []
    for curve in panel.curves:
        place, colour = other if curve.right else axis, f"C{curve.colour}"
        if curve.bars is not None:
            lows, highs = zip(*curve.bars, strict=True)
            place.vlines(curve.steps, lows, highs, color=colour, alpha=0.5, linewidth=1)
        alpha = 0.3 if curve.smooth and len(curve.steps) > 1 else 1.0
        place.plot(curve.steps, curve.values, ".", color=colour, alpha=alpha, markersize=3)
        dashes = "--" if curve.dashed else "-"
        handles += place.plot(*smoothed(curve), dashes, color=colour, label=label(curve.label), linewidth=1.4)
    if any(curve.label for curve in panel.curves):
        # Looking for the best place takes seconds where there are many points.
        axis.legend(
            handles=handles,
            fontsize="x-small",
            loc="upper left",
            bbox_to_anchor=(1.1 if panel.right_label else 1.01, 1.0),
            borderaxespad=0,
        )


def _draw_heatmap(axis: Any, panel: Panel) -> None:
    from matplotlib.collections import PolyCollection

    heatmap = panel.heatmap
    assert heatmap is not None
    corners, colours = [], []
    for first, last, row, share in heatmap.cells:
        (left, right), (low, high) = (first - 0.5, last + 0.5), (row - 0.5, row + 0.5)
        corners.append([(x, y * heatmap.row_size) for x, y in ((left, low), (right, low), (right, high), (left, high))])
        colours.append((0.12, 0.47, 0.71, min(0.12 + 0.88 * share, 1)))
    # One collection, because an artist for each of thousands of cells takes seconds.
    axis.add_collection(PolyCollection(corners, facecolors=colours))
    axis.set_xlim(min(cell[0] for cell in heatmap.cells) - 0.5, max(cell[1] for cell in heatmap.cells) + 0.5)
    axis.set_ylim(-0.5 * heatmap.row_size, (heatmap.rows - 0.5) * heatmap.row_size)
