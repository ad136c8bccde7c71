"""A model's parameters: their names, shapes and logical axes, and fresh values."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from nested_reft.models.config import ModelConfig

Parameters = dict[str, Any]

MLP_PARAMETERS = ("mlp_norm", "gate", "up", "down")
"""Those of a layer that its MLP reads; attention reads all others."""


_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "width"),
    "final_norm": ("norm",),
    "layers/attention_norm": ("layer", "norm"),
    "layers/query": ("layer", "heads", "width"),
    "layers/key": ("layer", "kv_heads", "width"),
    "layers/value": ("layer", "kv_heads", "width"),
    "layers/output": ("layer", "width", "heads"),
    "layers/mlp_norm": ("layer", "norm"),
    "layers/gate": ("layer", "hidden", "width"),
    "layers/up": ("layer", "hidden", "width"),
    "layers/down": ("layer", "width", "hidden"),
    # Optional parameters come last, so that they do not change the place of the others.
    "head": ("vocab", "width"),
    "layers/query_bias": ("layer", "heads"),
    "layers/key_bias": ("layer", "kv_heads"),
    "layers/value_bias": ("layer", "kv_heads"),
    "layers/query_norm": ("layer", "head_size"),
    "layers/key_norm": ("layer", "head_size"),
}
# Two axes of a full map are as wide as the model, and one mesh axis can split only one of them.
_BRIDGE_AXES = {
    "bridges/map": ("layer", "norm", "width"),
    "bridges/narrow": ("layer", "rank", "width"),
    "bridges/widen": ("layer", "width", "rank"),
}


def parameter_axes(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Names of the model's parameters and the logical axes of each.

    The one table behind initialisation, sharding and weight formats. Layer parameters carry a
    leading `layer` axis and are named `layers/<name>`.

    Args:
        config: decides which optional parameters there are.

    Returns:
        Parameter name -> logical axes, which `sharding.MESH_AXES` maps to mesh axes.
    """
    absent: set[str] = set()
    if config.tied_embeddings:
        absent.add("head")
    if not config.qkv_bias:
        absent |= {name for name in _AXES if name.endswith("_bias")}
    if not config.qk_norm:
        absent |= {"layers/query_norm", "layers/key_norm"}
    return {name: axes for name, axes in _AXES.items() if name not in absent}


def axes_of(name: str) -> tuple[str, ...]:
    """Logical axes of any array of a model: a parameter, an adapter, a bridge, or the scale of an int8 copy.

    Args:
        name: its path, such as `layers/query_lora_in` or `bridges/map`.

    Returns:
        As `parameter_axes`; empty where the array is whole on every device, as norms and heads of one number are.
    """
    if name in _BRIDGE_AXES:
        return _BRIDGE_AXES[name]
    # An adapter reads what its projection reads, and writes what it writes.
    for suffix, axes in (("_lora_in", (0, None, 2)), ("_lora_out", (0, 1, None))):
        if name.endswith(suffix):
            own = _AXES[name.removesuffix(suffix)]
            return tuple("rank" if axis is None else own[axis] for axis in axes)
    if name.endswith("_scale"):  # one for each output channel
        return _AXES.get(name.removesuffix("_scale"), ())[:-1]
    return _AXES.get(name, ())


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter named in `parameter_axes`.

    Args:
        config: the model, which gives the size of each logical axis.
    """
    size = {
        "vocab": config.vocab_size,
        "width": config.width,
        "norm": config.width,
        "hidden": config.hidden_width,
        "heads": config.num_heads * config.head_size,
        "kv_heads": config.num_kv_heads * config.head_size,
        "head_size": config.head_size,
        "layer": config.num_layers,
    }
    return {name: tuple(size[axis] for axis in axes) for name, axes in parameter_axes(config).items()}


def splittable_parts(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """What each logical axis that a mesh may split consists of, and how many of it the model has.

    An axis of heads is split between heads, never within one: its length says too little.

    Args:
        config: the model.
    """
    return {
        "kv_heads": ("key/value heads", config.num_kv_heads),
        "heads": ("query heads", config.num_heads),
        "hidden": ("hidden units", config.hidden_width),
        "vocab": ("tokens in its vocabulary", config.vocab_size),
        "width": ("units of width", config.width),
    }


def initial_parameters(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Parameters:
    """Fresh parameters: norms one, biases zero, matrices normal with standard deviation
    1 / sqrt(fan in), those that write to the residual stream scaled by 1 / sqrt(2 L) more.

    Args:
        config: the model.
        key: PRNG key of all matrices.
        dtype: what the parameters are stored in; values are drawn in float32.

    Returns:
        Parameters by name, as `Transformer` takes them.
    """
    parameters: Parameters = {}
    for index, (name, shape) in enumerate(parameter_shapes(config).items()):
        leaf = name.removeprefix("layers/")
        if leaf.endswith("norm"):
            value = jnp.ones(shape, dtype)
        elif leaf.endswith("bias"):
            value = jnp.zeros(shape, dtype)
        else:
            # Matrices are `[out, in]`, so the last axis is the fan in.
            scale = 1 / math.sqrt(shape[-1])
            # 2 L outputs add up in the residual stream, whose variance should not grow with depth (GPT-2).
            if leaf in ("output", "down"):
                scale /= math.sqrt(2 * config.num_layers)
            # The place in the table picks the key, so an entry put before others would change what a seed gives.
            matrix_key = jax.random.fold_in(key, index)
            if name.startswith("layers/"):  # drawn `[in, out]`, as earlier versions did: a seed's model stays the same
                matrix = jax.random.normal(matrix_key, (shape[0], shape[2], shape[1])).swapaxes(1, 2)
            else:
                matrix = jax.random.normal(matrix_key, shape)
            value = (scale * matrix).astype(dtype)
        parameters[name] = value
    return parameters
