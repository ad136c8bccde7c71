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

from nested_reft.models.transformer import Parameters, Transformer, parameter_axes

Precision = Literal["bfloat16", "int8"]


@partial(jax.jit, static_argnames="precision")
def low_precision(model: Transformer, precision: Precision) -> Transformer:
    """A copy of `model` whose matrices are stored in `precision`; norms, biases and adapters stay as they are.

    Products take bfloat16 inputs and accumulate in float32. An int8 matrix stands for
    `round(W / s) * s` with one scale `s = max|W| / 127` per output channel (per token for embedding and
    head), multiplied in after the product.
    """
    small: Parameters = {}
    scales: Parameters = {}
    for name, axes in parameter_axes(model.config).items():
        value = model.parameters()[name]
        if len([axis for axis in axes if axis != "layer"]) < 2:
            small[name] = value
        elif precision == "bfloat16":
            small[name] = value.astype(jnp.bfloat16)
        else:
            small[name], scales[name] = _int8(value, input_axis=-1 if axes[0] == "vocab" else -2)
    copy = Transformer(model.config, small)
    copy.cache_dtype, copy.layers_unrolled, copy.lora_scale = model.cache_dtype, model.layers_unrolled, model.lora_scale
    for name, scale in scales.items():
        owner = copy.layers if name.startswith("layers/") else copy
        setattr(owner, f"{name.removeprefix('layers/')}_scale", nnx.Param(scale))
    for name, adapter in nnx.state(model.layers, nnx.LoRAParam).items():
        setattr(copy.layers, str(name), nnx.LoRAParam(adapter[...]))
    return copy


def _int8(weight: Float[Array, "..."], input_axis: int) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=input_axis, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, axis=input_axis)
