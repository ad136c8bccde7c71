"""Runs under trajectory balance: what the learner adds to the loss, which is beta, the reference and its resets."""

import jax
import numpy as np
import pytest

from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.rewards.reward import RewardConfig
from tests.training.runs import assert_equal_arrays, comparable_steps, metrics_of, nano, save_after, trainer

RESET = TrajectoryBalanceConfig(beta=1.0, beta_final=0.2, beta_decay_steps=4, reference_reset_every=2)
# An untrained model is always wrong, and under equal rewards its own reference has nothing to learn. Lengths differ.
MOVING = {"reward": RewardConfig(overlong_cache_tokens=8), "optimizer__learning_rate": 0.01}
FAST = MOVING | {"evaluation__samples_per_prompt": 0, "evaluation__every_steps": 100}


def reference_of(run):
    return jax.device_get(run.state.learner.reference)


def is_trained_policy(run) -> bool:
    pairs = zip(jax.tree.leaves(reference_of(run)), jax.tree.leaves(run.state.learner.state.trainable), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def test_beta_follows_its_schedule_and_the_reference_its_resets_and_nothing_compiles(tmp_path):
    """From 1 by a fifth a batch to 0.2; after every second batch the policy is the reference."""
    run = trainer(nano(loss=RESET, **FAST), tmp_path)
    assert is_trained_policy(run)
    learner, first = run.state.learner, run.step(0)
    metrics = metrics_of(run, first)
    assert np.isfinite(metrics["log_z"]) and metrics["loss"] == pytest.approx(metrics["residual_std"] ** 2, rel=1e-4)
    found, resets, compiled = [first.update], [is_trained_policy(run)], []
    for _ in range(4):
        found.append(learner.update(learner.batch(first.groups)))
        resets.append(is_trained_policy(run))
        compiled.append(run.compilations.count)
    assert [update.parts["beta"] for update in found] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert resets == [False, True, False, True, False]
    # On the reference itself S is zero; after an update away from it, it is not.
    assert [abs(update.parts["reference_log_ratio"]) < 1e-4 for update in found] == [True, False, True, False, True]
    assert compiled[0] == compiled[-1]


def test_resuming_continues_beta_and_a_reference_that_was_reset(tmp_path):
    """The checkpoint falls between two resets, so a reference that starts anew would be another one."""
    config = nano(loss=RESET, train__updates_per_batch=2, **FAST)
    first = trainer(config, tmp_path)
    comparable_steps(first, range(3))
    save_after(first, 3)
    kept, expected = reference_of(first), comparable_steps(first, range(3, 4))
    first.close()
    second = trainer(config, tmp_path, resume=True)
    assert_equal_arrays(reference_of(second), kept)
    assert comparable_steps(second, range(3, 4)) == expected
    assert_equal_arrays(reference_of(second), reference_of(first))
