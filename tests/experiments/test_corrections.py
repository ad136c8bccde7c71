"""The experiment on corrections: its summary by hand, its configurations, and runs of two steps."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from experiments import corrections
from experiments.corrections import (
    BASELINE,
    CORRECTIONS,
    MIXED,
    TASKS,
    corrected_config,
    main,
    mean_gain,
    summarise,
    tables,
)
from nested_reft.training.warm_start import WarmStartConfig


def run(correction: str, seed: int, accuracy: list[float], mismatch: str = "small") -> dict[str, Any]:
    steps = {"tokens": [100, 120], "ess_token": [0.5, None], "kl_behavior_target": [0.2, 0.4]}
    evaluations = {"step": list(range(len(accuracy))), "accuracy": accuracy}
    return {"correction": correction, "mismatch": mismatch, "seed": seed, "steps": steps, "evaluations": evaluations}


def test_the_mean_gain_by_hand():
    """The start is no part of the mean: (0.1 + 0.3 + 0.5) / 3 above 0.2."""
    assert mean_gain(run("x", 0, [0.2, 0.3, 0.5, 0.7])) == pytest.approx(0.3)


def test_corrections_are_compared_with_the_same_seed():
    """Seeds differ by much and the correction by 0.1 in each, so the interval is a point."""
    runs = [run(BASELINE, seed, [0.1 * seed, 0.1 * seed + 0.2, 0.1 * seed + 0.2]) for seed in range(3)]
    runs += [run("better", seed, [0.1 * seed, 0.1 * seed + 0.3, 0.1 * seed + 0.3]) for seed in range(3)]
    found = summarise(runs)["small"]
    assert found["better"]["over_baseline"] == pytest.approx(0.1)
    np.testing.assert_allclose(found["better"]["interval"], [0.1, 0.1])
    assert found[BASELINE]["over_baseline"] == 0 and found[BASELINE]["tokens"] == 220
    assert found["better"]["ess_token"] == pytest.approx(0.5) and found["better"][
        "kl_behavior_target"
    ] == pytest.approx(0.3)
    printed = tables(summarise([*runs, *(one | {"mismatch": "large"} for one in runs)]))
    assert printed.index("better") < printed.index(BASELINE) and "mismatch: large, KL" in printed
    assert "+0.100..+0.100" in printed


@pytest.mark.parametrize("name", TASKS)
def test_corrections_differ_in_the_loss_only(name):
    task = TASKS[name]()
    plain, *others = [corrected_config(task, "small", correction, 3).to_json() for correction in CORRECTIONS]
    assert plain["train"]["seed"] == 3 and plain["warm_start"]["steps"] == 0
    assert plain["loss"]["bias_mitigation"] == "one"
    for other in others:
        assert {part for part in plain if plain[part] != other[part]} - {"mix_control"} == {"name", "loss"}
    losses = [json.dumps(config["loss"]) for config in (plain, *others)]
    assert len(set(losses)) == len(losses)
    larger = corrected_config(task, "large", BASELINE, 3).to_json()
    assert {part for part in plain if plain[part] != larger[part]} == {"name", "nesting"}


def test_the_baseline_is_asked_for(capsys):
    assert main(["tiny", "--corrections", "token"]) == 2
    assert "lacks 'no correction'" in capsys.readouterr().err


@pytest.mark.slow
def test_corrections_from_one_start(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    monkeypatch.setitem(TASKS, "tiny", quick_task)
    chosen = [BASELINE, MIXED]
    arguments = ["tiny", "--corrections", *chosen, "--mismatch", "small", "--seeds", "1", "--steps", "2"]
    arguments += ["--out", str(tmp_path), "--json", str(tmp_path / "summary.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("warm start, seed 1") == 1 and printed.count("-1: mean gain") == 2
    kept = [json.loads(file.read_text()) for file in sorted((tmp_path / "tiny").glob("small-*-seed1-steps*.json"))]
    # All draw the same completions at first, and learn differently from them.
    assert len(kept) == 2 and 0 < kept[0]["steps"]["ess_token"][0] < 1
    for one in kept[1:]:
        assert one["evaluations"]["accuracy"][0] == kept[0]["evaluations"]["accuracy"][0]
        assert one["steps"]["tokens"][0] == kept[0]["steps"]["tokens"][0]
    # Repeated, the command computes nothing again.
    assert main(arguments) == 0
    assert "-1: mean gain" not in capsys.readouterr().out
    found = json.loads((tmp_path / "summary.json").read_text())["mismatches"]
    assert list(found["small"]) == chosen
    assert (tmp_path / "tiny.png").stat().st_size > 0


def quick_task() -> corrections.Task:
    """`tiny`, smaller, with a warm start of two steps."""
    task = corrections.tiny()
    (source,) = task.base.data.sources
    data = dataclasses.replace(task.base.data, sources=(dataclasses.replace(source, train_size=64, heldout_size=8),))
    return dataclasses.replace(
        task, base=dataclasses.replace(task.base, data=data, warm_start=WarmStartConfig(steps=2))
    )
