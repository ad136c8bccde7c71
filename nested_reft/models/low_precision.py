"""Rollout copies of a model with smaller weights: bfloat16, or int8 with a scale per output channel.

What a copy samples enters training with the log-probabilities that the copy gave it, so its rounding is one more way
of being off-policy and the importance weight corrects it like layer skipping.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

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
    bfloat16 = jnp.uint16 if jax.default_backend() == "cpu" else jnp.bfloat16  # see `stored_as`
    copy.cache_dtype = bfloat16
    for name, axes in parameter_axes(model.config).items():
        # Norms and biases have one axis beside that of the layers. They are small, so their rounding would gain
        # nothing.
        if len([axis for axis in axes if axis != "layer"]) < 2:
            continue
        owner, leaf = (copy.layers, name.removeprefix("layers/")) if axes[0] == "layer" else (copy, name)
        weight = getattr(owner, leaf)[...]
        if precision == "bfloat16":
            setattr(owner, leaf, nnx.Param(stored_as(weight, bfloat16)))
        else:
            integers, scale = _int8(weight)
            setattr(owner, leaf, nnx.Param(integers))
            setattr(owner, f"{leaf}_scale", nnx.Param(scale))
    return copy


def _int8(weight: Float[Array, "*stack O I"]) -> tuple[Int8[Array, "*stack O I"], Float[Array, "*stack O"]]:
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=-1, keepdims=True)
    # A channel of zeros has no scale of its own, and any one keeps it zero. 127 and not 128 keeps the range
    # symmetric.
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, axis=-1)
