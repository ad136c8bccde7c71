"""A run's report: figures and tables from metrics.jsonl alone."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nested_reft.cli.main import main
from nested_reft.reports.figures import (
    audit,
    curriculum_sources,
    read_metrics,
    report_text,
    series,
    summarize,
    write_report,
)

pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")


def line(step: int, **more) -> dict:
    plain = {"step": step, "accuracy": step / 4, "reward": 0.5, "tokens_per_second": 100.0, "ess_token": 0.9}
    return plain | {"left_out_layers": [2, 3 + step % 2]} | more


def curriculum(step: int) -> dict:
    found: dict = {"curriculum_audit": f"a rose to 0.{step}"}
    for index, name in enumerate(("a", "group/b", "_$c")):
        values = {"probability": 0.5 - index / 8, "learnability": 0.1, "bonus": 0.2, "count": 8 * step}
        found |= {f"curriculum/{name}/{metric}": value for metric, value in values.items()}
    return found | {"curriculum/a/reward": 0.25}


def run(path, lines) -> None:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_of_a_run(tmp_path, capsys):
    heldout = {"step": 0, "heldout/a": 0.1}
    run(tmp_path, [heldout, *(line(step, **curriculum(step)) for step in (1, 2, 3)), line(4, **{"heldout/a": 0.3})])
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    assert "step 3: a rose to 0.3" in shown and "group/b" in shown
    names = {"accuracy", "reward", "ess", "speed", "heldout", "left_out_layers", "curriculum"}
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "report").glob("*.png"))
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"({name}.png)" in text for name in names)
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["steps"] == 4
    assert result["metrics"]["accuracy"] == {"first": 0.25, "last": 1.0, "mean": 0.625}
    assert result["metrics"]["heldout/a"]["last"] == 0.3
    assert result["curriculum"]["group/b"]["count"] == 24 and result["curriculum"]["group/b"]["reward"] is None


def test_ages_of_what_is_trained_on_and_of_what_is_kept(tmp_path):
    """Three of four completions are of version 0 in step 2; a step without ages has no point."""
    kept = {"replay/age": 0.5, "replay/reward": 0.75}
    ages = [{"staleness_completions": [4]}, {"staleness_completions": [1, 3]} | kept, {}]
    run(tmp_path, [line(step, **more) for step, more in enumerate(ages, start=1)])
    found = write_report(tmp_path)
    assert {"ages", "staleness", "reward"} <= {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert found["metrics"]["replay/age"]["last"] == 0.5 and found["metrics"]["replay/reward"]["last"] == 0.75
    # Where everything is fresh, there is nothing to see.
    (tmp_path / "fresh").mkdir()
    run(tmp_path / "fresh", [line(1, staleness_completions=[4])])
    write_report(tmp_path / "fresh")
    assert not (tmp_path / "fresh" / "report" / "ages.png").exists()


def test_a_run_without_curriculum_or_nesting_or_ess(tmp_path):
    run(tmp_path, [{"step": 1, "reward": 0.5, "accuracy": 0.5, "left_out_layers": []}])
    write_report(tmp_path)
    # The reward is the accuracy, and one curve is enough.
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"accuracy"}


def test_names_from_a_run_cannot_reach_the_terminal(tmp_path, capsys):
    name = "x\x1b[2J`"
    run(tmp_path, [line(1, **{f"curriculum/{name}/probability": 1.0, "curriculum_audit": "\x1b[31mred"})])
    assert main(["report", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out + (tmp_path / "report" / "report.md").read_text()


def test_reading(tmp_path):
    run(tmp_path, [line(1, **curriculum(1)), line(2, loss=float("nan"))])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # killed while writing
    lines = read_metrics(tmp_path)
    assert series(lines, "accuracy") == ([1, 2], [0.25, 0.5])
    assert series(lines, "loss") == ([], [])
    assert curriculum_sources(lines) == ["a", "group/b", "_$c"]
    assert audit(lines) == ["step 1: a rose to 0.1"]
    assert set(summarize(lines)["curriculum"]) == {"a", "group/b", "_$c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a run directory: it has no metrics.jsonl"),
        ('{"step": 0}\n', "has no complete step yet"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2 of .* is not JSON"),
        ('{"steps": 1}\n', "line 1 of .* has no step"),
    ],
)
def test_refuses(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    run(tmp_path, [line(1)])
    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(["report", str(tmp_path)]) == 2
    assert "run: pip install matplotlib" in capsys.readouterr().err


def test_off_policy_figures(tmp_path):
    more = {"kl_behavior_target": 0.1, "entropy": 1.0, "completion_tokens": 9.0, "gradient_norm": 0.5}
    more |= {f"ratio_quantile_{q}": 1.0 for q in ("05", "50", "95")} | {"reward/accuracy": 0.5, "reward/format": 1.0}
    run(tmp_path, [line(1, **more), line(2, **more)])
    write_report(tmp_path)
    found = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert found >= {"kl", "ratio", "entropy", "length", "gradient_norm", "parts"}


def test_bounds_that_keep_most_are_shown(tmp_path):
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


def test_the_callers_backend_stays(tmp_path):
    """In a process of its own, because other tests may have chosen one."""
    run(tmp_path, [line(1), line(2)])
    code = f"""
import sys, pathlib, matplotlib
matplotlib.use("svg")
from nested_reft.reports.figures import write_report
write_report(pathlib.Path({str(tmp_path)!r}))
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["svg", "False"]


def test_speed_leaves_out_steps_that_compile(tmp_path):
    """Steps 1 and 3 compile; the mean of the others is 100, and of all of them 55."""
    speeds = {1: (10.0, 5), 2: (100.0, 5), 3: (10.0, 7), 4: (100.0, 7)}
    run(tmp_path, [line(step, tokens_per_second=speed, compilations=n) for step, (speed, n) in speeds.items()])
    lines = read_metrics(tmp_path)
    assert series(lines, "tokens_per_second") == ([2, 4], [100.0, 100.0])
    assert summarize(lines)["metrics"]["tokens_per_second"]["mean"] == 100.0
    assert series(lines[:1], "tokens_per_second") == ([1], [10.0])  # rather that than nothing


@pytest.mark.parametrize(("steps", "last"), [(2, ([0, 2], [0.1, 0.7])), (1, ([0], [0.1]))])
def test_the_held_out_result_at_the_end_is_the_last_point(steps, last, tmp_path):
    """It stands in the summary; that of an earlier end is not the last."""
    run(tmp_path, [{"step": 0, "heldout/a": 0.1}, line(1), line(2)])
    (tmp_path / "summary.json").write_text(json.dumps({"steps": steps, "after": {"a": {"greedy_accuracy": 0.7}}}))
    assert series(read_metrics(tmp_path), "heldout/a") == last


def test_a_summary_that_cannot_be_read_takes_nothing_away(tmp_path):
    run(tmp_path, [line(1)])
    (tmp_path / "summary.json").write_text("{")
    assert len(read_metrics(tmp_path)) == 1


def test_numbers_too_large_for_a_figure_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": ' + "9" * 400 + ', "accuracy": 0.5}\n')
    write_report(tmp_path)
    assert series(read_metrics(tmp_path), "reward") == ([], [])
