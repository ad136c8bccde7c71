"""Sampling with fewer rows than completions: a row that ends takes the next completion that waits.

Completions of a long-tailed length leave most of a batch idle while the longest go on. Here, as many prompts as one
likes are answered by a fixed number of rows, which stay busy until nothing waits. What is sampled is what `generate`
samples, token for token: a draw depends on its prompt's number, its place in the group and its position.

One round has four steps:

1. Where the shelf is empty, prefill the next prompts.
2. Move the caches so that the oldest row begins at slot 0.
3. Rows that have ended take completions from the shelf.
4. Decode until an eighth of the rows has ended, or as many as take what is left, or the slots are full.

When nothing waits, decode the rest and drop rows that have ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.layer import KeyValues
from nested_reft.models.placement import gathered
from nested_reft.models.transformer import PromptCache, Transformer
from nested_reft.rollout.drawing import next_token, rollouts_of, shifted, stopped
from nested_reft.rollout.sampling import SamplingConfig, row_keys
from nested_reft.rollout.schedule import cache_sizes, compactions_of, row_slots, stocked_prompts, taken_together
from nested_reft.sharding import constrain, shares
from nested_reft.types import ForcedPrefixes, Rollouts, valid_mask


@struct.dataclass
class _Completions:
    """Completions: those of R rows, or all N in the order in which they are handed out, which goes prompt by prompt."""

    tokens_nC: Int[Array, "n C"]
    logprob_nC: Float[Array, "n C"]
    length_n: Int[Array, " n"]


@struct.dataclass
class _Prefilled:
    """The shelf: the next `b` prompts, which have been run and whose completions wait for rows."""

    first: Int[Array, ""]  # number of the first of these completions
    end: Int[Array, ""]  # and of the one after the last
    prompt: PromptCache
    hidden_bGD: Float[Array, "b G D"]  # what predicts the first token to sample
    prefix: KeyValues | None  # of forced tokens, `[A, b, G, J, F, K]`


@struct.dataclass
class _Row:
    """What each row holds; `R` rows, each a group of one with a copy of its prompt's keys and values."""

    number_R: Int[Array, " R"]  # of its completion; N where it has had none
    start_R: Int[Array, " R"]  # the step that its completion's first token belongs to
    done_R: Bool[Array, " R"]
    hidden_RD: Float[Array, "R D"]  # what predicts its next token
    current: _Completions  # R of them
    prompt: PromptCache
    cache: KeyValues  # `[A, R, 1, J, W, K]`: every row writes into the same slot, wherever it began


@struct.dataclass
class _State:
    """Carry of the loops."""

    step: Int[Array, ""]
    next: Int[Array, ""]  # number of the first completion that waits
    row: _Row
    finished: _Completions  # N of them, filled in as rows take another one


@partial(jax.jit, static_argnames=("group_size", "max_completion_tokens", "sampling", "rows", "shared_prefix"))
def generate_refilled(
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
    rows: int,
    shared_prefix: int = 0,
) -> Rollouts:
    """What `generate` samples, decoded by `rows` rows at a time.

    Prompts run in small batches, shortly before their completions are handed out. Each row has a copy of its prompt's
    keys and values, so memory grows with `rows` and not with the number of prompts. When nothing waits any more, rows
    that have ended are dropped as in `generate`.

    Args:
        model, prompt_BP, prompt_length_B, plan, stop_ids, key, policy_version, forced, number_B, group_size,
            max_completion_tokens, sampling, shared_prefix: as in `generate`.
        rows: completions that are decoded at the same time, from 1 to B * G.
    """
    shape, model = (prompt_BP.shape[0], group_size), gathered(model)
    number_B = jnp.arange(shape[0]) if number_B is None else number_B
    decoder = _Refiller(
        model, plan, stop_ids, prompt_BP, prompt_length_B, row_keys(key, number_B, group_size).reshape(-1),
        max_completion_tokens, sampling, rows, shared_prefix, forced,
    )  # fmt: skip
    completions = decoder.run()
    tokens_BGC, logprob_BGC, length_BG = (
        constrain(values.reshape(*shape, *values.shape[1:]), "batch")
        for values in (completions.tokens_nC, completions.logprob_nC, completions.length_n)
    )
    finished_BG = stopped(tokens_BGC, length_BG, 0 if forced is None else forced.length_BG, stop_ids)
    sampled = (tokens_BGC, logprob_BGC, length_BG, finished_BG)
    return rollouts_of(sampled, prompt_BP, prompt_length_B, forced, plan, model, policy_version, sampling)


@dataclass(frozen=True)
class _Refiller:
    """What stays the same while completions are decoded, and the parts of its loop."""

    model: Transformer
    plan: LayerPlan
    stop_ids: Array
    prompt_BP: Array
    prompt_length_B: Array
    key_N: Key[Array, " N"]
    size: int  # C
    sampling: SamplingConfig
    rows: int
    shared_prefix: int
    forced: ForcedPrefixes | None

    @property
    def count(self) -> int:
        """N, completions in all."""
        return self.key_N.shape[0]

    @property
    def group(self) -> int:
        """G."""
        return self.count // self.prompt_BP.shape[0]

    @property
    def given(self) -> int:
        """F, slots that prefixes take."""
        return 0 if self.forced is None else self.forced.tokens_BGF.shape[-1]

    @property
    def _cache_sizes(self) -> list[int]:
        """Cache sizes, small to large. A running row holds at most C - 1 tokens, so C slots have room for one more.
        Prefixes need F + 1.
        """
        smaller = (size for size in cache_sizes(self.size)[:-1] if size > self.given)
        return [*smaller, row_slots(self.size, self.given, is_refilled=True)]

    def run(self) -> _Completions:
        """All completions."""
        state, shelf = self._start()

        def one_round(carry: tuple[_State, _Prefilled]) -> tuple[_State, _Prefilled]:
            state, shelf = carry
            # The condition returns the shelf alone: a backend may copy what a condition returns, and the caches are
            # large.
            shelf = jax.lax.cond(
                state.next >= shelf.end, lambda: self._prefill_next(state.next // self.group), lambda: shelf
            )
            state = self._admit(self._shift_to_front(state), shelf)
            return self._decode_until(state, self._is_due, self._cache_sizes), shelf

        state, _ = jax.lax.while_loop(lambda carry: carry[0].next < self.count, one_round, (state, shelf))
        # Where devices share the rows, all of them stay, as in `generate`: their caches would have to move.
        sizes = compactions_of(self.rows, 1, self.size) if shares("batch") == 1 else []
        for fewer, _ in [*sizes, (0, 1)]:

            def fits(state: _State, fewer: int = fewer) -> Bool[Array, ""]:
                return jnp.sum(~state.row.done_R) <= fewer

            # Few rows are left, whose caches are small whatever room they have.
            state = jax.lax.while_loop(
                lambda state, fits=fits: ~fits(state),
                lambda state, fits=fits: self._decode_until(self._shift_to_front(state), fits, self._cache_sizes[-1:]),
                state,
            )
            state = dataclasses.replace(state, finished=_put(state.finished, state.row.number_R, state.row.current))
            if fewer:
                # A stable sort keeps those that run, in their order.
                kept_r = jnp.argsort(state.row.done_R, stable=True)[:fewer]
                state = dataclasses.replace(state, row=_taken(state.row, kept_r))
        return state.finished

    def _start(self) -> tuple[_State, _Prefilled]:
        """Rows that have all ended, and an empty shelf."""
        shelf: _Prefilled = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: self._prefill_next(jnp.zeros((), jnp.int32)))
        )
        config, rows = self.model.config, self.rows

        def nothing(count: int) -> _Completions:
            return _Completions(
                *(jnp.zeros((count, *x), d) for x, d in (((self.size,), int), ((self.size,), float), ((), int)))
            )

        layers = jax.tree.map(lambda x: jnp.zeros((x.shape[0], rows, *x.shape[2:]), x.dtype), shelf.prompt.layers)
        row = _Row(
            number_R=jnp.full(rows, self.count),
            start_R=jnp.zeros(rows, int),
            done_R=jnp.ones(rows, bool),
            hidden_RD=jnp.zeros((rows, config.width), shelf.hidden_bGD.dtype),
            current=nothing(rows),
            prompt=PromptCache(
                layers, jnp.zeros((rows, self.prompt_BP.shape[1]), bool), jnp.zeros((rows, config.width))
            ),
            cache=self.model.empty_cache(rows, 1, self._cache_sizes[-1], self.plan),
        )
        zero = jnp.zeros((), int)
        return _State(zero, zero, _split(row), nothing(self.count)), shelf

    def _prefill_next(self, prompt: Int[Array, ""]) -> _Prefilled:
        """The next prompts after their own pass, from that of a number on."""
        batch, group = self.prompt_BP.shape[0], self.group
        count = stocked_prompts(self.rows, group)
        # After the last prompt the last one fills up the batch; its copies are not used.
        index_b = jnp.minimum(prompt + jnp.arange(count), batch - 1)
        valid_bP = valid_mask(self.prompt_length_B[index_b], self.prompt_BP.shape[1])
        cache = self.model.prefill(self.prompt_BP[index_b], valid_bP, self.plan, self.shared_prefix)
        hidden_bGD = jnp.broadcast_to(cache.last_hidden_BD[:, None], (count, group, cache.last_hidden_BD.shape[-1]))
        prefix = None
        if self.forced is not None:
            # Prefixes end at the same slot, so that rows which take them go on from the same step.
            start_bG = self.given - self.forced.length_BG[index_b]
            tokens_bGF = shifted(self.forced.tokens_BGF[index_b], -start_bG)
            hidden_bGD, prefix = self.model.prefill_completions(tokens_bGF, start_bG, cache, self.plan)
        first = prompt * group
        return _Prefilled(first, jnp.minimum(first + count * group, self.count), cache, hidden_bGD, prefix)

    def _is_due(self, state: _State) -> Bool[Array, ""]:
        """True when enough rows have ended to be refilled together, and always when nothing waits."""
        return jnp.sum(state.row.done_R) >= jnp.minimum(taken_together(self.rows), self.count - state.next)

    def _admit(self, state: _State, shelf: _Prefilled) -> _State:
        """The state after rows that have ended took what is on the shelf."""
        row = state.row
        place_R = state.next + jnp.cumsum(row.done_R) - 1
        takes_R = row.done_R & (place_R < shelf.end)
        finished = _put(state.finished, jnp.where(takes_R, row.number_R, self.count), row.current)
        number_R = jnp.where(takes_R, place_R, row.number_R)
        prompt_R, of_group_R = jnp.divmod(jnp.where(takes_R, place_R - shelf.first, 0), self.group)

        def chosen(new: Array, old: Array, axis: int = 0) -> Array:
            return jnp.where(jnp.expand_dims(takes_R, [a for a in range(old.ndim) if a != axis]), new, old)

        length_R, tokens_RC, cache = jnp.zeros(self.rows, int), jnp.zeros((self.rows, self.size), int), row.cache
        if self.forced is not None and shelf.prefix is not None:
            forced = jax.tree.map(lambda x: x.reshape(self.count, *x.shape[2:])[number_R], self.forced)
            length_R, given = forced.length_BG, self.given
            tokens_RC = jnp.where(jnp.arange(given) < length_R[:, None], forced.tokens_BGF, 0)
            tokens_RC = jnp.pad(tokens_RC, ((0, 0), (0, max(self.size - given, 0))))[:, : self.size]
            # The prefixes end before the next slot.
            slot_F = state.step - given + jnp.arange(given)
            cache = jax.tree.map(
                lambda whole, new: whole.at[..., slot_F, :].set(
                    chosen(new[:, prompt_R, of_group_R][:, :, None], whole[..., slot_F, :], axis=1)
                ),
                cache,
                shelf.prefix,
            )
        new = _Completions(tokens_RC, jnp.zeros_like(row.current.logprob_nC), length_R)
        row = _Row(
            number_R=number_R,
            start_R=chosen(state.step - length_R, row.start_R),
            done_R=chosen(length_R >= self.size, row.done_R),
            hidden_RD=chosen(shelf.hidden_bGD[prompt_R, of_group_R], row.hidden_RD),
            current=jax.tree.map(chosen, new, row.current),
            prompt=PromptCache(
                jax.tree.map(
                    lambda x, old: chosen(x[:, prompt_R], old, axis=1), shelf.prompt.layers, row.prompt.layers
                ),
                chosen(shelf.prompt.valid_BP[prompt_R], row.prompt.valid_BP),
                chosen(shelf.prompt.last_hidden_BD[prompt_R], row.prompt.last_hidden_BD),
            ),
            cache=cache,
        )
        return _State(state.step, state.next + takes_R.sum(), _split(row), finished)

    def _shift_to_front(self, state: _State) -> _State:
        """The same rows with the oldest one's first token in the first slot, so that steps read few slots.

        Where prefixes may come, as many slots as these take are left in front.
        """
        age_R = jnp.where(state.row.done_R, 0, state.step - state.row.start_R)
        shift = state.step - jnp.maximum(age_R.max(), self.given)
        slot_W = (jnp.arange(state.row.cache.key.shape[-2]) + shift) % state.row.cache.key.shape[-2]
        cache = jax.tree.map(lambda x: jnp.take(x, slot_W, axis=-2), state.row.cache)
        row = dataclasses.replace(state.row, start_R=state.row.start_R - shift, cache=cache)
        return dataclasses.replace(state, step=state.step - shift, row=row)

    def _decode_until(
        self, state: _State, is_over: Callable[[_State], Bool[Array, ""]], sizes: Sequence[int]
    ) -> _State:
        """Decodes until it is over or the slots are full, with caches of one size after the other."""
        for size in sizes:
            whole = state.row.cache
            part = jax.tree.map(lambda x, size=size: x[..., :size, :], whole)
            state = dataclasses.replace(state, row=dataclasses.replace(state.row, cache=part))
            state = jax.lax.while_loop(
                lambda state, size=size: ~is_over(state) & (state.step < size), self._one_step, state
            )
            cache = jax.tree.map(lambda x, new, size=size: x.at[..., :size, :].set(new), whole, state.row.cache)
            state = dataclasses.replace(state, row=dataclasses.replace(state.row, cache=cache))
        return state

    def _one_step(self, state: _State) -> _State:
        """Draws the next token of every row and feeds it."""
        row, current = state.row, state.row.current
        position_R = state.step - row.start_R
        key_R = jnp.take(self.key_N, row.number_R, mode="clip")
        by_row = (key_R, position_R, row.hidden_RD, row.done_R)
        token_R1, logprob_R1 = next_token(self.model, self.sampling, *(x[:, None] for x in by_row))
        here_RC = (jnp.arange(self.size) == position_R[:, None]) & ~row.done_R[:, None]
        current = _Completions(
            jnp.where(here_RC, token_R1, current.tokens_nC),
            jnp.where(here_RC, logprob_R1, current.logprob_nC),
            current.length_n + ~row.done_R,
        )
        ends_R = jnp.isin(token_R1[:, 0], self.stop_ids) | (position_R + 1 >= self.size)
        hidden_R1D, cache = self.model.decode(
            token_R1, state.step, row.cache, row.prompt, self.plan, row.start_R[:, None]
        )
        row = dataclasses.replace(
            row, current=current, done_R=row.done_R | ends_R, hidden_RD=hidden_R1D[:, 0], cache=cache
        )
        return dataclasses.replace(state, step=state.step + 1, row=row)


def _put(finished: _Completions, number_R: Int[Array, " R"], new: _Completions) -> _Completions:
    """The completions with those of some numbers replaced; the number N stands for none."""
    return jax.tree.map(lambda whole, part: whole.at[number_R].set(part, mode="drop"), finished, new)


def _split(row: _Row) -> _Row:
    """The rows spread over the devices that share a batch."""
    return _Row(
        *(jax.tree.map(lambda x: constrain(x, "batch"), part) for part in _by_row(row)),
        prompt=PromptCache(
            jax.tree.map(lambda x: constrain(x, "", "batch", "kv_heads"), row.prompt.layers),
            constrain(row.prompt.valid_BP, "batch"),
            constrain(row.prompt.last_hidden_BD, "batch"),
        ),
        cache=jax.tree.map(lambda x: constrain(x, "", "batch", "", "kv_heads"), row.cache),
    )


def _taken(row: _Row, kept_r: Int[Array, " r"]) -> _Row:
    """Some of the rows."""
    layers, cache = jax.tree.map(lambda x: x[:, kept_r], (row.prompt.layers, row.cache))
    return _Row(
        *(jax.tree.map(lambda x: x[kept_r], part) for part in _by_row(row)),
        prompt=PromptCache(layers, row.prompt.valid_BP[kept_r], row.prompt.last_hidden_BD[kept_r]),
        cache=cache,
    )


def _by_row(row: _Row) -> tuple[Array, Array, Array, Array, _Completions]:
    """The fields whose arrays begin with an axis of rows."""
    return row.number_R, row.start_R, row.done_R, row.hidden_RD, row.current
