"""A run's report: figures and tables from metrics.jsonl alone."""

import builtins
import json

import pytest

from nested_reft.cli.main import main
from nested_reft.reports.figures import audit, curriculum_sources, read_metrics, series, summarize, write_report

pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")


def line(step: int, **more) -> dict:
    plain = {"step": step, "accuracy": step / 4, "reward": 0.5, "tokens_per_second": 100.0, "ess_token": 0.9}
    return plain | {"skipped_layers": [2, 3 + step % 2]} | more


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
    names = {"accuracy", "reward", "ess", "speed", "heldout", "skipped_layers", "curriculum"}
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "report").glob("*.png"))
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"({name}.png)" in text for name in names)
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["steps"] == 4
    assert result["metrics"]["accuracy"] == {"first": 0.25, "last": 1.0, "mean": 0.625}
    assert result["metrics"]["heldout/a"]["last"] == 0.3
    assert result["curriculum"]["group/b"]["count"] == 24 and result["curriculum"]["group/b"]["reward"] is None


def test_a_run_without_curriculum_or_nesting_or_ess(tmp_path):
    run(tmp_path, [{"step": 1, "reward": 0.5, "accuracy": 0.5, "skipped_layers": []}])
    write_report(tmp_path)
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"accuracy", "reward"}


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
    assert "pip install 'nested_reft[report]'" in capsys.readouterr().err
