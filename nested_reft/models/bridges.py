"""Bridges: affine maps that stand in for the layers that a nested policy skips.

The bridge of layer `l` takes the residual stream from `x` to

    x + W_l rms(x) + b_l,    rms(x) = x / sqrt(mean(x^2) + epsilon)

and at the first position of a sequence to `x + c_l`. The stream there is many times as large as elsewhere, all tokens
attend to it, and where sequences begin with the same token it is one vector: a constant can then meet it exactly,
where the map cannot. Without it some layers can hardly be bridged.

A bridge costs one small product and no caches. `bridge_fitting` finds W and b. The model carries its bridges as
constants: they are not among its parameters, no gradient is computed for them in an update, and with zeros a
bridged layer is a skipped one. The importance weight makes up for what a bridge gets wrong.

Maps of this kind are known for reading and for shortening trained models (Din et al., arXiv 2303.09435; ReplaceMe,
arXiv 2505.02819). There they replace layers for good.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nested_reft.models.layer import linear
from nested_reft.models.parameters import Parameters

RMS_EPSILON = 1e-5


class BridgeVariable(nnx.Variable):
    """A part of a bridge. Its own type keeps it out of what trains, with and without adapters."""


class Bridges(nnx.Module):
    """The bridges of all layers, each with a leading axis `L`.

    Attributes, by rank:
        first: c, `[L, D]`.
        map, map_bias: of full rank; `[L, D, D]`, which is `[out, in]`, and `[L, D]`.
        narrow, widen, widen_bias: of rank r, W = widen narrow; `[L, r, D]`, `[L, D, r]` and `[L, D]`.
    """

    def __init__(self, num_layers: int, width: int, rank: int | None = None, dtype: Any = jnp.float32):
        """Bridges of zeros, which change nothing.

        Args:
            num_layers: L.
            width: D.
            rank: r; None is full rank.
            dtype: of the matrices, as the layers' own; biases and constants are float32.
        """
        self.first = BridgeVariable(jnp.zeros((num_layers, width)))
        if rank is None:
            self.map = BridgeVariable(jnp.zeros((num_layers, width, width), dtype))
            self.map_bias = BridgeVariable(jnp.zeros((num_layers, width)))
        else:
            self.narrow = BridgeVariable(jnp.zeros((num_layers, rank, width), dtype))
            self.widen = BridgeVariable(jnp.zeros((num_layers, width, rank), dtype))
            self.widen_bias = BridgeVariable(jnp.zeros((num_layers, width)))

    @property
    def rank(self) -> int | None:
        """r, or None of full rank."""
        return self.narrow[...].shape[1] if hasattr(self, "narrow") else None

    def load(self, stack: Parameters) -> None:
        """Takes over what `stack` returned, with other values.

        Args:
            stack: arrays by name.
        """
        for name, value in stack.items():
            setattr(self, name, BridgeVariable(value))

    def stack(self) -> Parameters:
        """All bridges by name, each array with its leading axis `L`."""
        return {name: value[...] for name, value in nnx.state(self).items()}


MATRICES = ("map", "narrow", "widen")
"""The names that low-precision copies store in fewer bits."""


def add_bridge(
    bridge: Parameters, x: Float[Array, "*rows D"], is_first: Bool[Array, "*rows"] | None = None
) -> Float[Array, "*rows D"]:
    """`x + W rms(x) + b`, and `x + c` at first positions.

    Args:
        bridge: one layer's entry of `Bridges.stack`.
        x: the residual stream before the layer.
        is_first: True at the first positions of sequences; None where there are none.

    Returns:
        The residual stream after it.
    """
    normed = stream_rms(x)
    if "map" in bridge:
        added = linear(bridge, "map", normed)
    else:
        added = linear(bridge, "widen", linear(bridge, "narrow", normed))
    return x + (added if is_first is None else jnp.where(is_first[..., None], bridge["first"], added))


def stream_rms(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """`x / sqrt(mean(x^2) + epsilon)`: what a bridge reads of the residual stream.

    Args:
        x: residual stream, in float32.
    """
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + RMS_EPSILON)
