"""Where the arrays of a model lie on a mesh, and how programs gather them: parameters, adapters, bridges and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from nested_reft.models.parameters import Parameters, axes_of
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import constrain, place, used_axes

T = TypeVar("T")


def place_state(state: T, mesh: Mesh) -> T:
    """Places each array of a model's state by its name.

    Args:
        state: of `nnx.state`, or a part of it.
        mesh: the devices that hold the arrays.
    """
    return _by_name(lambda array, name: place(array, mesh, axes_of(name)), state)


def place_bridges(stack: Parameters, mesh: Mesh) -> Parameters:
    """Places bridges that `Bridges.stack` returned, or others of their names.

    Args:
        stack: arrays by name.
        mesh: the devices that hold the arrays.
    """
    return {name: place(array, mesh, axes_of(f"bridges/{name}")) for name, array in stack.items()}


def keep_split(state: T) -> T:
    """Inside a program: the same arrays, split as they are stored.

    The compiler would else be free to give back a state that is split in another way, which would compile the next call
    again, and hold gradients whole.

    Args:
        state: parameters, gradients or moments, whose paths end in the names of parameters.
    """
    return _by_name(lambda array, name: constrain(array, *axes_of(name)) if axes_of(name) else array, state)


def gathered(model: Transformer) -> Transformer:
    """Inside a program: the same model with the width of every matrix whole, for loops that read all of it each time.

    A loop of decoding steps would gather each matrix in every step.

    Args:
        model: as it is stored.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return model
    graph, state = nnx.split(model)
    state = _by_name(lambda array, name: constrain(array, *used_axes(axes_of(name))), state)
    return nnx.merge(graph, state)


def _by_name(change: Callable[[jax.Array, str], jax.Array], tree: T) -> T:
    def changed(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        # The names in a path are its dictionary keys; what is around them says whether it is a moment.
        name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return change(array, name)

    return jax.tree_util.tree_map_with_path(changed, tree)
