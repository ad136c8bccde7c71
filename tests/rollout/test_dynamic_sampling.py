"""DAPO's dynamic sampling: which groups an update trains on, and when generating ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.layer_skip import LayerPlan
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.policy_gradient import policy_gradient_loss
from nested_reft.replay import (
    DynamicSamplingConfig,
    GenerationLimitError,
    enough,
    mixed_groups,
    select_groups,
    trained_groups,
    without_gradient,
)
from nested_reft.types import Prompts, Rollouts, Scored, TrainBatch

SIZE, GROUP = 5, 4
TOKEN_MEAN = PolicyGradientConfig(
    advantage="group_mean", bias_mitigation="base", level="token", normalization="token_mean"
)


def scored(accuracy_BG, first=0, reward_BG=None, scored_BG=None) -> Scored:
    """A generation batch whose prompts are numbered from `first`, with all completions distinguishable."""
    accuracy_BG = np.array(accuracy_BG, np.float32)
    shape = accuracy_BG.shape
    number_B = np.arange(first, first + shape[0], dtype=np.int32)
    rollouts = Rollouts(
        prompt_BP=jnp.asarray(number_B[:, None] + np.zeros((1, 3), np.int32)),
        prompt_length_B=jnp.full(shape[0], 3),
        tokens_BGC=jnp.broadcast_to(jnp.asarray(number_B)[:, None, None], (*shape, SIZE)),
        length_BG=jnp.full(shape, 4),
        finished_BG=jnp.ones(shape, bool).at[:, 0].set(False),
        forced_BG=jnp.zeros(shape, jnp.int32),
        behavior_logprob_BGC=jnp.broadcast_to(-0.1 * jnp.asarray(number_B)[:, None, None], (*shape, SIZE)),
        plan=LayerPlan.full(2),
        nested_BG=jnp.ones(shape, bool),
        policy_version=jnp.array(0),
    )
    names = tuple(str(number) for number in number_B)
    return Scored(
        prompts=Prompts(
            np.asarray(rollouts.prompt_BP), np.full(shape[0], 3), number_B % 2, names, names, ({},) * shape[0]
        ),
        rollouts=rollouts,
        texts=tuple((name,) * shape[1] for name in names),
        reward_BG=accuracy_BG if reward_BG is None else np.array(reward_BG, np.float32),
        accuracy_BG=accuracy_BG,
        scored_BG=np.ones(shape, bool) if scored_BG is None else np.array(scored_BG),
        parts={"accuracy": accuracy_BG},
    )


MIXED, RIGHT, WRONG = [1, 0, 0, 1], [1] * GROUP, [0] * GROUP


def test_a_group_is_mixed_by_raw_accuracy_of_what_could_be_scored():
    batch = scored(
        [MIXED, RIGHT, WRONG, [1, 0, 0, 0], [1, 0, 0, 0]],
        reward_BG=[[0] * 4, [0, 1, 2, 3], [0, -0.5, 0, -1], [0] * 4, [0] * 4],  # shaped: says nothing
        scored_BG=[[True] * 4] * 3 + [[False, True, True, True], [True, False, False, False]],
    )
    assert mixed_groups(batch).tolist() == [True, False, False, False, False]


def test_the_first_mixed_groups_in_order_make_the_batch():
    batches = [scored([WRONG, MIXED, RIGHT]), scored([MIXED, WRONG, MIXED], first=3)]
    config = DynamicSamplingConfig(max_generation_batches=5)
    assert not enough(batches[:1], config, 2)
    assert enough(batches, config, 2)
    chosen = select_groups(batches, config, 2)
    assert chosen.prompts.texts == ("1", "3")  # the surplus group 5 is cut
    assert mixed_groups(chosen).all()
    assert chosen.prompts.tokens_BP[:, 0].tolist() == [1, 3]
    assert chosen.prompts.source_B.tolist() == [1, 1]
    assert np.asarray(chosen.rollouts.tokens_BGC)[:, 0, 0].tolist() == [1, 3]
    assert np.allclose(np.asarray(chosen.rollouts.behavior_logprob_BGC)[:, 0, 0], [-0.1, -0.3])
    assert chosen.accuracy_BG.tolist() == [MIXED, MIXED]
    assert chosen.texts == (("1",) * GROUP, ("3",) * GROUP)
    assert not np.asarray(chosen.rollouts.forced_BG).any()


def test_all_mixed_data_needs_one_batch():
    assert enough([scored([MIXED, MIXED])], DynamicSamplingConfig(max_generation_batches=9), 2)


def test_off_trains_on_the_one_batch_as_it_is():
    batch = scored([WRONG, MIXED])
    config = DynamicSamplingConfig()
    assert not enough([], config, 2)
    assert enough([batch], config, 2)
    assert select_groups([batch], config, 2) is batch


def test_at_the_limit_it_trains_on_what_there_is_or_stops():
    batches = [scored([WRONG, MIXED]), scored([RIGHT, RIGHT], first=2)]
    assert enough(batches, DynamicSamplingConfig(max_generation_batches=2), 2)
    said = trained_groups(batches, DynamicSamplingConfig(max_generation_batches=2), 2)
    assert said["trained_groups"] == 1 and "left 1 of 2 groups" in said["shortfall"]
    assert trained_groups(batches, DynamicSamplingConfig(max_generation_batches=2), 1) == {"trained_groups": 1}
    assert trained_groups(batches[:1], DynamicSamplingConfig(), 2) == {}
    with pytest.raises(GenerationLimitError, match=r"2 generation batches gave 1 groups .* an update takes 2"):
        enough(batches, DynamicSamplingConfig(max_generation_batches=2, at_limit="stop"), 2)


def as_train_batch(chosen: Scored, advantage_BG) -> TrainBatch:
    rollouts = chosen.rollouts
    batch = TrainBatch(
        rollouts.prompt_BP,
        rollouts.prompt_length_B,
        rollouts.tokens_BGC,
        rollouts.length_BG,
        rollouts.forced_BG,
        rollouts.behavior_logprob_BGC,
        jnp.asarray(advantage_BG, jnp.float32),
    )
    return jax.tree.map(jnp.asarray, batch)


def loss_and_gradient(batch: TrainBatch):
    logprob_BGC = jnp.full(batch.tokens_BGC.shape, -0.3)

    def mean(logprob_BGC):
        return policy_gradient_loss(logprob_BGC, batch, TOKEN_MEAN, None)[0].mean()

    return jax.value_and_grad(mean)(logprob_BGC)


def test_groups_that_fill_the_batch_change_neither_loss_nor_divisor():
    config = DynamicSamplingConfig(max_generation_batches=1 + 1)
    batches = [scored([WRONG, MIXED]), scored([RIGHT, WRONG], first=2)]
    filled = select_groups(batches, config, 2)
    assert filled.prompts.texts == ("1", "0")
    advantage = [0.5, -0.5, -0.5, 0.5]
    loss, gradient = loss_and_gradient(as_train_batch(filled, [advantage, [9.0] * GROUP]))  # whatever a filler's is
    alone = select_groups(batches, config, 1)
    expected, expected_gradient = loss_and_gradient(as_train_batch(alone, [advantage]))
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    assert np.allclose(gradient[0], expected_gradient[0], atol=1e-7)
    assert not np.asarray(gradient[1]).any()


def test_overlong_filter_keeps_cut_off_completions_out_of_the_loss():
    batch = scored([MIXED])
    filtered = without_gradient(batch.rollouts, ~np.asarray(batch.rollouts.finished_BG))
    assert np.asarray(filtered.forced_BG).tolist() == [[4, 0, 0, 0]]
    _, gradient = loss_and_gradient(as_train_batch(dataclasses.replace(batch, rollouts=filtered), [[1.0] * GROUP]))
    assert not np.asarray(gradient[0, 0]).any()
    assert np.asarray(gradient[0, 1, :4]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_generation_batches": 0}, "dynamic_sampling.max_generation_batches is 0; allowed is 1 or more"),
    ],
)
def test_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DynamicSamplingConfig(**changes)
