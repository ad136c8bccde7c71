"""Runs whose weight is held by a budget, or whose samples are accepted at random."""

import dataclasses
import itertools

import numpy as np
import pytest

from nested_reft.bridging import BridgeConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.mix_control import MixControlConfig, MixControlState, largest_share
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.training.nested_policy import renew
from tests.training.runs import comparable_steps, metrics_of, nano, save_after, trainer

MIXED = PolicyGradientConfig("leave_one_out", "interpolated", "sequence", "token_mean", entropy_coefficient=1.0)
BUDGETED = PolicyGradientConfig("leave_one_out", "base", "sequence", "token_mean", obrs_lambda=2.0)
HELD = MixControlConfig(ess=0.9, window=1)
HELD_OVER_TWO = MixControlConfig(ess=0.9, window=2)


def test_the_share_follows_the_step_before(tmp_path):
    """It begins without correction; then each batch has the share that the last step's ratios allow."""
    run = trainer(nano(loss=MIXED, mix_control=HELD), tmp_path)
    found = [metrics_of(run, run.step(number)) for number in range(3)]
    assert found[0]["weight_mean"] == pytest.approx(1)
    for before, now in itertools.pairwise(found):
        mean, size = before["sequence_ratio_mean"], before["ess_sequence"]
        share = before["next_mix_share"]
        assert 0 < share < 1 and share == pytest.approx(largest_share(mean, mean**2 / size, 0.9), rel=1e-5)
        assert "budget 0.9" in before["mix_reason"] and now["weight_mean"] != pytest.approx(1, abs=1e-6)


def test_the_full_model_says_nothing_of_the_share_that_bridges_need(tmp_path):
    """Until bridges are fitted the full model samples, whose ESS of 1 would ask for the whole weight."""
    nesting = NestingConfig(skip_ratio=0.34, bridge=BridgeConfig("per_layer", tokens=150))
    run = trainer(nano(loss=MIXED, mix_control=HELD, nesting=nesting, rollout__group_size=8), tmp_path)
    for number in range(5):
        found = run.step(number)
        # The step whose rollouts fitted the bridges was the full model's as well.
        assert found.update.health.ess_sequence > 0.999 and run.state.mix == MixControlState(0.0)
        if found.renewed.bridge_tokens is not None:
            break
    else:
        pytest.fail("five steps did not fit the bridges")
    assert run.step(number + 1).update.health.ess_sequence < 0.999 and len(run.state.mix.recent) == 1


def test_moments_of_another_depth_are_forgotten(tmp_path):
    """The budget of the depth cannot be kept, so the first step ends with another depth."""
    control = NestingControlConfig("ess_token", budget=0.9999, max_skipped=2)
    over_five = MixControlConfig(ess=0.9)
    nesting = NestingConfig(skip_ratio=0.34)
    run = trainer(nano(loss=MIXED, mix_control=over_five, nesting_control=control, nesting=nesting), tmp_path)
    run.step(0)
    assert run.state.nesting.num_skipped == 1 and run.state.mix.recent == () and run.state.mix.share > 0
    # A batch that was ordered before the depth changed would count for neither.
    run.state.nesting = dataclasses.replace(run.state.nesting, num_skipped=2)
    before, ordered = run.state.mix, run.step(1)
    assert len(ordered.plan.left_out(6)) == 2
    late = dataclasses.replace(run.state.nesting, num_skipped=1)
    run.state.nesting, run.state.mix = late, before
    renew(run.state, 1, ordered.found, ordered.update.health, run.keys.step(2).plan)
    assert run.state.mix.share == before.share and run.state.mix.recent == ()


def test_a_constant_share_stays(tmp_path):
    run = trainer(nano(loss=dataclasses.replace(MIXED, mix_share=0.4)), tmp_path)
    found = metrics_of(run, run.step(0))
    assert run.state.mix.share == 0.4 and "next_mix_share" not in found
    assert found["weight_mean"] != pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("changes", [{"loss": MIXED, "mix_control": HELD_OVER_TWO}, {"loss": BUDGETED}])
def test_resuming_continues_shares_and_draws(tmp_path, changes):
    config = nano(**changes)
    first = trainer(config, tmp_path)
    first.step(0)
    save_after(first, 1)
    expected = comparable_steps(first, range(1, 3))
    first.close()
    assert comparable_steps(trainer(config, tmp_path, resume=True), range(1, 3)) == expected


def test_samples_are_accepted_at_random(tmp_path):
    """The accepted share is logged; rejected completions have weight 0 and the others at least lambda."""
    run = trainer(nano(loss=BUDGETED, train__micro_batches=2), tmp_path)
    found = run.step(0)
    metrics, weight_BG = metrics_of(run, found), found.update.weight_BGC.max(axis=-1)
    assert 0 < metrics["accepted_completions"] < 1
    assert metrics["accepted_completions"] == pytest.approx((weight_BG > 0).mean())
    assert weight_BG[weight_BG > 0].min() >= 2 - 1e-5
    # Another step has other draws: of 16 completions with acceptance about one half, all agree once in 2^16.
    again = run.state.learner.batch(found.groups, run.keys.step(1).acceptance).arrays.acceptance_draw_BGC
    first = run.state.learner.batch(found.groups, run.keys.step(0).acceptance).arrays.acceptance_draw_BGC
    assert first.shape == again.shape and not np.array_equal(first, again)


def test_a_budget_that_rejects_all_says_so(tmp_path):
    loss = dataclasses.replace(BUDGETED, obrs_lambda=1e8)
    run = trainer(nano(loss=loss), tmp_path)
    found = run.step(0)
    assert found.update.empty and run.state.learner.version == 0
    assert "obrs_lambda 100000000.0 rejected every token" in next(iter(found.warnings(run.config).values()))
