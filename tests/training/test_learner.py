"""The learner: what it hands out, what it copies, and what an update costs and changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.data.pipeline import batch_prompts
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses.supervised import SupervisedConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.run_directory import RunDirectory
from nested_reft.sharding import MeshConfig
from nested_reft.training.learner import Learner, LearnerBatch, completion_bucket
from nested_reft.training.reinforcement import reinforcement_task
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import prepare
from nested_reft.training.step import UpdatePlans, make_update
from nested_reft.training.trainer import Trainer
from nested_reft.types import Scored, concat, take
from tests.training.runs import MOVING, assert_equal_arrays, nano, trainer

DISTILLING = dataclasses.replace(MOVING, self_distillation_coefficient=1.0)
FAST = {"optimizer__learning_rate": 0.01}


def found_by(run: Trainer, seed: int = 0) -> Scored:
    """One batch of the run's first source, scored."""
    prompts = run.state.next_prompts(np.zeros(run.config.data.prompts_per_batch, np.int32))
    plan, key = run.state.draw_plan(jax.random.key(seed)), jax.random.key(seed)
    return run.searcher.search(run.state.learner.behavior_policy(), prompts, plan, key)


def flops(learner: Learner, batch: LearnerBatch) -> float:
    """Operations of the compiled update."""
    lowered = make_update(learner.task).lower(learner.state, learner.base, batch.arrays, batch.plans)
    return lowered.compile().cost_analysis()["flops"]


@pytest.fixture
def copies(monkeypatch):
    """The arrays that were copied, in order."""
    copied, copy = [], jnp.copy
    monkeypatch.setattr("nested_reft.training.learner.jnp.copy", lambda x: copied.append(x) or copy(x))
    return copied


def test_what_a_phase_without_training_saves_lies_on_the_whole_mesh():
    """Several processes could not save the counter of the first device alone."""
    learner = Learner(prepare(nano(mesh=MeshConfig(data=4))).policy)
    learner.rest()
    arrays = jax.tree.leaves(learner.arrays(with_reference=False))
    assert {len(array.sharding.device_set) for array in arrays} == {4}


def test_the_loop_copies_no_parameters(tmp_path, copies):
    run = trainer(nano(loss=dataclasses.replace(MOVING, reference_kl=None, reference_kl_coefficient=0.0)), tmp_path)
    run.step(0)
    run.step(1)
    assert run.state.learner.version == 2 and not copies


def test_one_copy_is_made_while_somebody_holds_a_policy(tmp_path, copies):
    run = trainer(nano(loss=MOVING, **FAST), tmp_path)
    learner = run.state.learner
    num_arrays = len(jax.tree.leaves(learner.state.trainable))
    assert len(copies) == num_arrays  # the reference
    copies.clear()
    held = learner.policy()
    run.step(0)
    assert len(copies) == num_arrays
    run.step(1)  # the held policy has its buffers to itself now
    run.step(2)
    assert len(copies) == num_arrays
    assert held.version == 0 and learner.version == 3


def test_a_policy_that_was_handed_out_stays_as_it_is(tmp_path):
    run = trainer(nano(loss=MOVING, **FAST), tmp_path)
    held = run.state.learner.policy()
    before, prompts = held.sample(["12 =", "345 ="], samples=4), run.state.next_prompts(np.zeros(4, np.int32))
    logprobs = held.generate(prompts, None, jax.random.key(0)).behavior_logprob_BGC
    run.step(0)
    run.step(1)
    assert held.sample(["12 =", "345 ="], samples=4) == before
    assert_equal_arrays(held.generate(prompts, None, jax.random.key(0)).behavior_logprob_BGC, logprobs)
    now = run.state.learner.policy()
    assert now.version == 2 and now.sample(["12 =", "345 ="], samples=4) != before


def test_a_setup_that_is_held_keeps_its_policy(tmp_path):
    setup = prepare(nano(loss=MOVING, **FAST))
    before = setup.policy.sample("12 =", samples=4)
    run = Trainer(setup, RunDirectory(tmp_path)).open()
    run.step(0)
    assert setup.policy.sample("12 =", samples=4) == before


def test_expert_iteration_repeats_what_was_right(tmp_path):
    """Half of each group counts as right: it becomes more likely, and the update sees nothing of the others."""
    run = trainer(nano(loss=SupervisedConfig(), optimizer__learning_rate=0.003), tmp_path)
    learner, found = run.state.learner, found_by(run)
    right_BG = np.arange(4) % 2 == np.zeros((4, 1))
    groups = dataclasses.replace(found, accuracy_BG=right_BG.astype(found.accuracy_BG.dtype))

    def mean_logprob(chosen_BG) -> float:
        rollouts = groups.rollouts
        prompts = (jnp.asarray(rollouts.prompt_BP), jnp.asarray(rollouts.prompt_length_B))
        logprob_BGC = np.array(learner.policy().logprobs(*prompts, jnp.asarray(rollouts.tokens_BGC)))
        mask_BGC = chosen_BG[..., None] & (np.arange(8) < rollouts.length_BG[..., None])
        return float(logprob_BGC[mask_BGC].mean())

    before = mean_logprob(right_BG)
    batch = learner.batch(groups)
    first = learner.update(batch)
    assert first.parts["cross_entropy"] == first.loss == pytest.approx(-before, rel=1e-4)
    assert (first.weight_BGC.sum(axis=-1) > 0).tolist() == right_BG.tolist()
    for _ in range(3):
        learner.update(batch)
    assert mean_logprob(right_BG) > before + 0.05


def test_expert_iteration_leaves_a_moving_model_alone_where_nothing_is_right(tmp_path):
    """After an update Adam has momentum, which would move the model without a gradient."""
    run = trainer(nano(loss=SupervisedConfig(), **FAST), tmp_path)
    learner, found = run.state.learner, found_by(run)
    learner.update(learner.batch(dataclasses.replace(found, accuracy_BG=np.ones_like(found.accuracy_BG))))
    before = jax.device_get(learner.state)
    update = learner.update(learner.batch(dataclasses.replace(found, accuracy_BG=np.zeros_like(found.accuracy_BG))))
    assert update.empty and update.loss == update.gradient_norm == 0
    assert_equal_arrays(jax.device_get(learner.state), before)


def test_self_distillation_trains_and_compiles_once(tmp_path):
    run = trainer(nano(loss=DISTILLING, train__micro_batches=2), tmp_path)
    values = [run.step(0).update.parts["self_distillation_kl"]]
    before = run.compilations.count
    values += [run.step(step).update.parts["self_distillation_kl"] for step in (1, 2)]
    assert run.compilations.count == before and all(value > 0 for value in values)
    whole = trainer(nano(loss=DISTILLING), tmp_path / "whole").step(0)
    np.testing.assert_allclose(whole.update.parts["self_distillation_kl"], values[0], rtol=1e-5)


def test_without_its_coefficient_self_distillation_costs_nothing(tmp_path):
    """A nested plan changes nothing: the compiled update has the operations that it had without."""
    run = trainer(nano(loss=MOVING), tmp_path)
    learner = run.state.learner
    batch = learner.batch(found_by(run))
    assert batch.plans == UpdatePlans()
    without = flops(learner, batch)
    planned = LearnerBatch(batch.arrays, UpdatePlans(nested=LayerPlan.skipping(6, [3])))
    assert flops(learner, planned) == without
    distilling = trainer(nano(loss=DISTILLING), tmp_path / "distilling").state.learner
    assert flops(distilling, planned) > 1.3 * without


def test_adapters_do_not_pay_for_gradients_of_the_base(tmp_path):
    """Forward, activations' gradient and weights' gradient cost alike, so leaving the last out saves a third."""

    def cost(name: str, **changes) -> float:
        with trainer(nano(**changes), tmp_path / name) as run:
            return flops(run.state.learner, run.state.learner.batch(found_by(run)))

    assert cost("adapters", lora=LoraConfig(rank=1)) < 0.75 * cost("whole")


def test_a_learner_needs_no_trainer():
    """Setup, searcher and learner make a loop of one's own."""
    setup = prepare(nano(loss=MOVING, **FAST))
    config, learner = setup.config, Learner(setup.policy)
    learner.begin(reinforcement_task(config, setup.data.shared_prefix))
    learner.keep_reference()
    searcher = Searcher(config.rollout, config.reward, setup.data.shared_prefix)
    batch = batch_prompts(list(setup.data.train_examples[0][:4]), [0] * 4, setup.data.prompt_size)
    found = searcher.search(learner.behavior_policy(), batch, LayerPlan.skipping(6, [3]), jax.random.key(0))
    update = learner.update(learner.batch(found))
    assert not update.empty and update.gradient_norm > 0 and learner.version == 1


def test_groups_that_fill_a_batch_have_no_weight(tmp_path):
    """Completions that do not count have no weight, and those that do weigh as they would alone."""
    run = trainer(nano(loss=MOVING, dynamic_sampling=DynamicSamplingConfig()), tmp_path)
    learner, found = run.state.learner, found_by(run)
    counted_BG = np.arange(4)[:, None] < np.full((4, 4), 2)
    rollouts = dataclasses.replace(found.rollouts, counted_BG=counted_BG)
    update = learner.update(learner.batch(dataclasses.replace(found, rollouts=rollouts)))
    assert (update.weight_BGC.sum(axis=-1) > 0).tolist() == counted_BG.tolist()


@pytest.mark.parametrize(("longest", "size"), [(1, 4), (4, 4), (5, 8), (9, 12), (13, 16), (16, 16)])
def test_completion_buckets(longest, size):
    assert completion_bucket(longest, 16) == size


def test_groups_of_an_earlier_version_are_refused_where_theta_old_is_needed(tmp_path):
    """`practical` divides by the full model at rollout time, which is gone; `base` divides by what was stored.

    With three policies pi_old is the model before the update, so it is at hand for groups of any version.
    """
    for variant, clip_policies, allowed in (
        ("practical", "two", False),
        ("base", "two", True),
        ("base", "three", True),
    ):
        loss = dataclasses.replace(nano().loss, bias_mitigation=variant, truncate_at=None, clip_policies=clip_policies)
        run = trainer(nano(loss=loss, train__updates_per_batch=2), tmp_path / variant / clip_policies)
        found = found_by(run)
        rollouts = dataclasses.replace(
            found.rollouts, version_BG=found.rollouts.version_BG - np.eye(4, dtype=np.int32)[:1].T
        )
        stale = dataclasses.replace(found, rollouts=rollouts)
        if allowed:
            old_BGC = run.state.learner.batch(stale).arrays.old_logprob_BGC
            assert (old_BGC is not None) == (clip_policies == "three")
        else:
            with pytest.raises(ValueError, match="1 of 4 groups were drawn by an earlier version than 0"):
                run.state.learner.batch(stale)


def test_each_group_is_scored_under_the_plan_that_drew_it(tmp_path):
    """Groups of two plans in one batch: each half equals what a batch of its own plan alone gets."""
    loss = dataclasses.replace(nano().loss, bias_mitigation="mixture", level="sequence", truncate_at=None)
    config = nano(loss=loss, rollout=dataclasses.replace(nano().rollout, mixture_alpha=0.5))
    run = trainer(config, tmp_path)
    prompts = run.state.next_prompts(np.zeros(4, np.int32))
    policy = run.state.learner.behavior_policy()
    one, other = (
        run.searcher.search(policy, prompts, LayerPlan.skipping(6, [layer]), jax.random.key(0)) for layer in (1, 4)
    )
    joined = concat([take(one, [0, 1]), take(other, [2, 3])])
    scores = [run.state.learner.batch(groups).arrays.nested_logprob_BGC for groups in (joined, one, other)]
    mixed_BGC, one_BGC, other_BGC = (np.asarray(score) for score in scores)
    size = min(x.shape[-1] for x in (mixed_BGC, one_BGC, other_BGC))
    np.testing.assert_allclose(mixed_BGC[:2, :, :size], one_BGC[:2, :, :size], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed_BGC[2:, :, :size], other_BGC[2:, :, :size], rtol=1e-5, atol=1e-6)
    assert not np.allclose(one_BGC[0], other_BGC[0][..., : one_BGC.shape[-1]], atol=1e-3)
    # Replay mixes completions of two plans within a group.
    is_one_G = np.arange(4) < 2
    part_BGL = np.where(is_one_G[:, None], one.rollouts.part_BGL, other.rollouts.part_BGL)
    both = dataclasses.replace(one, rollouts=dataclasses.replace(one.rollouts, part_BGL=part_BGL))
    under_other = dataclasses.replace(one, rollouts=dataclasses.replace(one.rollouts, part_BGL=other.rollouts.part_BGL))
    both_BGC, under_other_BGC = (
        np.asarray(run.state.learner.batch(groups).arrays.nested_logprob_BGC) for groups in (both, under_other)
    )
    np.testing.assert_allclose(both_BGC, np.where(is_one_G[:, None], one_BGC, under_other_BGC), rtol=1e-5, atol=1e-6)
