"""Several texts in one row: where each token stands in its own text, and which tokens of the row it sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nested_reft.models.visibility import Visible


def places(size: int, segment_BGC: Int[Array, "B G C"] | None = None) -> tuple[Int[Array, "*rows size"], Visible]:
    """The position of each token in its text, and which tokens of its row it sees: the earlier ones of its text.

    Args:
        size: of the rows' first tokens, those that are run; at most C.
        segment_BGC: the text that each token belongs to, those of one text side by side. None is one text to a row,
            and then positions have no axes for rows.
    """
    slot_C = jnp.arange(size)
    if segment_BGC is None:
        return slot_C, Visible(causal=True)
    segment_BGC = segment_BGC[..., :size]
    # A row's first token begins a text, like every token whose left neighbour is of another one.
    begins_BGC = jnp.pad(segment_BGC[..., 1:] != segment_BGC[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=True)
    first_BGC = jax.lax.cummax(jnp.where(begins_BGC, slot_C, 0), axis=2)
    return slot_C - first_BGC, Visible(first=first_BGC, causal=True)
