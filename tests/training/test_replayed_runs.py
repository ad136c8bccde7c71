"""Runs that train on what they kept, and on-policy runs beside them."""

import dataclasses

import numpy as np
import pytest

from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.replay_store import ReplayConfig, Store
from nested_reft.rewards.reward import RewardConfig
from nested_reft.training.search_config import SearchConfig
from tests.training.runs import MOVING, comparable_steps, metrics_of, nano, save_after, trainer

REPLAY = ReplayConfig(capacity=64, recent_share=0.5, inverse_temperature=1.0, prefill=24, max_staleness=2)
# An untrained model is always wrong, so its rewards differ by length.
FAST = {
    "loss": TrajectoryBalanceConfig(beta=0.5),
    "reward": RewardConfig(overlong_cache_tokens=8),
    "optimizer__learning_rate": 0.01,
    "evaluation__samples_per_prompt": 0,
    "evaluation__every_steps": 100,
}


def test_a_replayed_step_trains_on_what_is_kept_and_says_how_old_it_is(tmp_path):
    """16 completions a batch, of which some come twice: the prefill of 24 takes two batches, and later steps one."""
    run = trainer(nano(replay=REPLAY, train__ess_warning=0.999, **FAST), tmp_path)
    records = [run.step(number) for number in range(4)]
    assert [len(record.found) for record in records] == [2, 1, 1, 1]
    metrics = [metrics_of(run, record) for record in records]
    assert metrics[0]["staleness_max"] == 0 and metrics[0]["replay/recent"] == 1
    assert 24 <= metrics[0]["replay/completions"] <= 32 and metrics[3]["replay/completions"] > 32
    assert max(each["staleness_max"] for each in metrics) == 2  # and not 3: those are taken out
    for record, each in zip(records, metrics, strict=True):
        behind_BG = record.version - record.groups.rollouts.version_BG
        assert each["staleness_mean"] == pytest.approx(behind_BG.mean()) and 0 <= each["replay/age"] <= 2
        assert record.groups.rollouts.tokens_BGC.shape[:2] == (4, 4) and not record.update.empty
    assert metrics[3]["turned_away/stale"] > 0
    # What is trained on is what was found: each completion of the last batch is one of some step's.
    known = {text for record in records for scored in record.found for group in scored.texts for text in group}
    assert {text for group in records[-1].groups.texts for text in group} <= known
    # How far they are from the policy is logged, and no reason to warn: no weight depends on it.
    assert metrics[3]["ess_token"] < 0.999 and "warning" not in metrics[3]


def test_recent_groups_alone_are_those_of_an_on_policy_run(tmp_path):
    """With a search a step and m = 1, no completion that is trained on is behind; a policy gradient runs as well."""
    config = nano(**FAST | {"loss": MOVING, "replay": dataclasses.replace(REPLAY, recent_share=1.0, prefill=0)})
    run = trainer(config, tmp_path)
    assert [metrics_of(run, run.step(number))["staleness_max"] for number in range(2)] == [0, 0]


def test_an_update_may_train_on_fewer_completions_than_a_search_finds(tmp_path):
    """S = 4 are sampled of each prompt, and groups of K = 2 are the last of the newest version."""
    replay = dataclasses.replace(REPLAY, recent_share=1.0, group_size=2, prefill=0)
    run = trainer(nano(replay=replay, **FAST), tmp_path)
    record = run.step(0)
    assert record.found[0].rollouts.tokens_BGC.shape[:2] == (4, 4)
    assert record.groups.rollouts.tokens_BGC.shape[:2] == (4, 2) and not record.update.empty
    last = {texts[-1] for texts in record.found[0].texts}
    assert {texts[-1] for texts in record.groups.texts} <= last


def test_no_completion_is_older_than_the_limit_where_searchers_work_ahead(tmp_path):
    """With a lag of 2, batches are two versions old when they come, and a limit of 3 replays each for one step more."""
    replay = dataclasses.replace(REPLAY, prefill=0, max_staleness=3)
    run = trainer(nano(replay=replay, search=SearchConfig(lag=2), **FAST), tmp_path)
    metrics = [metrics_of(run, run.step(number)) for number in range(8)]
    assert max(each["staleness_max"] for each in metrics) == 3
    # The newest batch is two versions old, and yet it is the recent one.
    assert metrics[-1]["replay/recent"] > 0 and min(each["replay/recent"] for each in metrics) < 1
    # Two batches of four prompts; without the limit, the capacity would leave twice as many.
    assert metrics[-1]["replay/prompts"] == 8 and metrics[-1]["turned_away/stale"] > 0


def test_nesting_control_reads_depth_and_not_the_age_of_what_is_replayed(tmp_path):
    """Full rollouts have no mismatch of depth, so after two steps a layer is left out, however old the groups are."""
    control = NestingControlConfig("kl_behavior_target", budget=1e-3, max_skipped=2, patience=2)
    replay = dataclasses.replace(REPLAY, recent_share=0.0)
    changes = FAST | {"optimizer__learning_rate": 0.05}
    run = trainer(nano(replay=replay, nesting_control=control, nesting=NestingConfig(border=1), **changes), tmp_path)
    records = [run.step(number) for number in range(2)]
    assert records[1].staleness_BG.any() and abs(float(records[1].update.health.kl_behavior_target)) > 1e-3
    assert [record.nesting.num_skipped for record in records] == [0, 1]


def test_ages_where_weights_are_sent_every_other_step(tmp_path):
    """k = 2 with as large a lag, and m = 1: at most 2 k - 1 = 3 versions behind, the same every k steps."""
    replay = dataclasses.replace(REPLAY, recent_share=1.0, group_size=2, prefill=0, max_staleness=3)
    run = trainer(nano(replay=replay, search=SearchConfig(lag=2, sync_every=2), **FAST), tmp_path)
    ages = [set(run.step(number).staleness_BG.ravel().tolist()) for number in range(6)]
    # The batches of steps 0 to 3 are of version 0, and those of steps 4 and 5 of version 2.
    assert ages == [{0}, {1}, {2}, {3}, {2}, {3}]


def test_resuming_continues_what_is_kept(tmp_path):
    config = nano(replay=REPLAY, **FAST)
    first = trainer(config, tmp_path)
    comparable_steps(first, range(2))
    save_after(first, 2)
    kept, expected = first.state.buffer, comparable_steps(first, range(2, 4))
    first.close()
    second = trainer(config, tmp_path, resume=True)
    again = second.state.buffer
    assert isinstance(kept, Store) and isinstance(again, Store) and np.array_equal(again.rows_R, kept.rows_R)
    assert comparable_steps(second, range(2, 4)) == expected
