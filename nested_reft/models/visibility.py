"""Which keys of a segment its queries see, said by a few numbers for each token instead of one for each pair."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Visible:
    """A query at place t sees the key at place s where `valid[s]`, and `first[t] <= s`, and `s <= t` if `causal`.

    What is None excludes nothing. Leading axes broadcast to `[B, G]`.

    Attributes:
        valid: False at keys that nobody sees, such as padding.
        first: the earliest place that each query sees.
        causal: whether queries and keys are the same tokens, of which none sees a later one.
    """

    valid: Bool[Array, "*rows S"] | None = None
    first: Int[Array, "*rows T"] | None = None
    causal: bool = struct.field(pytree_node=False, default=False)

    def mask(self, queries: int, keys: int) -> Bool[Array, "..."]:
        """The same as a mask that broadcasts to `[B, G, T, S]`: True where a query sees a key.

        Args:
            queries: T.
            keys: S.
        """
        mask = jnp.tril(jnp.ones((queries, keys), bool)) if self.causal else jnp.ones((), bool)
        if self.first is not None:
            mask = mask & (jnp.arange(keys) >= self.first[..., None])
        return mask if self.valid is None else mask & self.valid[..., None, :]
