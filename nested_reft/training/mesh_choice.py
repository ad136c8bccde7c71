"""The mesh of a run that leaves it to the program: `mesh.data auto`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from nested_reft import processes
from nested_reft.losses.registry import OfflineConfig
from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import parameter_shapes, splittable_parts
from nested_reft.models.registry import model_shape
from nested_reft.rollout.schedule import cached_tokens
from nested_reft.sharding import MeshConfig, dividing, largest_split, make_mesh, mesh_bytes
from nested_reft.training.config import Config

FILLED = 0.8  # of a device's memory; activations and what programs need for themselves take the rest


def with_chosen_mesh(config: Config) -> Config:
    """The configuration with its mesh in numbers; says what was chosen and why.

    Args:
        config: of the run.

    Raises:
        ValueError: the model fits no mesh over the devices that are here.
    """
    mesh = config.mesh
    if mesh.data != "auto":
        return config
    devices = jax.device_count()
    if mesh.fsdp == mesh.tensor == 1:
        shape = config.model.shape or model_shape(config.model.name)
        everything = make_mesh(MeshConfig(slices=mesh.slices, data="auto"))
        chosen, reason = choose_mesh(config, shape, devices, mesh_bytes(everything) / everything.size)
    else:
        shares = _shares(config, max(devices // (mesh.slices * mesh.tensor), 1))
        chosen = dataclasses.replace(mesh, data=max(shares // mesh.fsdp, 1))
        reason = "the other axes are given, and the rest shares prompts"
    found = dataclasses.replace(config, mesh=chosen)  # the rules for meshes are checked here
    if processes.is_writer():
        idle = idle_reason(found, devices)
        print(f"{chosen.describe()}: {reason}{f'; {idle}' if idle else ''}")
    return found


def idle_reason(config: Config, devices: int) -> str | None:
    """Why a mesh that the program chose leaves devices out, and what would use all; None where it leaves none.

    Args:
        config: of the run, with its mesh in numbers.
        devices: how many there are.
    """
    mesh = config.mesh
    if mesh.size >= devices:
        return None
    used = f"{mesh.size} of {devices} devices are used"
    sizes = dataclasses.asdict(mesh)
    # The first axes that leave a rest; `data` comes last, because it takes what they leave.
    taken = 1
    for axis in ("slices", "tensor", "fsdp"):
        taken *= sizes[axis]
        if devices % taken:
            return f"{used}, because mesh.{axis} {sizes[axis]} does not divide {devices * sizes[axis] // taken} of them"
    shares = devices // mesh.tensor
    counts = [f"{name} is {count}" for name, count in _prompts(config).items() if count % shares]
    return (
        f"{used}, because mesh.data x mesh.fsdp shares prompts evenly and {' and '.join(counts)}; a multiple of"
        f" {shares} would use all"
    )


def choose_mesh(config: Config, shape: ModelConfig, devices: int, each: float) -> tuple[MeshConfig, str]:
    """The mesh with the least exchange between devices on which a run fits.

    Sharing heads (`tensor`) exchanges activations in every layer of every decoding step, and sharing storage (`fsdp`)
    exchanges weights once per pass; sharing prompts alone (`data`) exchanges gradients once per micro-batch. So
    `tensor` is as small as fits, then `fsdp`, and the rest is `data`.

    Args:
        config: of the run.
        shape: of its model.
        devices: how many there are.
        each: bytes of memory of one device.

    Returns:
        The mesh and the reason for it.

    Raises:
        ValueError: no mesh fits.
    """
    needed = math.inf
    for mesh in possible_meshes(config, shape, devices):
        bytes_each = device_bytes(config, shape, mesh)
        needed = min(needed, bytes_each)
        if bytes_each <= FILLED * each:
            return mesh, f"at least {_gigabytes(bytes_each)} of each device's {_gigabytes(each)} are used"
    raise ValueError(
        f"mesh.data is 'auto', and no mesh over {devices} devices fits: each needs at least {_gigabytes(needed)} and"
        f" has {_gigabytes(each)}, of which {FILLED:.0%} are filled; take more devices, a smaller model,"
        " or train adapters (lora.rank)"
    )


def possible_meshes(config: Config, shape: ModelConfig, devices: int) -> Iterator[MeshConfig]:
    """Meshes over all devices, or over as many as can share a run's prompts; those with the least exchange first.

    Args:
        config: of the run, whose number of slices they have.
        shape: of its model.
        devices: how many there are.
    """
    parts, slices = splittable_parts(shape), config.mesh.slices
    for tensor in dividing(math.gcd(largest_split(parts, "tensor"), devices // slices)):
        shares = _shares(config, devices // slices // tensor)
        for fsdp in dividing(math.gcd(largest_split(parts, "fsdp"), shares)):
            yield MeshConfig(slices=slices, data=shares // fsdp, fsdp=fsdp, tensor=tensor)


def device_bytes(config: Config, shape: ModelConfig, mesh: MeshConfig) -> float:
    """Bytes that one device of a mesh cannot do without: what is stored, and what rollouts add.

    It compares meshes before the model is loaded. `training.memory.least_bytes` checks the one that was taken, with
    activations and old weights.

    Args:
        config: of the run.
        shape: of its model.
        mesh: in numbers.
    """
    item, count = jnp.dtype(config.model.dtype).itemsize, sum(math.prod(s) for s in parameter_shapes(shape).values())
    # Weights, two moments and the gradient; of adapters, only the weights count.
    gradient = 0 if config.lora.rank else count * item / (mesh.fsdp * mesh.tensor)
    stored = count * item * (1 if config.lora.rank else 3) / (mesh.fsdp * mesh.tensor)
    if isinstance(config.loss, OfflineConfig):
        return stored + gradient
    weights = config.rollout.weights
    copied = 0 if weights == "target" else count * jnp.dtype(weights).itemsize / (mesh.fsdp * mesh.tensor)
    # Decoding reads every matrix whole in its width, so it is gathered before the loop.
    read = item if weights == "target" else jnp.dtype(weights).itemsize
    gathered = 0 if mesh.fsdp == 1 else count * read / mesh.tensor
    rollout = config.rollout
    tokens = cached_tokens(
        config.data.prompts_per_batch,
        rollout.group_size,
        config.data.max_prompt_tokens,
        rollout.max_completion_tokens,
        rollout.rows,
    )
    values = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * item
    caches = tokens * values / (mesh.batch * mesh.tensor)
    # The gradient is gone when rollouts begin.
    return stored + copied + max(gradient, gathered + caches)


def _gigabytes(size: float) -> str:
    """Bytes as a message names them."""
    # Two digits of 100 GB and more would be printed as a power of ten.
    return f"{size / 1e9:.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"


def _shares(config: Config, most: int) -> int:
    """Into how many shares a slice can cut its prompts, of the batches that a run has."""
    each = math.gcd(*_prompts(config).values()) // config.mesh.slices
    return max(size for size in dividing(most) if max(each, 1) % size == 0)


def _prompts(config: Config) -> dict[str, int]:
    """The prompts that are shared at a time, by the fields that they come from."""
    train, name = config.train, "data.prompts_per_batch"
    for field in ("mini_batches", "micro_batches"):
        if getattr(train, field) > 1:
            name += f" / train.{field}"
    found = {name: config.prompts_per_micro_batch}
    if (warm_start := config.warm_start).steps:
        parts = " / warm_start.micro_batches" if warm_start.micro_batches > 1 else ""
        found[f"warm_start.batch_size{parts}"] = warm_start.batch_size // warm_start.micro_batches
    return found
