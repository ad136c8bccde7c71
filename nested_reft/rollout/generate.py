"""Batched sampling of completions under a layer plan, in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nested_reft.layer_skip import LayerPlan
from nested_reft.models.transformer import KeyValues, PromptCache, Transformer
from nested_reft.rollout.sampling import SamplingConfig, row_uniforms, sample_token, tempered, token_logprob
from nested_reft.types import Rollouts, valid_mask

LOGITS_AT_ONCE = 2**26  # 256 MB of float32
COMPACT_FROM = 32  # completion tokens; shorter rollouts end before dropping finished rows could pay
COMPACTIONS = 3  # each compiles the decode step once more


@struct.dataclass
class _DecodeState:
    """Carry of the decode loop; `step` tokens of every row are sampled.

    Its B x G rows are those of the batch, or after a compaction those at (`prompt_B`, `row_BG`) of it.
    """

    step: Int[Array, ""]
    prompt_B: Int[Array, " B"]
    row_BG: Int[Array, "B G"]
    tokens_BGC: Int[Array, "B G C"]
    logprob_BGC: Float[Array, "B G C"]
    length_BG: Int[Array, "B G"]
    done_BG: Bool[Array, "B G"]
    cache: KeyValues


@partial(jax.jit, static_argnames=("group_size", "max_completion_tokens", "sampling", "shared_prefix"))
def generate(
    model: Transformer,
    prompt_BP: Int[Array, "B P"],
    prompt_length_B: Int[Array, " B"],
    plan: LayerPlan,
    stop_ids: Int[Array, " stops"],
    key: jax.Array,
    policy_version: Int[Array, ""] | int = 0,
    *,
    group_size: int,
    max_completion_tokens: int,
    sampling: SamplingConfig,
    shared_prefix: int = 0,
) -> Rollouts:
    """Samples `group_size` completions of each prompt from the policy that `plan` leaves.

    The prompt runs once per group and its caches are shared by the group. Decoding ends as soon as
    every row has drawn a stop token; where completions may be long, rows that have are dropped whenever half of
    each group would do (`_compactions`). It compiles once per shape and plan size.

    Args:
        model: the target; the plan picks the layers that act.
        prompt_BP, prompt_length_B: right-padded prompts (`right_padded` turns others into them).
        plan: kept layers; all of them make this an ordinary rollout.
        stop_ids: tokens that end a completion; they are part of it.
        key: PRNG key; a row's draw depends on the key and on the row's place in the batch.
        policy_version: written through to the rollouts.
        group_size: G.
        max_completion_tokens: C.
        sampling: temperature and truncation.
        shared_prefix: leading tokens that all prompts have in common (`data.pipeline.shared_prefix`).
    """
    batch, size = prompt_BP.shape[0], max_completion_tokens
    prompt = model.prefill(prompt_BP, valid_mask(prompt_length_B, prompt_BP.shape[1]), plan, shared_prefix)
    rows = (batch, group_size)

    def add_token(state: _DecodeState, hidden_BGD: Array) -> _DecodeState:
        uniform = row_uniforms(jax.random.fold_in(key, state.step), rows)  # of the whole batch, compacted or not
        uniform = uniform[:, state.prompt_B[:, None], state.row_BG]
        token_BG, logprob_BG = sample_token(uniform, model.logits(hidden_BGD), sampling)
        token_BG = jnp.where(state.done_BG, 0, token_BG)
        logprob_BG = jnp.where(state.done_BG, 0.0, logprob_BG)
        at_step = (0, 0, state.step)
        return dataclasses.replace(
            state,
            step=state.step + 1,
            tokens_BGC=jax.lax.dynamic_update_slice(state.tokens_BGC, token_BG[..., None], at_step),
            logprob_BGC=jax.lax.dynamic_update_slice(state.logprob_BGC, logprob_BG[..., None], at_step),
            length_BG=state.length_BG + ~state.done_BG,
            done_BG=state.done_BG | jnp.isin(token_BG, stop_ids),
        )

    def decode_until_fits(state: _DecodeState, prompt: PromptCache, fewer: tuple[int, int]) -> _DecodeState:
        """Decodes until all rows still running fit into `fewer` prompts and completions of each."""

        def too_many(state: _DecodeState) -> Array:
            running_B = jnp.sum(~state.done_BG, axis=1)
            return (state.step < size) & ((jnp.sum(running_B > 0) > fewer[0]) | jnp.any(running_B > fewer[1]))

        def decode_one(state: _DecodeState) -> _DecodeState:
            last = state.step - 1
            token_BG = jax.lax.dynamic_index_in_dim(state.tokens_BGC, last, axis=2, keepdims=False)
            hidden_BGD, cache = model.decode(token_BG, last, state.cache, prompt, plan)
            return add_token(dataclasses.replace(state, cache=cache), hidden_BGD)

        return jax.lax.while_loop(too_many, decode_one, state)

    state = _DecodeState(
        step=jnp.zeros((), jnp.int32),
        prompt_B=jnp.arange(batch),
        row_BG=jnp.broadcast_to(jnp.arange(group_size), rows),
        tokens_BGC=jnp.zeros((*rows, size), jnp.int32),
        logprob_BGC=jnp.zeros((*rows, size), jnp.float32),
        length_BG=jnp.zeros(rows, jnp.int32),
        done_BG=jnp.zeros(rows, bool),
        cache=model.empty_cache(*rows, max(size - 1, 1), plan),
    )
    first_BGD = jnp.broadcast_to(prompt.last_hidden_BD[:, None], (*rows, prompt.last_hidden_BD.shape[-1]))
    state = whole = add_token(state, first_BGD)
    for fewer in _compactions(*rows, size):
        state = decode_until_fits(state, prompt, fewer)
        whole = _put_back(whole, state)
        if fewer[1] > 0:
            state, prompt = _compacted(state, prompt, *fewer)
    return Rollouts(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BGC=whole.tokens_BGC,
        length_BG=whole.length_BG,
        finished_BG=whole.done_BG,
        forced_BG=jnp.zeros(rows, jnp.int32),
        behavior_logprob_BGC=whole.logprob_BGC,
        plan=plan,
        nested_BG=jnp.ones(rows, bool),
        policy_version=jnp.asarray(policy_version, jnp.int32),
    )


def _compactions(batch: int, group: int, size: int) -> list[tuple[int, int]]:
    """Prompts and completions of each that decoding shrinks to, one after the other; the last is none.

    Groups are halved first: their rows share a prompt, so a compacted batch copies no prompt's caches.
    """
    shapes = []
    while size >= COMPACT_FROM and len(shapes) < COMPACTIONS and batch * group >= 4:
        batch, group = (batch, -(-group // 2)) if group > 1 else (-(-batch // 2), group)
        shapes.append((batch, group))
    return [*shapes, (0, 0)]


def _compacted(state: _DecodeState, prompt: PromptCache, batch: int, group: int) -> tuple[_DecodeState, PromptCache]:
    """The rows that still run, with finished ones where those leave room."""
    running_BG = ~state.done_BG
    chosen_B = jnp.arange(batch)
    if batch < running_BG.shape[0]:
        chosen_B = jnp.argsort(~running_BG.any(axis=1), stable=True)[:batch]
        prompt = PromptCache(
            jax.tree.map(lambda a: a[:, chosen_B], prompt.layers),
            prompt.valid_BP[chosen_B],
            prompt.last_hidden_BD[chosen_B],
        )
    chosen_BG = jnp.argsort(~running_BG[chosen_B], axis=1, stable=True)[:, :group]

    def rows(x_BG: Array) -> Array:
        return x_BG[chosen_B[:, None], chosen_BG]

    return _DecodeState(
        step=state.step,
        prompt_B=state.prompt_B[chosen_B],
        row_BG=rows(state.row_BG),
        tokens_BGC=rows(state.tokens_BGC),
        logprob_BGC=rows(state.logprob_BGC),
        length_BG=rows(state.length_BG),
        done_BG=rows(state.done_BG),
        cache=jax.tree.map(lambda a: a[:, chosen_B[:, None], chosen_BG], state.cache),
    ), prompt


def _put_back(whole: _DecodeState, part: _DecodeState) -> _DecodeState:
    """The batch's tokens, log-probabilities, lengths and ends, with those of the part's rows in their places."""

    def put(name: str) -> Array:
        return getattr(whole, name).at[part.prompt_B[:, None], part.row_BG].set(getattr(part, name))

    names = ("tokens_BGC", "logprob_BGC", "length_BG", "done_BG")
    return dataclasses.replace(whole, **{name: put(name) for name in names})


def completion_logprobs(
    model: Transformer,
    prompt_BP: Int[Array, "B P"],
    prompt_length_B: Int[Array, " B"],
    tokens_BGC: Int[Array, "B G C"],
    temperature: float,
    plan: LayerPlan | None = None,
    remat: bool = False,
    differentiable_entropy: bool = False,
    shared_prefix: int = 0,
) -> tuple[Float[Array, "B G C"], Float[Array, "B G C"]]:
    """Log-probability of every completion token, and the entropy of the distribution it came from.

    Both in nats, at the given temperature, over the full vocabulary. Values at padding are those
    of token 0 there: mask them by length.

    Args:
        model, prompt_BP, prompt_length_B, tokens_BGC: as in a rollout.
        temperature: that of the rollout.
        plan: the policy's layers; None is the full model, with the cheapest gradient.
        remat: recompute activations in the backward pass.
        differentiable_entropy: let gradients through the entropy, at the cost of keeping a second
            array over the vocabulary for the backward pass; otherwise they stop there.
        shared_prefix: leading tokens that all prompts have in common.
    """
    valid_BP = valid_mask(prompt_length_B, prompt_BP.shape[1])
    hidden_BGCD = model.completion_hidden(prompt_BP, valid_BP, tokens_BGC, plan, remat, shared_prefix)
    return hidden_logprobs(model, hidden_BGCD, tokens_BGC, temperature, differentiable_entropy)


def hidden_logprobs(
    model: Transformer,
    hidden_BGCD: Float[Array, "B G C D"],
    tokens_BGC: Int[Array, "B G C"],
    temperature: float,
    differentiable_entropy: bool = False,
) -> tuple[Float[Array, "B G C"], Float[Array, "B G C"]]:
    """What `completion_logprobs` returns, of final hidden states."""

    def block(hidden: Array, tokens: Array) -> tuple[Array, Array]:
        logits = tempered(model.logits(hidden), temperature)
        all_logprobs = jax.nn.log_softmax(logits if differentiable_entropy else jax.lax.stop_gradient(logits), axis=-1)
        return token_logprob(logits, tokens, 1.0), -jnp.sum(jnp.exp(all_logprobs) * all_logprobs, axis=-1)

    return over_position_blocks(block, model.config.vocab_size, hidden_BGCD, tokens_BGC)


def over_position_blocks(function: Callable[..., Any], vocab_size: int, *arrays: Array) -> Any:
    """`function` of arrays `[B, G, C, ...]` that makes logits on its way to results `[B, G, C]`.

    Logits of all tokens at once can be larger than everything else together (1,000 tokens of Qwen's
    vocabulary take 600 MB). Where they would exceed `LOGITS_AT_ONCE`, completion positions are worked
    off block by block, each block's logits computed again in the backward pass.
    """
    batch, group, size = arrays[0].shape[:3]
    block_size = min(size, max(1, LOGITS_AT_ONCE // (batch * group * vocab_size)))
    if block_size == size:
        return function(*arrays)

    def split(value: Array) -> Array:
        padded = jnp.pad(value, [(0, 0), (0, 0), (0, -size % block_size)] + [(0, 0)] * (value.ndim - 3))
        return jnp.moveaxis(padded.reshape(batch, group, -1, block_size, *value.shape[3:]), 2, 0)

    results = jax.lax.map(lambda blocks: jax.checkpoint(function)(*blocks), tuple(split(value) for value in arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, group, -1)[..., :size], results)


def right_padded(
    tokens_BP: Int[Array, "B P"], valid_BP: Bool[Array, "B P"]
) -> tuple[Int[Array, "B P"], Int[Array, " B"]]:
    """Moves each row's valid tokens to the front, in order, and counts them: left or mixed padding in, right out."""
    order = jnp.argsort(~valid_BP, axis=-1, stable=True)
    return jnp.take_along_axis(tokens_BP, order, axis=-1), valid_BP.sum(axis=-1)
