"""Softmax attention over segments of keys and values: with all scores written out, or for long texts by blocks."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from nested_reft.backends import attention_blocks, flat_products
from nested_reft.models.blocked_attention import MASKED, attend_by_blocks
from nested_reft.models.layer import KeyValues, as_operand
from nested_reft.models.visibility import Visible


def attend(
    query_BGTHK: Float[Array, "B G T H K"], *segments: tuple[KeyValues, Bool[Array, "..."]]
) -> Float[Array, "B G T H*K"]:
    """Softmax attention over one or more segments of keys and values.

    One softmax spans all segments, so the result is that of ordinary attention over their
    concatenation, without ever repeating a prompt's keys for each of its completions. It is
    normalised last, so that the segments need not be joined.

    Args:
        query_BGTHK: queries; head `h` reads key head `h // (H / J)`.
        segments: each one's keys and values, `[B, G, J, S, K]` of a row's own or `[B, J, S, K]` that a group
            shares, and a mask: True where a query may look; broadcasts to `[B, G, T, S]`.

    Returns:
        The heads' outputs side by side, before the output projection.
    """
    batch, group, length, num_heads, head_size = query_BGTHK.shape
    num_kv_heads = segments[0][0].key.shape[-3]
    # Query heads of one key head lie side by side, so a key is never repeated for them.
    query = query_BGTHK.reshape(batch, group, length, num_kv_heads, num_heads // num_kv_heads, head_size)
    # Queries are scaled and not scores, of which there are usually many more.
    query = query / math.sqrt(head_size)

    scores = [jnp.where(_over_heads(mask), _scores(query, segment.key), MASKED) for segment, mask in segments]
    # The softmax of all segments needs one common maximum. With `initial` a segment may have no keys at all, as that
    # of a completion of one token.
    highest = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, initial=MASKED, keepdims=True) for x in scores])
    # The maximum cancels in the quotient below, so its gradient is zero and need not be computed.
    weights = [jnp.exp(x - jax.lax.stop_gradient(highest)) for x in scores]
    sums = [_weighted_sum(weight, segment.value) for weight, (segment, _) in zip(weights, segments, strict=True)]
    total_BGJTR = functools.reduce(jnp.add, [jnp.sum(weight, axis=-1) for weight in weights])
    attended = jnp.swapaxes(functools.reduce(jnp.add, sums) / total_BGJTR[..., None], 2, 3)
    return attended.reshape(batch, group, length, num_heads * head_size)


def _over_heads(mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """A mask over `[B, G, T, S]`, broadcast over heads: `[B, G, J, T, H/J, S]`."""
    return jnp.expand_dims(mask.reshape((1,) * (4 - mask.ndim) + mask.shape), (2, 4))


# The next two spell their products out, batch axes first and the contracted axis last where it lies so: einsum may
# ask for transposed keys, values or weights, and a CPU then spends more on moving them than on the product.


def _scores(query_BGTJRK: Float[Array, "B G T J R K"], key: Num[Array, "..."]) -> Float[Array, "B G J T R S"]:
    """Products of queries with keys `[B, G, J, S, K]` or `[B, J, S, K]`."""
    if key.ndim == 4:
        # A prompt's keys have no axis of the group: all completions' queries meet them in one product.
        query = jnp.moveaxis(query_BGTJRK, 3, 1)
        return jnp.moveaxis(_batched_product(query, key, axes=(5, 3), batch=2), 1, 2)
    # Keys first: a group's few queries make a poor left side.
    return jnp.moveaxis(_batched_product(key, jnp.swapaxes(query_BGTJRK, 2, 3), axes=(4, 5), batch=3), 3, 5)


def _weighted_sum(weight_BGJTRS: Float[Array, "B G J T R S"], value: Num[Array, "..."]) -> Float[Array, "B G J T R K"]:
    """Sums of values `[B, G, J, S, K]` or `[B, J, S, K]` under attention weights."""
    if value.ndim == 4:
        weight = jnp.swapaxes(weight_BGJTRS, 1, 2)
        return jnp.moveaxis(_batched_product(weight, value, axes=(5, 2), batch=2), 1, 2)
    return _batched_product(weight_BGJTRS, value, axes=(5, 3), batch=3)


def _batched_product(x: Array, y: Array, axes: tuple[int, int], batch: int) -> Float[Array, "..."]:
    """Contracts one axis of each, the first `batch` axes shared, in the narrower dtype and summed in float32."""
    x, y = as_operand(x), as_operand(y)
    # The wider operand is narrowed, because widening the other would copy a whole cache.
    dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    x, y = x.astype(dtype), y.astype(dtype)
    if flat_products():  # heads have axes of their own, so the same numbers are multiplied in float32
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    shared = tuple(range(batch))
    dimensions = (((axes[0],), (axes[1],)), (shared, shared))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def attend_texts(
    query_BGTHK: Float[Array, "B G T H K"], *segments: tuple[KeyValues, Visible]
) -> Float[Array, "B G T H*K"]:
    """Softmax attention over one or more segments of keys and values, in memory that grows with the length.

    Short texts take `attend`, which writes all scores out. Long ones go by blocks; `backends.attention_blocks`
    says from where on.

    Args:
        query_BGTHK: queries; head `h` reads key head `h // (H / J)`.
        segments: each one's keys and values, as `attend` takes them, and which of them the queries see.

    Returns:
        The heads' outputs side by side, before the output projection.
    """
    queries = query_BGTHK.shape[2]
    sizes = [keys_values.key.shape[-2] for keys_values, _ in segments]
    blocks = attention_blocks(queries, sum(sizes))
    if blocks is None:
        masked = [(own, seen.mask(queries, size)) for (own, seen), size in zip(segments, sizes, strict=True)]
        return attend(query_BGTHK, *masked)
    given = [(as_operand(own.key), as_operand(own.value), seen) for own, seen in segments]
    return attend_by_blocks(query_BGTHK, given, *blocks)
