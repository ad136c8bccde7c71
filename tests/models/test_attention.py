"""Attention by blocks: the outputs and gradients of plain attention, in memory that grows with the length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nested_reft import backends
from nested_reft.layer_plan import LayerPlan
from nested_reft.models.attention import attend
from nested_reft.models.blocked_attention import attend_by_blocks
from nested_reft.models.layer import KeyValues
from nested_reft.models.visibility import Visible
from nested_reft.types import valid_mask
from tests.tiny_models import TINY, tiny_model, tiny_prompts

B, G, T, P, J, R, K = 2, 3, 11, 7, 2, 3, 4
START_BG = jnp.array([[0, 4, 2], [1, 0, 11]])  # the last row is padding only
# Three texts side by side, or two, or one: the place where the text of each token begins.
FIRST_BGT = jnp.array([[[0] * 4 + [4] * 5 + [9] * 2] * 3, [[0] * 11, [0] * 6 + [6] * 5, [0] * 10 + [10]]])
OWN = {
    "one text": Visible(causal=True),
    "packed": Visible(first=FIRST_BGT, causal=True),
    "forced": Visible(first=START_BG[..., None], causal=True),
    "left padded": Visible(valid=jnp.arange(T) >= START_BG[..., None], causal=True),
}
PROMPT = Visible((jnp.arange(P) < jnp.array([[5], [2]]))[:, None])


def with_gradients(function, *arrays):
    """The outputs, and the gradients of a random sum of them."""
    weight = jax.random.normal(jax.random.key(9), jax.eval_shape(function, *arrays).shape)

    @jax.jit
    def run(*arrays):
        out, backward = jax.vjp(function, *arrays)
        return out, backward(weight)

    return run(*arrays)


@pytest.mark.parametrize(
    ("own", "queries", "keys"), [("one text", 4, 3), ("packed", 3, 8), ("forced", 4, 4), ("left padded", 16, 16)]
)
def test_blocks_are_plain_attention(own, queries, keys, key):
    """Blocks that divide nothing, one block for all, and segments that each row has or that its group shares."""
    keys_of = jax.random.split(key, 4)
    query = jax.random.normal(keys_of[0], (B, G, T, J * R, K))
    prompt, prefix = (jax.random.normal(each, (2, B, J, P, K)) for each in keys_of[1:3])
    mine = jax.random.normal(keys_of[3], (2, B, G, J, T, K))
    # A prefix that everyone sees, so that padding has something to see in both.
    seen_by = (Visible(), PROMPT, OWN[own])

    def plain(query, *segments):
        masked = [
            (KeyValues(*pair), seen.mask(T, pair.shape[-2])) for pair, seen in zip(segments, seen_by, strict=True)
        ]
        return attend(query, *masked)

    def blocks(query, *segments):
        given = [(*pair, seen) for pair, seen in zip(segments, seen_by, strict=True)]
        return attend_by_blocks(query, given, queries, keys)

    expected, found = (with_gradients(each, query, prefix, prompt, mine) for each in (plain, blocks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, found)


def test_a_query_that_sees_nothing_stays_finite(key):
    """Padding before a text: plain attention takes a mean there, which nobody reads; a gradient of NaN would spread."""
    query, *mine = jax.random.normal(key, (3, 1, 1, 6, 2, K))
    mine = [jnp.swapaxes(x, 2, 3) for x in mine]
    seen = Visible(valid=jnp.arange(6) >= 4, causal=True)
    out, gradients = with_gradients(lambda q, k, v: attend_by_blocks(q, [(k, v, seen)], 2, 2), query, *mine)
    assert not out[0, 0, :4].any() and jnp.abs(out[0, 0, 4:]).min() > 0
    assert not gradients[0][0, 0, :4].any() and all(jnp.isfinite(gradient).all() for gradient in gradients)


@pytest.fixture
def short_blocks(monkeypatch):
    """A function that makes attention of every text go by small blocks, or as it does by itself."""

    def switch(on: bool):
        monkeypatch.setattr(backends, "LONG_ATTENTION", 1 if on else 2**18)
        monkeypatch.setattr(backends, "ATTENTION_BLOCKS", (2, 3) if on else (128, 256))

    return switch


@pytest.mark.parametrize("texts", [pytest.param("shared prefix", marks=pytest.mark.slow), "packed"])
def test_a_model_has_the_same_states_and_gradients(texts, short_blocks, key):
    model, (tokens_BP, length_B) = tiny_model(scale=1.0), tiny_prompts()
    prefix, segment_BGC = (2, None) if texts == "shared prefix" else (0, jnp.array([1] * 3 + [2] * 5))
    tokens_BP = jnp.concatenate([jnp.broadcast_to(tokens_BP[:1, :2], (3, 2)), tokens_BP[:, 2:]], axis=1)
    tokens_BGC = jax.random.randint(key, (3, 2, 8), 0, TINY.vocab_size)
    graph, state = nnx.split(model)
    if segment_BGC is not None:
        segment_BGC = jnp.broadcast_to(segment_BGC, tokens_BGC.shape)

    def states(state):
        model = nnx.merge(graph, state)
        return model.completion_hidden(
            tokens_BP, valid_mask(length_B, 9), tokens_BGC, None, "dots", prefix, segment_BGC
        )

    found = []
    for on in (False, True):
        short_blocks(on)
        found.append(with_gradients(lambda state: states(state), state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *found)
    assert any(not jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, found), strict=True))


def test_forced_prefixes_are_prefilled_alike(short_blocks, key):
    """Prefixes of 0 to 6 tokens end at one slot, and prompts differ in length."""
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    tokens_BGF, start_BG = jax.random.randint(key, (3, 2, 6), 0, TINY.vocab_size), jnp.array([[0, 6], [2, 5], [1, 3]])

    def prefilled(model):
        prompt = model.prefill(tokens_BP, valid_mask(length_B, 9), LayerPlan.full(5))
        hidden_BGD, cache = model.prefill_completions(tokens_BGF, start_BG, prompt, LayerPlan.full(5))
        written = jnp.arange(6) >= start_BG[..., None]
        return hidden_BGD, jax.tree.map(lambda x: x * written[:, :, None, :, None], cache)

    found = []
    for on in (False, True):
        short_blocks(on)
        found.append(jax.jit(lambda model: prefilled(model))(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), *found)
    # The switch changes the program.
    assert any(not jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, found), strict=True))


def test_only_long_texts_go_by_blocks():
    """A decoding step has one query, and short texts keep the program that they had."""
    assert backends.attention_blocks(511, 512) is None and backends.attention_blocks(1, 10**6) is None
    assert backends.attention_blocks(512, 512) == backends.attention_blocks(200, 4096) == backends.ATTENTION_BLOCKS


def test_memory_grows_with_the_length(key):
    """Four times as many tokens: plain attention would take sixteen times as much."""

    def needed(length: int) -> int:
        def attended(query, own):
            return attend_by_blocks(query, [(own, own, Visible(causal=True))], 128, 256).sum()

        shapes = [(1, 2, length, 4, 8), (1, 2, 2, length, 8)]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(attended, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(4096) < 4.4 * needed(1024)
