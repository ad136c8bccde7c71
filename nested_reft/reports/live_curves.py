"""Curves of a run in a notebook, drawn anew while it trains."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from typing import Any

from nested_reft.reports.figures import figure_maker

EVERY_STEPS = 5  # a drawing takes about as long as a step of a small model
EVERY_SECONDS = 10.0  # steps of a large model are worth a drawing each
SMOOTHED_STEPS = 10
FEW_STEPS = 50


class LiveCurves:
    """An `on_step` for `train` that shows curves in a notebook's cell and draws them anew every five steps, or each
    step where steps are slow.

    >>> accuracy = lambda step: step.accuracy
    >>> curves = LiveCurves(accuracy=accuracy, ESS=lambda step: step.update.health.ess_token)

    Each curve has a panel: its values as dots, and the mean of the latest ten as a line.
    """

    def __init__(self, **curves: Callable[[Any], float | None]):
        """Args:
        curves: by title, what to show of a `StepRecord`; None leaves the step out. Underscores become spaces.

        Raises:
            ValueError: no curve is given.
            ImportError: matplotlib or IPython is not installed.
        """
        if not curves:
            raise ValueError("LiveCurves got no curve; give some, such as accuracy=lambda step: step.accuracy")
        # What is missing shows before the run, and not at its first step.
        self._make_figure, self._display = figure_maker(), _notebook_display()
        self._curves = curves
        self._points: dict[str, tuple[list[int], list[float]]] = {title: ([], []) for title in curves}
        self._shown: Any = None
        self._drawn_seconds = -math.inf

    def __call__(self, step: Any) -> None:
        """Takes in a step, and draws the first one, every fifth, and any that comes long after the last drawing.

        Args:
            step: its `StepRecord`.
        """
        for title, value_of in self._curves.items():
            value = value_of(step)
            if value is not None and math.isfinite(value):
                steps, values = self._points[title]
                steps.append(step.number)
                values.append(float(value))
        if step.number % EVERY_STEPS == 0 or time.monotonic() - self._drawn_seconds >= EVERY_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Shows all values so far, in the place of the drawing before."""
        figure = self._make_figure(figsize=(4 * len(self._points), 2.8), layout="constrained")
        panels = figure.subplots(1, len(self._points), squeeze=False)[0]
        for axis, (title, (steps, values)) in zip(panels, self._points.items(), strict=True):
            # A line alone would show nothing of the first step. Few small dots would be lost; many large ones hide it.
            size, alpha = (8, 0.6) if len(steps) <= FEW_STEPS else (4, 0.4)
            axis.plot(steps, values, ".", color="C0", alpha=alpha, markersize=size)
            axis.plot(steps, _smoothed(values), color="C0")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set(title=title.replace("_", " "), xlabel="step")
            axis.grid(alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        self._shown = self._display(file.getvalue(), self._shown)
        self._drawn_seconds = time.monotonic()


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those before it, ten in all."""
    windows = [values[max(end - SMOOTHED_STEPS, 0) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def _notebook_display() -> Callable[[bytes, Any], Any]:
    """What shows a PNG, in the place of one that it has shown before where that is given.

    Raises:
        ImportError: IPython is not installed.
    """
    try:
        from IPython.display import Image, display
    except ImportError as error:
        raise ImportError("curves in a notebook need the package ipython; run: pip install ipython") from error

    def show(png: bytes, shown: Any) -> Any:
        # A figure itself would be shown only where pyplot has been imported before.
        image = Image(data=png, format="png")
        if shown is None:
            return display(image, display_id=True)
        shown.update(image)
        return shown

    return show
