"""The experiments on bridges and on precision beside depth: whole commands on the tiny model, and what they refuse."""

import json

import pytest

from experiments import bridges, precision_depth
from nested_reft.layer_plan import Part

SHORT = ["--config", "tiny", "--fitted", "8", "--chosen", "32", "--measured", "32", "--distil-steps", "1"]


@pytest.mark.slow
def test_bridges_of_the_tiny_model(tmp_path, capsys, monkeypatch):
    """One layer of six is left out. Bridges, which can also do nothing, are nearer to the full model than a skip."""
    monkeypatch.setattr(bridges, "PARTS", {part: bridges.PARTS[part] for part in (Part.SKIP, Part.BRIDGE)})
    keep, kept = bridges.keep_json, []
    monkeypatch.setattr(bridges, "keep_json", lambda file, found: kept.append(len(found["rows"])) or keep(file, found))
    assert bridges.main(["sums", *SHORT, "--layers", "1", "--json", str(tmp_path / "bridges.json")]) == 0
    assert kept == [0, 1]  # a command that is stopped leaves what it has
    found = json.loads((tmp_path / "bridges.json").read_text())
    (row,) = found["rows"]
    assert row["layers"] == row["runs"] == 1 and len(row["skip, layers"]) == 1
    # One layer is a run of one, and nothing comes before it in its sequence.
    assert row["bridge"] == pytest.approx(row["in sequence"], abs=1e-5) == pytest.approx(row["per run"], abs=1e-5)
    assert 0 < row["distilled"] < row["skip"] and row["bridge"] < row["skip"] and row["standard error"] > 0
    assert row["skip, layers"] == [min(range(1, 5), key=lambda layer: found["layer"]["skip"][layer])]
    assert [(name, len(values)) for name, values in found["layer"].items()] == [("skip", 6), ("bridge", 6)]
    quarters = row["in sequence, by quarter"]
    assert len(quarters) == 4 and min(quarters) < row["in sequence"] < max(quarters)
    assert 0 < row["quarter"] < row["skip"]
    printed = capsys.readouterr().out
    assert f"{row['distilled']:.3f}" in printed and "in sequence" in printed


@pytest.mark.slow
def test_precision_beside_depth_of_the_tiny_model(tmp_path, capsys, monkeypatch):
    """The full float32 model is the target itself; rounding moves it by little, and leaving layers out by more."""
    monkeypatch.setattr(precision_depth, "PRECISIONS", ("float32", "int8"))
    numbers = ["--fit-prompts", "16", "--measured-prompts", "16", "--repeats", "1"]
    arguments = ["--config", "tiny", "--leave-out", "2", "3", *numbers, "--json", str(tmp_path / "product.json")]
    assert precision_depth.main(arguments) == 0
    rows = json.loads((tmp_path / "product.json").read_text())["rows"]
    depths = ["full", "2 layers, 1 bridges"]
    assert [(row["depth"], row["precision"]) for row in rows] == [
        (depth, precision) for depth in depths for precision in ("float32", "int8")
    ]
    ess = [row["ess_token"] for row in rows]
    assert ess[0] == pytest.approx(1, abs=1e-5) and ess[0] > ess[1] > ess[2] and rows[0]["speedup"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert f"{ess[2]:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (bridges.main, ["differences"], "task: invalid choice: 'differences'"),
        (bridges.main, ["sums", "--config", "nowhere"], "configuration 'nowhere' is unknown"),
        (bridges.main, ["sums", *SHORT, "--layers", "0"], "--layers is 0; allowed is a whole number from 1"),
        (bridges.main, ["sums", *SHORT, "--layers", "5"], "--layers has 5; allowed is 1 to 4"),
        (bridges.main, ["sums", *SHORT, "--chosen", "31"], "--chosen is 31; allowed is 32 to 2992"),
        (
            bridges.main,
            ["sums", *SHORT, "--fitted", "3000"],
            "--chosen needs 32 prompts, a batch; the source has 0 left",
        ),
        (bridges.main, ["sums", *SHORT, "--measured", "129"], "--measured is 129; allowed is 32 to 128"),
        (
            precision_depth.main,
            ["--config", "tiny"],
            "--leave-out names [6, 7, 12, 15, 27, 28]; the model has layers 0",
        ),
        (
            precision_depth.main,
            ["--config", "tiny", "--leave-out", "x"],
            "--leave-out is 'x'; allowed is a whole number",
        ),
        (precision_depth.main, ["--config", "tiny", "--fit-prompts", "3"], "--fit-prompts is 3; allowed is 16 to 3000"),
        (
            precision_depth.main,
            ["--config", "tiny", "--measured-prompts", "9"],
            "--measured-prompts is 9; allowed is 16",
        ),
        (precision_depth.main, ["--steps", "3"], "unrecognized arguments: --steps 3; allowed are -h, --help, --config"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(main, arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
