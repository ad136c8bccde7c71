"""`nested-reft report`: what it writes, prints and refuses, of one run and of several, also of damaged ones."""

import builtins
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nested_reft.cli.main import main
from nested_reft.reports.report import write_report
from tests.reports.runs_on_disk import line, sample, write_run

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the optional package matplotlib")


ODD = {"metrics": '{"step": 1, "left_out_layers": 3, "staleness_completions": ["x"], "bounds/a": [1]}\n'}


def curriculum(step: int) -> dict:
    found: dict = {"curriculum_audit": f"a rose to 0.{step}"}
    for index, name in enumerate(("a", "group/b", "_$c")):
        values = {"probability": 0.5 - index / 8, "learnability": 0.1, "bonus": 0.2, "count": 8 * step}
        found |= {f"curriculum/{name}/{metric}": value for metric, value in values.items()}
    return found | {"curriculum/a/reward": 0.25}


@pytest.fixture
def without_matplotlib(monkeypatch):
    """Charts as PNG files take most of a report's time."""
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)


@needs_matplotlib
def test_report_of_a_run(tmp_path, capsys):
    heldout = {"step": 0, "heldout/a": 0.1}
    lines = [heldout, *(line(step, **curriculum(step)) for step in (1, 2, 3)), line(4, **{"heldout/a": 0.3})]
    run = write_run(tmp_path / "run", lines, [sample(1)])
    assert main(["report", str(run), "--json", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    assert "step 3: a rose to 0.3" in shown and "group/b" in shown and "Held-out accuracy on a went from" in shown
    page = run / "report" / "report.html"
    assert shown.splitlines()[-1] == f"report: {page}"
    names = {"learning", "speed", "weights", "layers", "curriculum"}
    text = page.read_text(encoding="utf-8")
    assert set(names) == {name for name in names if f'<figure id="{name}">' in text}
    drawings = {path.stem: path.read_bytes() for path in page.parent.glob("*.png")}
    assert set(drawings) == {f"report-{name}" for name in names}
    assert all(content.startswith(b"\x89PNG") for content in drawings.values())
    assert {path.name for path in page.parent.iterdir()} == {"report.html", *(f"{stem}.png" for stem in drawings)}
    (result,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert result["steps"] == 4
    assert result["metrics"]["accuracy"] == {"first": 0.25, "last": 1.0, "mean": 0.625}
    assert result["metrics"]["heldout/a"]["last"] == 0.3
    assert result["curriculum"]["group/b"]["count"] == 24 and result["curriculum"]["group/b"]["reward"] is None


def test_several_runs_go_where_they_are_told(tmp_path, capsys, monkeypatch, without_matplotlib):
    runs = [str(write_run(tmp_path / name, [line(1)], [sample(1)])) for name in ("one", "two")]
    assert main(["report", *runs, "--out", str(tmp_path / "both.html")]) == 0
    assert "2 runs" in (tmp_path / "both.html").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *runs]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {Path('comparison', 'report.html')}"
    assert (tmp_path / "comparison" / "report.html").is_file() and not (tmp_path / "one" / "report").exists()


def test_names_from_a_run_cannot_reach_the_terminal(tmp_path, capsys, without_matplotlib):
    lines = [
        line(1, **{"curriculum/x\x1b[2J/probability": 1.0, "curriculum_audit": "\x1b[31mred", "warning": "\x1b[31m"})
    ]
    assert main(["report", str(write_run(tmp_path, lines, config={"name": "\x1b[2J"}))]) == 0
    assert "\x1b" not in capsys.readouterr().out + (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    forged = write_run(tmp_path / "forged", [line(1, **{"heldout/x\nreport: elsewhere": 0.5})])
    assert main(["report", str(forged)]) == 0
    assert not [words for words in capsys.readouterr().out.splitlines() if words.startswith("report: elsewhere")]


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ({}, "There is no metrics.jsonl."),
        ({"metrics": ""}, "No step has been logged yet, so there are no curves."),
        ({"metrics": '{"step": 1, "reward": 0.5}\nnonsense\n'}, "Line 2 of metrics.jsonl is not JSON"),
        ({"metrics": '{"step": 1, "reward": 0.5}\n', "samples": '{"step": 1, "parts": 3}\n[]\n'}, "Line 2 of samples"),
        (
            ODD,
            "There is no sa",
        ),
    ],
)
def test_an_empty_or_damaged_run_has_a_report_of_the_rest(logs, message, tmp_path, capsys, without_matplotlib):
    run = write_run(tmp_path / "run", [], config={"name": "x"})
    (run / "metrics.jsonl").unlink()
    for name, text in logs.items():
        (run / f"{name}.jsonl").write_text(text)
    assert main(["report", str(run)]) == 0
    assert f"warning: {message}" in capsys.readouterr().out
    assert message in (run / "report" / "report.html").read_text(encoding="utf-8")


def test_refusals(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run directory: it has no config.json and no metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    run = write_run(tmp_path / "run", [line(1)])
    assert main(["report", str(run), "--out", str(tmp_path / "nowhere" / "x.html")]) == 2
    assert "cannot write" in capsys.readouterr().err
    kept = (run / "metrics.jsonl").read_bytes()
    for place in (run / "metrics.jsonl", "/dev/null"):
        assert main(["report", str(run), "--out", str(place)]) == 2
        assert capsys.readouterr().err == f"error: --out is '{place}'; allowed is a name that ends in .html\n"
    assert (run / "metrics.jsonl").read_bytes() == kept
    (run / "report").write_text("")
    assert main(["report", str(run)]) == 2
    assert f"'{run / 'report'}' cannot be used" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_page_and_the_extra_is_named(tmp_path, capsys, without_matplotlib):
    assert main(["report", str(write_run(tmp_path, [line(1)]))]) == 0
    assert "no PNG files: figures need the package matplotlib; run: pip install" in capsys.readouterr().out
    assert '<figure id="speed">' in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


@needs_matplotlib
def test_the_callers_backend_stays(tmp_path):
    """In a process of its own, because other tests may have chosen one."""
    write_run(tmp_path, [line(1), line(2)])
    code = f"""
import sys, pathlib, matplotlib
matplotlib.use("svg")
from nested_reft.reports.report import write_report
write_report([pathlib.Path({str(tmp_path)!r})])
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["svg", "False"]


@needs_matplotlib
def test_charts_of_all_kinds_are_drawn(tmp_path):
    """Bars, dashes, both axes, heatmaps, and names that matplotlib would read as mathematics."""
    more = {"kl_behavior_target": 0.1, "entropy": 1.0, "gradient_norm": 0.5, "reward": -3.0, "reward/$x$": 0.5}
    more |= {f"ratio_quantile_{q}": 1.0 for q in ("05", "50", "95")} | {"replay/age": 0.5, "heldout/_$c": 0.5}
    lines = [line(step, **more, **curriculum(step), staleness_completions=[1, 3]) for step in (1, 2)]
    run = write_run(tmp_path / "run", lines, summary={"before": {"_$c": {"prompts": 10}}})
    found = write_report([run], tmp_path / "x.html")
    names = {Path(path).stem.removeprefix("x-") for path in found["figures"]}
    assert names >= {"learning", "parts", "weights", "layers", "curriculum", "replay", "ages", "update"}
