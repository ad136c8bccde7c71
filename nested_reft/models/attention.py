"""Attention of whole texts: in updates, in scoring and in prefill. Single tokens that decode use `layer.attend`."""

from __future__ import annotations

from jaxtyping import Array, Float

from nested_reft.backends import attention_blocks
from nested_reft.models.blocked_attention import attend_by_blocks
from nested_reft.models.layer import KeyValues, as_operand, attend
from nested_reft.models.visibility import Visible


def attend_texts(
    query_BGTHK: Float[Array, "B G T H K"], *segments: tuple[KeyValues, Visible]
) -> Float[Array, "B G T H*K"]:
    """Softmax attention over one or more segments of keys and values, in memory that grows with the length.

    Short texts take `layer.attend`, which writes all scores out. Long ones go by blocks; `backends.attention_blocks`
    says from where on.

    Args:
        query_BGTHK: queries; head `h` reads key head `h // (H / J)`.
        segments: each one's keys and values, as `layer.attend` takes them, and which of them the queries see.

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
