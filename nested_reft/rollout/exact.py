"""Exact nested rollouts: the nested policy drafts, the full model verifies.

Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318) with the
target's own sub-network as the draft. What comes out is distributed exactly as the full model's
samples, so every importance weight is one.

The draft has no prefill and no caches of its own: at verified positions it reads the full model's.
Any proposal is valid as long as its own probabilities enter the rule below.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.layer import KeyValues
from nested_reft.models.placement import gathered
from nested_reft.models.transformer import PromptCache, Transformer
from nested_reft.rollout.sampling import (
    SamplingConfig,
    draw_categorical,
    policy_probability,
    row_keys,
    row_uniforms,
)
from nested_reft.types import ForcedPrefixes, Rollouts, valid_mask

TINY = 1e-38  # the smallest probability that a log is taken of; float32 has little below it


@struct.dataclass
class ExactRollouts:
    """Rollouts of the full model, and what their drafting did.

    Attributes:
        rollouts: exactly the full model's samples; `behavior_logprob_BGC` is the full model's.
        tested, accepted: draft tokens that verification reached, and those it kept, of rows that were not done.
        rounds: full-model passes of the batch.
    """

    rollouts: Rollouts
    tested: Int[Array, ""]
    accepted: Int[Array, ""]
    rounds: Int[Array, ""]

    @property
    def acceptance(self) -> Float[Array, ""]:
        """Share of tested draft tokens that were kept: an estimate of E min(1, p / q).

        Drafts after a rejection are never tested; counting them would estimate less, the more the longer drafts are.
        """
        return self.accepted / jnp.maximum(self.tested, 1)


@struct.dataclass
class _State:
    """Carry of the loop: `length_BG` tokens of each row are final; the caches hold all but the last."""

    tokens_BGC: Int[Array, "B G C"]
    logprob_BGC: Float[Array, "B G C"]
    length_BG: Int[Array, "B G"]
    finished_BG: Bool[Array, "B G"]
    cache: KeyValues
    rounds: Int[Array, ""]
    tested: Int[Array, ""]
    accepted: Int[Array, ""]

    @property
    def done_BG(self) -> Bool[Array, "B G"]:
        """Rows that take no more tokens."""
        return self.finished_BG | (self.length_BG >= self.tokens_BGC.shape[-1])


@partial(jax.jit, static_argnames=("group_size", "max_completion_tokens", "sampling", "draft_length", "shared_prefix"))
def generate_exact(
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
    draft_length: int,
    shared_prefix: int = 0,
) -> ExactRollouts:
    """Samples completions of the full model, drafted by the policy that `plan` leaves.

    Each round drafts k tokens x_1 .. x_k from the nested q and runs the full model p once over them:

        accept x_t with probability min(1, p_t(x_t) / q_t(x_t)), in order;
        at the first rejection draw from max(p_t - q_t, 0), normalised, and end the round;
        with all k accepted draw one more token from p_{k+1}.

    Greedy decoding is the same rule with one-hot p and q: the output is that of plain greedy
    decoding, token for token.

    Args:
        model: the target, which verifies.
        prompt_BP, prompt_length_B: right-padded prompts.
        plan: the layers that draft.
        stop_ids: tokens that end a completion; they are part of it.
        key: PRNG key. As in `generate`, a draw depends on it, the prompt's number, the place in the group and the
            position, and not on the round.
        policy_version: updates that the model has seen; written through to the rollouts.
        forced: first tokens of the completions, given instead of sampled; None samples all.
        number_B: the number of each prompt; None is its place in the batch.
        group_size: G.
        max_completion_tokens: C, forced tokens included.
        sampling: temperature and truncation, of draft and verification alike.
        draft_length: k, at least 1.
        shared_prefix: leading tokens that all prompts have in common.

    Returns:
        The rollouts, and how many drafts were tested and accepted.
    """
    rows = (prompt_BP.shape[0], group_size)
    model = gathered(model)
    # The prompt runs under the full model only: the draft reads the same caches, slot by slot.
    prompt = model.prefill(prompt_BP, valid_mask(prompt_length_B, prompt_BP.shape[1]), shared_prefix=shared_prefix)
    keys_BG = row_keys(key, jnp.arange(rows[0]) if number_B is None else number_B, group_size)
    rounds = _Rounds(model, plan, prompt, stop_ids, Purposes.of(keys_BG), sampling, draft_length)
    state = rounds.start(rows, max_completion_tokens)
    if forced is not None:
        state = rounds.with_given(state, forced)
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.done_BG), rounds.one_round, state)
    num_layers = model.config.num_layers
    rollouts = Rollouts(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BGC=state.tokens_BGC,
        length_BG=state.length_BG,
        finished_BG=state.finished_BG,
        forced_BG=jnp.zeros(rows, jnp.int32) if forced is None else forced.length_BG,
        counted_BG=jnp.ones(rows, bool),
        behavior_logprob_BGC=state.logprob_BGC,
        # The nested policy only drafted; what came out is the full model's.
        nested_BG=jnp.zeros(rows, bool),
        full_share_BG=jnp.ones(rows),
        part_BGL=jnp.broadcast_to(plan.to_parts(num_layers), (*rows, num_layers)),
        version_BG=jnp.full(rows, policy_version, jnp.int32),
        temperature_BG=jnp.full(rows, sampling.temperature, jnp.float32),
    )
    return ExactRollouts(rollouts, state.tested, state.accepted, state.rounds)


class Purposes(NamedTuple):
    """The keys of each row, by what is drawn at a position.

    A position may be drafted in several rounds, with the same numbers each time. Only the last of these drafts is
    tested, and whether the earlier ones were thrown away depended on the positions before them alone. So the numbers
    of a position are as good as new when they count.
    """

    draft_BG: Key[Array, "B G"]
    test_BG: Key[Array, "B G"]
    own_BG: Key[Array, "B G"]  # of tokens that the full model draws itself

    @classmethod
    def of(cls, key_BG: Key[Array, "B G"]) -> Purposes:
        """The keys of rows.

        Args:
            key_BG: of `row_keys`.
        """
        split = jax.vmap(jax.vmap(jax.random.split, (0, None)), (0, None))
        return cls(*jnp.moveaxis(split(key_BG, 3), -1, 0))


@dataclass(frozen=True)
class _Rounds:
    """What stays the same while a batch is drafted and verified, and the steps of one round."""

    model: Transformer
    plan: LayerPlan
    prompt: PromptCache
    stop_ids: Array
    keys: Purposes
    sampling: SamplingConfig
    draft_length: int

    def start(self, rows: tuple[int, int], size: int) -> _State:
        """Every row's first token, which the prompt's own pass predicts, and empty caches."""
        p_BV = self._probability(self.prompt.last_hidden_BD)
        p_BGV = jnp.broadcast_to(p_BV[:, None], (*rows, p_BV.shape[1]))
        first_BG = draw_categorical(row_uniforms(self.keys.own_BG, 0), p_BGV)
        chosen_BG = jnp.take_along_axis(p_BGV, first_BG[..., None], axis=-1)[..., 0]
        zero = jnp.zeros((), jnp.int32)
        return _State(
            tokens_BGC=jnp.zeros((*rows, size), jnp.int32).at[:, :, 0].set(first_BG),
            logprob_BGC=jnp.zeros((*rows, size), jnp.float32).at[:, :, 0].set(jnp.log(jnp.maximum(chosen_BG, TINY))),
            length_BG=jnp.ones(rows, jnp.int32),
            finished_BG=jnp.isin(first_BG, self.stop_ids),
            # A round may begin at the last position and still writes all its drafts, hence the room beyond C.
            cache=self.model.empty_cache(*rows, size + self.draft_length, None),
            rounds=zero,
            tested=zero,
            accepted=zero,
        )

    def with_given(self, state: _State, forced: ForcedPrefixes) -> _State:
        """The starting state of rows whose first tokens are given; a row without any keeps the token it drew."""
        size, has_prefix_BG = state.tokens_BGC.shape[-1], forced.length_BG > 0
        # One pass fills the caches with all prefixes. Beyond a shorter one they hold padding, which is
        # written over before anything attends to it: a round feeds its tokens in order.
        _, cache = self.model.extend(forced.tokens_BGF, jnp.zeros_like(forced.length_BG), state.cache, self.prompt)
        room = max(size - forced.tokens_BGF.shape[-1], 0)
        given_BGC = jnp.pad(forced.tokens_BGF, ((0, 0), (0, 0), (0, room)))[..., :size]
        given_BGC = jnp.where(jnp.arange(size) < forced.length_BG[..., None], given_BGC, 0)
        return dataclasses.replace(
            state,
            tokens_BGC=jnp.where(has_prefix_BG[..., None], given_BGC, state.tokens_BGC),
            logprob_BGC=jnp.where(has_prefix_BG[..., None], 0.0, state.logprob_BGC),
            length_BG=jnp.maximum(forced.length_BG, 1),
            finished_BG=state.finished_BG & ~has_prefix_BG,
            cache=cache,
        )

    def one_round(self, state: _State) -> _State:
        """Drafts, verifies, and adds what was accepted."""
        # The caches lack the last final token, so a round feeds it before its drafts.
        start_BG = jnp.maximum(state.length_BG - 1, 0)
        last_BG = jnp.take_along_axis(state.tokens_BGC, start_BG[..., None], axis=-1)[..., 0]
        carry = (last_BG, state.cache, start_BG)
        (_, cache, _), (drafts_TBG, q_TBGV) = jax.lax.scan(self._draft, carry, jnp.arange(self.draft_length))
        drafts_BGT = jnp.moveaxis(drafts_TBG, 0, -1)
        # The full model writes over what the draft left in the caches, so no nested key or value survives the round.
        hidden_BGTD, cache = self.model.extend(
            jnp.concatenate([last_BG[..., None], drafts_BGT], axis=-1), start_BG, cache, self.prompt
        )
        p_BGTV = self._probability(hidden_BGTD)
        tokens_BGT, logprob_BGT, accepted_BG = accept(
            self.keys, start_BG + 1, drafts_BGT, jnp.moveaxis(q_TBGV, 0, 2), p_BGTV
        )
        return _with_tokens(state, tokens_BGT, logprob_BGT, accepted_BG, self.stop_ids, cache)

    def _draft(self, carry: Any, position: Array) -> tuple[Any, tuple[Array, Array]]:
        """One draft token: feeds the token before it, draws it, keeps q."""
        # The carry holds the caches, so the second draft token attends to the first one's keys.
        token_BG, cache, start_BG = carry
        hidden_BGTD, cache = self.model.extend(token_BG[..., None], start_BG + position, cache, self.prompt, self.plan)
        q_BGV = self._probability(hidden_BGTD[:, :, 0])
        token_BG = draw_categorical(row_uniforms(self.keys.draft_BG, start_BG + 1 + position), q_BGV)
        return (token_BG, cache, start_BG), (token_BG, q_BGV)

    def _probability(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        return policy_probability(self.model.logits(hidden), self.sampling)


def _with_tokens(
    state: _State,
    tokens_BGT: Int[Array, "B G T"],
    logprob_BGT: Float[Array, "B G T"],
    accepted_BG: Int[Array, "B G"],
    stop_ids: Int[Array, " stops"],
    cache: KeyValues,
) -> _State:
    """The state after a round of k = T - 1 drafts: of the accepted tokens and the one after them, those up to a stop
    token and within C are added to rows that are not done."""
    offset_T, size = jnp.arange(tokens_BGT.shape[-1]), state.tokens_BGC.shape[-1]
    is_stop_BGT = jnp.isin(tokens_BGT, stop_ids)
    # The stop token itself stays, so it is subtracted from its own count.
    after_stop_BGT = jnp.cumsum(is_stop_BGT, axis=-1) - is_stop_BGT > 0
    position_BGT = state.length_BG[..., None] + offset_T
    # The token after the accepted drafts counts too, hence `<=`.
    kept_BGT = offset_T <= accepted_BG[..., None]
    kept_BGT &= ~after_stop_BGT & (position_BGT < size) & ~state.done_BG[..., None]
    index_B, index_G = (jnp.arange(count) for count in state.length_BG.shape)
    # Tokens that are not kept are sent to index C, outside the array, where `mode="drop"` discards them.
    where = (index_B[:, None, None], index_G[None, :, None], jnp.where(kept_BGT, position_BGT, size))
    # Drafts beyond C could never be kept, so they do not count as tested.
    drafted_BG = jnp.where(state.done_BG, 0, jnp.minimum(offset_T[-1], size - state.length_BG))
    return _State(
        tokens_BGC=state.tokens_BGC.at[where].set(tokens_BGT, mode="drop"),
        logprob_BGC=state.logprob_BGC.at[where].set(logprob_BGT, mode="drop"),
        length_BG=state.length_BG + kept_BGT.sum(axis=-1),
        finished_BG=state.finished_BG | (kept_BGT & is_stop_BGT).any(axis=-1),
        cache=cache,
        rounds=state.rounds + 1,
        tested=state.tested + jnp.minimum(accepted_BG + 1, drafted_BG).sum(),
        accepted=state.accepted + jnp.minimum(accepted_BG, drafted_BG).sum(),
    )


def accept(
    keys: Purposes,
    position_BG: Int[Array, "B G"],
    drafts_BGT: Int[Array, "B G T"],
    q_BGTV: Float[Array, "B G T V"],
    p_BGTV: Float[Array, "B G T+1 V"],
) -> tuple[Int[Array, "B G T+1"], Float[Array, "B G T+1"], Int[Array, "B G"]]:
    """The speculative-sampling rule, for every row on its own.

    Args:
        keys: of the rows.
        position_BG: of each row's first draft, counted from its completion's first token.
        drafts_BGT: k draft tokens.
        q_BGTV: the distributions they were drawn from.
        p_BGTV: the target's distributions at the same positions, and at the one after.

    Returns:
        Tokens, of which the first `accepted + 1` count; log p of each in nats; and how many drafts were accepted.
    """
    length = drafts_BGT.shape[-1]
    position_BGT = position_BG[..., None] + jnp.arange(length)
    uniform_BGT = row_uniforms(jnp.broadcast_to(keys.test_BG[..., None], drafts_BGT.shape), position_BGT)[0]
    p_draft_BGT = jnp.take_along_axis(p_BGTV[:, :, :length], drafts_BGT[..., None], axis=-1)[..., 0]
    q_draft_BGT = jnp.take_along_axis(q_BGTV, drafts_BGT[..., None], axis=-1)[..., 0]
    # u q < p is u < p / q without a division by a q that may be zero.
    passes_BGT = uniform_BGT * q_draft_BGT < p_draft_BGT
    # The running product is 1 up to the first rejection, so its sum counts the drafts before it.
    accepted_BG = jnp.cumprod(passes_BGT, axis=-1).sum(axis=-1)
    # One formula serves both cases. With all drafts accepted, q counts as zero and the residual is p itself.
    at = accepted_BG[..., None, None]
    p_BGV = jnp.take_along_axis(p_BGTV, at, axis=2)[:, :, 0]
    q_BGV = jnp.take_along_axis(q_BGTV, jnp.minimum(at, length - 1), axis=2)[:, :, 0]
    q_BGV = jnp.where((accepted_BG < length)[..., None], q_BGV, 0.0)
    residual_BGV = jnp.maximum(p_BGV - q_BGV, 0.0)
    # p = q up to rounding leaves nothing: then p itself is what is asked for.
    residual_BGV = jnp.where(residual_BGV.sum(axis=-1, keepdims=True) > 0, residual_BGV, p_BGV)
    next_BG = draw_categorical(row_uniforms(keys.own_BG, position_BG + accepted_BG), residual_BGV)
    tokens_BGT = jnp.where(jnp.arange(length + 1) == accepted_BG[..., None], next_BG[..., None], _pad_one(drafts_BGT))
    p_token_BGT = jnp.take_along_axis(p_BGTV, tokens_BGT[..., None], axis=-1)[..., 0]
    # Tokens after the first rejection may have probability 0. They are thrown away, but their log must stay finite.
    return tokens_BGT, jnp.log(jnp.maximum(p_token_BGT, TINY)), accepted_BG


def _pad_one(values_BGT: Int[Array, "B G T"]) -> Int[Array, "B G T+1"]:
    return jnp.pad(values_BGT, ((0, 0), (0, 0), (0, 1)))
