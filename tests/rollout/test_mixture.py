"""Defensive-mixture rollouts: who drew what, and that every completion is its component's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout.generate import generate
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.rollout.mixture import mixture_rollouts
from nested_reft.rollout.sampling import SamplingConfig, row_keys, row_uniforms
from nested_reft.types import Rollouts
from tests.tiny_models import tiny_model, tiny_prompts

PLAN = LayerPlan.skipping(5, [1, 3])


def rollout_from(model, prompts=3):
    tokens_BP, length_B = (values[:prompts] for values in tiny_prompts())

    def rollout(plan, key, count, forced):
        return generate(
            model,
            tokens_BP,
            length_B,
            plan,
            jnp.array([-1]),
            key,
            forced=forced,
            group_size=count,
            max_completion_tokens=5,
            sampling=SamplingConfig(),
        )

    return rollout


def labelled_rollouts(shape, full, plan):
    """Completions of one token: 1 from the full model, 0 from the nested one."""
    zeros = jnp.zeros(shape, jnp.int32)
    return Rollouts(
        prompt_BP=jnp.zeros((shape[0], 1), jnp.int32),
        prompt_length_B=jnp.ones(shape[0], jnp.int32),
        tokens_BGC=jnp.full((*shape, 1), int(full)),
        length_BG=zeros + 1,
        finished_BG=zeros == 0,
        forced_BG=zeros,
        counted_BG=zeros == 0,
        behavior_logprob_BGC=jnp.zeros((*shape, 1)),
        nested_BG=zeros == 0,
        full_share_BG=jnp.zeros(shape),
        part_BGL=jnp.broadcast_to(plan.to_parts(5), (*shape, 5)),
        version_BG=jnp.zeros(shape, jnp.int32),
        temperature_BG=jnp.ones(shape),
    )


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_each_completion_has_the_probability_of_one_component(alpha, key):
    model = tiny_model()
    result = mixture_rollouts(rollout_from(model), key, PLAN, 5, 3, 8, alpha)
    logprob = {}
    for name, plan in (("full", LayerPlan.full(5)), ("nested", PLAN)):
        score = jax.jit(completion_logprobs, static_argnames="temperature")
        args = (model, result.prompt_BP, result.prompt_length_B, result.tokens_BGC)
        logprob[name] = np.asarray(score(*args, temperature=1.0, plan=plan)[0])
    behavior = np.asarray(result.behavior_logprob_BGC)
    is_full = np.abs(behavior - logprob["full"]).max(axis=-1) < 1e-3
    is_nested = np.abs(behavior - logprob["nested"]).max(axis=-1) < 1e-3
    assert np.all(is_full ^ is_nested)
    drawn = row_uniforms(row_keys(jax.random.split(key, 3)[0], jnp.arange(3), 8), 0)[0] < alpha
    assert np.array_equal(is_full, np.asarray(drawn))
    assert np.array_equal(result.nested_BG, ~is_full)
    assert np.array_equal(result.full_share_BG, np.full((3, 8), np.float32(alpha)))
    assert result.part_BGL.tolist() == [[PLAN.to_parts(5).tolist()] * 8] * 3  # also where the full model drew all
    # No completion is used twice.
    assert len({tuple(row) for row in np.asarray(result.tokens_BGC).reshape(24, 5)}) > 20


def test_prompts_that_stand_beside_a_row_change_nothing(key):
    """Another prompt may make a component sample more completions; those of this one stay."""
    model = tiny_model(scale=1.0)
    whole, alone = (mixture_rollouts(rollout_from(model, n), key, PLAN, 5, n, 8, 0.3) for n in (3, 1))
    assert alone.tokens_BGC.tolist() == whole.tokens_BGC[:1].tolist()
    assert alone.nested_BG.tolist() == whole.nested_BG[:1].tolist()


def test_components_are_drawn_independently_at_the_rate_alpha():
    """The number from the full model varies by prompt as a binomial does; a fixed count would not."""

    def labelled(plan, key, count, forced):
        return labelled_rollouts((400, count), plan.shape.kept == 5, plan)

    result = mixture_rollouts(labelled, jax.random.key(3), PLAN, 5, 400, 8, 0.25)
    counts_B = np.asarray(result.tokens_BGC)[..., 0].sum(axis=1)
    assert abs(counts_B.mean() - 2.0) < 4 * np.sqrt(8 * 0.25 * 0.75 / 400)
    assert abs(counts_B.var() - 1.5) < 0.5
