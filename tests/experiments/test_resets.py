"""The experiment on resets: its summary by hand, its configurations, and runs of a few steps."""

import json
from typing import Any

import numpy as np
import pytest

from experiments.resets import PROMPT, arms, experiment_config, main, runs_of, summarise, summary_table
from experiments.runs import EVERY
from nested_reft.training.warm_start import WarmStartConfig


def run(arm: str, seed: int, accuracy: list[float], greedy: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "steps": [EVERY * i for i in range(len(accuracy))],
        "accuracy": [[value] for value in accuracy],
        "greedy_accuracy": [[0.0], [greedy]],
        "seconds": 2.0,
    }


def test_arms_are_compared_with_the_same_seed():
    """Seeds differ by 0.2 and the arm by 0.5 in each, so the interval of the gain is a point; 0.5 counts as solved."""
    runs = [run(PROMPT, seed, [0.0, 0.2 * seed], 0.1) for seed in range(2)]
    runs += [run("uniform", seed, [0.0, 0.2 * seed + 0.5], 0.5 - 0.01 * seed) for seed in range(2)]
    found = summarise(runs)
    assert found["uniform"]["gain"] == pytest.approx(0.5)
    np.testing.assert_allclose(found["uniform"]["gain_interval"], [0.5, 0.5])
    assert (found["uniform"]["solved"], found[PROMPT]["solved"]) == (1, 0) and found[PROMPT]["gain"] == 0
    np.testing.assert_allclose(found["uniform"]["final_interval"], [0.5, 0.7])
    assert "+0.500..+0.500" in summary_table(found)


def test_arms_differ_in_the_resets_only():
    plain, *others = [experiment_config(arm, 3, 200).to_json() for arm in arms(200)]
    assert plain["reset"]["share"] == 0 and plain["train"]["seed"] == 3 and plain["warm_start"]["steps"] == 0
    for other in others:
        assert {part for part in plain if plain[part] != other[part]} == {"name", "reset"}
    assert len({json.dumps(other["reset"]) for other in others}) == len(others) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "15"], "a multiple of 10"), (["--arms", "uniform"], "--arms lacks 'prompt'")],
)
def test_what_cannot_be_compared_is_refused(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_finished_runs_are_kept(tmp_path, capsys):
    """Both arms start alike, and a repeated command computes nothing."""
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    runs = runs_of([PROMPT, "uniform"], [1], EVERY, tmp_path, WarmStartConfig(steps=2))
    assert runs[0]["accuracy"][0] == runs[1]["accuracy"][0] and capsys.readouterr().out.count("sampled accuracy") == 2
    arguments = ["--arms", PROMPT, "uniform", "--seeds", "1", "--steps", str(EVERY), "--out", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "summary.json")]) == 0
    assert "sampled accuracy" not in capsys.readouterr().out
    assert list(json.loads((tmp_path / "summary.json").read_text())["arms"]) == [PROMPT, "uniform"]
    assert (tmp_path / "resets.png").stat().st_size > 0
