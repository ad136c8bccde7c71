"""What every decoder of this folder does with a row: draw its next token, tell how it ended, and hand it over."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.sampling import SamplingConfig, row_uniforms, sample_token
from nested_reft.sharding import constrain, shares
from nested_reft.types import ForcedPrefixes, Rollouts


def next_token(
    model: Transformer,
    sampling: SamplingConfig,
    key_bg: Key[Array, "b g"],
    position: Int[Array, "*#bg"],
    hidden_bgD: Float[Array, "b g D"],
    done_bg: Bool[Array, "b g"],
) -> tuple[Int[Array, "b g"], Float[Array, "b g"]]:
    """Draws the next token of every row, and gives its log-probability.

    A row that has ended passes through the model with the others. What it draws is not kept: both are 0.

    Args:
        model, sampling: the policy; its plan made the hidden states.
        key_bg: of each row (`sampling.row_keys`).
        position: of the token in its completion, forced tokens included.
        hidden_bgD: what predicts the token.
        done_bg: rows that have ended.
    """
    uniform = constrain(row_uniforms(key_bg, position), "", "batch")
    token_bg, logprob_bg = sample_token(uniform, _whole_rows(model.logits(hidden_bgD)), sampling)
    token_bg, logprob_bg = constrain(token_bg, "batch"), constrain(logprob_bg, "batch")
    return jnp.where(done_bg, 0, token_bg), jnp.where(done_bg, 0, logprob_bg)


def stopped(
    tokens_BGC: Int[Array, "B G C"], length_BG: Int[Array, "B G"], given: Int[Array, "B G"] | int, stop_ids: Array
) -> Bool[Array, "B G"]:
    """Whether a stop token ended each row, where a row may also end because it is full.

    Args:
        tokens_BGC, length_BG: the rows.
        given: how many of a row's first tokens were not sampled; a stop token among them ends nothing.
        stop_ids: tokens that end a completion.
    """
    last_BG1 = jnp.take_along_axis(tokens_BGC, jnp.maximum(length_BG - 1, 0)[..., None], axis=-1)
    return (length_BG > given) & jnp.isin(last_BG1[..., 0], stop_ids)


def shifted(values_BGX: Array, left_BG: Int[Array, "B G"]) -> Array:
    """Each row moved to the left by its own number of places, or to the right where that is negative; what falls out
    at one end comes in at the other."""
    size = values_BGX.shape[-1]
    index_BGX = (jnp.arange(size) + left_BG[..., None]) % size
    return jnp.take_along_axis(values_BGX, index_BGX, axis=-1)


def rollouts_of(
    sampled: tuple[Array, Array, Array, Array],
    prompt_BP: Int[Array, "B P"],
    prompt_length_B: Int[Array, " B"],
    forced: ForcedPrefixes | None,
    plan: LayerPlan,
    model: Transformer,
    policy_version: Int[Array, ""] | int,
    sampling: SamplingConfig,
) -> Rollouts:
    """The rollouts of one policy, of the completions that it sampled.

    Args:
        sampled: tokens and log-probabilities `[B, G, C]`, lengths and whether a stop token ended them `[B, G]`.
        prompt_BP, prompt_length_B, forced, plan, model, policy_version, sampling: as in `generate`.
    """
    tokens_BGC, logprob_BGC, length_BG, finished_BG = sampled
    shape = length_BG.shape
    return Rollouts(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BGC=tokens_BGC,
        length_BG=length_BG,
        finished_BG=finished_BG,
        forced_BG=jnp.zeros(shape, jnp.int32) if forced is None else forced.length_BG,
        counted_BG=jnp.ones(shape, bool),
        behavior_logprob_BGC=logprob_BGC,
        nested_BG=jnp.ones(shape, bool),
        full_share_BG=jnp.zeros(shape),
        part_BGL=jnp.broadcast_to(plan.to_parts(model.config.num_layers), (*shape, model.config.num_layers)),
        version_BG=jnp.full(shape, policy_version, jnp.int32),
        temperature_BG=jnp.full(shape, sampling.temperature, jnp.float32),
    )


def _whole_rows(logits_bgV: Array) -> Array:
    """The logits with rows split over all devices, and the vocabulary over none.

    Products leave them split along the vocabulary. To sample, each device would else gather the logits of all rows of
    its share of the batch: on TPUs, as many bytes as the weights.
    """
    # Named first, or devices would rather gather the head's weights, and read all of them in every step.
    logits_bgV = constrain(logits_bgV, "batch", "", "vocab")
    if logits_bgV.shape[0] % shares("row") == 0:
        return constrain(logits_bgV, "row")
    return constrain(logits_bgV, "batch", "completion")
