"""The metrics of a run as series, tables and words."""

import json
import re

import pytest

from nested_reft.reports.run_files import read_run
from nested_reft.reports.run_metrics import audit, curriculum_sources, report_text, series, summarize
from tests.reports.runs_on_disk import line, write_run

GOOD = re.compile(r'^\{"step": \d+\}$', re.MULTILINE)


def test_reading(tmp_path):
    """A last line that is cut short was being written when the run was killed; NaN is no point of a curve."""
    sources = {f"curriculum/{name}/probability": 0.5 for name in ("a", "group/b", "_$c")}
    write_run(tmp_path, [line(1, **sources, curriculum_audit="a rose"), line(2, loss=float("nan"))])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    lines = read_run(tmp_path).lines
    assert series(lines, "accuracy") == ([1, 2], [0.25, 0.5])
    assert series(lines, "loss") == ([], [])
    assert curriculum_sources(lines) == ["a", "group/b", "_$c"]
    assert audit(lines) == ["step 1: a rose"]
    assert set(summarize(lines)["curriculum"]) == {"a", "group/b", "_$c"}


def test_bounds_that_keep_most_are_shown():
    """The median of three steps; a side without a bound in most of them has none, as one of an older log may not."""
    lines = [
        line(1, **{"bounds/geometric_mean": [0.8, 1.1, 0.5, 1.5], "bounds/sequence_k3": [0, 0.2, 0, None]}),
        line(2, **{"bounds/geometric_mean": [0.9, 1.2, 0.7, None], "bounds/sequence_k3": [0, 0.3, 0, 0.4]}),
        line(3, **{"bounds/geometric_mean": [0.7, 1.05, 0.6, None]}),
    ]
    expected = {"geometric_mean": [0.8, 1.1, 0.6, None], "sequence_k3": [None, 0.25, None, None]}
    assert summarize(lines)["bounds"] == expected
    shown = report_text(summarize(lines), lines).splitlines()
    at = next(i for i, text in enumerate(shown) if text.startswith("loss.reject_by: bounds that keep"))
    assert shown[at].split()[-4:] == ["95", "%", "99", "%"]
    assert shown[at + 2].split() == ["geometric_mean", "0.8", "to", "1.1", "0.6", "or", "more"]
    assert shown[at + 3].split() == ["sequence_k3", "0.25", "or", "less", "none"]


def test_a_curriculum_of_one_source_is_left_out_of_the_text():
    for names, shown in (("a", False), ("ab", True)):
        lines = [line(1, curriculum_audit="a rose", **{f"curriculum/{name}/probability": 0.5 for name in names})]
        text = report_text(summarize(lines), lines)
        assert ("step 1: a rose" in text) == ("source, last values" in text) == shown


def test_speed_leaves_out_steps_that_compile():
    """Steps 1 and 3 compile; the mean of the others is 100, and of all of them 55."""
    speeds = {1: (10.0, 5), 2: (100.0, 5), 3: (10.0, 7), 4: (100.0, 7)}
    lines = [line(step, tokens_per_second=speed, compilations=n) for step, (speed, n) in speeds.items()]
    assert series(lines, "tokens_per_second") == ([2, 4], [100.0, 100.0])
    assert summarize(lines)["metrics"]["tokens_per_second"]["mean"] == 100.0
    assert series(lines[:1], "tokens_per_second") == ([1], [10.0])  # rather that than nothing


@pytest.mark.parametrize(("steps", "last"), [(2, ([0, 2], [0.1, 0.7])), (1, ([0], [0.1]))])
def test_the_held_out_result_at_the_end_is_the_last_point(steps, last, tmp_path):
    """It stands in the summary; that of an earlier end is not the last."""
    summary = {"steps": steps, "after": {"a": {"greedy_accuracy": 0.7}}}
    write_run(tmp_path, [{"step": 0, "heldout/a": 0.1}, line(1), line(2)], summary=summary)
    assert series(read_run(tmp_path).lines, "heldout/a") == last


def test_numbers_too_large_for_a_figure_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": ' + "9" * 400 + ', "accuracy": 0.5}\n')
    assert series(read_run(tmp_path).lines, "reward") == ([], [])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"step": 1}\nnonsense\n{"step": 2}\n', r"^Line 2 of metrics.jsonl is not JSON.* It is left out.$"),
        ('{"step": 1}\n{"steps": 1}\n', "^Line 2 of metrics.jsonl has no step. It is left out.$"),
        ('{"step": 1}\n{"step": -1}\n', "^A line of metrics.jsonl is of step -1. It is left out.$"),
        ('{"step": 1}\n' + "x\n" * 9, "^6 more lines of metrics.jsonl are damaged and left out.$"),
        ('{"step": 0}\n', "^No step has been logged yet"),
        ("", "^No step has been logged yet"),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_read(text, fault, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    found = read_run(tmp_path)
    assert [line["step"] for line in found.lines] == [json.loads(each)["step"] for each in GOOD.findall(text)]
    assert any(re.search(fault, each) for each in found.faults), found.faults
    assert "There is no samples.jsonl." in found.faults and "There is no config.json." in found.faults


def test_damaged_objects_are_named(tmp_path):
    write_run(tmp_path, [line(1)])
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "config.json").write_text("[" * 100_000)
    found = read_run(tmp_path)
    assert len(found.lines) == 1 and found.summary == found.config == {}
    assert {f"{name}.json is damaged, so nothing is taken from it." for name in ("summary", "config")} < set(
        found.faults
    )


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config.json and no metrics.jsonl"):
        read_run(tmp_path)
