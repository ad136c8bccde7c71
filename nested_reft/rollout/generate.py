"""Batched sampling of completions under a layer plan, in one compiled program."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nested_reft.layer_skip import LayerPlan
from nested_reft.models.layer import KeyValues
from nested_reft.models.transformer import PromptCache, Transformer
from nested_reft.rollout.sampling import SamplingConfig, row_uniforms, sample_token
from nested_reft.types import ForcedPrefixes, Rollouts, valid_mask

COMPACT_FROM = 32  # completion tokens; shorter rollouts end before dropping finished rows could pay
COMPACTIONS = 3  # each compiles the decode step once more
GROW_FROM = 64  # completion tokens; with fewer, reading caches half empty costs less than compiling for smaller ones


Rows = tuple[Int[Array, "_ 1"], Int[Array, "_ _"]]
"""Rows that are being decoded, as an index into arrays `[B, G]`: all, or after a compaction some of some prompts."""


@struct.dataclass
class _DecodeState:
    """Carry of the decode loop; `step` tokens of every unfinished row are sampled.

    Tokens stand in the order in which they were sampled; what was forced before them is put in front at the end.
    """

    step: Int[Array, ""]
    tokens_BGC: Int[Array, "B G C"]
    logprob_BGC: Float[Array, "B G C"]
    length_BG: Int[Array, "B G"]
    done_BG: Bool[Array, "B G"]  # takes no more tokens
    cache: KeyValues  # of the rows that are being decoded


@partial(jax.jit, static_argnames=("group_size", "max_completion_tokens", "sampling", "shared_prefix"))
def generate(
    model: Transformer,
    prompt_BP: Int[Array, "B P"],
    prompt_length_B: Int[Array, " B"],
    plan: LayerPlan,
    stop_ids: Int[Array, " stops"],
    key: jax.Array,
    policy_version: Int[Array, ""] | int = 0,
    forced: ForcedPrefixes | None = None,
    *,
    group_size: int,
    max_completion_tokens: int,
    sampling: SamplingConfig,
    shared_prefix: int = 0,
) -> Rollouts:
    """Samples `group_size` completions of each prompt from the policy that `plan` leaves.

    The prompt runs once per group and its caches are shared by the group. Decoding ends as soon as
    every row has drawn a stop token; where completions may be long, rows that have are dropped whenever half of
    each group would do (`_compactions`), and caches grow in steps. It compiles once per shape and plan size.

    Args:
        model: the target; the plan picks the layers that act.
        prompt_BP, prompt_length_B: right-padded prompts (`right_padded` turns others into them).
        plan: kept layers; all of them make this an ordinary rollout.
        stop_ids: tokens that end a completion; they are part of it.
        key: PRNG key; a row's draw depends on the key and on the row's place in the batch.
        policy_version: updates that the model has seen; written through to the rollouts.
        forced: first tokens of the completions, given instead of sampled; they run in one pass, and each
            row may have a number of its own. None lets every completion be sampled from its first token.
        group_size: G.
        max_completion_tokens: C, forced tokens included.
        sampling: temperature and truncation.
        shared_prefix: leading tokens that all prompts have in common (`data.pipeline.shared_prefix`).

    Returns:
        Rollouts on the devices, whose log-probabilities are those of the distributions that tokens were drawn from.
    """
    shape, size = (prompt_BP.shape[0], group_size), max_completion_tokens
    prompt = model.prefill(prompt_BP, valid_mask(prompt_length_B, prompt_BP.shape[1]), plan, shared_prefix)
    first_BGD = jnp.broadcast_to(prompt.last_hidden_BD[:, None], (*shape, prompt.last_hidden_BD.shape[-1]))
    forced_size, start_BG, limit_BG, forced_cache = 0, None, None, None
    if forced is not None:
        # Prefixes end at one slot of the caches whatever their lengths, so that one slot number serves all rows.
        forced_size = forced.tokens_BGF.shape[-1]
        start_BG = forced_size - forced.length_BG
        limit_BG = size - forced.length_BG
        right_aligned_BGF = _shifted(forced.tokens_BGF, -start_BG)
        first_BGD, forced_cache = model.prefill_completions(right_aligned_BGF, start_BG, prompt, plan)

    def add_token(state: _DecodeState, rows: Rows, hidden_bgD: Array) -> _DecodeState:
        """Draws each row's next token from its hidden state."""
        uniform = row_uniforms(jax.random.fold_in(key, state.step), shape)[:, *rows]  # by place in the whole batch
        token_bg, logprob_bg = sample_token(uniform, model.logits(hidden_bgD), sampling)
        done_bg = state.done_BG[rows]
        # A finished row still passes through the model with the batch; what it draws is not kept.
        token_bg, logprob_bg = (jnp.where(done_bg, 0, value) for value in (token_bg, logprob_bg))
        ends_bg = jnp.isin(token_bg, stop_ids)
        if limit_BG is not None:  # a row whose prefix took some of its tokens is full earlier than the others
            ends_bg |= state.step + 1 >= limit_BG[rows]
        return dataclasses.replace(
            state,
            step=state.step + 1,
            tokens_BGC=state.tokens_BGC.at[*rows, state.step].set(token_bg),
            logprob_BGC=state.logprob_BGC.at[*rows, state.step].set(logprob_bg),
            length_BG=state.length_BG.at[rows].add(~done_bg),
            done_BG=state.done_BG.at[rows].set(done_bg | ends_bg),
        )

    def decode_until_fits(state: _DecodeState, rows: Rows, prompt: PromptCache, fewer: tuple[int, int]) -> _DecodeState:
        """Decodes until all rows still running fit into `fewer` prompts and completions of each, or caches are full."""
        # A step feeds the token before the one that it draws.
        end = min(size, state.cache.key.shape[-2] - forced_size + 1)

        def too_many(state: _DecodeState) -> Array:
            # Finished rows need not leave at once: the loop ends when a smaller batch would hold all the others.
            running_B = jnp.sum(~state.done_BG, axis=1)
            return (state.step < end) & ((jnp.sum(running_B > 0) > fewer[0]) | jnp.any(running_B > fewer[1]))

        def decode_one(state: _DecodeState) -> _DecodeState:
            # Slots count forced tokens, while `step` counts sampled ones.
            last = state.step - 1
            starts_bg = None if start_BG is None else start_BG[rows]
            hidden_bgD, cache = model.decode(
                state.tokens_BGC[*rows, last], forced_size + last, state.cache, prompt, plan, starts_bg
            )
            return add_token(dataclasses.replace(state, cache=cache), rows, hidden_bgD)

        return jax.lax.while_loop(too_many, decode_one, state)

    cache_sizes = _cache_sizes(size)
    rows = (jnp.arange(shape[0])[:, None], jnp.broadcast_to(jnp.arange(group_size), shape))
    state = _DecodeState(
        step=jnp.zeros((), jnp.int32),
        tokens_BGC=jnp.zeros((*shape, size), jnp.int32),
        logprob_BGC=jnp.zeros((*shape, size), jnp.float32),
        length_BG=jnp.zeros(shape, jnp.int32),
        done_BG=jnp.zeros(shape, bool) if limit_BG is None else limit_BG <= 0,
        cache=model.empty_cache(*shape, cache_sizes[0], plan) if forced_cache is None else forced_cache,
    )
    if forced is not None:
        state = _with_cache_size(state, forced_size + cache_sizes[0])
    # The first token needs no decode step, since the prefill has its hidden state already.
    state = add_token(state, rows, first_BGD)
    compactions = _compactions(*shape, size)
    # Each size serves until it is full or the first compaction is due. All that follows has caches of full size.
    for cache_size in cache_sizes[1:]:
        state = decode_until_fits(state, rows, prompt, (compactions or [(0, 0)])[0])
        state = _with_cache_size(state, forced_size + cache_size)
    for fewer in compactions:
        state = decode_until_fits(state, rows, prompt, fewer)
        state, rows, prompt = _compacted(state, rows, prompt, *fewer)
    state = decode_until_fits(state, rows, prompt, (0, 0))
    tokens_BGC, logprob_BGC, length_BG = state.tokens_BGC, state.logprob_BGC, state.length_BG
    finished_BG, forced_BG = state.done_BG, jnp.zeros(shape, jnp.int32)
    if forced is not None:
        # With prefixes, a row can be done because it is full. Its last token tells whether it stopped.
        last_BG1 = jnp.take_along_axis(tokens_BGC, jnp.maximum(length_BG - 1, 0)[..., None], axis=-1)
        finished_BG = (length_BG > 0) & jnp.isin(last_BG1[..., 0], stop_ids)
        forced_BG = forced.length_BG
        given_BGC = jnp.pad(forced.tokens_BGF, ((0, 0), (0, 0), (0, max(size - forced_size, 0))))[..., :size]
        # Sampled tokens were written from index 0; each row moves right by the length of its own prefix.
        own_BGC = jnp.arange(size) >= forced_BG[..., None]
        tokens_BGC = jnp.where(own_BGC, _shifted(tokens_BGC, -forced_BG), given_BGC)
        logprob_BGC = jnp.where(own_BGC, _shifted(logprob_BGC, -forced_BG), 0.0)
        length_BG = length_BG + forced_BG
    return Rollouts(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BGC=tokens_BGC,
        length_BG=length_BG,
        finished_BG=finished_BG,
        forced_BG=forced_BG,
        counted_BG=jnp.ones(shape, bool),
        behavior_logprob_BGC=logprob_BGC,
        nested_BG=jnp.ones(shape, bool),
        full_share_B=jnp.zeros(shape[0]),
        kept_mask_BL=jnp.broadcast_to(plan.to_mask(model.config.num_layers), (shape[0], model.config.num_layers)),
        version_B=jnp.full(shape[0], policy_version, jnp.int32),
    )


def _shifted(values_BGX: Array, left_BG: Int[Array, "B G"]) -> Array:
    """Each row moved to the left by its own number of places, or to the right where that is negative; what falls out
    at one end comes in at the other."""
    size = values_BGX.shape[-1]
    index_BGX = (jnp.arange(size) + left_BG[..., None]) % size
    return jnp.take_along_axis(values_BGX, index_BGX, axis=-1)


def _compactions(batch: int, group: int, size: int) -> list[tuple[int, int]]:
    """Prompts and completions of each that decoding shrinks to, one after the other.

    Groups are halved first: their rows share a prompt, so a compacted batch copies no prompt's caches.
    """
    shapes = []
    while size >= COMPACT_FROM and len(shapes) < COMPACTIONS and batch * group >= 4:
        batch, group = (batch, -(-group // 2)) if group > 1 else (-(-batch // 2), group)
        shapes.append((batch, group))
    return shapes


def _cache_sizes(size: int) -> list[int]:
    """Tokens that caches hold room for, one after the other: every step reads them whole."""
    # The last token is never fed, so it needs no slot.
    last = max(size - 1, 1)
    return [-(-last // 4), -(-last // 2), last] if size >= GROW_FROM else [last]


def _with_cache_size(state: _DecodeState, size: int) -> _DecodeState:
    """The same caches with room for `size` tokens."""
    room = [(0, 0)] * 4 + [(0, size - state.cache.key.shape[-2]), (0, 0)]
    return dataclasses.replace(state, cache=jax.tree.map(lambda a: jnp.pad(a, room), state.cache))


def _compacted(
    state: _DecodeState, rows: Rows, prompt: PromptCache, batch: int, group: int
) -> tuple[_DecodeState, Rows, PromptCache]:
    """The rows that still run, with finished ones where those leave room, and their caches."""
    running_bg = ~state.done_BG[rows]
    kept_b = jnp.arange(batch)
    if batch < running_bg.shape[0]:
        kept_b = jnp.argsort(~running_bg.any(axis=1), stable=True)[:batch]
        prompt = PromptCache(
            jax.tree.map(lambda a: a[:, kept_b], prompt.layers), prompt.valid_BP[kept_b], prompt.last_hidden_BD[kept_b]
        )
    kept_bg = kept_b[:, None], jnp.argsort(~running_bg[kept_b], axis=1, stable=True)[:, :group]
    cache = jax.tree.map(lambda a: a[:, *kept_bg], state.cache)
    return dataclasses.replace(state, cache=cache), (rows[0][kept_b], rows[1][kept_bg]), prompt


def right_padded(
    tokens_BP: Int[Array, "B P"], valid_BP: Bool[Array, "B P"]
) -> tuple[Int[Array, "B P"], Int[Array, " B"]]:
    """Moves each row's valid tokens to the front, in order, and counts them: left or mixed padding in, right out.

    Args:
        tokens_BP: token ids, padded anywhere.
        valid_BP: False at padding.

    Returns:
        Right-padded tokens, and the valid tokens of each row.
    """
    # A stable sort keeps the valid tokens in their order.
    order = jnp.argsort(~valid_BP, axis=-1, stable=True)
    return jnp.take_along_axis(tokens_BP, order, axis=-1), valid_BP.sum(axis=-1)
