"""What the experiments compute and draw, without their long runs."""

import numpy as np
import pytest

from experiments import nesting_control, plan_divergence
from experiments.runs import wanted_run
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.training.config import load_config


def test_the_controller_holds_the_budget_of_both_synthetic_plants():
    for cost, late_size in ((nesting_control.steady, 3), (nesting_control.drifting, None)):
        lines = nesting_control.plant_run(cost, nesting_control.PLANT_CONTROL)
        found = nesting_control.summary("plant", nesting_control.PLANT_CONTROL, lines)
        assert found["ess_mean_late"] > found["budget"] and found["steps_over_budget"] < 0.15
        assert found["raised"] + found["lowered"] < 40
        if late_size is not None:
            assert abs(found["skipped_mean_late"] - late_size) < 0.3


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the figure needs the 'report' extra")
    lines = nesting_control.plant_run(nesting_control.steady, nesting_control.PLANT_CONTROL)
    nesting_control.plot(tmp_path / "figure.png", {"plant": (nesting_control.PLANT_CONTROL, lines)})
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_every_rule_of_the_plan_comparison_can_be_drawn(key):
    measured = NestingConfig(choice="measured", divergence_file="-")
    for nesting, num_skipped in plan_divergence.rules(measured).values():
        plan = draw_plan(key, nesting, 30, np.linspace(0, 1, 30), num_skipped)
        assert plan.shape.kept == 30 - num_skipped


def test_runs_of_other_steps_have_files_of_their_own(tmp_path):
    """A shorter trial would else be computed over the results of the long runs."""
    long, short = (load_config("tiny", train={"seed": 3, "steps": steps}) for steps in (100, 20))
    found = [wanted_run(config, tmp_path, "one", variant="one") for config in (long, short)]
    assert [each.file.name for each in found] == ["one-seed3-steps100.json", "one-seed3-steps20.json"]
    assert found[0].labels == {"variant": "one", "seed": 3}
