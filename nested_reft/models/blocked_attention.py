"""Softmax attention by blocks of queries and keys, whose memory grows with the length and not with its square.

A loop goes through the pairs of a block of queries and a block of keys that it may see, so the scores of one pair exist
at a time. Each query keeps its largest score so far, the sum of its weights, and the weighted sum of the values, the
last two relative to that score. The backward pass makes the weights again from the logarithm of their sum.

Sources: the running maximum and sum are those of Milakov and Gimelshein (2018), and the backward pass follows the
equations of FlashAttention (Dao et al., 2022). Here several segments of keys share one softmax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from nested_reft.models.visibility import Visible

SAVED = "attention by blocks"  # name of what a policy of rematerialisation may keep for the backward pass
MASKED = -1e30  # score of a key that is not seen; finite, so that a row without any key stays finite
LOWEST = -1e29  # where maxima start: above MASKED, so that the weight of a key that is not seen is 0 in every block


@struct.dataclass
class Segment:
    """Keys and values cut into blocks of s.

    `g` is G where each row has its own keys, and 1 where a group shares them.

    Attributes:
        key, value: `[blocks, B, J, g, s, K]`.
        valid: `[blocks, B or 1, G or 1, s]`; None where all keys are seen.
        first: `[blocks of queries, B or 1, G or 1, t]`; None where queries see all earlier keys.
        causal: as in `Visible`.
    """

    key: Array
    value: Array
    valid: Array | None
    first: Array | None
    causal: bool = struct.field(pytree_node=False)

    def rows(self, x: Array) -> Array:
        """A block of queries' values `[B, J, G, t, R, K]` as `[B, J, g, rows, K]`: all that meet the same keys."""
        return x.reshape(*x.shape[:2], self.key.shape[3], -1, x.shape[-1])


def attend_by_blocks(
    query_BGTHK: Float[Array, "B G T H K"],
    segments: Sequence[tuple[Array, Array, Visible]],
    query_block: int,
    key_block: int,
) -> Float[Array, "B G T H*K"]:
    """What `attention.attend` returns, up to rounding. A query that sees no key at all gets zeros.

    Args:
        query_BGTHK: queries; head `h` reads key head `h // (H / J)`.
        segments: each one's keys and values, `[B, G, J, S, K]` of a row's own or `[B, J, S, K]` that a group shares,
            and who sees them. One that is causal has T keys.
        query_block: queries to a block.
        key_block: keys to a block.

    Returns:
        The heads' outputs side by side, before the output projection.
    """
    batch, group, length, num_heads, head_size = query_BGTHK.shape
    num_kv_heads = segments[0][0].shape[-3]
    query_block = min(query_block, length)
    # Query heads of one key head lie side by side, and so do the rows of a group: a key is repeated for neither.
    shape = (batch, group, length, num_kv_heads, num_heads // num_kv_heads, head_size)
    query = _blocks(jnp.moveaxis(query_BGTHK.reshape(shape) / math.sqrt(head_size), 3, 1), 3, query_block)
    blocked = tuple(_segment(*segment, length, query_block, key_block) for segment in segments)
    attended = _attend(query, blocked)
    # [blocks, B, J, G, t, R, K] -> [B, G, blocks, t, J, R, K]
    attended = jnp.transpose(attended, (1, 3, 0, 4, 2, 5, 6)).reshape(batch, group, -1, num_heads * head_size)
    return attended[:, :, :length]


def _segment(key: Array, value: Array, seen: Visible, length: int, query_block: int, key_block: int) -> Segment:
    size, first = key.shape[-2], seen.first
    key_block = min(key_block, size)
    # The axis of the group comes after that of heads, and has length 1 where keys are shared.
    key, value = (x[:, :, None] if x.ndim == 4 else jnp.swapaxes(x, 1, 2) for x in (key, value))
    valid = seen.valid
    # What fills up the last block comes after all queries of a causal segment, so they do not see it anyway.
    if valid is None and size % key_block and not seen.causal:
        valid = jnp.ones(size, bool)
    if first is not None:
        # Queries that see from the same place on may share one number.
        first = jnp.broadcast_to(first, (*first.shape[:-1], length))
    return Segment(
        _blocks(key, 3, key_block),
        _blocks(value, 3, key_block),
        None if valid is None else _blocks(_with_rows(valid), 2, key_block),
        None if first is None else _blocks(_with_rows(first), 2, query_block),
        seen.causal,
    )


def _with_rows(x: Array) -> Array:
    """With both axes of rows, each of length 1 where it was missing."""
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


def _blocks(x: Array, axis: int, size: int) -> Array:
    """Cuts an axis into blocks, filled up with zeros; they become the leading axis."""
    padding = [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)]
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


@jax.custom_vjp
def _attend(query: Array, segments: tuple[Segment, ...]) -> Array:
    """Attention of query blocks `[blocks, B, J, G, t, R, K]`, which are scaled already, over all segments."""
    return _forward(query, segments)[0]


def _forward(query: Array, segments: tuple[Segment, ...]) -> tuple[Array, tuple[Any, ...]]:
    # Largest score, sum of weights, weighted sum of values.
    state = jnp.full(query.shape[:-1], LOWEST), jnp.zeros(query.shape[:-1]), jnp.zeros(query.shape, jnp.float32)
    for segment in segments:

        def step(state: tuple, pair: Array, segment: Segment = segment) -> tuple[tuple, None]:
            highest, total, summed = _at(state, pair[0])
            key, value = _at((segment.key, segment.value), pair[1])
            scores = _dot(segment.rows(_at(query, pair[0])), key, 4, 4).reshape(*highest.shape, -1)
            seen = _seen(segment, pair, query.shape[4])
            if seen is not None:
                # The axes of heads are the second and the fifth.
                scores = jnp.where(jnp.expand_dims(seen, (1, 4)), scores, MASKED)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weight, shrunk = jnp.exp(scores - new_highest[..., None]), jnp.exp(highest - new_highest)
            values = _dot(segment.rows(weight), value, 4, 3).reshape(summed.shape)
            new = new_highest, total * shrunk + jnp.sum(weight, axis=-1), summed * shrunk[..., None] + values
            return _put(state, pair[0], new), None

        state, _ = jax.lax.scan(step, state, _pairs(query, segment))
    highest, total, summed = state
    # A query that sees nothing has a total of 0.
    total = jnp.where(total > 0, total, 1.0)
    attended = checkpoint_name(summed / total[..., None], SAVED)
    log_total = checkpoint_name(highest + jnp.log(total), SAVED)
    return attended, (query, segments, attended, log_total)


def _backward(residuals: tuple[Any, ...], cotangent: Array) -> tuple[Array, tuple[Segment, ...]]:
    """With weights W, values V and the cotangent dO of the output O: dV = W^T dO, dQ = dS K and dK = dS^T Q, where
    dS = W * (dO V^T - rowsum(dO * O)).

    Scores have the keys first here, so that two of the three sums run along rows: a CPU is slow at the others.
    """
    query, segments, attended, log_total = residuals
    shift = jnp.sum(cotangent * attended, axis=-1)
    dquery, found = jnp.zeros(query.shape, jnp.float32), []
    for segment in segments:

        def step(gradients: tuple, pair: Array, segment: Segment = segment) -> tuple[tuple, None]:
            dquery, dkey, dvalue = gradients
            queries, douts = map(segment.rows, _at((query, cotangent), pair[0]))
            log_totals, shifts = (
                jnp.swapaxes(segment.rows(x[..., None]), 3, 4) for x in _at((log_total, shift), pair[0])
            )
            key, value = _at((segment.key, segment.value), pair[1])
            scores = _dot(key, queries, 4, 4)
            seen = _seen(segment, pair, query.shape[4])
            if seen is not None:
                scores = _masked_keys_first(scores, seen, query.shape[3:6])
            weight = jnp.exp(scores - log_totals)
            dscores = weight * (_dot(value, douts, 4, 4) - shifts)
            dkey, dvalue = _add((dkey, dvalue), pair[1], (_dot(dscores, queries, 4, 3), _dot(weight, douts, 4, 3)))
            dqueries = _dot(dscores, key, 3, 3).reshape(query.shape[1:])
            return (_add(dquery, pair[0], dqueries), dkey, dvalue), None

        zeros = dquery, *(jnp.zeros(x.shape, jnp.float32) for x in (segment.key, segment.value))
        (dquery, dkey, dvalue), _ = jax.lax.scan(step, zeros, _pairs(query, segment))
        gradient = dkey.astype(segment.key.dtype), dvalue.astype(segment.value.dtype)
        found.append(Segment(*gradient, None, None, segment.causal))
    return dquery.astype(query.dtype), tuple(found)


_attend.defvjp(_forward, _backward)


def _pairs(query: Array, segment: Segment) -> Int[Array, "pairs 2"]:
    """The pairs of a block of queries and a block of keys that have any two which see each other."""
    queries, keys = query.shape[4], segment.key.shape[4]
    pairs = [(i, j) for i in range(len(query)) for j in range(len(segment.key))]
    # If the block's last query does not see the key block's first key, no pair in them does.
    return jnp.array([(i, j) for i, j in pairs if not segment.causal or j * keys <= (i + 1) * queries - 1], jnp.int32)


def _seen(segment: Segment, pair: Array, queries: int) -> Bool[Array, "rows group t s"] | None:
    """True where a query of a pair of blocks sees a key; None where all do."""
    slot_s = pair[1] * segment.key.shape[4] + jnp.arange(segment.key.shape[4])
    masks = []
    if segment.causal:
        masks.append((slot_s <= (pair[0] * queries + jnp.arange(queries))[:, None])[None, None])
    if segment.first is not None:
        masks.append(slot_s >= _at(segment.first, pair[0])[..., None])
    if segment.valid is not None:
        masks.append(_at(segment.valid, pair[1])[..., None, :])
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _masked_keys_first(scores: Array, seen: Array, sizes: tuple[int, ...]) -> Float[Array, "B J g s rows"]:
    """Scores with the keys first, those that are not seen masked; `sizes` are G, t and R of a block of queries."""
    group, queries, repeats = sizes
    shared = scores.shape[2]
    seen = jnp.swapaxes(seen, 2, 3)[:, None, :, :, None, :, None]
    if shared < group:
        # The rows of a group lie side by side, after the keys that they share.
        seen = jnp.swapaxes(seen, 2, 4)
    split = scores.reshape(*scores.shape[:4], group // shared, queries, repeats)
    return jnp.where(seen, split, MASKED).reshape(scores.shape)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Float[Array, "B J g m n"]:
    """Contracts one axis of each; the first three axes are common."""
    dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    dimensions = (((x_axis,), (y_axis,)), ((0, 1, 2), (0, 1, 2)))
    return jax.lax.dot_general(x.astype(dtype), y.astype(dtype), dimensions, preferred_element_type=jnp.float32)


def _at(blocks: Any, number: Array) -> Any:
    """Block `number` of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), blocks)


def _put(blocks: Any, number: Array, new: Any) -> Any:
    """The arrays with block `number` replaced."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, number, 0), blocks, new)


def _add(blocks: Any, number: Array, new: Any) -> Any:
    """The arrays with something added to block `number`."""
    return _put(blocks, number, jax.tree.map(jnp.add, _at(blocks, number), new))
