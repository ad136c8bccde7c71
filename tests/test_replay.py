"""Replay: which groups an update trains on, and when generating ends; DAPO's dynamic sampling is one of its rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.policy_gradient import policy_gradient_loss
from nested_reft.replay import (
    Buffer,
    DynamicSamplingConfig,
    GenerationLimitError,
    add,
    draw,
    mixed_groups,
    num_mixed,
    ready,
    shortfall,
)
from nested_reft.types import Scored, TrainBatch
from tests.scored_groups import scored

GROUP = 4
TOKEN_MEAN = PolicyGradientConfig(
    advantage="group_mean", bias_mitigation="base", level="token", normalization="token_mean"
)


def buffer(*batches: Scored) -> Buffer:
    found = Buffer()
    for batch in batches:
        found = add(found, batch)
    return found


MIXED, RIGHT, WRONG = [1, 0, 0, 1], [1] * GROUP, [0] * GROUP


def test_a_group_is_mixed_by_raw_accuracy_of_what_could_be_scored():
    batch = scored(
        [MIXED, RIGHT, WRONG, [1, 0, 0, 0], [1, 0, 0, 0]],
        reward_BG=[[0] * 4, [0, 1, 2, 3], [0, -0.5, 0, -1], [0] * 4, [0] * 4],  # shaped: says nothing
        scored_BG=[[True] * 4] * 3 + [[False, True, True, True], [True, False, False, False]],
    )
    assert mixed_groups(batch).tolist() == [True, False, False, False, False]


def test_the_first_mixed_groups_in_order_make_the_batch():
    first, second = scored([WRONG, MIXED, RIGHT]), scored([MIXED, WRONG, MIXED], first=3)
    config = DynamicSamplingConfig(max_generation_batches=5)
    assert not ready(buffer(first), config, 2)
    assert ready(buffer(first, second), config, 2) and num_mixed(buffer(first, second)) == 3
    chosen, rest = draw(buffer(first, second), config, 2)
    assert chosen.prompts.texts == ("1", "3")  # the surplus group 5 is cut
    assert mixed_groups(chosen).all() and chosen.rollouts.counted_BG.all()
    assert chosen.prompts.tokens_BP[:, 0].tolist() == [1, 3]
    assert chosen.prompts.source_B.tolist() == [1, 1]
    assert chosen.rollouts.tokens_BGC[:, 0, 0].tolist() == [1, 3]
    assert chosen.rollouts.version_BG[:, 0].tolist() == [1, 3]
    assert np.allclose(chosen.rollouts.behavior_logprob_BGC[:, 0, 0], [-0.1, -0.3])
    assert chosen.accuracy_BG.tolist() == chosen.parts["accuracy"].tolist() == [MIXED, MIXED]
    assert chosen.texts == (("1",) * GROUP, ("3",) * GROUP)
    assert rest == Buffer()  # group 5 would be off-policy by the next update


def test_all_mixed_data_needs_one_batch():
    assert ready(buffer(scored([MIXED, MIXED])), DynamicSamplingConfig(max_generation_batches=9), 2)


def test_off_trains_on_the_one_batch_as_it_is():
    batch = scored([WRONG, MIXED])
    config = DynamicSamplingConfig()
    assert not ready(Buffer(), config, 2)
    assert ready(buffer(batch), config, 2)
    drawn, rest = draw(buffer(batch), config, 2)
    assert drawn is batch and rest == Buffer()
    assert shortfall(num_mixed(buffer(batch)), config, 2) is None


def test_adding_leaves_the_buffer_before_as_it_was():
    """A state of a pure rule: a checkpoint may hold the buffer while a step goes on."""
    before = buffer(scored([MIXED]))
    after = add(before, scored([WRONG], first=1))
    assert len(before.batches) == 1 and [batch.prompts.texts for batch in after.batches] == [("0",), ("1",)]


def test_at_the_limit_it_trains_on_what_there_is_or_stops():
    found = buffer(scored([WRONG, MIXED]), scored([RIGHT, RIGHT], first=2))
    config = DynamicSamplingConfig(max_generation_batches=2)
    assert ready(found, config, 2)
    assert "left 1 of 2 groups" in (shortfall(num_mixed(found), config, 2) or "")
    assert shortfall(num_mixed(found), config, 1) is None
    with pytest.raises(GenerationLimitError, match=r"2 generation batches gave 1 groups .* an update takes 2"):
        ready(found, dataclasses.replace(config, at_limit="stop"), 2)


def test_before_the_limit_it_neither_stops_nor_goes_ahead():
    config = DynamicSamplingConfig(max_generation_batches=3, at_limit="stop")
    assert not ready(buffer(scored([WRONG]), scored([RIGHT], first=1)), config, 1)


def as_train_batch(chosen: Scored, signal_BG) -> TrainBatch:
    rollouts = chosen.rollouts
    batch = TrainBatch(
        prompt_BP=rollouts.prompt_BP,
        prompt_length_B=rollouts.prompt_length_B,
        tokens_BGC=rollouts.tokens_BGC,
        length_BG=rollouts.length_BG,
        forced_BG=rollouts.forced_BG,
        counted_BG=rollouts.counted_BG,
        signal_BG=np.asarray(signal_BG, np.float32),
        behavior_logprob_BGC=rollouts.behavior_logprob_BGC,
    )
    return jax.tree.map(jnp.asarray, batch)


def loss_and_gradient(batch: TrainBatch):
    logprob_BGC = jnp.full(batch.tokens_BGC.shape, -0.3)
    return jax.value_and_grad(lambda x: policy_gradient_loss(x, batch, TOKEN_MEAN).total.mean())(logprob_BGC)


def test_groups_that_fill_the_batch_change_neither_loss_nor_divisor():
    config = DynamicSamplingConfig(max_generation_batches=2)
    found = buffer(scored([WRONG, MIXED]), scored([RIGHT, WRONG], first=2))
    filled, _ = draw(found, config, 2)
    assert filled.prompts.texts == ("1", "0")
    assert filled.rollouts.counted_BG.tolist() == [[True] * GROUP, [False] * GROUP]
    assert not filled.rollouts.forced_BG.any()  # a filler was sampled all the same: the two are two things
    advantage = [0.5, -0.5, -0.5, 0.5]
    loss, gradient = loss_and_gradient(as_train_batch(filled, [advantage, [9.0] * GROUP]))  # whatever a filler's is
    alone, _ = draw(found, config, 1)
    expected, expected_gradient = loss_and_gradient(as_train_batch(alone, [advantage]))
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    assert np.allclose(gradient[0], expected_gradient[0], atol=1e-7)
    assert not np.asarray(gradient[1]).any()


def test_completions_that_did_not_count_before_do_not_count_after():
    """The overlong filter marks cut-off completions; their group may be mixed, and is drawn."""
    cut_off = [[False, True, True, True]]
    batch = scored([MIXED], counted_BG=cut_off)
    drawn, _ = draw(buffer(batch), DynamicSamplingConfig(max_generation_batches=2), 1)
    assert drawn.rollouts.counted_BG.tolist() == cut_off
    _, gradient = loss_and_gradient(as_train_batch(drawn, [[1.0] * GROUP]))
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
