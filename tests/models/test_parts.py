"""Plans with finer parts: bridges, layers without attention, layers without MLP, in every pass of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.compilation import CompileCounter
from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.models.bridges import Bridges, BridgeVariable
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.exact import generate_exact
from nested_reft.rollout.generate import generate
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.types import ForcedPrefixes, valid_mask
from tests.tiny_models import TINY, forward, tiny_model, tiny_prompts

PARTS = [Part.KEEP, Part.BRIDGE, Part.NO_MLP, Part.NO_ATTENTION, Part.KEEP]


def bridged_model(rank: int | None = None) -> Transformer:
    """A model whose bridges are random and far from zero."""
    model = tiny_model()
    model.bridges = Bridges(TINY.num_layers, TINY.width, rank)
    for number, (name, value) in enumerate(model.bridges.stack().items()):
        random = jax.random.normal(jax.random.key(number), value.shape)
        setattr(model.bridges, name, BridgeVariable(0.3 * random))
    return model


def with_zeros(model: Transformer, layer: int, *names: str) -> Transformer:
    """The model with some matrices of one layer zeroed."""
    parameters = model.parameters()
    return Transformer(TINY, parameters | {f"layers/{n}": parameters[f"layers/{n}"].at[layer].set(0) for n in names})


@pytest.mark.parametrize(("part", "zeroed"), [(Part.NO_ATTENTION, "output"), (Part.NO_MLP, "down")])
def test_a_half_layer_is_a_layer_whose_other_half_adds_nothing(part, zeroed):
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    found = forward(model, tokens_BP, LayerPlan.skipping(5, [2], part))
    np.testing.assert_array_equal(found, forward(with_zeros(model, 2, zeroed), tokens_BP, LayerPlan.full(5)))
    # The other half is not the same.
    wrong = Part.NO_MLP if part == Part.NO_ATTENTION else Part.NO_ATTENTION
    assert jnp.abs(found - forward(model, tokens_BP, LayerPlan.skipping(5, [2], wrong))).max() > 0.1


@pytest.mark.parametrize("skipped", [[], [1], [0, 4]])
def test_optional_steps_change_neither_states_nor_gradients(skipped):
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    plan = LayerPlan.skipping(5, skipped)

    def loss(parameters, plan):
        return jnp.sum(forward(Transformer(TINY, parameters), tokens_BP, plan) ** 2)

    losses, gradients = zip(
        *(jax.value_and_grad(loss)(model.parameters(), plan) for plan in (plan, plan.with_optional(5, 2))), strict=True
    )
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-5)
    for name, gradient in jax.device_get(gradients[0]).items():
        np.testing.assert_allclose(
            np.asarray(gradients[1][name]), gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max()
        )


@pytest.mark.parametrize("rank", [None, 3])
def test_a_bridge_of_zeros_is_a_skip_bit_for_bit(rank):
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    model.bridges = Bridges(TINY.num_layers, TINY.width, rank)
    skipped, bridged = (forward(model, tokens_BP, LayerPlan.skipping(5, [1, 3], p)) for p in (Part.SKIP, Part.BRIDGE))
    assert jnp.array_equal(skipped, bridged)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_bridge_adds_its_map_of_the_normed_stream(rank):
    model, (tokens_BP, length_B) = bridged_model(rank), tiny_prompts()
    valid_BP, start = valid_mask(length_B, 9), model.text_streams(tokens_BP, tokens_BP[:, None, :4])
    before, after = (
        model.run_texts(start, valid_BP, LayerPlan.of_parts(np.array([Part.KEEP, part, 0, 0, 0])))
        for part in (Part.SKIP, Part.BRIDGE)
    )
    bridge = {name: np.asarray(value[1], np.float64) for name, value in model.stacked_bridges().items()}
    map_DD = bridge["map"] if rank is None else bridge["widen"] @ bridge["narrow"]
    bias_D = bridge["map_bias"] if rank is None else bridge["widen_bias"]
    for x, found in zip(before, after, strict=True):
        x = np.asarray(x, np.float64)
        normed = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
        expected = x + normed @ map_DD.T + bias_D
        if found is after[0]:  # prompts have first positions, completions have none
            expected[:, :, 0] = x[:, :, 0] + bridge["first"]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("forced", [False, True])
def test_sampled_logprobs_are_those_of_an_uncached_pass(forced, key):
    """Prefill, decoding and forced prefixes under a plan of every part."""
    model, (prompt_BP, length_B) = bridged_model(), tiny_prompts()
    plan = LayerPlan.of_parts(np.array(PARTS))
    prefixes = ForcedPrefixes(prompt_BP[:, None, :3].repeat(4, 1), jnp.array([[0, 1, 2, 3]] * 3)) if forced else None
    rollouts = generate(
        model,
        prompt_BP,
        length_B,
        plan,
        jnp.array([3]),
        key,
        0,
        prefixes,
        group_size=4,
        max_completion_tokens=12,
        sampling=SamplingConfig(temperature=0.9),
    )
    expected, _ = jax.jit(completion_logprobs, static_argnames="temperature")(
        model, prompt_BP, length_B, rollouts.tokens_BGC, temperature=0.9, plan=plan
    )
    sampled = valid_mask(rollouts.length_BG, 12) & (jnp.arange(12) >= rollouts.forced_BG[..., None])
    difference = jnp.where(sampled, rollouts.behavior_logprob_BGC - expected, 0.0)
    assert jnp.abs(difference).max() < 1e-4
    assert rollouts.part_BGL[:, 0].tolist() == [PARTS] * 3
    # Another plan scores the same tokens otherwise, so the comparison can fail.
    other, _ = jax.jit(completion_logprobs, static_argnames="temperature")(
        model, prompt_BP, length_B, rollouts.tokens_BGC, temperature=0.9, plan=LayerPlan.skipping(5, [1])
    )
    assert jnp.abs(jnp.where(sampled, other - expected, 0.0)).max() > 0.1


@pytest.mark.parametrize("shared_prefix", [0, 1, 3])
def test_first_positions_are_those_of_prompts_however_they_run(shared_prefix):
    """A shared prefix holds them; padding on the left moves them."""
    model, plan = bridged_model(), LayerPlan.of_parts(np.array(PARTS))
    tokens_BP = jnp.concatenate([jnp.tile(jnp.array([[5, 6, 7]]), (2, 1)), tiny_prompts()[0][:2, :4]], axis=1)
    expected = forward(model, tokens_BP, plan)
    found = model.prefill(tokens_BP, jnp.ones((2, 7), bool), plan, shared_prefix)
    np.testing.assert_allclose(model.logits(found.last_hidden_BD), expected[:, -1], atol=1e-4)
    padded = jnp.concatenate([jnp.full((2, 2), 9), tokens_BP], axis=1)
    valid = jnp.tile(jnp.arange(9) >= 2, (2, 1))
    np.testing.assert_allclose(forward(model, padded, plan, valid)[:, 2:], expected, atol=1e-4)


def test_exact_rollouts_may_be_drafted_by_any_part(key):
    """What comes out is the full model's, token for token when greedy."""
    model, (prompt_BP, length_B) = bridged_model(), tiny_prompts()
    how = {"group_size": 2, "max_completion_tokens": 8, "sampling": SamplingConfig(temperature=0.0)}
    stops = jnp.array([3])
    drafted = generate_exact(
        model, prompt_BP, length_B, LayerPlan.of_parts(np.array(PARTS)), stops, key, draft_length=2, **how
    )
    plain = generate(model, prompt_BP, length_B, LayerPlan.full(5), stops, key, **how)
    assert jnp.array_equal(drafted.rollouts.tokens_BGC, plain.tokens_BGC)
    assert drafted.rollouts.part_BGL[:, 0].tolist() == [PARTS] * 3


def test_a_new_plan_of_the_same_shape_compiles_nothing():
    model, (tokens_BP, _) = bridged_model(), tiny_prompts()
    first = forward(model, tokens_BP, LayerPlan.of_parts(np.array(PARTS)))
    other = LayerPlan.of_parts(np.array(PARTS[::-1]))
    compiled = CompileCounter()
    second = jax.block_until_ready(forward(model, tokens_BP, other))
    compiled.close()
    assert compiled.count == 0
    assert jnp.abs(first - second).max() > 0.1


def test_a_plan_with_bridges_needs_a_model_with_bridges():
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    with pytest.raises(ValueError, match="the plan bridges layers, and the model has no bridges"):
        forward(model, tokens_BP, LayerPlan.skipping(5, [1], Part.BRIDGE))
