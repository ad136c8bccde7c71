"""Log-probabilities of given completions, without ever holding the logits of very many tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.sampling import tempered
from nested_reft.sharding import shares
from nested_reft.types import valid_mask

LOGITS_AT_ONCE = 2**26  # 256 MB of float32, on each device


def completion_logprobs(
    model: Transformer,
    prompt_BP: Int[Array, "B P"],
    prompt_length_B: Int[Array, " B"],
    tokens_BGC: Int[Array, "B G C"],
    temperature: float,
    plan: LayerPlan | None = None,
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
        differentiable_entropy: let gradients through the entropy, at the cost of keeping a second
            array over the vocabulary for the backward pass; otherwise they stop there.
        shared_prefix: leading tokens that all prompts have in common.

    Returns:
        Log-probabilities, 0 or less, and entropies, 0 or more; neither is reduced.
    """
    valid_BP = valid_mask(prompt_length_B, prompt_BP.shape[1])
    hidden_BGCD = model.completion_hidden(prompt_BP, valid_BP, tokens_BGC, plan, shared_prefix=shared_prefix)
    return hidden_logprobs(model, hidden_BGCD, tokens_BGC, temperature, differentiable_entropy)


def hidden_logprobs(
    model: Transformer,
    hidden_BGCD: Float[Array, "B G C D"],
    tokens_BGC: Int[Array, "B G C"],
    temperature: float,
    differentiable_entropy: bool = False,
) -> tuple[Float[Array, "B G C"], Float[Array, "B G C"]]:
    """What `completion_logprobs` returns, of final hidden states.

    Args:
        model: the policy, of which only the output head is used.
        hidden_BGCD: states of `Transformer.completion_hidden`, under any plan.
        tokens_BGC: the tokens that they predict.
        temperature: that of the rollout.
        differentiable_entropy: let gradients through the entropy; see `completion_logprobs`.
    """

    # Log-probability and entropy share the logits, which are the costly part.
    def block(hidden: Array, tokens: Array) -> tuple[Array, Array]:
        return logprob_and_entropy(tempered(model.logits(hidden), temperature), tokens, differentiable_entropy)

    return over_position_blocks(block, model.config.vocab_size, hidden_BGCD, tokens_BGC)


def logprob_and_entropy(
    logits: Float[Array, "*rows V"], token: Int[Array, "*rows"], differentiable_entropy: bool = False
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """`x_t - log Z` and `log Z - sum_v e^(x_v - max x) (x_v - max x) / Z`, in nats, with `Z = sum_v e^(x_v - max x)`.

    Both read the same exponentials, the only array over the vocabulary that is kept beside the logits. A second one
    takes a quarter of the head's share of an update on a CPU.

    Args:
        logits: tempered; -inf excludes a token, which then adds nothing.
        token: t of each row.
        differentiable_entropy: let gradients through the entropy.

    Returns:
        Log-probabilities, 0 or less up to rounding, and entropies, from 0 to log V.
    """
    # The maximum cancels in both, so it needs no gradient.
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weight = jnp.exp(logits - highest)
    total = jnp.sum(weight, axis=-1)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)
    logprob = (chosen - highest)[..., 0] - jnp.log(total)
    if not differentiable_entropy:
        logits, weight, total = jax.lax.stop_gradient((logits, weight, total))
    # 0 log 0 counts as 0, while 0 * -inf would be NaN, and its gradient too. A weight of e^-1000 is 0 already.
    shifted = jnp.maximum(logits - highest, -1e3)
    return logprob, jnp.log(total) - jnp.sum(weight * shifted, axis=-1) / total


def block_positions(batch: int, group: int, size: int, vocab_size: int) -> int:
    """How many completion positions `over_position_blocks` takes at once; all of them where their logits are few.

    Args:
        batch, group, size: B, G and C.
        vocab_size: V.
    """
    # Devices share prompts and the vocabulary. With smaller blocks they would sum the head's gradient more often.
    held = LOGITS_AT_ONCE * math.gcd(shares("batch"), batch) * shares("vocab")
    # A single position is always taken, even where its logits exceed the limit.
    return min(size, max(1, held // (batch * group * vocab_size)))


def over_position_blocks(function: Callable[..., Any], vocab_size: int, *arrays: Array) -> Any:
    """`function` of arrays `[B, G, C, ...]` that makes logits on its way to results `[B, G, C]`.

    Logits of all tokens at once can be larger than everything else together (1,000 tokens of Qwen's
    vocabulary take 600 MB). Where they would exceed `LOGITS_AT_ONCE`, completion positions are worked
    off block by block, each block's logits computed again in the backward pass.

    Args:
        function: takes a block of each array; its results may be a tree.
        vocab_size: V, which decides the size of a block.
        arrays: with the same B, G and C.

    Returns:
        What `function` of the whole arrays would return.
    """
    batch, group, size = arrays[0].shape[:3]
    block_size = block_positions(batch, group, size, vocab_size)
    # Where all fits, nothing is cut, copied or computed twice.
    if block_size == size:
        return function(*arrays)

    def split(value: Array) -> Array:
        # Positions are filled up to whole blocks, and what that adds is cut off at the end.
        padded = jnp.pad(value, [(0, 0), (0, 0), (0, -size % block_size)] + [(0, 0)] * (value.ndim - 3))
        return jnp.moveaxis(padded.reshape(batch, group, -1, block_size, *value.shape[3:]), 2, 0)

    # The map works one block after the other, so only one block of logits exists at a time.
    results = jax.lax.map(lambda blocks: jax.checkpoint(function)(*blocks), tuple(split(value) for value in arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, group, -1)[..., :size], results)
