"""Bridges: affine maps that stand in for the layers that a nested policy skips.

The bridge of layer `l` takes the residual stream from `x` to

    x + W_l rms(x) + b_l,    rms(x) = x / sqrt(mean(x^2) + epsilon)

It costs one small product and no caches. `bridge_fitting` finds W and b. The model carries its bridges as
constants: they are not among its parameters, no gradient is computed for them in an update, and with `W = 0` and
`b = 0` a bridged layer is a skipped one. The importance weight makes up for what a bridge gets wrong.

Maps of this kind are known for reading and for shortening trained models (Din et al., arXiv 2303.09435; ReplaceMe,
arXiv 2505.02819). There they replace layers for good.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nested_reft.models.layer import linear
from nested_reft.models.parameters import Parameters

RMS_EPSILON = 1e-5


class BridgeVariable(nnx.Variable):
    """A part of a bridge. Its own type keeps it out of what trains, with and without adapters."""


class Bridges(nnx.Module):
    """The bridges of all layers, each with a leading axis `L`.

    Attributes, by rank:
        map, map_bias: of full rank; `[L, D, D]`, which is `[out, in]`, and `[L, D]`.
        narrow, widen, widen_bias: of rank r, W = widen narrow; `[L, r, D]`, `[L, D, r]` and `[L, D]`.
    """

    def __init__(self, num_layers: int, width: int, rank: int | None = None):
        """Bridges of zeros, which change nothing.

        Args:
            num_layers: L.
            width: D.
            rank: r; None is full rank.
        """
        if rank is None:
            self.map = BridgeVariable(jnp.zeros((num_layers, width, width)))
            self.map_bias = BridgeVariable(jnp.zeros((num_layers, width)))
        else:
            self.narrow = BridgeVariable(jnp.zeros((num_layers, rank, width)))
            self.widen = BridgeVariable(jnp.zeros((num_layers, width, rank)))
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


def add_bridge(bridge: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """`x + W rms(x) + b`.

    Args:
        bridge: one layer's entry of `Bridges.stack`.
        x: the residual stream before the layer.

    Returns:
        The residual stream after it.
    """
    normed = stream_rms(x)
    if "map" in bridge:
        return x + linear(bridge, "map", normed)
    return x + linear(bridge, "widen", linear(bridge, "narrow", normed))


def stream_rms(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """`x / sqrt(mean(x^2) + epsilon)`: what a bridge reads of the residual stream.

    Args:
        x: residual stream, in float32.
    """
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + RMS_EPSILON)
