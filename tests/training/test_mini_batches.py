"""Several updates on disjoint parts of a batch: who gets dealt where, what an update sees, and what a run keeps."""

import dataclasses

import jax
import numpy as np
import pytest

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.value import CriticConfig
from nested_reft.sharding import MeshConfig
from nested_reft.training.mini_batches import deal
from nested_reft.training.step import make_update
from nested_reft.training.trainer import Trainer
from nested_reft.types import Scored
from tests.training.runs import assert_equal_arrays, comparable_steps, nano, save_after, trainer

PPO = PolicyGradientConfig(
    "gae",
    "base",
    "token",
    "token_mean",
    clip_policies="three",
    clip_low=0.2,
    clip_high=0.2,
    entropy_coefficient=0.1,
    critic=CriticConfig(kl_coefficient=0.1, value_coefficient=0.5),
)
# Two passes over two mini-batches of two groups each.
PARTS = {"train__updates_per_batch": 4, "train__mini_batches": 2}
KEY = jax.random.key(5)


def ppo(path, **changes) -> Trainer:
    return trainer(nano(**{"loss": PPO, "optimizer__learning_rate": 0.01} | changes), path)


def found_by(run: Trainer) -> Scored:
    """One batch of the run's own prompts, scored."""
    prompts = run.state.next_prompts(np.zeros(run.config.data.prompts_per_batch, np.int32))
    return run.searcher.search(
        run.state.learner.behavior_policy(), prompts, run.state.draw_plan(jax.random.key(0)), jax.random.key(0)
    )


def test_every_pass_deals_each_group_once():
    rows = deal(12, 3, 4, KEY)
    assert rows.shape == (4, 3, 4)
    assert all(sorted(each.ravel().tolist()) == list(range(12)) for each in rows)
    # A pass has an order of its own, which neither is sorted nor depends on how many passes follow.
    assert len({tuple(each.ravel().tolist()) for each in [*rows, np.arange(12)]}) == 5
    np.testing.assert_array_equal(rows[:2], deal(12, 3, 2, KEY))
    assert not np.array_equal(rows, deal(12, 3, 4, jax.random.key(6)))


def test_one_mini_batch_is_the_batch_as_it_is():
    assert deal(4, 1, 2, None).tolist() == [[[0, 1, 2, 3]]] * 2


@pytest.mark.parametrize("changes", [{}, PARTS], ids=["whole", "parts"])
def test_updates_are_those_of_a_loop_by_hand(tmp_path, changes):
    """Each update sees its groups with the signals of the whole batch, in the order that was dealt. One pass over one
    mini-batch is the plain update on the batch, bit for bit."""
    run = ppo(tmp_path, **changes)
    learner, config = run.state.learner, run.config.train
    batch = learner.batch(found_by(run), kl_coefficient=0.1)
    state, base, arrays = jax.tree.map(np.array, (learner.state, learner.base, batch.arrays))
    update, results = learner.update(batch, KEY), []
    for rows_KM in deal(4, config.mini_batches, config.updates_per_batch // config.mini_batches, KEY):
        for rows_M in rows_KM:
            part = jax.tree.map(lambda x, rows_M=rows_M: x[rows_M], arrays)
            state, result = make_update(learner.task)(state, base, part, batch.plans)
            results.append(result)
    assert_equal_arrays(learner.state, state)
    assert learner.version == config.updates_per_batch and learner.batches == 1
    last = results[-config.mini_batches :]
    assert update.loss == pytest.approx(np.mean([result.loss for result in last]), rel=1e-6)
    assert update.parts["value_loss"] == pytest.approx(np.mean([each.parts["value_loss"] for each in last]), rel=1e-6)
    # Before the first update nothing but the sampler's own layers is off.
    assert update.health is not None and update.health.ratio_max == results[0].health.ratio_max
    # In the last pass every token that counts had a weight in one update, at its own place.
    np.testing.assert_array_equal(update.weight_BGC > 0, np.asarray(batch.arrays.mask_BGC))


def test_a_mini_batch_without_anything_to_learn_gets_no_update(tmp_path):
    """Adam has momentum after the first updates, and a gradient of zero would follow it."""
    run = ppo(tmp_path, train__updates_per_batch=8, train__mini_batches=4)
    learner, found = run.state.learner, found_by(run)
    counted_BG = np.arange(4)[:, None] == np.ones((4, 4))  # the second group alone
    rollouts = dataclasses.replace(found.rollouts, counted_BG=counted_BG)
    update = learner.update(learner.batch(dataclasses.replace(found, rollouts=rollouts), kl_coefficient=0.1), KEY)
    assert learner.version == 2 and not update.empty  # one in each pass
    assert (update.weight_BGC.sum(axis=(1, 2)) > 0).tolist() == [False, True, False, False]


def test_devices_share_each_mini_batch(tmp_path):
    found = {}
    for data in (1, 2):
        run = ppo(tmp_path / str(data), mesh=MeshConfig(data=data), **PARTS)
        if data == 1:
            groups = found_by(run)
        learner = run.state.learner
        found[data] = learner.update(learner.batch(groups, kl_coefficient=0.1), KEY)
    assert found[2].loss == pytest.approx(found[1].loss, rel=1e-4)
    assert found[2].gradient_norm == pytest.approx(found[1].gradient_norm, rel=1e-4)
    np.testing.assert_allclose(found[2].weight_BGC, found[1].weight_BGC, rtol=1e-4)


def test_runs_compile_once_and_resume_bit_for_bit(tmp_path):
    straight = ppo(tmp_path / "straight", **PARTS)
    expected = comparable_steps(straight, range(1))
    compiled = straight.compilations.count
    expected += comparable_steps(straight, range(1, 3))
    assert straight.compilations.count == compiled
    first = ppo(tmp_path / "resumed", **PARTS)
    assert comparable_steps(first, range(2)) == expected[:2]
    save_after(first, 2)
    first.close()
    second = trainer(first.config, tmp_path / "resumed", resume=True)
    assert comparable_steps(second, range(2, 3)) == expected[2:]
    assert_equal_arrays(straight.state.learner.state, second.state.learner.state)
    # Two passes on the whole batch are another run.
    whole = ppo(tmp_path / "whole", train__updates_per_batch=4)
    assert comparable_steps(whole, range(1)) != expected[:1]
