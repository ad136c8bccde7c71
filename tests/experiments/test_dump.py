"""The DUMP experiment: its measure and its table."""

import json

import pytest

from experiments.dump import compare, curve, experiment_config, main
from nested_reft.sweeps.results import cost_to_reach


def result(kind: str, seed: int, means: list[float]) -> dict:
    """A run of two sources with these mean accuracies, evaluated every 10 steps."""
    steps = [10 * i for i in range(len(means))]
    accuracy = [[mean - 0.1, mean + 0.1] for mean in means]
    return {"kind": kind, "seed": seed, "steps": steps, "accuracy": accuracy, "seconds": 1.0, "sources": ["a", "b"]} | {
        "probability": [[0.5, 0.5]] * steps[-1]
    }


def test_curve_is_the_mean_of_up_to_three_evaluations():
    assert curve(result("uniform", 0, [0.0, 0.3, 0.6, 0.3])) == pytest.approx([0.0, 0.15, 0.3, 0.4])


def test_steps_to_reach_by_hand():
    run = result("dump", 0, [0.0, 0.3, 0.6, 0.3])  # smoothed: 0, 0.15, 0.3, 0.4
    assert cost_to_reach(run["steps"], curve(run), 0.2) == (pytest.approx(10 + 10 * 0.05 / 0.15), True)
    assert cost_to_reach(run["steps"], curve(run), 0.0) == (0.0, True)
    assert cost_to_reach(run["steps"], curve(run), 0.5) == (30.0, False)


def test_comparison_by_hand():
    """Uniform ends at 0.3 in both seeds, at step 40; seed 0 of dump is there at step 20, seed 1 never."""
    uniform = [result("uniform", seed, [0.0, 0.0, 0.3, 0.3, 0.3]) for seed in (0, 1)]
    dump = [result("dump", 0, [0.0, 0.45, 0.45, 0.45, 0.45]), result("dump", 1, [0.0] * 5)]
    row = compare([*uniform, *dump])[1]
    assert (row["kind"], row["seeds"], row["reached"]) == ("dump", [0, 1], 1)
    assert row["steps_to_level"] == pytest.approx([20.0, 40.0])
    assert row["baseline_steps_to_level"] == pytest.approx([40.0, 40.0])
    assert row["share_of_steps"] == row["share_of_time"] == pytest.approx(0.75)
    assert row["share_of_time_interval"] == pytest.approx([0.5, 1.0])
    assert row["final_gain"] == pytest.approx((0.15 - 0.3) / 2)
    assert compare(dump) == []  # nothing to compare with


def test_report_of_finished_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    for kind in ("uniform", "dump"):
        for seed in (0, 1):
            config = experiment_config(kind, seed, 40).to_json()
            run = result(kind, seed, [0.0, 0.1 + seed / 10, 0.2, 0.3, 0.4]) | {"config": config}
            (tmp_path / f"{kind}-seed{seed}-steps40.json").write_text(json.dumps(run))
    assert main(["--report-only", "--seeds", "0", "1", "--steps", "40", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "dump" in shown and "1.00" in shown
    assert {"results.json", "accuracy.png", "hand_over.png"} <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["reached"] == 2


def test_refuses_steps_that_no_evaluation_ends(capsys):
    assert main(["--steps", "25"]) == 2
    assert "--steps is 25; allowed is a multiple of 10" in capsys.readouterr().err
