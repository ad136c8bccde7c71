"""The experiment on old completions: its configurations, what it refuses, and runs of two steps."""

import dataclasses
import json

import pytest

from experiments import tba
from experiments.corrections import BASELINE
from experiments.tba import LOSSES, experiment_config, lost_to_lag, main, table_of_times, times_to_level
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


def test_searchers_change_nothing_but_who_searches():
    alone, threads = (experiment_config(8, BASELINE, 3, 10, searchers).to_json() for searchers in (0, 3))
    assert {part for part in alone if alone[part] != threads[part]} == {"search"}
    assert threads["search"] == alone["search"] | {"backend": "thread", "searchers": 3}
    # Two batches under way keep two searchers at work; the synchronous run has none.
    assert experiment_config(2, BASELINE, 3, 10, searchers=3).search.searchers == 2
    assert experiment_config(0, BASELINE, 3, 10, searchers=3).search.backend == "inline"


def timed(lag: int, seed: int, step_seconds: float):
    """Six steps whose smoothed accuracies are 0, 0.15, 0.3, 0.6, 0.8, 0.9, 0.9: 0.81 is reached after 4.1 of them."""
    steps = {"seconds": step_seconds, "compiling_seconds": 0.0, "rollout_seconds": 0.5, "tokens": 100}
    steps |= {"ess_token": 0.5, "kl_behavior_target": 0.2, "plan_price": 1, "bridge_seconds": None}
    columns = {name: [value] * 6 for name, value in (steps | {"draft_acceptance": None}).items()}
    # The first step compiled.
    columns |= {"search_seconds": [9.0] + [2.0] * 5, "update_seconds": [1.0] * 6}
    accuracy = [0.0, 0.3, 0.6, 0.9, 0.9, 0.9, 0.9]
    return {
        "config": {"search": {"lag": lag}},
        "mismatch": f"lag {lag}",
        "correction": BASELINE,
        "seed": seed,
        "steps": columns,
        "evaluations": {"step": list(range(7)), "accuracy": accuracy, "greedy": accuracy},
        "load": [1.0, 2.0],
    }


def test_times_to_the_level_of_the_synchronous_run_by_hand():
    """A step takes three seconds in turns, of which two are sampling, and one second where searchers work ahead.

    The simulation takes five whole steps. In turns these are 5 x 3. One searcher never stands still, and the last
    update follows its fifth batch: 5 x 2 + 1. Two searchers keep the learner busy once the first batch is there: 2 + 5.
    """
    runs = [timed(lag, seed, seconds) for seed in (0, 1) for lag, seconds in ((0, 3.0), (2, 1.0))]
    found = times_to_level(runs)[BASELINE]
    assert found["lag 0"]["to_level"] == pytest.approx([12.3, 12.3]) and found["lag 2"]["ratio"] == pytest.approx(1 / 3)
    assert found["lag 2"]["steps_to_level"] == pytest.approx([4.1, 4.1]) and found["lag 2"]["reached"] == 2
    assert found["lag 0"]["simulated"] == {1: [15.0, 15.0]}
    assert found["lag 2"]["simulated"] == {1: [11.0, 11.0], 2: [7.0, 7.0]}
    # 0.45 lies halfway between the evaluations after two and three steps.
    assert times_to_level(runs, 0.45)[BASELINE]["lag 2"]["steps_to_level"] == pytest.approx([2.5, 2.5])
    row = table_of_times({BASELINE: found}).splitlines()[-1]
    assert "lag 2" in row and "2 of 2" in row and "0.33..0.33" in row and "1: 11.0, 2: 7.0" in row


def test_what_is_lost_to_a_lag_is_paired_by_seed():
    gains = {"lag 0": [0.1, 0.5], "lag 8": [0.0, 0.4], "lag 16": [-0.1, 0.5]}
    found = lost_to_lag({lag: {BASELINE: {"mean_gain": values}} for lag, values in gains.items()})[BASELINE]
    assert list(found) == ["lag 8", "lag 16"]
    assert found["lag 8"]["change"] == pytest.approx(-0.1) and found["lag 8"]["interval"] == pytest.approx([-0.1, -0.1])
    assert found["lag 16"]["change"] == pytest.approx(-0.1) and found["lag 16"]["interval"] == pytest.approx([-0.2, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "token TIS"], "--losses lacks 'no correction'"),
        (["--losses", "nothing"], "invalid choice: 'nothing'"),
        (["--lags", "-1"], "--lags is -1; allowed is a whole number from 0"),
        (["--steps", "0"], "--steps is 0; allowed is a whole number from 1"),
        (["--searchers", "-1"], "--searchers is -1; allowed is a whole number from 0"),
        (["--judge-seconds", "-1"], "--judge-seconds is -1.0; allowed is 0 to 1e6"),
        (["--target", "1"], "--target is 1.0; allowed is more than 0 and less than 1"),
        (["--target", "0.5", "--lags", "2"], "--target needs 0 among --lags"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_old_batches_from_one_start(tmp_path, monkeypatch, capsys):
    """With a lag of 1, the second batch is of the first policy too: two updates old. A thread samples it, and waits."""
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    monkeypatch.setattr(tba, "load_config", quick_tiny)
    arguments = ["--losses", BASELINE, "--lags", "0", "1", "--seeds", "1", "--steps", "2", "--out", str(tmp_path)]
    arguments += ["--searchers", "1", "--judge-seconds", "0.2"]
    arguments += ["--json", str(tmp_path / "summary.json")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("-1: mean gain") == 2
    (run,) = (json.loads(file.read_text()) for file in tmp_path.glob("lag1-*.json"))
    assert run["steps"]["staleness_mean"] == [0, 2] and min(run["steps"]["search_seconds"]) > 0.2
    assert run["evaluations"]["step"] == [0, 2]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["lags"]["lag 1"]) == [BASELINE]
    assert list(summary["times"][BASELINE]["lag 1"]["simulated"]) == ["1"]
    # Repeated, the command computes nothing again.
    assert main(arguments) == 0 and "mean gain" not in capsys.readouterr().out.partition("\n")[0]


def quick_tiny(name: str):
    """`tiny`, smaller, with a warm start of two steps."""
    config = load_config(name)
    (source,) = config.data.sources
    data = dataclasses.replace(config.data, sources=(dataclasses.replace(source, train_size=64, heldout_size=8),))
    return dataclasses.replace(config, data=data, warm_start=WarmStartConfig(steps=2))
