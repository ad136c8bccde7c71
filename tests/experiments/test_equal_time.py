"""The equal-time experiment: its summary by hand, its variants, and a run of two steps."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from experiments import equal_time
from experiments.equal_time import TASKS, VARIANTS, CompilingTime, main, runs_of, variant_config
from experiments.equal_time_summary import curve, level_of, step_costs, summarise, tables, verdict
from nested_reft.sweeps.results import cost_to_reach
from nested_reft.training.warm_start import WarmStartConfig


def run(variant: str, seed: int, accuracy: list[float], step_seconds: float, **steps: list[Any]) -> dict[str, Any]:
    """A run that is evaluated after every step, each of which samples 100 tokens."""
    number = len(accuracy) - 1
    same = {"seconds": step_seconds, "rollout_seconds": step_seconds / 4, "compiling_seconds": 0.0, "tokens": 100}
    same |= {"ess_token": 0.5, "kl_behavior_target": 0.2, "plan_price": 0.6, "bridge_seconds": None}
    columns = {name: [value] * number for name, value in (same | {"draft_acceptance": None}).items()}
    return {
        "variant": variant,
        "seed": seed,
        "steps": columns | steps,
        "evaluations": {"step": list(range(number + 1)), "accuracy": accuracy, "greedy": accuracy},
        "load": [1.0, 2.0],
    }


# Smoothed over three evaluations this is 0, 0, 0.1, 0.3, 0.6, 0.9, 1.0.
RISING = [0.0, 0.0, 0.3, 0.6, 0.9, 1.2, 0.9]
SLOW = [0.0, 0.0, 0.0, 0.0, 0.3, 0.6, 0.9]


def test_a_level_is_reached_by_hand():
    """0.9 of the gain 1.0 is reached after 5 steps of 2 s, 0.45 halfway between steps 3 and 4."""
    full = run("full", 0, RISING, 2.0)
    np.testing.assert_allclose(curve(full, "seconds")[1], [0, 0, 0.1, 0.3, 0.6, 0.9, 1.0])
    assert level_of(full) == pytest.approx(0.9)
    assert cost_to_reach(*curve(full, "seconds"), 0.89999) == (pytest.approx(10.0, abs=1e-3), True)
    assert cost_to_reach(*curve(full, "seconds"), 0.45) == (pytest.approx(7.0), True)
    assert cost_to_reach(*curve(full, "tokens"), 0.45) == (pytest.approx(350.0), True)
    assert cost_to_reach(*curve(full, "seconds"), 1.1) == (pytest.approx(12.0), False)  # a lower bound
    assert cost_to_reach(*curve(full, "seconds"), 0.0) == (0.0, True)


def test_ratios_are_paired_by_seed():
    """The same curve in steps half as long takes half the time and all the tokens; a late one never arrives."""
    runs = [run("full", seed, RISING, 2.0) for seed in range(3)]
    runs += [run("quick", seed, RISING, 1.0) for seed in range(3)]
    runs += [run("late", seed, SLOW, 1.0) for seed in range(3)]
    found = summarise(runs)
    assert found["quick"]["seconds"]["ratio"] == pytest.approx(0.5)
    assert found["quick"]["seconds"]["interval"] == pytest.approx([0.5, 0.5])
    assert found["quick"]["tokens"]["ratio"] == pytest.approx(1.0)
    assert found["quick"]["verdict"] == "met" and found["quick"]["gain"] == pytest.approx(0)
    # Its six seconds are a bound below, so 0.6 shows nothing.
    assert found["late"]["seconds"]["reached"] == 0 and found["late"]["seconds"]["ratio"] == pytest.approx(0.6)
    assert found["late"]["verdict"] == "open" and found["late"]["gain"] == pytest.approx(0.6 - 1.0)
    assert found["full"]["verdict"] == "missed" and found["full"]["steps"]["rollout_share"] == pytest.approx(0.25)
    assert "quick" in tables(found)


@pytest.mark.parametrize(
    ("interval", "reached", "expected"),
    [([0.5, 0.7], 5, "met"), ([0.5, 0.71], 5, "open"), ([0.5, 0.6], 4, "open"), ([0.71, 0.8], 4, "missed")],
)
def test_verdicts(interval, reached, expected):
    assert verdict({"interval": interval, "reached": reached}, 5) == expected


def test_steps_that_compile_and_full_steps_are_left_out():
    """Step 1 compiled, so costs are of steps 2 to 4; the policy nests from step 2 on, so its KL is of these."""
    one = run(
        "bridged",
        0,
        [0.0] * 5,
        1.0,
        compiling_seconds=[9.0, 0.0, 0.0, 0.0],
        seconds=[5.0, 1.0, 1.0, 1.0],
        plan_price=[1, 0.6, 0.6, 0.6],
        kl_behavior_target=[0.0, 0.1, None, 0.3],
        ess_token=[1.0, 0.5, None, 0.3],
        bridge_seconds=[7.0, None, 0.5, 0.3],
    )
    found = step_costs([one])
    assert found["seconds"] == pytest.approx(1.0) and found["tokens_per_second"] == pytest.approx(400)
    assert found["bridge_seconds"] == pytest.approx(1.5)  # three fits of 0.5 s, the median
    # Over all steps these would be 0.7, 0.6 and 0.133.
    means = [found[name] for name in ("plan_price", "ess_token", "kl_behavior_target")]
    assert means == pytest.approx([0.6, 0.4, 0.2])
    assert summarise([one | {"variant": "full"}])["full"]["kl_by_quarter"] == [None, pytest.approx(0.1), None, 0.3]


def test_a_variant_without_bridges_counts_all_steps():
    """Rounded weights leave the price at 1 and are off-policy all the same."""
    rounded = run("full", 0, [0.0] * 5, 1.0, plan_price=[1] * 4, kl_behavior_target=[0.1, 0.2, 0.3, 0.4])
    assert summarise([rounded])["full"]["kl_by_quarter"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert step_costs([rounded])["kl_behavior_target"] == pytest.approx(0.25)


def test_time_of_programs_within_programs_counts_once(monkeypatch):
    """Two seconds of an inner program end within the five of the outer one, and one second follows: six."""
    now = iter([13.0, 15.0, 17.0, 18.0])
    with CompilingTime() as compiling:
        monkeypatch.setattr(equal_time.time, "monotonic", lambda: next(now))
        for event, seconds in (("trace", 2.0), ("trace", 5.0), ("backend", 1.0)):
            jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}", seconds)
        jax.monitoring.record_event_duration_secs("/elsewhere", 100.0)
        assert compiling.seconds == pytest.approx(6.0)


@pytest.mark.parametrize("name", ["tiny", "tiny_long", "smollm2", "smollm2_long"])
def test_variants_differ_in_rollouts_and_weights_only(name):
    task = TASKS[name]()
    one, *others = configs = [variant_config(task, variant, 3).to_json() for variant in VARIANTS]
    assert one["train"]["seed"] == 3 and one["warm_start"]["steps"] == 0
    for other in others:
        assert {part for part in one if one[part] != other[part]} <= {"name", "nesting", "rollout", "loss"}
    assert others[-1]["loss"]["bias_mitigation"] == "mixture"
    settings = [json.dumps({key: value for key, value in config.items() if key != "name"}) for config in configs]
    assert len(set(settings)) == len(VARIANTS)


@pytest.mark.slow
def test_two_variants_from_one_start(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    variants, seeds = ["full", "bridged"], [1]
    full, bridged = runs_of(quick_task(), variants, seeds, 2, tmp_path / "tiny")
    assert capsys.readouterr().out.count("warm start, seed 1") == 1
    assert full["evaluations"]["accuracy"][0] == bridged["evaluations"]["accuracy"][0]
    assert full["steps"]["tokens"][0] == bridged["steps"]["tokens"][0]  # the first step has no bridges yet
    assert full["steps"]["plan_price"] == [1, 1] and bridged["steps"]["plan_price"][1] < 1
    # The command finds both runs, reports, and computes nothing again.
    monkeypatch.setitem(TASKS, "tiny", quick_task)
    arguments = ["tiny", "--variants", *variants, "--seeds", "1", "--steps", "2", "--out", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "summary.json")]) == 0
    assert "equal-time-" not in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())["variants"]
    assert list(summary) == variants
    # Two steps teach nothing, and a variant that starts at its level has not met the target.
    assert all(each["verdict"] == "open: no full run gained accuracy" for each in summary.values())
    assert (tmp_path / "tiny.png").stat().st_size > 0


def test_a_seed_that_learns_nothing_is_left_out():
    learns, stays = (
        run("full", seed, accuracy, 1.0) for seed, accuracy in ((0, [0.0, 0.3, 0.6, 0.6, 0.6]), (1, [0.5] * 5))
    )
    found = summarise([learns, stays])["full"]
    assert found["seeds"] == [0] and found["seconds"]["reached"] == 1


def quick_task() -> equal_time.Task:
    """`tiny`, smaller, with a warm start of two steps, and bridges from the second step on."""
    task = equal_time.tiny()
    bridge = dataclasses.replace(task.bridged.bridge, tokens=128)
    (source,) = task.base.data.sources
    data = dataclasses.replace(task.base.data, sources=(dataclasses.replace(source, train_size=64, heldout_size=8),))
    return dataclasses.replace(
        task,
        base=dataclasses.replace(task.base, data=data, warm_start=WarmStartConfig(steps=2)),
        bridged=dataclasses.replace(task.bridged, bridge=bridge),
    )


def test_full_is_what_others_are_compared_with(capsys):
    assert main(["tiny", "--variants", "bridged"]) == 2
    assert "--variants lacks 'full', which the others are compared with" in capsys.readouterr().err
