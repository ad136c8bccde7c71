"""Several texts in one row: where each token stands in its own text, and which tokens of the row it sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def places(
    size: int, segment_BGC: Int[Array, "B G C"] | None = None
) -> tuple[Int[Array, "*rows size"], Bool[Array, "*rows size size"]]:
    """The position of each token in its text, and a mask: True where a token sees another one of its row.

    Args:
        size: of the rows' first tokens, those that are run; at most C.
        segment_BGC: the text that each token belongs to, those of one text side by side. None is one text to a row,
            and then positions and mask have no axes for rows.
    """
    slot_C, causal_CC = jnp.arange(size), jnp.tril(jnp.ones((size, size), bool))
    if segment_BGC is None:
        return slot_C, causal_CC
    segment_BGC = segment_BGC[..., :size]
    # A row's first token begins a text, like every token whose left neighbour is of another one.
    begins_BGC = jnp.pad(segment_BGC[..., 1:] != segment_BGC[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
    first_BGC = jax.lax.cummax(jnp.where(begins_BGC, slot_C, 0), axis=2)
    return slot_C - first_BGC, causal_CC & (segment_BGC[..., :, None] == segment_BGC[..., None, :])
