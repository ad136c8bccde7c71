"""Batched sampling of completions under a layer plan, in one compiled program."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.layer import KeyValues
from nested_reft.models.placement import gathered
from nested_reft.models.transformer import PromptCache, Transformer
from nested_reft.rollout.drawing import next_token, rollouts_of, shifted, stopped
from nested_reft.rollout.sampling import SamplingConfig, row_keys
from nested_reft.rollout.schedule import cache_sizes, compactions_of
from nested_reft.sharding import constrain
from nested_reft.types import ForcedPrefixes, Rollouts, valid_mask


class _Rows(NamedTuple):
    """Rows `[b, g]` of a batch `[B, G]` that are being decoded: all, or after a compaction some of some prompts.

    Each prompt's rows are taken and put back apart from those of others, so devices that share the prompts exchange
    nothing.
    """

    prompt_b: Int[Array, " b"] | None = None  # None is all prompts
    completion_bg: Int[Array, "b g"] | None = None  # of each of these prompts; None is all completions

    def of(self, values: Array, axis: int = 0) -> Array:
        """The values of these rows.

        Args:
            values: `[..., B, G, ...]`.
            axis: that of B.
        """
        take = partial(jnp.take, axis=axis, mode="clip")
        if self.prompt_b is not None:
            values = take(values, self.prompt_b)
        if self.completion_bg is None:
            return values
        # Within a prompt, the axis of G is where that of B was.
        return jax.vmap(take, (axis, 0), axis)(values, self.completion_bg)

    def put(self, values_BG: Array, new_bg: Array) -> Array:
        """The values with new ones in these rows."""
        if self.completion_bg is None:
            return new_bg
        if self.prompt_b is not None:
            return values_BG.at[self.prompt_b[:, None], self.completion_bg].set(new_bg)
        return jax.vmap(lambda row, index, new: row.at[index].set(new))(values_BG, self.completion_bg, new_bg)

    def among(self, kept: _Rows) -> _Rows:
        """Those of these rows that `kept` takes out of them."""
        prompt_b = kept.prompt_b if self.prompt_b is None else self.prompt_b
        if self.prompt_b is not None and kept.prompt_b is not None:
            prompt_b = self.prompt_b[kept.prompt_b]
        own = kept.completion_bg if self.completion_bg is None else kept.of(self.completion_bg)
        return _Rows(prompt_b, own)


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
    number_B: Int[Array, " B"] | None = None,
    *,
    group_size: int,
    max_completion_tokens: int,
    sampling: SamplingConfig,
    shared_prefix: int = 0,
) -> Rollouts:
    """Samples `group_size` completions of each prompt from the policy that `plan` leaves.

    The prompt runs once per group and its caches are shared by the group. Decoding ends as soon as every row has drawn
    a stop token. In long rollouts, finished rows are dropped once the rest fit into half of each group
    (`compactions_of`), and caches grow in steps. It compiles once per shape and plan size.

    Args:
        model: the target; the plan picks the layers that act.
        prompt_BP, prompt_length_B: right-padded prompts.
        plan: kept layers; all of them make this an ordinary rollout.
        stop_ids: tokens that end a completion; they are part of it.
        key: PRNG key. A draw depends on it, on the prompt's number, on the completion's place in its group and on the
            token's position in the completion (forced tokens count), and on nothing that stands beside it.
        policy_version: updates that the model has seen; written through to the rollouts.
        forced: first tokens of the completions, given instead of sampled; they run in one pass, and each
            row may have a number of its own. None lets every completion be sampled from its first token.
        number_B: the number of each prompt (`sampling.row_keys`); None is its place in the batch.
        group_size: G.
        max_completion_tokens: C, forced tokens included.
        sampling: temperature and truncation.
        shared_prefix: leading tokens that all prompts have in common (`data.pipeline.shared_prefix`).

    Returns:
        Rollouts on the devices, whose log-probabilities are those of the distributions that tokens were drawn from.
    """
    shape, model = (prompt_BP.shape[0], group_size), gathered(model)
    prompt = model.prefill(prompt_BP, valid_mask(prompt_length_B, prompt_BP.shape[1]), plan, shared_prefix)
    # Without prefixes nothing of them is traced, so the plain program stays as it was.
    given = None if forced is None else _GivenTokens(forced, max_completion_tokens)
    number_B = jnp.arange(shape[0]) if number_B is None else number_B
    key_BG = row_keys(key, number_B, group_size)
    decoder = _Decoder(model, plan, stop_ids, key_BG, shape, max_completion_tokens, sampling, given)
    state = _decoded(decoder, prompt)
    sampled = (state.tokens_BGC, state.logprob_BGC, state.length_BG, state.done_BG)
    sampled = sampled if given is None else given.put_in_front(state, stop_ids)
    return rollouts_of(sampled, prompt_BP, prompt_length_B, forced, plan, model, policy_version, sampling)


class _GivenTokens:
    """Forced prefixes while a batch is decoded.

    Prefixes end at one slot of the caches whatever their lengths, so that one slot number serves all rows.
    """

    def __init__(self, forced: ForcedPrefixes, size: int):
        self.forced, self.size = forced, forced.tokens_BGF.shape[-1]
        self.start_BG = self.size - forced.length_BG  # slot of each row's first token
        self.limit_BG = size - forced.length_BG  # tokens that are left to sample
        self._completion_size = size

    def right_aligned_BGF(self) -> Int[Array, "B G F"]:
        """The prefixes moved to the end of their slots."""
        return shifted(self.forced.tokens_BGF, -self.start_BG)

    def put_in_front(self, state: _DecodeState, stop_ids: Array) -> tuple[Array, Array, Array, Array]:
        """Tokens, log-probabilities, lengths and stops of whole completions, prefixes included."""
        size, forced_BG = self._completion_size, self.forced.length_BG
        finished_BG = stopped(state.tokens_BGC, state.length_BG, 0, stop_ids)
        room = max(size - self.size, 0)
        given_BGC = jnp.pad(self.forced.tokens_BGF, ((0, 0), (0, 0), (0, room)))[..., :size]
        # Sampled tokens were written from index 0; each row moves right by the length of its own prefix.
        own_BGC = jnp.arange(size) >= forced_BG[..., None]
        tokens_BGC = jnp.where(own_BGC, shifted(state.tokens_BGC, -forced_BG), given_BGC)
        logprob_BGC = jnp.where(own_BGC, shifted(state.logprob_BGC, -forced_BG), 0.0)
        return tokens_BGC, logprob_BGC, state.length_BG + forced_BG, finished_BG


@dataclass(frozen=True)
class _Decoder:
    """What stays the same while a batch is decoded, and the two steps of its loop."""

    model: Transformer
    plan: LayerPlan
    stop_ids: Array
    key_BG: jax.Array
    shape: tuple[int, int]  # B and G of the whole batch
    size: int  # C
    sampling: SamplingConfig
    given: _GivenTokens | None

    @property
    def given_size(self) -> int:
        """Slots of the caches that prefixes take."""
        return 0 if self.given is None else self.given.size

    def add_token(self, state: _DecodeState, rows: _Rows, hidden_bgD: Array) -> _DecodeState:
        """Draws each row's next token from its hidden state."""
        # Forced tokens count, so a completion goes on from its own first tokens as it did when they were sampled.
        position = state.step if self.given is None else state.step + rows.of(self.given.forced.length_BG)
        done_bg = rows.of(state.done_BG)
        token_bg, logprob_bg = next_token(
            self.model, self.sampling, rows.of(self.key_BG), position, hidden_bgD, done_bg
        )
        ends_bg = jnp.isin(token_bg, self.stop_ids)
        if self.given is not None:  # a row whose prefix took some of its tokens is full earlier than the others
            ends_bg |= state.step + 1 >= rows.of(self.given.limit_BG)

        def with_column(whole_BGC: Array, new_bg: Array) -> Array:
            # Rows that left have no token at this step.
            column_BG = rows.put(jnp.zeros(self.shape, new_bg.dtype), new_bg)
            return jax.lax.dynamic_update_index_in_dim(whole_BGC, column_BG, state.step, axis=2)

        return dataclasses.replace(
            state,
            step=state.step + 1,
            tokens_BGC=with_column(state.tokens_BGC, token_bg),
            logprob_BGC=with_column(state.logprob_BGC, logprob_bg),
            length_BG=rows.put(state.length_BG, rows.of(state.length_BG) + ~done_bg),
            done_BG=rows.put(state.done_BG, done_bg | ends_bg),
        )

    def until_fits(self, state: _DecodeState, rows: _Rows, prompt: PromptCache, fewer: tuple[int, int]) -> _DecodeState:
        """Decodes until all rows still running fit into `fewer` prompts and completions of each, or caches are full."""
        # A step feeds the token before the one that it draws.
        end = min(self.size, state.cache.key.shape[-2] - self.given_size + 1)

        def too_many(state: _DecodeState) -> Array:
            # Finished rows need not leave at once: the loop ends when a smaller batch would hold all the others.
            running_B = jnp.sum(~state.done_BG, axis=1)
            return (state.step < end) & ((jnp.sum(running_B > 0) > fewer[0]) | jnp.any(running_B > fewer[1]))

        def decode_one(state: _DecodeState) -> _DecodeState:
            # Slots count forced tokens, while `step` counts sampled ones.
            last = state.step - 1
            starts_bg = None if self.given is None else rows.of(self.given.start_BG)
            token_BG = jax.lax.dynamic_index_in_dim(state.tokens_BGC, last, axis=2, keepdims=False)
            hidden_bgD, cache = self.model.decode(
                rows.of(token_BG), self.given_size + last, state.cache, prompt, self.plan, starts_bg
            )
            return self.add_token(dataclasses.replace(state, cache=cache), rows, hidden_bgD)

        return jax.lax.while_loop(too_many, decode_one, state)


def _decoded(decoder: _Decoder, prompt: PromptCache) -> _DecodeState:
    """Every row decoded to its end, with caches that grow and finished rows that leave."""
    model, shape, size, given = decoder.model, decoder.shape, decoder.size, decoder.given
    slots = cache_sizes(size)
    rows = _Rows()
    first_BGD = jnp.broadcast_to(prompt.last_hidden_BD[:, None], (*shape, prompt.last_hidden_BD.shape[-1]))
    if given is None:
        cache = model.empty_cache(*shape, slots[0], decoder.plan)
    else:
        first_BGD, cache = model.prefill_completions(given.right_aligned_BGF(), given.start_BG, prompt, decoder.plan)
    state = _DecodeState(
        step=jnp.zeros((), jnp.int32),
        tokens_BGC=constrain(jnp.zeros((*shape, size), jnp.int32), "batch"),
        logprob_BGC=constrain(jnp.zeros((*shape, size), jnp.float32), "batch"),
        length_BG=constrain(jnp.zeros(shape, jnp.int32), "batch"),
        done_BG=constrain(jnp.zeros(shape, bool) if given is None else given.limit_BG <= 0, "batch"),
        cache=cache,
    )
    if given is not None:
        state = _with_cache_size(state, given.size + slots[0])
    # The first token needs no decode step, since the prefill has its hidden state already.
    state = decoder.add_token(state, rows, first_BGD)
    compactions = compactions_of(*shape, size)
    # Each size serves until it is full or the first compaction is due. All that follows has caches of full size.
    for cache_size in slots[1:]:
        state = decoder.until_fits(state, rows, prompt, (compactions or [(0, 0)])[0])
        state = _with_cache_size(state, decoder.given_size + cache_size)
    for fewer in compactions:
        state = decoder.until_fits(state, rows, prompt, fewer)
        state, rows, prompt = _compacted(state, rows, prompt, *fewer)
    return decoder.until_fits(state, rows, prompt, (0, 0))


def _with_cache_size(state: _DecodeState, size: int) -> _DecodeState:
    """The same caches with room for `size` tokens."""
    room = [(0, 0)] * 4 + [(0, size - state.cache.key.shape[-2]), (0, 0)]
    return dataclasses.replace(state, cache=jax.tree.map(lambda a: jnp.pad(a, room), state.cache))


def _compacted(
    state: _DecodeState, rows: _Rows, prompt: PromptCache, batch: int, group: int
) -> tuple[_DecodeState, _Rows, PromptCache]:
    """The rows that still run, with finished ones where those leave room, and their caches."""
    running_bg = ~rows.of(state.done_BG)
    kept_b = None
    if batch < running_bg.shape[0]:
        kept_b = jnp.argsort(~running_bg.any(axis=1), stable=True)[:batch]
        running_bg = running_bg[kept_b]
        prompt = PromptCache(
            jax.tree.map(lambda a: a[:, kept_b], prompt.layers), prompt.valid_BP[kept_b], prompt.last_hidden_BD[kept_b]
        )
    kept = _Rows(kept_b, jnp.argsort(~running_bg, axis=1, stable=True)[:, :group])
    cache = jax.tree.map(lambda a: constrain(kept.of(a, axis=1), "", "batch", "", "kv_heads"), state.cache)
    return dataclasses.replace(state, cache=cache), rows.among(kept), prompt
