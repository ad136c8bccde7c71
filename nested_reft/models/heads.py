"""Heads that read a number off a hidden state: the value of a prefix."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class HeadParam(nnx.Param):
    """A parameter of a head. It trains with the whole model and also where adapters alone do."""


class ScalarHead(nnx.Module):
    """w . h + b for each hidden state h, in float32; zero until its first update."""

    def __init__(self, width: int):
        """Args:
        width: D of the model.
        """
        # With zeros every value begins at 0, which random weights would only blur. The gradient of w is h, not zero.
        self.weight = HeadParam(jnp.zeros(width))
        self.bias = HeadParam(jnp.zeros(()))

    def __call__(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
        """One number for each state.

        Args:
            hidden: final hidden states, after the last norm.
        """
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), self.weight[...]) + self.bias[...]
