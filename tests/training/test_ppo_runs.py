"""Runs with a critic on the policy's trunk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.dataset_reset import ResetConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.value import CriticConfig
from nested_reft.models.heads import ScalarHead
from nested_reft.models.lora import LoraConfig, add_lora, split_trainable
from nested_reft.rollout.policy import Policy
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.run_directory import RunDirectory
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.tiny_models import tiny_model
from tests.training.runs import PPO, assert_equal_arrays, comparable_steps, metrics_of, nano, save_after, trainer

LOSS = dataclasses.replace(PPO, critic=CriticConfig(kl_coefficient=0.1, kl_target=0.01, value_coefficient=0.5))
# Nested rollouts, two passes over each batch, and every completion with a start of its own.
CONFIG = nano(
    loss=LOSS,
    train__updates_per_batch=2,
    optimizer__learning_rate=0.01,
    reset=ResetConfig(share=0.5, references="answers", per="completion"),
)


def head_of(run) -> np.ndarray:
    model = run.state.learner.policy().model
    assert model.value_head is not None
    return np.asarray(model.value_head.weight[...])


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A run after two steps with a checkpoint of the first, the metrics of both, and what came after the first."""
    path = tmp_path_factory.mktemp("run")
    run = Trainer(prepare(CONFIG), RunDirectory.create(path, "ppo", CONFIG.to_json())).open()
    started = head_of(run)
    first = metrics_of(run, run.step(0))
    kl = run.state.kl
    # A second step of its own, because the first reference has no divergence and an untrained model few rewards.
    second = metrics_of(run, run.step(1))
    save_after(run, 2)
    run.checkpoints.wait()
    return run, started, first, kl, second


def test_policy_and_critic_learn_together(stepped):
    run, started, first, kl, second = stepped
    assert not started.any() and head_of(run).any()
    names = {"value_loss", "value_mean", "return_mean", "explained_variance", "value_clipped_share", "completion_kl"}
    assert names <= first.keys() and np.isfinite([second[name] for name in names]).all()
    # The reference is where reinforcement began, so the first batch has no divergence, and beta falls by 2 %.
    assert first["completion_kl"] == pytest.approx(0, abs=1e-5) and second["completion_kl"] != 0
    assert first["kl_coefficient"] == pytest.approx(0.1 * 0.98) == kl.coefficient
    assert 0 < second["ess_token"] < 1 and second["reset/forced_tokens"] > 0


def test_truncated_sampling_measures_nothing_by_its_ratios(tmp_path):
    """On-policy with top_k 4 of 16, ratios to the distribution that was drawn from would be the mass that is kept."""
    assert isinstance(CONFIG.loss, PolicyGradientConfig) and CONFIG.loss.critic is not None
    practical = dataclasses.replace(CONFIG.loss, bias_mitigation="practical", clip_policies="two")
    critic = dataclasses.replace(CONFIG.loss.critic, kl_target=None)
    rollout = dataclasses.replace(CONFIG.rollout, sampling=SamplingConfig(top_k=4))
    loss = dataclasses.replace(practical, critic=critic)
    run = trainer(dataclasses.replace(CONFIG, loss=loss, rollout=rollout), tmp_path)
    found = metrics_of(run, run.step(0))
    unlike = {"ess_token", "ess_sequence", "ratio_mean", "ratio_tail", "kl_behavior_target", "completion_kl"}
    assert not unlike & found.keys() and not any(name.startswith("bounds/") for name in found)
    assert found["entropy"] > 0 and found["ess_weight"] > 0


def test_old_values_are_those_of_the_policy_before_the_update(stepped):
    run, *_ = stepped
    learner = run.state.learner
    found = run.step(2)
    before = learner.batch(found.groups, kl_coefficient=0.3).arrays
    model = learner.policy().model
    valid_BP = np.arange(before.prompt_BP.shape[1]) < np.asarray(before.prompt_length_B)[:, None]
    value_BGC = model.values(model.completion_hidden(before.prompt_BP, jnp.asarray(valid_BP), before.tokens_BGC))
    np.testing.assert_allclose(before.old_value_BGC, value_BGC, atol=1e-5)
    mask_BGC = np.asarray(before.mask_BGC)
    assert not np.asarray(before.token_signal_BGC)[~mask_BGC].any()
    assert np.asarray(before.token_signal_BGC)[mask_BGC].std() == pytest.approx(1, abs=1e-2)


def test_resuming_continues_policy_and_critic_bit_for_bit(stepped, tmp_path):
    first = trainer(CONFIG, tmp_path)
    first.step(0)
    save_after(first, 1)
    expected = comparable_steps(first, range(1, 2))
    first.close()
    second = trainer(CONFIG, tmp_path, resume=True)
    assert comparable_steps(second, range(1, 2)) == expected
    assert_equal_arrays(first.state.learner.state, second.state.learner.state)
    assert second.state.kl == first.state.kl and head_of(second).any()


def test_a_share_that_draws_nothing_is_ppo_step_for_step(tmp_path):
    """Completions may begin with a prefix, and none does: the same samples, losses and parameters as without resets."""
    never = dataclasses.replace(CONFIG, reset=ResetConfig(share=1e-30, references="answers", per="completion"))
    plain = dataclasses.replace(CONFIG, reset=ResetConfig())
    runs = [trainer(config, tmp_path / str(index)) for index, config in enumerate((never, plain))]
    for number in range(2):
        with_prefixes, without = (run.step(number) for run in runs)
        assert with_prefixes.all.prompts.forced is not None and not with_prefixes.all.rollouts.forced_BG.any()
        assert without.all.prompts.forced is None
        assert np.array_equal(with_prefixes.all.rollouts.tokens_BGC, without.all.rollouts.tokens_BGC)
        parts = with_prefixes.update.parts
        assert {"value_loss", "completion_kl"} <= parts.keys() and parts == pytest.approx(
            without.update.parts, abs=1e-5
        )
    states = [jax.tree.leaves(run.state.learner.state.trainable) for run in runs]
    for one, other in zip(*states, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_heavy_penalty_keeps_the_policy_at_the_reference(tmp_path):
    """No sample is rewarded. At the reference nothing pulls, so nothing moves, to the last bit. Away from it the
    penalty pulls the policy back; with the other sign the divergence would grow."""
    critic = CriticConfig(kl_coefficient=1.0, value_coefficient=0.5, whiten_advantages=False)
    config = nano(
        loss=dataclasses.replace(LOSS, entropy_coefficient=0.0, critic=critic),
        nesting=NestingConfig(),
        optimizer__learning_rate=1e-3,
        rollout__group_size=8,
        rollout__max_completion_tokens=4,
        evaluation__samples_per_prompt=0,
    )
    run = trainer(config, tmp_path)
    learner = run.state.learner
    before = jax.tree.map(jnp.copy, learner.state.trainable)
    found = run.step(0)
    assert found.reward == 0 and found.update.parts["completion_kl"] == 0
    assert_equal_arrays(learner.state.trainable, before)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(before))))
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), before)
    learner.state = dataclasses.replace(learner.state, trainable=moved)
    records = [run.step(number) for number in range(1, 17)]
    divergence = [record.update.parts["completion_kl"] for record in records]
    assert all(record.reward == 0 for record in records) and np.mean(divergence[-5:]) < divergence[0] / 2


def test_a_checkpoint_is_a_policy_with_its_critic(stepped):
    run, *_ = stepped
    policy = Policy.load(run.run_directory.path)
    assert policy.model.value_head is not None and np.asarray(policy.model.value_head.weight[...]).any()


def test_the_head_trains_beside_adapters():
    model = tiny_model()
    with pytest.raises(ValueError, match="no value head"):
        model.values(jnp.zeros((1, 16)))
    add_lora(model, LoraConfig(rank=2), jax.random.key(0))
    model.value_head = ScalarHead(model.config.width)
    _, trainable, frozen = split_trainable(model)
    assert "value_head" in trainable and "value_head" not in frozen
    assert "embedding" in frozen and "embedding" not in trainable
