"""Rollout copies in bfloat16 and int8: the same function up to their rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.models.bridges import Bridges
from nested_reft.models.lora import LoraConfig, add_lora
from nested_reft.models.low_precision import _int8, low_precision
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.generate import generate
from nested_reft.rollout.sampling import SamplingConfig
from tests.tiny_models import TINY, forward, tiny_model, tiny_prompts

UNTIED = dataclasses.replace(TINY, tied_embeddings=False, qkv_bias=True, qk_norm=True)


def with_matrices(model: Transformer, change) -> Transformer:
    return Transformer(
        model.config,
        {n: change(n, v) if v.ndim - n.startswith("layers/") == 2 else v for n, v in model.parameters().items()},
    )


def test_int8_by_hand():
    # Rows [1, -2, 0.5] and [0, 0, 0]: scales 2 / 127 and 1; 1 / s = 63.5 rounds to the even 64.
    integer_OI, scale_O = _int8(jnp.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(integer_OI, [[64, -127, 32], [0, 0, 0]])
    np.testing.assert_allclose(scale_O, [2 / 127, 1.0])


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_int8_copy_is_the_model_with_rounded_matrices(config):
    model = tiny_model(config)

    def rounded(_: str, value: jax.Array) -> jax.Array:
        integer, scale = _int8(value)
        return integer * scale[..., None]

    tokens_BT = jax.random.randint(jax.random.key(1), (2, 7), 0, config.vocab_size)
    copied = forward(low_precision(model, "int8"), tokens_BT)
    expected = forward(with_matrices(model, rounded), tokens_BT)
    # The copy's products take bfloat16 inputs, 8 bits each: a few per cent after five layers with large matrices.
    np.testing.assert_allclose(copied, expected, atol=0.1 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_bfloat16_copy_is_the_model_with_matrices_cast(config):
    model = tiny_model(config)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 7), 0, config.vocab_size)
    expected = forward(with_matrices(model, lambda _, value: value.astype(jnp.bfloat16)), tokens_BT)
    np.testing.assert_array_equal(forward(low_precision(model, "bfloat16"), tokens_BT), expected)


@pytest.mark.parametrize("precision, bytes_of_4", [("bfloat16", 2), ("int8", 1)])
def test_a_copy_is_smaller(precision, bytes_of_4):
    model = tiny_model(dataclasses.replace(TINY, width=128, hidden_width=256, head_size=32))

    def size(module) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module)))

    assert size(low_precision(model, precision)) < size(model) * (bytes_of_4 / 4 + 0.03)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_copys_stacks_are_never_widened(precision):
    """XLA's CPU backend slices bfloat16 by way of float32: decoding would hold, and read, whole stacks in 4 bytes."""
    copy, plan = low_precision(tiny_model(), precision), LayerPlan.skipping(5, [1])
    tokens_BP, length_B = tiny_prompts()
    prompt = copy.prefill(tokens_BP, jnp.arange(tokens_BP.shape[1]) < length_B[:, None], plan)
    cache = copy.empty_cache(len(length_B), 2, 3, plan)
    assert cache.key.dtype.itemsize == prompt.layers.key.dtype.itemsize == 2
    decode = jax.jit(
        lambda m, cache, prompt: m.decode(jnp.zeros((len(length_B), 2), int), jnp.array(1), cache, prompt, plan)
    )
    text = decode.lower(copy, cache, prompt).compile().as_text() or ""
    assert "ENTRY" in text
    for stack in (copy.layers.gate[...], cache.key, prompt.layers.key):
        assert f"f32[{','.join(map(str, stack.shape))}]" not in text


@pytest.mark.parametrize("rank", [None, 4])
def test_bridges_are_rounded_like_the_layers(rank):
    model = tiny_model()
    model.bridges = Bridges(TINY.num_layers, TINY.width, rank)
    model.bridges.load({n: jax.random.normal(jax.random.key(3), v.shape) for n, v in model.stacked_bridges().items()})
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 7), 0, TINY.vocab_size)
    plan = LayerPlan.skipping(5, [1, 3], Part.BRIDGE)
    expected = forward(model, tokens_BT, plan)
    for precision, tolerance in (("bfloat16", 0.05), ("int8", 0.1)):
        copy = low_precision(model, precision)
        for name in ("map",) if rank is None else ("narrow", "widen"):
            assert copy.stacked_bridges()[name].dtype.itemsize == (2 if precision == "bfloat16" else 1)
        error = jnp.abs(forward(copy, tokens_BT, plan) - expected)
        assert 0 < error.max() < tolerance * jnp.abs(expected).max()
    assert model.stacked_bridges()["map" if rank is None else "widen"].dtype == jnp.float32  # the model's own stay


def test_adapters_stay_in_float32():
    model = tiny_model()
    expected = with_matrices(model, lambda _, value: value.astype(jnp.bfloat16))
    for policy in (model, expected):
        add_lora(policy, LoraConfig(rank=2), jax.random.key(2))
        for name in ("query", "down"):
            adapter = getattr(policy.layers, f"{name}_lora_out")
            adapter[...] = 0.3 * jax.random.normal(jax.random.key(3), adapter.shape)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 7), 0, TINY.vocab_size)
    np.testing.assert_array_equal(forward(low_precision(model, "bfloat16"), tokens_BT), forward(expected, tokens_BT))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_behavior_logprobs_are_those_of_the_copy(precision, key):
    model, plan = tiny_model(), LayerPlan.skipping(5, [1])
    copy = low_precision(model, precision)
    tokens_BP, length_B = tiny_prompts()
    result = generate(
        copy,
        tokens_BP,
        length_B,
        plan,
        jnp.array([-1]),
        key,
        group_size=4,
        max_completion_tokens=6,
        sampling=SamplingConfig(),
    )

    def logprobs(policy: Transformer) -> jax.Array:
        prompt_GT = jnp.broadcast_to(tokens_BP[0, : length_B[0]], (4, length_B[0]))
        sequence = jnp.concatenate([prompt_GT, result.tokens_BGC[0]], axis=1)
        logits = forward(policy, sequence, plan)[:, length_B[0] - 1 : -1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), result.tokens_BGC[0][..., None], -1)[..., 0]

    # The cached pass rounds keys and values to bfloat16, an uncached one does not.
    np.testing.assert_allclose(result.behavior_logprob_BGC[0], logprobs(copy), atol=0.2)
    own_error = jnp.abs(result.behavior_logprob_BGC[0] - logprobs(copy)).mean()
    assert own_error < 0.5 * jnp.abs(result.behavior_logprob_BGC[0] - logprobs(model)).mean()
