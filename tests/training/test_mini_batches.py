"""Several updates on disjoint parts of a batch: who gets dealt where, what an update sees, and what a run keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.data.pipeline import batch_prompts
from nested_reft.layer_plan import LayerPlan
from nested_reft.sharding import MeshConfig, shard_batch
from nested_reft.training.learner import Learner
from nested_reft.training.mini_batches import deal
from nested_reft.training.reinforcement import reinforcement_task
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import Setup, prepare
from nested_reft.training.step import make_update
from nested_reft.training.trainer import Trainer
from nested_reft.types import Scored
from tests.training.runs import PPO, assert_equal_arrays, comparable_steps, nano, save_after, trainer

# Two passes over two mini-batches of two groups each.
PARTS = {"train__updates_per_batch": 4, "train__mini_batches": 2}
KEY = jax.random.key(5)
FAST = {"optimizer__learning_rate": 0.01}


def ppo(path, **changes) -> Trainer:
    return trainer(nano(**{"loss": PPO} | FAST | changes), path)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return prepare(nano(loss=PPO, **FAST))


@pytest.fixture(scope="module")
def found(setup) -> Scored:
    """One batch of four groups, scored."""
    prompts = batch_prompts(list(setup.data.train_examples[0][:4]), [0] * 4, setup.data.prompt_size)
    searcher = Searcher(setup.config.rollout, setup.config.reward, setup.data.shared_prefix)
    return searcher.search(setup.policy, prompts, LayerPlan.skipping(6, [3]), jax.random.key(0))


def learner_of(setup: Setup, **changes) -> Learner:
    """A learner at the start of reinforcement, with other fields of its `train` section."""
    learner = Learner(setup.policy, value_head=getattr(setup.config.loss, "critic", None) is not None)
    train = dataclasses.replace(setup.config.train, **changes)
    learner.begin(reinforcement_task(dataclasses.replace(setup.config, train=train), setup.data.shared_prefix))
    learner.keep_reference()
    return learner


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


@pytest.mark.parametrize(("updates", "parts"), [(1, 1), (4, 2)])
def test_updates_are_those_of_a_loop_by_hand(setup, found, updates, parts):
    """Each update sees its groups with the signals of the whole batch, in the order that was dealt. One pass over one
    mini-batch is the plain update on the batch, bit for bit."""
    learner = learner_of(setup, updates_per_batch=updates, mini_batches=parts)
    batch = learner.batch(found, kl_coefficient=0.1)
    arrays, state = jax.tree.map(np.array, batch.arrays), jax.tree.map(jnp.copy, learner.state)
    update, results = learner.update(batch, KEY), []
    for rows_KM in deal(4, parts, updates // parts, KEY):
        for rows_M in rows_KM:
            part = shard_batch(jax.tree.map(lambda x, rows_M=rows_M: x[rows_M], arrays), learner.mesh)
            state, result = make_update(learner.task)(state, learner.base, part, batch.plans)
            results.append(result)
    assert_equal_arrays(learner.state, state)
    assert learner.version == updates and learner.batches == 1
    last = results[-parts:]
    assert update.loss == pytest.approx(np.mean([result.loss for result in last]), rel=1e-6)
    assert update.parts["value_loss"] == pytest.approx(np.mean([each.parts["value_loss"] for each in last]), rel=1e-6)
    # Before the first update nothing but the sampler's own layers is off.
    assert update.health is not None and update.health.ratio_max == results[0].health.ratio_max
    # In the last pass every token that counts had a weight in one update, at its own place.
    np.testing.assert_array_equal(update.weight_BGC > 0, np.asarray(batch.arrays.mask_BGC))


def test_a_mini_batch_without_anything_to_learn_gets_no_update(setup, found):
    """Adam has momentum after the first updates, and a gradient of zero would follow it."""
    learner = learner_of(setup, updates_per_batch=4, mini_batches=2)
    counted_BG = np.arange(4)[:, None] == np.ones((4, 4))  # the second group alone
    rollouts = dataclasses.replace(found.rollouts, counted_BG=counted_BG)
    update = learner.update(learner.batch(dataclasses.replace(found, rollouts=rollouts), kl_coefficient=0.1), KEY)
    assert learner.version == 2 and not update.empty  # one in each pass
    assert (update.weight_BGC.sum(axis=(1, 2)) > 0).tolist() == [False, True, False, False]


def test_devices_share_each_mini_batch(found):
    updates = []
    for data in (1, 2):
        learner = learner_of(prepare(nano(mesh=MeshConfig(data=data), **FAST)), updates_per_batch=2, mini_batches=2)
        updates.append(learner.update(learner.batch(found), KEY))
    one, two = updates
    assert two.loss == pytest.approx(one.loss, rel=1e-4, abs=1e-6)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4) and one.health is not None
    np.testing.assert_allclose(two.weight_BGC, one.weight_BGC, rtol=1e-4)


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
