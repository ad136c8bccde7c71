"""Curves in a notebook: one picture that is replaced, with the values of every step."""

from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure

from nested_reft.reports import live_curves
from nested_reft.reports.live_curves import LiveCurves


def steps(*rewards):
    return [SimpleNamespace(number=number, reward=reward) for number, reward in enumerate(rewards, 1)]


def test_a_picture_is_shown_at_once_and_replaced_every_five_steps():
    InteractiveShell.instance()
    curves = LiveCurves(reward=lambda step: step.reward, square=lambda step: step.reward**2)
    with capture_output() as shown:
        for step in steps(*range(11)):
            curves(step)
    # After steps 1, 5 and 10.
    first, *later = shown.outputs
    assert not first.update and [each.update for each in later] == [True, True]
    assert all(each.transient == first.transient for each in later)
    assert len({each.data["image/png"] for each in shown.outputs}) == 3


def test_slow_steps_are_drawn_one_by_one(monkeypatch):
    InteractiveShell.instance()
    monkeypatch.setattr(live_curves, "EVERY_SECONDS", 0.0)
    curves = LiveCurves(reward=lambda step: step.reward)
    with capture_output() as shown:
        for step in steps(1.0, 2.0, 3.0):
            curves(step)
    assert len(shown.outputs) == 3


def test_a_single_step_shows_as_a_dot(monkeypatch):
    InteractiveShell.instance()
    figures = []
    monkeypatch.setattr(live_curves, "figure_maker", lambda: lambda **how: figures.append(Figure(**how)) or figures[0])
    with capture_output():
        LiveCurves(mean_reward=lambda step: step.reward)(*steps(0.5))
    (axis,) = figures[0].axes
    assert axis.get_title() == "mean reward"
    assert [(*line.get_xdata(), *line.get_ydata()) for line in axis.lines if line.get_marker() == "."] == [(1, 0.5)]


def test_what_a_step_does_not_have_leaves_a_gap():
    InteractiveShell.instance()
    curves = LiveCurves(reward=lambda step: step.reward)
    with capture_output() as shown:
        for step in steps(1.0, None, float("nan"), 4.0, None):
            curves(step)
    assert len(shown.outputs) == 2 and curves._points == {"reward": ([1, 4], [1.0, 4.0])}


def test_curves_without_any_are_refused():
    with pytest.raises(ValueError, match="LiveCurves got no curve; give some, such as accuracy="):
        LiveCurves()
