"""Device mesh, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from nested_reft import processes
from nested_reft.backends import have_slices, machine_memory, memory_limits
from nested_reft.untrusted import shown

MOST_DEVICES = 4096  # along an axis of a mesh

AXES = ("slice", "data", "fsdp", "tensor")
"""Names of the mesh's axes. The connection between devices is the slowest along the first and the fastest along the
last: what is exchanged most often goes along the last."""
BATCH = AXES[:3]

# Axes not named here are replicated. `batch` is the leading axis of every batch array. `layer` stays whole, so that
# every device takes the layers of a plan out of its own part of the stack. `width` is split where arrays are stored;
# programs gather it before they use a matrix (`used_axes`).
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": BATCH,
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "width": ("fsdp",),
    # Rows whose logits are drawn from: each device has the whole vocabulary of some.
    "row": AXES,
    "completion": ("tensor",),
}


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. All sizes together are the number of devices.

    Attributes:
        slices: groups of devices with a slow connection between them, such as several TPU slices; they share a batch's
            prompts, and each holds all parameters.
        data: devices of a slice that share a batch's prompts, and each hold all parameters. `auto` takes as
            many devices as share the prompts evenly, which is all of them where the batch allows it; where `fsdp` and
            `tensor` are 1, it also chooses these by the size of the model.
        fsdp: devices that share a batch's prompts and also the storage of parameters, gradients and moments.
        tensor: devices that share each layer's heads and hidden units.
    """

    slices: int = 1
    data: int | Literal["auto"] = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if name == "data" and size == "auto":
                continue
            if type(size) is not int or not 1 <= size <= MOST_DEVICES:
                also = ", or auto" if name == "data" else ""
                raise ValueError(f"mesh.{name} is {shown(size)}; allowed is 1 or more{also}")

    @property
    def size(self) -> int:
        """How many devices there are."""
        return self.batch * self.tensor

    @property
    def batch(self) -> int:
        """How many shares a batch has."""
        if self.data == "auto":
            raise ValueError("mesh.data is 'auto', which has no size before the devices are known")
        return self.slices * self.data * self.fsdp

    def over(self, devices: int) -> MeshConfig:
        """The same with `data` in numbers: as many as the other axes leave of all devices.

        Args:
            devices: how many there are.
        """
        if self.data != "auto":
            return self
        return dataclasses.replace(self, data=max(devices // (self.slices * self.fsdp * self.tensor), 1))

    def describe(self) -> str:
        """The sizes that are not 1, as a message names them."""
        sizes = [f"mesh.{name} {size}" for name, size in dataclasses.asdict(self).items() if size != 1]
        return f"{' x '.join(sizes) or 'mesh'} is {self.size} device{'s' if self.size > 1 else ''}"


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh of the four axes `AXES` over the first devices.

    Args:
        config: how many devices each axis has.

    Raises:
        ValueError: there are fewer devices than the mesh needs, or several processes have more; or `mesh.slices` is
            above 1, and the devices form another number of slices.
    """
    devices = jax.devices()
    config = config.over(len(devices))
    if config.size > len(devices):
        raise ValueError(f"{config.describe()}; allowed are 1 to {len(devices)}, which are here")
    if processes.count() > 1 and config.size < len(devices):
        # A process whose devices are left out would have no part in the arrays, and the others would wait for it.
        raise ValueError(
            f"{config.describe()}; allowed is {len(devices)}, all devices of the {processes.count()} processes"
        )
    return mesh_of(devices[: config.size], config)


def mesh_of(devices: Sequence[Any], config: MeshConfig) -> Mesh:
    """A mesh over given devices.

    Args:
        devices: as many as the mesh has, also those of a topology that is compiled for.
        config: how many devices each axis has.

    Raises:
        ValueError: `mesh.slices` is above 1, and the devices form another number of slices.
    """
    config, modes = config.over(len(devices)), (AxisType.Auto,) * 4
    assert config.data != "auto"
    shape = (config.slices, config.data, config.fsdp, config.tensor)
    # With Auto axes the compiler chooses how intermediate values are split.
    if config.slices == 1 or not have_slices(devices):
        # CPUs and GPUs have no slices; devices of one process come one after the other, which is what counts there.
        return Mesh(device_grid(devices, shape), AXES, axis_types=modes)
    slices = len({device.slice_index for device in devices})
    if slices != config.slices:
        raise ValueError(f"mesh.slices is {config.slices}, and the devices form {slices}; give the number of slices")
    grid = mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), (config.slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=modes)


def device_grid(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the order of a mesh, those of its last axes near to one another.

    An axis may take a part of an axis of chips. `jax.make_mesh` allows that on v5e alone, so it finds no place for
    eight devices in a row on 4x4x4.

    Args:
        devices: as many as the mesh has.
        shape: of the mesh.
    """
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def one_device() -> Mesh:
    """A mesh of the first device of this process: what works alone, however many processes there are."""
    return mesh_of(jax.local_devices()[:1], MeshConfig())


def batch_devices(mesh: Mesh) -> int:
    """How many shares a batch has on a mesh; its rows are a multiple of it.

    Args:
        mesh: of `make_mesh`.
    """
    return math.prod(mesh.shape[axis] for axis in BATCH)


def mesh_bytes(mesh: Mesh) -> float:
    """Memory of all devices of the mesh; on CPUs, which share it, that of the machine.

    Args:
        mesh: the devices that the run uses.

    Returns:
        Bytes; infinite where they are not known, so that nothing is refused.
    """
    devices = list(mesh.local_devices)  # those of other processes cannot be asked
    limits = memory_limits(devices)
    if limits is not None:
        return sum(limits) / len(devices) * mesh.size
    return machine_memory() or math.inf


def used_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes of a parameter while a program uses it: its width is whole on every device.

    Args:
        axes: logical axes that it is stored by.
    """
    return tuple("" if axis == "width" else axis for axis in axes)


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """The partition of an array from its logical axes.

    Args:
        axes: logical axes of an array in their order; an axis of an unknown name, such as '', is whole.

    Raises:
        ValueError: two of its axes would be split over the same mesh axis.
    """
    mesh_axes = [MESH_AXES.get(axis) for axis in axes]
    # Axes that are replicated may repeat, so they are left out of the comparison.
    used = [name for names in mesh_axes for name in names or ()]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map to mesh axes {mesh_axes}: one mesh axis can split only one of them")
    return PartitionSpec(*mesh_axes)


def on_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """The context in which programs are called that `constrain` their values on a mesh.

    Args:
        mesh: of their arguments.
    """
    # One device has nothing to split, and its programs stay those that are called without a mesh.
    return nullcontext() if mesh.size == 1 else jax.set_mesh(mesh)


def constrain(array: jax.Array, *axes: str) -> jax.Array:
    """Tells the compiler how a value is split, inside of a program that is called under `on_mesh`.

    Without a mesh it changes nothing. An axis that the mesh does not divide is whole on every device, as prompts of a
    user are, who gives any number of them.

    Args:
        array: a value of the program.
        axes: logical axes, in their order; one of the name '' is whole, and so are those left out at the end.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
        return array
    split = ["" if length % shares(axis) else axis for length, axis in zip(array.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(array, partition_spec(split))


def constrain_used(array: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A parameter with its width whole, as a program uses it; its gradient is split as the parameter is stored.

    Otherwise the gradient would be summed whole on every device, which sends twice as much as giving each device the
    sum of its own share.

    Args:
        array: the parameter, stored by `axes`.
        axes: logical axes.
    """
    if shares("width") == 1:
        return constrain(array, *used_axes(axes))
    return _gathered(array, tuple(axes))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return constrain(array, *used_axes(axes))


_gathered.defvjp(
    lambda array, axes: (_gathered(array, axes), None),
    lambda axes, _, gradient: (constrain(gradient, *axes),),
)


def shares(axis: str) -> int:
    """Into how many shares programs under `on_mesh` split a logical axis, where the mesh divides it.

    Args:
        axis: its name.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(name, 1) for name in MESH_AXES.get(axis, ()))


def place(tree: Any, mesh: Mesh, axes: Sequence[str] = ()) -> Any:
    """Makes values of the host, or arrays that lie elsewhere, arrays of a mesh. All arrays of a run are placed here.

    Several processes hold equal host values. Each takes from them what its own devices hold, and nothing is sent.

    Args:
        tree: any tree of NumPy arrays, numbers, device arrays and typed PRNG keys.
        mesh: the devices that hold the arrays, perhaps those of several processes.
        axes: logical axes of every leaf, in their order; what is not named is whole on every device.
    """
    # One device has nothing to split. Programs that take split arrays there return them split in some other way, and
    # would be compiled once more for those.
    spec = partition_spec(tuple(axes)) if mesh.size > 1 else PartitionSpec()
    return place_as(tree, NamedSharding(mesh, spec))


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
        axes: logical axes of each, as `parameter_axes` gives them; `check_divisible` has seen that they can be split.
        mesh: the devices that hold the arrays.

    Returns:
        The parameters by name, each split over the mesh or replicated on it.
    """
    return {name: place(value, mesh, axes[name]) for name, value in parameters.items()}


def check_divisible(parts: dict[str, tuple[str, int]], mesh: Mesh) -> None:
    """Refuses a mesh that does not split every axis of a model evenly.

    Args:
        parts: logical axis -> what it consists of, such as heads, and how many the model has.
        mesh: the devices that are to hold the parameters.

    Raises:
        ValueError: the parts of an axis are not a multiple of the mesh axis; says which sizes would do.
    """
    for axis, (what, count) in parts.items():
        (name,) = MESH_AXES[axis]
        if count % mesh.shape[name]:
            most = largest_split(parts, name)
            raise ValueError(
                f"mesh.{name} is {mesh.shape[name]}, but the model has {count} {what}; allowed are {divisors(most)}"
            )


def divisors(number: int) -> str:
    """The sizes of a mesh axis that divide a number, the smallest first, as text for a message.

    Args:
        number: 1 or more.
    """
    return ", ".join(map(str, dividing(number)))


def dividing(number: int) -> list[int]:
    """The sizes of a mesh axis that divide a number, the smallest first.

    Args:
        number: 1 or more.
    """
    return [size for size in range(1, min(number, MOST_DEVICES) + 1) if number % size == 0]


def largest_split(parts: dict[str, tuple[str, int]], axis: str) -> int:
    """Into how many shares a mesh axis can split all that it splits of a model; every divisor of it does as well.

    Args:
        parts: as `check_divisible` takes them.
        axis: of the mesh.
    """
    return math.gcd(*(count for logical, (_, count) in parts.items() if MESH_AXES[logical] == (axis,)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places arrays on the mesh, split along their leading axis.

    Args:
        batch: a tree of arrays whose leading axis is B, a multiple of `batch_devices(mesh)`.
        mesh: the devices that hold the arrays.
    """
    return place(batch, mesh, ("batch",))


def spread(batch: Any, mesh: Mesh) -> Any:
    """Places arrays on the mesh, split along their leading axis where it divides, and else whole on every device.

    Texts of a user come in any number, and a copy on every device is still right.

    Args:
        batch: a tree of arrays whose leading axis is B.
        mesh: the devices that hold the arrays.
    """
    divides = all(leaf.shape[0] % batch_devices(mesh) == 0 for leaf in jax.tree.leaves(batch))
    return shard_batch(batch, mesh) if divides else replicate(batch, mesh)


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
