"""The transformer under layer plans, paddings, prompt sharing and adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.config import ModelConfig
from nested_reft.models.lora import LoraConfig, add_lora, merge_lora
from nested_reft.models.parameters import initial_parameters, parameter_shapes
from nested_reft.models.transformer import Transformer
from nested_reft.types import valid_mask
from tests.tiny_models import TINY, forward, tiny_model, tiny_prompts


def test_full_plan_is_the_model_without_a_plan_bit_for_bit():
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    valid_BP = valid_mask(length_B, 9)
    without_plan, full_plan = (forward(model, tokens_BP, plan, valid_BP) for plan in (None, LayerPlan.full(5)))
    assert jnp.array_equal(without_plan, full_plan)


@pytest.mark.parametrize("layer", range(5))
def test_only_kept_layers_act(layer):
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    plan = LayerPlan.skipping(5, [1, 3])
    parameters = model.parameters()
    perturbed = {
        name: value.at[layer].multiply(1.5) if name.startswith("layers/") else value
        for name, value in parameters.items()
    }
    before, after = forward(model, tokens_BP, plan), forward(Transformer(TINY, perturbed), tokens_BP, plan)
    assert jnp.array_equal(before, after) == (layer in (1, 3))


def test_plan_equals_a_model_built_without_the_left_out_layers():
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    plan = LayerPlan.skipping(5, [0, 3])
    shorter = {
        name: value[plan.layer_S] if name.startswith("layers/") else value for name, value in model.parameters().items()
    }
    config = ModelConfig(**{**vars(TINY), "num_layers": 3})
    np.testing.assert_allclose(
        forward(model, tokens_BP, plan), forward(Transformer(config, shorter), tokens_BP), atol=1e-5
    )


def test_logits_do_not_depend_on_the_side_of_the_padding():
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    row = tokens_BP[:1, :5]
    padding = jnp.full((1, 4), 3)
    right = forward(model, jnp.concatenate([row, padding], 1), None, jnp.arange(9)[None] < 5)[:, :5]
    left = forward(model, jnp.concatenate([padding, row], 1), None, jnp.arange(9)[None] >= 4)[:, 4:]
    plain = forward(model, row)
    np.testing.assert_allclose(right, plain, atol=2e-5)
    np.testing.assert_allclose(left, plain, atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("skipped", [None, (2,)])
def test_shared_prompt_equals_running_every_sequence_whole(skipped, remat, key):
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    plan = None if skipped is None else LayerPlan.skipping(5, skipped)
    completion_BGC = jax.random.randint(key, (3, 2, 4), 0, 31)
    valid_BP = valid_mask(length_B, 9)
    score = jax.jit(
        lambda model: model.logits(model.completion_hidden(tokens_BP, valid_BP, completion_BGC, plan, remat))
    )
    logits = score(model)
    for b, length in enumerate(length_B.tolist()):
        for g in range(2):
            sequence = jnp.concatenate([tokens_BP[b, :length], completion_BGC[b, g]])[None]
            whole = forward(model, sequence, plan)[0, length - 1 : -1]
            # A change of 1e-6 in the weights moves most logits by 3e-4, and those of one token by 4e-3.
            np.testing.assert_allclose(logits[b, g], whole, atol=3e-4)


def test_gradient_is_the_same_with_and_without_the_full_plan():
    """The layer loop has two forms; only the cost of their gradients may differ."""
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    graph, state = nnx.split(model)

    def loss(state, plan):
        return jnp.sum(nnx.merge(graph, state)(tokens_BP, plan=plan) ** 2) * 1e-3

    gradient = jax.jit(jax.grad(loss))
    plain, planned = gradient(state, None), gradient(state, LayerPlan.full(5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, planned)


def test_left_out_layers_get_no_gradient():
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    graph, state = nnx.split(model)
    plan = LayerPlan.skipping(5, [1])
    gradient = jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(tokens_BP, plan=plan) ** 2))(state)
    norms_L = jnp.sqrt(jnp.sum(gradient["layers"]["gate"][...] ** 2, axis=(1, 2)))
    assert norms_L[1] == 0 and jnp.all(norms_L[jnp.array([0, 2, 3, 4])] > 0)


def test_new_adapters_change_nothing_and_merged_adapters_change_everything_alike(key):
    model, (tokens_BP, _) = tiny_model(), tiny_prompts()
    plain = forward(model, tokens_BP)
    add_lora(model, LoraConfig(rank=3, alpha=6.0), key)
    assert model.lora_scale == 2.0
    np.testing.assert_allclose(forward(model, tokens_BP), plain, atol=1e-5)
    for name in ("query", "down"):
        out = getattr(model.layers, f"{name}_lora_out")
        out[...] = 0.1 * jax.random.normal(key, out.shape)
    adapted = forward(model, tokens_BP)
    assert jnp.abs(adapted - plain).max() > 0.1
    np.testing.assert_allclose(forward(Transformer(TINY, merge_lora(model)), tokens_BP), adapted, rtol=1e-4, atol=2e-4)


def test_bfloat16_weights_stay_close():
    config = ModelConfig(**{**vars(TINY), "num_layers": 2})
    parameters = initial_parameters(config, jax.random.key(0))
    halved = {name: value.astype(jnp.bfloat16) for name, value in parameters.items()}
    tokens_BP, _ = tiny_prompts()
    logits = forward(Transformer(config, halved), tokens_BP)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(Transformer(config, parameters), tokens_BP), atol=0.1)


def test_refuses_parameters_that_do_not_fit():
    parameters = initial_parameters(TINY, jax.random.key(0))
    with pytest.raises(ValueError, match=r"missing \['layers/gate'\]"):
        Transformer(TINY, {name: value for name, value in parameters.items() if name != "layers/gate"})
    with pytest.raises(ValueError, match=r"'final_norm' has shape \(3,\); the configuration says \(16,\)"):
        Transformer(TINY, parameters | {"final_norm": jnp.ones(3)})
    assert parameter_shapes(TINY)["layers/key"] == (5, 16, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3, model.shape.num_kv_heads 2"),
        ({"head_size": 7}, "head_size is 7"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"family": "gpt2"}, "family is 'gpt2'; allowed are llama"),
    ],
)
def test_refuses_impossible_shapes(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**vars(TINY), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha is 0.0"),
        ({"rank": 2, "targets": ("query", "head")}, "allowed are some of query, key"),
    ],
)
def test_refuses_impossible_adapters(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)
