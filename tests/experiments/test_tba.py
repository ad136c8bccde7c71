"""The experiment on old completions: its configurations, what it refuses, and runs of two steps."""

import dataclasses
import json

import pytest

from experiments import tba
from experiments.corrections import BASELINE
from experiments.tba import LOSSES, experiment_config, main
from nested_reft.training.config import load_config
from nested_reft.training.warm_start import WarmStartConfig


def test_runs_differ_in_loss_and_lag_only():
    plain, *others = [experiment_config(16, loss, 3, 10).to_json() for loss in LOSSES]
    assert plain["search"]["lag"] == 16 and plain["nesting"]["skip_ratio"] == 0 and plain["train"]["seed"] == 3
    for loss, other in zip([*LOSSES][1:], others, strict=True):
        changed = {part for part in plain if plain[part] != other[part]}
        assert changed == {"name", "loss"} | ({"optimizer"} if loss == "trajectory balance" else set())
    later = experiment_config(48, BASELINE, 3, 10).to_json()
    assert {part for part in plain if plain[part] != later[part]} == {"name", "search"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "token TIS"], "--losses lacks 'no correction'"),
        (["--losses", "nothing"], "invalid choice: 'nothing'"),
        (["--lags", "-1"], "--lags is -1; allowed is a whole number from 0"),
        (["--steps", "0"], "--steps is 0; allowed is a whole number from 1"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_old_batches_from_one_start(tmp_path, monkeypatch, capsys):
    """With a lag of 1, the second batch is of the first policy too: two updates old."""
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    monkeypatch.setattr(tba, "load_config", quick_tiny)
    arguments = ["--losses", BASELINE, "--lags", "1", "--seeds", "1", "--steps", "2", "--out", str(tmp_path)]
    arguments += ["--json", str(tmp_path / "summary.json")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("-1: mean gain") == 1
    (run,) = (json.loads(file.read_text()) for file in tmp_path.glob("lag1-*.json"))
    assert run["steps"]["staleness_mean"] == [0, 2]
    assert list(json.loads((tmp_path / "summary.json").read_text())["lags"]["lag 1"]) == [BASELINE]
    # Repeated, the command computes nothing again.
    assert main(arguments) == 0 and "mean gain" not in capsys.readouterr().out.partition("\n")[0]


def quick_tiny(name: str):
    """`tiny`, smaller, with a warm start of two steps."""
    config = load_config(name)
    (source,) = config.data.sources
    data = dataclasses.replace(config.data, sources=(dataclasses.replace(source, train_size=64, heldout_size=8),))
    return dataclasses.replace(config, data=data, warm_start=WarmStartConfig(steps=2))
