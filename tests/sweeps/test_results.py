"""What a run is compared by, from logs that are written by hand."""

import pytest

from nested_reft.sweeps.results import accuracy_curve, cost_to_reach, run_result
from tests.reports.runs_on_disk import line, write_run
from tests.sweeps.results_by_hand import config


def test_the_curve_is_the_mean_of_the_sources_over_seconds_without_compiling():
    """Step 1 compiled and counts as the median of the others, 2 s. Source b keeps 0.2 where it was not evaluated."""
    lines = [
        line(0, **{"heldout/a": 0.0, "heldout/b": 0.2}),
        line(1, step_seconds=50.0, compilations=9),
        line(2, step_seconds=1.0, compilations=9, **{"heldout/a": 0.4}),
        line(3, step_seconds=2.0, compilations=9),
        line(4, step_seconds=3.0, compilations=9, **{"heldout/a": 0.6, "heldout/b": 0.6}),
    ]
    curve = accuracy_curve(lines)
    assert curve["step"] == [0, 2, 4] and curve["seconds"] == [0.0, 3.0, 8.0]
    assert curve["accuracy"] == pytest.approx([0.1, 0.3, 0.6])
    seconds, accuracy = curve["seconds"], curve["accuracy"]
    assert cost_to_reach(seconds, accuracy, 0.45) == (pytest.approx(5.5), True)  # halfway from 3 s to 8 s
    assert cost_to_reach(seconds, accuracy, 0.05) == (0.0, True)
    assert cost_to_reach(seconds, accuracy, 0.7) == (8.0, False)


def test_measures_of_a_run_directory(tmp_path):
    steps = {"step_seconds": 1.0, "compilations": 0, "plan_price": 0.8}
    lines = [line(step, **steps, **{"heldout/a": step / 10}) for step in range(3)]
    after = {"a": {"greedy_accuracy": 0.3, "sampled_accuracy": None, "prompts": 8}}
    summary = {"after": after, "steps": 2, "nested_speedup": 1.2}
    run = write_run(tmp_path / "run", lines, config=config(), summary=summary, versions={"commit": "abc"})
    found = run_result(run)
    assert found["measures"]["accuracy"] == 0.3 and found["measures"]["sampled_accuracy"] is None
    # The last line has the end of the run, so the mean of the evaluations after the start is (0.1 + 0.3) / 2.
    assert found["measures"]["mean_accuracy"] == pytest.approx(0.2)
    assert found["measures"]["plan_price"] == pytest.approx(0.8) and found["measures"]["nested_speedup"] == 1.2
    # The summary of an earlier end says nothing of a run that goes on.
    (tmp_path / "run" / "summary.json").write_text('{"after": {"a": {"greedy_accuracy": 0.3}}, "steps": 1}')
    assert run_result(run)["measures"]["accuracy"] is None
