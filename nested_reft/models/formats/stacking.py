"""Stacked parameters out of checkpoints that hold one tensor per layer.

A weight format is a table from our parameter names to its tensor names, with `{layer}` where the
layer's index goes. Every format that we read stores linear weights as `[out, in]`, and so do we.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import Parameters, parameter_axes, parameter_shapes, splittable_parts
from nested_reft.sharding import check_divisible, place


def tensor_shapes(config: ModelConfig, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds.

    Args:
        config: the model.
        names: the format's table.
    """
    shapes = {}
    for parameter, shape in parameter_shapes(config).items():
        if not parameter.startswith("layers/"):
            shapes[names[parameter]] = shape
            continue
        for layer in range(config.num_layers):
            # A checkpoint holds one tensor per layer, so the stack's leading axis goes.
            shapes[names[parameter].format(layer=layer)] = shape[1:]
    return shapes


def check_tensors(
    config: ModelConfig,
    names: Mapping[str, str],
    found: Mapping[str, tuple[int, ...]],
    ignored: Callable[[str], bool],
) -> None:
    """Refuses a checkpoint that does not hold exactly this model, before any weight is read.

    Args:
        config: the model.
        names: the format's table.
        found: name and shape of each tensor in the checkpoint.
        ignored: True for names that may be there beside the parameters.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place in the model.
    """
    # A configuration may ask for a billion layers, so their number is checked before their tensors are listed.
    if config.num_layers > len(found):
        raise ValueError(
            f"it lacks tensors: it holds {len(found)}, and its configuration asks for {config.num_layers} layers"
        )
    expected = tensor_shapes(config, names)
    # Missing tensors come first: where a download stopped halfway, every later message would mislead.
    if missing := [name for name in expected if name not in found]:
        raise ValueError(
            f"it lacks {_some(missing)}; its configuration asks for"
            " them: the download or export is incomplete, or the configuration is another model's"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(f"tensor '{name}' has shape {tuple(found[name])}; its configuration says {shape}")
    if unknown := [name for name in found if name not in expected and not ignored(name)]:
        raise ValueError(f"it holds {_some(unknown)}, which a '{config.family}' model has no place for")


def stack_parameters(
    config: ModelConfig,
    names: Mapping[str, str],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    mesh: Mesh | None = None,
) -> Parameters:
    """Reads all parameters, one tensor at a time, into stacks allocated once.

    No more than one parameter's stack exists beside the parameters themselves, so the peak
    stays near one copy of the model.

    Args:
        config: the model.
        names: the format's table.
        read: gives a tensor by its name in the checkpoint, in the checkpoint's layout.
        dtype: dtype of the result.
        mesh: where they are placed; None is one device. No device ever holds a parameter whole that the mesh splits.

    Returns:
        Parameters by name, as `Transformer` takes them.

    Raises:
        ValueError: the mesh does not split the model evenly.
    """
    axes = parameter_axes(config)
    if mesh is not None:
        check_divisible(splittable_parts(config), mesh)
    parameters: Parameters = {}
    for parameter, shape in parameter_shapes(config).items():
        # The stack is filled in place. Joining a list of layers would need twice its memory.
        stack = np.empty(shape, jnp.dtype(dtype))
        if parameter.startswith("layers/"):
            for layer in range(config.num_layers):
                stack[layer] = read(names[parameter].format(layer=layer))
        else:
            stack[...] = read(names[parameter])
        # Each stack goes to the device at once, so that the host holds one at a time.
        parameters[parameter] = jnp.asarray(stack) if mesh is None else place(stack, mesh, axes[parameter])
    return parameters


def _some(names: Iterable[str]) -> str:
    """The first few names and how many more, for a message."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"tensor {shown}" if len(names) <= 3 else f"tensors {shown} ({len(names) - 3} more)"
