"""Searching ahead of the learner: which orders are issued when, and that no run depends on who carries them out."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft import curriculum
from nested_reft.checkpoints import newest_checkpoint
from nested_reft.curriculum import CurriculumConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.limits import RewardError
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.training.search_config import SearchConfig, check_backend
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.scored_groups import texts_of
from tests.training.runs import (
    MOVING,
    assert_equal_arrays,
    comparable,
    comparable_steps,
    metrics_of,
    nano,
    samples_of,
    save_after,
    trainer,
    two_sources,
)

THREADS = SearchConfig(lag=2, backend="thread", searchers=3)
MOVES = {"loss": MOVING, "optimizer__learning_rate": 0.01}
# An untrained model is always wrong, so its rewards differ by length.
REPLAYED = {
    "loss": TrajectoryBalanceConfig(beta=0.5),
    "reward": RewardConfig(overlong_cache_tokens=8),
    "replay": ReplayConfig(capacity=64, recent_share=0.5, inverse_temperature=1.0, prefill=24, max_staleness=4),
    "optimizer__learning_rate": 0.01,
}
NO_EVALUATION = {"evaluation__samples_per_prompt": 0, "evaluation__every_steps": 100}


@pytest.fixture(scope="module")
def setup():
    """What all runs of this module start from, so that no model is made twice."""
    # Tests send signals, and no machine is so slow that the process would end unsaved.
    return prepare(nano(train__save_seconds=600.0, **MOVES))


def with_search(setup, search: SearchConfig, **changes):
    """The setup with another section `search`, and perhaps other parts."""
    return dataclasses.replace(setup, config=dataclasses.replace(setup.config, search=search, **changes))


def test_without_lag_each_batch_is_sampled_just_before_its_update(tmp_path):
    """Against the plain loop: the step's own plan and keys, the present policy, the next prompts."""
    config = two_sources(
        **MOVES,
        curriculum=CurriculumConfig("dump"),
        dynamic_sampling=DynamicSamplingConfig(max_generation_batches=2),
    )
    run, plain = trainer(config, tmp_path / "run"), trainer(config, tmp_path / "plain")
    for number in range(2):
        found = run.step(number)
        assert len(found.found) == 2 and not found.staleness_BG.any()
        keys, state = plain.keys.step(number), plain.state
        plan = state.draw_plan(keys.plan)
        assert np.array_equal(found.plan.layer_S, plan.layer_S)
        for index, scored in enumerate(found.found):
            key = keys.batch(index)
            source_B = curriculum.choose(state.curriculum, config.curriculum, key.curriculum, 4)
            prompts = state.next_prompts(source_B)
            expected = plain.searcher.search(state.learner.behavior_policy(), prompts, plan, key.rollout)
            assert_equal_arrays(expected.rollouts, scored.rollouts)
            state.curriculum = curriculum.update(state.curriculum, config.curriculum, expected)
        state.learner.update(state.learner.batch(found.groups, keys.acceptance))
    assert_equal_arrays(run.state.learner.state, plain.state.learner.state)


def test_nesting_control_reads_depth_and_not_age(setup, tmp_path):
    """Full rollouts that are two updates old: their ratios are over the budget, and one layer more is left out at once.

    The two batches that were ordered before that say nothing of one layer less, whatever they are.
    """
    control = NestingControlConfig("kl_behavior_target", budget=5e-4, max_skipped=2, patience=1)
    search = SearchConfig(lag=2)
    # A first layer of its own shows little mismatch in a fresh model, so the budget decides by the age alone.
    moved = with_search(setup, search, nesting_control=control, nesting=NestingConfig(border=1))
    optimizer = dataclasses.replace(moved.config.optimizer, learning_rate=0.05)
    run = trainer(dataclasses.replace(moved, config=dataclasses.replace(moved.config, optimizer=optimizer)), tmp_path)
    records = [run.step(number) for number in range(4)]
    assert [record.nesting.num_skipped for record in records] == [1, 1, 1, 0]
    assert abs(float(records[2].update.health.kl_behavior_target)) > 1e-3
    assert [record.found[0].stats.mismatch["kl_behavior_target"] > 5e-4 for record in records] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("lag", "sync_every", "ages"),
    [
        (2, 1, [0, 1, 2, 2, 2, 2]),
        (0, 3, [0, 1, 2, 0, 1, 2]),
        # Ordered one step before: in steps 0 0 1 2 3 4, with the weights of steps 0 0 0 2 2 4.
        (1, 2, [0, 1, 2, 1, 2, 1]),
    ],
)
def test_the_age_of_every_batch_is_exact(lag, sync_every, ages, setup, tmp_path):
    search = SearchConfig(lag=lag, sync_every=sync_every)
    run = trainer(with_search(setup, search), tmp_path)
    records = [run.step(number) for number in range(6)]
    assert [set(found.staleness_BG.ravel().tolist()) for found in records] == [{age} for age in ages]
    assert max(ages) == lag + sync_every - 1
    assert {found.search.under_way for found in records} == {lag}


def test_batches_take_turns_in_their_temperatures(setup, tmp_path):
    """Each keeps the log-probabilities of its own; a resumed run goes on with the next. The update knows but one."""
    started = with_search(setup, SearchConfig(lag=1, temperatures=(1.0, 0.5, 2.0)))
    run = trainer(started, tmp_path)
    found = [run.step(0)]
    save_after(run, 1)
    run.close()
    run = trainer(started, tmp_path, resume=True)
    assert run.state.ordered == 2
    found += [run.step(number) for number in (1, 2, 3)]
    for record, temperature in zip(found, (1.0, 0.5, 2.0, 1.0), strict=True):
        rollouts = record.groups.rollouts
        assert (rollouts.temperature_BG == temperature).all()
        assert {line["temperature"] for line in samples_of(run, record)} == {temperature}
        # The first two batches are of the first weights, which the setup still holds.
        if record.number <= 2:
            policy = dataclasses.replace(setup.policy, sampling=SamplingConfig(temperature))
            texts = rollouts.prompt_BP, rollouts.prompt_length_B, rollouts.tokens_BGC
            expected = policy.logprobs(*(jnp.asarray(array) for array in texts), record.plan)
            drawn_BGC = np.arange(rollouts.tokens_BGC.shape[-1]) < rollouts.length_BG[..., None]
            np.testing.assert_allclose(
                np.asarray(expected)[drawn_BGC], rollouts.behavior_logprob_BGC[drawn_BGC], rtol=1e-3, atol=1e-3
            )
    # Cooler samples are more probable under their own distribution.
    rollouts = [record.groups.rollouts for record in found]
    means = [each.behavior_logprob_BGC.sum() / each.length_BG.sum() for each in rollouts]
    assert means[1] > max(means[0], means[2], means[3])


def test_batches_take_turns_in_how_deep_they_nest(setup, tmp_path):
    """Of six layers none is left out and two are; a resumed run goes on with the next."""
    started = with_search(setup, SearchConfig(lag=1, skip_ratios=(0.0, 0.34)))
    run = trainer(started, tmp_path)
    found = [run.step(0)]
    save_after(run, 1)
    run.close()
    run = trainer(started, tmp_path, resume=True)
    found += [run.step(number) for number in (1, 2)]
    assert [len(record.plan.left_out(6)) for record in found] == [0, 2, 0]
    assert [(record.groups.rollouts.part_BGL != 0).all() for record in found] == [True, False, True]


def test_a_run_does_not_depend_on_who_searches(setup, tmp_path):
    """Nor does it skip a prompt: what the steps train on are the stream's prompts in their order."""
    inline = trainer(with_search(setup, SearchConfig(lag=2)), tmp_path / "inline")
    expected = comparable_steps(inline, range(4))
    threads = trainer(with_search(setup, THREADS), tmp_path / "threads")
    records = [threads.step(number) for number in range(4)]
    alone = trainer(with_search(setup, SearchConfig()), tmp_path / "alone")
    prompts = [alone.state.next_prompts(np.zeros(4, np.int32)).texts for _ in range(4)]
    assert [found.groups.prompts.texts for found in records] == prompts
    threads.close()
    assert_equal_arrays(inline.state.learner.state, threads.state.learner.state)
    assert len({line["loss"] for line in expected}) == 4


@pytest.mark.parametrize(
    ("search", "steps"),
    [
        (THREADS, 2),
        # In the middle of a period, whose weights the checkpoint keeps.
        (SearchConfig(lag=1, sync_every=3), 2),
        (SearchConfig(lag=0, sync_every=3), 3),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(search, steps, setup, tmp_path):
    started = with_search(setup, search)
    straight = trainer(started, tmp_path / "straight")
    expected = comparable_steps(straight, range(5))
    first = trainer(started, tmp_path / "resumed")
    assert comparable_steps(first, range(steps)) == expected[:steps]
    save_after(first, steps)
    # Waiting for a checkpoint changes nothing.
    assert comparable_steps(first, range(steps, 5)) == expected[steps:]
    first.close()
    second = trainer(started, tmp_path / "resumed", resume=True)
    assert len(second.state.found_ahead) == search.lag
    assert (second.state.searching is None) == (steps % search.sync_every == 0)
    assert comparable_steps(second, range(steps, 5)) == expected[steps:]
    assert_equal_arrays(straight.state.learner.state, second.state.learner.state)
    for run in (straight, second):
        run.close()


def test_a_checkpoint_whose_wait_fails_loses_nothing_that_was_found(setup, tmp_path, monkeypatch):
    """Batches 1 and 2 are under way after step 0. The second wait fails, and the next one goes on from there."""
    started = with_search(setup, SearchConfig(lag=2))
    expected = comparable_steps(trainer(started, tmp_path / "straight"), range(3))
    run = trainer(started, tmp_path / "run")
    found = comparable_steps(run, range(1))
    take = run.pool.take

    def fails():
        if len(run.pool) == 1:
            raise TimeoutError("batch 2 was not found in that time")
        return take()

    monkeypatch.setattr(run.pool, "take", fails)
    with pytest.raises(TimeoutError):
        run.save()
    assert (len(run.state.found_ahead), len(run.pool)) == (1, 1)
    monkeypatch.undo()
    assert found + comparable_steps(run, range(1, 3)) == expected


def test_the_wait_of_a_checkpoint_is_waiting_and_no_time_of_the_step(setup, tmp_path, monkeypatch):
    """Each of two results takes three seconds of a clock that nothing else moves."""
    run = trainer(with_search(setup, SearchConfig(lag=2)), tmp_path)
    run.step(0)
    now, take = [1000.0], run.pool.take
    monkeypatch.setattr("nested_reft.training.orders.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow():
        now[0] += 3.0
        return take()

    monkeypatch.setattr(run.pool, "take", slow)
    run.orders.drain(run.state)
    record = run.step(1)
    assert (record.search.drained_seconds, record.search.waited_seconds) == (6.0, 0.0)
    metrics = metrics_of(run, record)
    assert metrics["search_wait_seconds"] == 6.0 and metrics["trained_tokens_per_second"] > 0
    assert run.step(2).search.drained_seconds == 0.0


KILLED = """
import json, os, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
from nested_reft.run_directory import RunDirectory
from nested_reft.training.config import Config
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer

def on_step(found):
    if found.number == 3:
        run.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)

config = Config.from_json(json.loads(sys.stdin.read()))
run = Trainer(prepare(config), RunDirectory(Path(sys.argv[1])), on_step).open()
run.run()
"""


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    """By signal 9 in step 3, with batches under way and the newest checkpoint after step 2.

    It is one of trajectory balance: what is kept for replay survives as well, and so do weights in the middle of a
    period of three steps.
    """
    search = SearchConfig(lag=2, sync_every=3, backend="thread", searchers=2)
    config = nano(**REPLAYED, **NO_EVALUATION, search=search, train__steps=4)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    whole = trainer(config, straight)
    whole.run()
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed)],
        input=json.dumps(config.to_json()),
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=os.environ,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert newest_checkpoint(killed / "checkpoints") == 2
    resumed = trainer(config, killed, resume=True)
    resumed.run()
    assert texts_of(resumed.state.buffer) == texts_of(whole.state.buffer)
    assert_equal_arrays(resumed.state.learner.state, whole.state.learner.state)
    for name in ("metrics", "samples"):
        lines = {path: [comparable(line) for line in read_log(path / f"{name}.jsonl")] for path in (straight, killed)}
        assert lines[killed] == lines[straight]


def test_a_search_that_fails_ends_the_run_with_its_message(setup, tmp_path, monkeypatch):
    def fails(*_):
        raise RewardError("no completion of this step could be scored")

    run = trainer(with_search(setup, THREADS), tmp_path)
    monkeypatch.setattr(run.searcher, "search", fails)
    with pytest.raises(RewardError, match="could be scored"):
        run.step(0)
    run.close()


def test_an_interrupt_waits_for_what_is_under_way_and_a_resumed_run_begins_with_it(setup, tmp_path):
    started = with_search(setup, THREADS)
    run = Trainer(started, RunDirectory(tmp_path), lambda found: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run.open().run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 1
    second = trainer(started, tmp_path, resume=True)
    assert len(second.state.found_ahead) == 2
    second.close()


def test_a_second_signal_leaves_a_searcher_that_hangs(setup, tmp_path, monkeypatch, caplog):
    """It would be waited for as long as a batch may take, which is an hour."""
    monkeypatch.setattr("nested_reft.training.search_pool.CLOSE_SECONDS", 0.05)
    main, released = threading.main_thread().ident, threading.Event()

    def hangs(*_):
        # Two kinds, because equal signals may come as one.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.pthread_kill(main, number)
        released.wait()

    run = Trainer(with_search(setup, SearchConfig(lag=1, backend="thread")), RunDirectory(tmp_path)).open()
    monkeypatch.setattr(run.searcher, "search", hangs)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    released.set()
    assert "searcher-0 is still at batch 0" in caplog.text


def test_a_searcher_that_cannot_start_ends_an_earlier_phase(tmp_path, monkeypatch):
    def no_place(*_):
        raise ValueError("no such device")

    monkeypatch.setattr("nested_reft.training.search_pool.DeviceSite", no_place)
    run = trainer(nano(warm_start__steps=3, search=SearchConfig(lag=1, backend="thread")), tmp_path)
    for thread in threading.enumerate():
        if thread.name.startswith("searcher-"):
            thread.join(30)
    with pytest.raises(ValueError, match="no such device"):
        run.run()
    assert (run.state.phase, run.state.step) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lag": -1}, r"search.lag is -1; allowed is 0 or more"),
        ({"sync_every": 0}, r"search.sync_every is 0; allowed is 1 or more"),
        ({"searchers": 2}, r"search.searchers is 2; with backend 'inline' .* 1 to 1: the learner itself samples"),
        (
            {"searchers": 4, "lag": 2, "backend": "thread"},
            r"search.searchers is 4; with backend 'thread' and lag 2, allowed is 1 to 3: lag \+ 1 batches are",
        ),
        ({"timeout_seconds": 0.0}, r"search.timeout_seconds is 0.0; allowed is more than 0"),
        ({"timeout_seconds": float("nan")}, r"search.timeout_seconds is nan"),
        ({"skip_ratios": (0.2, 1.0)}, r"search.skip_ratios holds 1.0; allowed is 0 <= skip_ratio < 1"),
        ({"temperatures": (1.0, 0.0)}, r"search.temperatures holds 0.0; allowed is 0.001 to 1000"),
        ({"gpus_per_searcher": 1.0}, r"search.gpus_per_searcher is 1.0; with search.backend 'inline' allowed is 0"),
        ({"tpus_per_searcher": -1.0, "backend": "ray"}, r"search.tpus_per_searcher is -1.0; allowed is 0 to"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**changes)


def test_ray_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("nested_reft.training.search_config.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"search.backend is 'ray', which is not installed: pip install 'nested_reft"):
        prepare(nano(search=SearchConfig(backend="ray")))
    check_backend(SearchConfig(lag=1, backend="thread"))
