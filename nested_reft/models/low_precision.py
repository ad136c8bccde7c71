"""Rollout copies of a model with smaller weights: bfloat16, or int8 with a scale per output channel.

What a copy samples enters training with the log-probabilities that the copy gave it, so its rounding is one more way
of being off-policy and the importance weight corrects it like layer skipping.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from nested_reft.backends import stored_bfloat16
from nested_reft.models.bridges import MATRICES as BRIDGE_MATRICES
from nested_reft.models.layer import stored_as
from nested_reft.models.parameters import parameter_axes
from nested_reft.models.transformer import Transformer


@partial(jax.jit, static_argnames="precision")
def low_precision(model: Transformer, precision: Literal["bfloat16", "int8"]) -> Transformer:
    """A copy of `model` with matrices in `precision` and caches in bfloat16; norms, biases and adapters stay.

    Products take bfloat16 inputs and accumulate in float32. An int8 matrix stands for
    `round(W / s) * s` with one scale `s = max|W| / 127` per output channel (per token for embedding and
    head), multiplied in after the product.

    Args:
        model: in float32 or bfloat16; it stays as it is.
        precision: what the matrices become.

    Returns:
        A model that samples and scores; it is not meant for training.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("bfloat16", "int8"):
        raise ValueError(f"precision is '{precision}'; allowed are bfloat16 and int8")
    # A clone has its own variables, so the model that trains keeps its weights.
    copy = nnx.clone(model)
    bfloat16 = stored_bfloat16()
    copy.cache_dtype = bfloat16
    for name, axes in parameter_axes(model.config).items():
        # Norms and biases have one axis beside that of the layers. They are small, so their rounding would gain
        # nothing.
        if len([axis for axis in axes if axis != "layer"]) < 2:
            continue
        owner, leaf = (copy.layers, name.removeprefix("layers/")) if axes[0] == "layer" else (copy, name)
        for stored, value in _rounded(leaf, getattr(owner, leaf)[...], precision, bfloat16).items():
            setattr(owner, stored, nnx.Param(value))
    if copy.bridges is not None:
        for name, weight in model.stacked_bridges().items():
            if name in BRIDGE_MATRICES:
                copy.bridges.load(_rounded(name, weight, precision, bfloat16))
    return copy


def _rounded(name: str, weight: Array, precision: str, bfloat16: Any) -> dict[str, Array]:
    """A matrix in its new form, and the scale of int8 beside it, by name."""
    if precision == "bfloat16":
        return {name: stored_as(weight, bfloat16)}
    integers, scale = _int8(weight)
    return {name: integers, f"{name}_scale": scale}


def _int8(weight: Float[Array, "*stack O I"]) -> tuple[Int8[Array, "*stack O I"], Float[Array, "*stack O"]]:
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=-1, keepdims=True)
    # A channel of zeros has no scale of its own, and any one keeps it zero. 127 and not 128 keeps the range
    # symmetric.
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, axis=-1)
