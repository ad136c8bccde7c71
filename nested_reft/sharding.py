"""Device mesh, and the one table from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from nested_reft import processes

# Axes not named here are replicated. `batch` is the leading axis of every batch array.
MESH_AXIS = {"batch": "data", "vocab": "model", "heads": "model", "kv_heads": "model", "hidden": "model"}


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out.

    Attributes:
        data: devices that share a batch's prompts.
        model: devices that share each layer's heads and hidden units.
    """

    data: int = 1
    model: int = 1

    def __post_init__(self):
        for name in ("data", "model"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name} is {getattr(self, name)}; allowed is 1 or more")


def make_mesh(config: MeshConfig) -> Mesh:
    """A `data` x `model` mesh over the first devices.

    Args:
        config: how many devices each axis has.

    Raises:
        ValueError: there are fewer devices than the mesh needs, or several processes have more.
    """
    needed, devices = config.data * config.model, jax.devices()
    if needed > len(devices):
        raise ValueError(
            f"mesh.data x mesh.model is {config.data} x {config.model} = {needed} devices; allowed are 1 to"
            f" {len(devices)}, which are here"
        )
    if processes.count() > 1 and needed < len(devices):
        # A process whose devices are left out would have no part in the arrays, and the others would wait for it.
        raise ValueError(
            f"mesh.data x mesh.model is {config.data} x {config.model} = {needed} devices; allowed is {len(devices)},"
            f" all devices of the {processes.count()} processes"
        )
    # With Auto axes the compiler chooses how intermediate values are split.
    return jax.make_mesh(
        (config.data, config.model), ("data", "model"), (AxisType.Auto, AxisType.Auto), devices=devices[:needed]
    )


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The partition of an array from its logical axes.

    Args:
        axes: logical axes of an array in their order; unknown names are replicated.

    Raises:
        ValueError: two of its axes would be split over the same mesh axis.
    """
    mesh_axes = [MESH_AXIS.get(axis) for axis in axes]
    # Axes that are replicated may repeat, so they are left out of the comparison.
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to mesh axes {mesh_axes}: one mesh axis can split only one of them")
    return PartitionSpec(*mesh_axes)


def place(tree: Any, mesh: Mesh, axes: Sequence[str] = ()) -> Any:
    """Makes values of the host, or arrays that lie elsewhere, arrays of a mesh. All arrays of a run are placed here.

    Several processes hold equal host values. Each takes from them what its own devices hold, and nothing is sent.

    Args:
        tree: any tree of NumPy arrays, numbers, device arrays and typed PRNG keys.
        mesh: the devices that hold the arrays, perhaps those of several processes.
        axes: logical axes of every leaf, in their order; what is not named is whole on every device.
    """
    return place_as(tree, NamedSharding(mesh, partition_spec(tuple(axes))))


def place_as(tree: Any, sharding: Sharding) -> Any:
    """Like `place`, by a partition that is known already.

    Args:
        tree: as in `place`.
        sharding: of every leaf.
    """
    leaves = jax.tree.leaves(tree)
    if sharding.is_fully_addressable and all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return jax.device_put(tree, sharding)  # all leaves in one call
    return jax.tree.map(lambda leaf: _placed(leaf, sharding), tree)


def _placed(value: Any, sharding: Sharding) -> jax.Array:
    """A value on devices of several processes, or from them."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        if not sharding.is_fully_addressable:
            return _moved(sharding)(value)
        value = to_host(value)
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        words = _placed(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(value))
    host = np.asarray(value)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def to_host(tree: Any) -> Any:
    """The same tree with NumPy arrays. All arrays of a run come to the host here.

    Arrays that are split over several processes are gathered, all of them by one program, so every process must call it
    for the same arrays.

    Args:
        tree: any tree of arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    far = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable]
    if not far:
        return jax.device_get(tree)
    split = [i for i in far if not leaves[i].is_fully_replicated]
    if split:
        mesh = leaves[split[0]].sharding.mesh
        gathered = _moved(NamedSharding(mesh, PartitionSpec()))([leaves[i] for i in split])
        for i, whole in zip(split, gathered, strict=True):
            leaves[i] = whole
    for i in far:
        leaves[i] = leaves[i].addressable_data(0)
    return jax.device_get(jax.tree.unflatten(structure, leaves))


@lru_cache
def _moved(sharding: Sharding) -> Callable[[Any], Any]:
    """The program that gives arrays another partition."""
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def shard_parameters(
    parameters: dict[str, jax.Array], axes: dict[str, tuple[str, ...]], mesh: Mesh
) -> dict[str, jax.Array]:
    """Places each named parameter on the mesh as the table says.

    Args:
        parameters: by name.
        axes: logical axes of each, as `parameter_axes` gives them.
        mesh: the devices that hold the arrays.

    Returns:
        The parameters by name, each split over the mesh or replicated on it.

    Raises:
        ValueError: a split axis is not a multiple of the mesh axis.
    """
    # JAX would refuse an uneven split as well, but without naming the field to change.
    check_divisible({name: value.shape for name, value in parameters.items()}, axes, mesh)
    return {name: place(value, mesh, axes[name]) for name, value in parameters.items()}


def check_divisible(shapes: dict[str, tuple[int, ...]], axes: dict[str, tuple[str, ...]], mesh: Mesh) -> None:
    """Refuses a mesh that does not split each named parameter evenly.

    Args:
        shapes: the shape of each parameter, by name.
        axes: logical axes of each, as `parameter_axes` gives them.
        mesh: the devices that are to hold the parameters.

    Raises:
        ValueError: a split axis is not a multiple of the mesh axis; names both.
    """
    for name, shape in shapes.items():
        for size, logical, mesh_axis in zip(shape, axes[name], partition_spec(axes[name]), strict=True):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"mesh.{mesh_axis} is {mesh.shape[mesh_axis]}, but '{name}' has {size} along '{logical}';"
                    " the first must divide the second"
                )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places arrays on the mesh, split along their leading axis.

    Args:
        batch: a tree of arrays whose leading axis is B, a multiple of `mesh.data`.
        mesh: the devices that hold the arrays.
    """
    return place(batch, mesh, ("batch",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places arrays on every device of the mesh, whole.

    Args:
        tree: any tree of arrays.
        mesh: the devices that hold the arrays.
    """
    return place(tree, mesh)


def replicate_scalars(tree: Any, mesh: Mesh) -> Any:
    """Places the scalars of a state (counters) on every device of the mesh; arrays stay where they are.

    A fresh counter is tied to no device and a computed one is: left alone, the difference would
    compile every program twice, and a restored counter would sit on the first device only.

    Args:
        tree: a tree of arrays, such as an optimizer's state.
        mesh: the devices that are to hold the scalars.
    """
    # Arrays have been placed by their names before; only scalars have no place of their own.
    return jax.tree.map(lambda x: replicate(x, mesh) if x.ndim == 0 else x, tree)
