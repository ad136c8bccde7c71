"""What is drawn of a run, how it is smoothed, and what keeps to its limits."""

import math
from pathlib import Path

import pytest

from nested_reft.reports.charts import Chart, Curve, Panel, limits, smoothed, spread, ticks, wilson
from nested_reft.reports.run_charts import run_charts
from nested_reft.reports.run_files import RunFiles
from nested_reft.reports.svg import figure, number
from tests.reports.runs_on_disk import line

PATHS = [Path("one"), Path("two")]


def charts(lines, **more):
    return {chart.name: chart for chart in run_charts([RunFiles(path, lines, **more) for path in PATHS[:1]])}


def two(first, second):
    runs = [RunFiles(path, lines) for path, lines in zip(PATHS, (first, second), strict=True)]
    return {chart.name: chart for chart in run_charts(runs)}


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    # By hand for 0 of n: 0 and z^2 / (n + z^2) = 3.841 / 103.841. Half of 100 is the textbook's 0.404 to 0.596.
    [(0.0, 100, (0.0, 0.03699)), (1.0, 100, (0.96301, 1.0)), (0.5, 100, (0.40383, 0.59617))],
)
def test_wilson(share, count, expected):
    assert wilson(share, count) == pytest.approx(expected, abs=1e-4)


def test_smoothing_is_a_mean_over_a_window_around_each_step():
    """48 points give windows of 2 on either side: around a single 5 there are five means of 1; few points stay."""
    values = [0.0] * 48
    values[20] = 5.0
    means = smoothed(Curve("x", 0, range(48), values))[1]
    assert [index for index, mean in enumerate(means) if mean == pytest.approx(1)] == [18, 19, 20, 21, 22]
    assert sum(means) == pytest.approx(5)
    assert smoothed(Curve("x", 0, range(48), values, smooth=False))[1] == values
    assert smoothed(Curve("x", 0, range(6), values[:6]))[1] == values[:6]


def test_many_points_become_few():
    assert spread(1001, 3) == [0, 500, 1000] and spread(3, 3) == [0, 1, 2]
    assert len(figure_of(Curve("x", 0, range(20_000), [math.sin(step) for step in range(20_000)]))) < 30_000


def figure_of(*curves):
    return figure(Chart("x", "x", "", [Panel("y", curves)]))


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0, 3.0], [0.0], [-1e100, 1e100], [1e-300, 2e-300]])
def test_any_values_have_an_axis(values):
    panel = Panel("y", [Curve("x", 0, range(len(values)), values)])
    low, high = limits(panel)
    assert low < high and all(low <= value <= high for value in values)
    shown = [number(tick, high - low) for tick in ticks(low, high)]
    assert len(shown) == len(set(shown)) > 0
    assert "nan" not in figure_of(*panel.curves) and "inf" not in figure_of(*panel.curves)


def test_accuracies_have_a_fixed_axis_and_bars_where_the_number_of_prompts_is_known():
    lines = [{"step": 0, "heldout/a": 0.5, "heldout/b": 0.5}, line(1, **{"heldout/a": 0.5})]
    heldout, samples = charts(lines, summary={"before": {"a": {"prompts": 100}}})["learning"].panels
    assert heldout.limits == samples.limits == (0, 1)
    bars = {curve.label: curve.bars for curve in heldout.curves}
    assert bars["heldout/a"] == [pytest.approx((0.404, 0.596), abs=1e-3)] * 2 and bars["heldout/b"] is None


def test_the_reward_stands_beside_the_accuracy_on_an_axis_that_holds_it():
    inside, outside = ([line(1, reward=reward), line(2, reward=reward)] for reward in (0.5, -3.0))
    (panel,) = charts(inside)["learning"].panels
    assert [(curve.label, curve.right) for curve in panel.curves] == [("accuracy", False), ("reward", False)]
    (panel,) = charts(outside)["learning"].panels
    assert [(curve.label, curve.right) for curve in panel.curves] == [("accuracy", False), ("reward", True)]
    assert panel.right_label and limits(panel, right=True)[0] < -3 < limits(panel, right=True)[1]


def test_a_reward_that_is_the_accuracy_is_drawn_once():
    found = charts([{"step": 1, "reward": 0.5, "accuracy": 0.5, "reward/accuracy": 0.5, "left_out_layers": []}])
    assert set(found) == {"learning"} and len(found["learning"].panels[0].curves) == 1


def test_skipped_layers_are_a_heatmap_of_all_layers():
    """Layer 2 in both steps, layers 4 and 3 in turn."""
    heatmap = charts([line(1), line(2)], summary={"layers": 6})["layers"].panels[0].heatmap
    assert heatmap.rows == 6
    assert set(heatmap.cells) == {(1, 1, 2, 1.0), (1, 1, 4, 1.0), (2, 2, 2, 1.0), (2, 2, 3, 1.0)}
    # Where many steps share a cell, it holds the share of them.
    many = charts([line(step) for step in range(1, 321)])["layers"].panels[0].heatmap
    assert len(many.cells) == 3 * 160 and {share for *_, share in many.cells} == {1.0, 0.5}
    assert charts([line(1, left_out_layers=[10**9, "x", -1, True])]).get("layers") is None


def test_ages_are_shares_of_each_step_and_nothing_where_all_is_fresh():
    cells = (
        charts([line(1, staleness_completions=[4]), line(2, staleness_completions=[1, 3])])["ages"].panels[0].heatmap
    )
    assert set(cells.cells) == {(1, 1, 0, 1.0), (2, 2, 0, 0.25), (2, 2, 1, 0.75)}
    assert "ages" not in charts([line(1, staleness_completions=[4])])


def test_a_curriculum_of_one_source_is_left_out():
    a, b = ({f"curriculum/{name}/probability": 0.5} for name in "ab")
    assert "curriculum" not in charts([line(1, **a)])
    assert [curve.label for curve in charts([line(1, **a, **b)])["curriculum"].panels[0].curves] == ["a", "b"]


def test_several_runs_share_a_panel_for_each_metric():
    found = two([line(1, ess_sequence=0.5), line(2)], [line(1), line(2)])
    panels = {panel.label: [curve.label for curve in panel.curves] for panel in found["weights"].panels}
    assert panels["ess_token: effective sample size (share)"] == ["one", "two"]
    assert panels["ess_sequence: effective sample size (share)"] == ["one"]
    assert {"layers-1", "layers-2"} <= set(found) and found["layers-2"].title.startswith("two: ")


def test_names_from_a_run_are_text_of_a_figure():
    name = "curriculum/<b>\x1b[2J\u202e/probability"
    drawn = figure(charts([line(1, **{name: 0.5, "curriculum/b/probability": 0.5})])["curriculum"])
    assert "<b>" not in drawn and "&lt;b&gt;\\x1b[2J\\u202e" in drawn
