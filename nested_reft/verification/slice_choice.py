"""The smallest TPU slice that a run fits on, found by compiling for one slice after the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from nested_reft.layer_plan import PlanShape
from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import parameter_shapes
from nested_reft.plan_price import ceilings_of
from nested_reft.sharding import MeshConfig
from nested_reft.training.config import Config
from nested_reft.training.mesh_choice import choose_mesh, possible_meshes
from nested_reft.verification.compiled_costs import DoesNotFit, checked_mesh, topology_devices, workload_of
from nested_reft.verification.pod_costs import FITS, ProgramCost, rollout_cost, update_cost

SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}
"""Shapes of the slices that Google Cloud's documentation lists, in chips, the smallest first."""
_KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5"}
MODELS = ("qwen2.5-math-1.5b-instruct", "qwen2.5-math-7b-instruct", "qwen2.5-72b-instruct")
ADAPTER_RANK = 16  # where the configuration has no adapters


def slices_of(generation: str) -> tuple[str, ...]:
    """The shapes of a generation's slices.

    Args:
        generation: as libtpu names it.

    Raises:
        ValueError: it is none of `SLICES`.
    """
    if generation not in SLICES:
        raise ValueError(f"--generations has '{generation}'; allowed are {', '.join(SLICES)}")
    return SLICES[generation]


def cloud_name(generation: str, shape: str) -> str:
    """What Google Cloud calls a slice: it counts the chips of v5e, and the TensorCores of v5p, two to a chip.

    Args:
        generation, shape: of the slice.
    """
    chips = math.prod(map(int, shape.split("x")))
    return f"v5litepod-{chips}" if generation == "v5e" else f"{generation}-{2 * chips}"


def trained(config: Config, all_parameters: bool) -> Config:
    """The configuration with all parameters trained, in float32 with rollouts in bfloat16, or adapters on a bfloat16
    model alone.

    Args:
        config: of the run.
        all_parameters: which of the two.
    """
    rank = 0 if all_parameters else config.lora.rank or ADAPTER_RANK
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype="float32" if all_parameters else "bfloat16"),
        lora=dataclasses.replace(config.lora, rank=rank),
        rollout=dataclasses.replace(config.rollout, weights="bfloat16" if all_parameters else "target"),
        train=dataclasses.replace(config.train, compute_dtype="bfloat16" if all_parameters else "float32"),
    )


def with_mesh(config: Config, shape: ModelConfig, devices: Sequence[Any]) -> Config:
    """The configuration with the mesh that a run would choose by itself on such devices (`mesh.data auto`).

    Args:
        config: of the run.
        shape: of its model.
        devices: of a topology.

    Raises:
        ValueError: no mesh fits, or the memory of such a device is not known.
    """
    memory = ceilings_of(devices[0].device_kind).memory_bytes
    if memory is None:
        raise ValueError("mesh.data is 'auto', and the memory of these devices is not known; give the mesh in numbers")
    return dataclasses.replace(config, mesh=choose_mesh(config, shape, len(devices), memory)[0])


def smallest_on(config: Config, shape: ModelConfig, chips: int, memory: float) -> Config | None:
    """The configuration with the mesh that takes the least memory on one slice; None where that cannot fit.

    A micro-batch has one prompt for each share of the batch; where there are more shares than prompts, there are as
    many prompts.

    Args:
        config: of the run.
        shape: of its model.
        chips: of the slice.
        memory: of a chip, in bytes.
    """
    prompts = math.lcm(config.data.prompts_per_batch, chips)
    # All prompts are one micro-batch here, so that the mesh alone decides how many shares they have.
    whole = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, prompts_per_batch=prompts),
        train=dataclasses.replace(config.train, micro_batches=1),
        mesh=MeshConfig(),
    )
    found = []
    for mesh in possible_meshes(whole, shape, chips):
        if mesh.size < chips:
            continue
        prompts = math.lcm(config.data.prompts_per_batch, mesh.batch)
        each = dataclasses.replace(
            whole,
            data=dataclasses.replace(config.data, prompts_per_batch=prompts),
            train=dataclasses.replace(config.train, micro_batches=prompts // mesh.batch),
            mesh=mesh,
        )
        found.append((least_bytes(each, shape), each))
    # Of meshes with as much memory, the first has the least exchange between devices.
    size, smallest = min(found, key=lambda pair: pair[0], default=(math.inf, None))
    return smallest if size <= FITS * memory else None


def least_bytes(config: Config, shape: ModelConfig) -> float:
    """Bytes that a device of a mesh cannot do without in a rollout, or in an update of one prompt at a time.

    Args:
        config: of the run, with its mesh in numbers.
        shape: of its model.
    """
    work, mesh = workload_of(config), config.mesh
    count, split = sum(math.prod(size) for size in parameter_shapes(shape).values()), mesh.fsdp * mesh.tensor
    item, weights = jnp.dtype(config.model.dtype).itemsize, config.rollout.weights
    # Rollouts read a copy, or the weights themselves, and keep their caches in the same dtype.
    copied = 0 if weights == "target" else jnp.dtype(weights).itemsize
    read, cached = (copied, 2) if copied else (item, item)
    held = count * (copied + item * (1 if config.lora.rank else 3)) / split  # with two moments
    gathered = 0 if mesh.fsdp == 1 else count * read / mesh.tensor
    tokens = work.prompts * (work.prompt_tokens + work.group_size * work.completion_tokens) / mesh.batch
    caches = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * cached * tokens / mesh.tensor
    # Each layer's input, in float32, is kept for the backward pass of one prompt's completions.
    kept = work.prompt_tokens + config.trained_group_size * (work.completion_tokens - 1)
    gradient = 0 if config.lora.rank else count * item / split
    return held + max(gathered + caches, gradient + 4.0 * kept * shape.num_layers * shape.width)


def minimum_resources(
    config: Config,
    shapes: Mapping[str, ModelConfig],
    generations: Sequence[str],
    done: Sequence[dict[str, Any]] = (),
    compiles: bool = True,
) -> Iterator[dict[str, Any]]:
    """For each model and generation, the smallest slice with 90 % of whose memory a run does: all parameters trained,
    and adapters alone.

    Args:
        config: batch, sequences and loss.
        shapes: models by name.
        generations: of TPUs.
        done: rows that are known already and are left out.
        compiles: False takes the lower bound's word, which costs seconds and not minutes.

    Yields:
        Rows, as plain values; `slice` is None where no slice fits.
    """
    known = {(row["model"], row["generation"], row["all_parameters"]) for row in done}
    for name, shape in shapes.items():
        for generation in generations:
            for all_parameters in (True, False):
                if (name, generation, all_parameters) not in known:
                    found = smallest_slice(trained(config, all_parameters), shape, generation, compiles)
                    yield {"model": name, "generation": generation, "all_parameters": all_parameters, **found}


def smallest_slice(config: Config, shape: ModelConfig, generation: str, compiles: bool = True) -> dict[str, Any]:
    """The smallest slice of a generation that a run fits on, with what its rollout and its update cost.

    Args:
        config: of the run.
        shape: of its model.
        generation: of the TPU.
        compiles: as `minimum_resources` takes it.
    """
    memory, too_small = ceilings_of(_KINDS[generation]).memory_bytes, []
    assert memory is not None
    for name in slices_of(generation):
        chips = math.prod(map(int, name.split("x")))
        run = smallest_on(config, shape, chips, memory)
        if run is None:
            continue
        programs = _compiled(run, shape, f"{generation}:{name}") if compiles else []
        found = {
            "slice": name,
            "cloud_name": cloud_name(generation, name),
            "chips": chips,
            "mesh": dataclasses.asdict(run.mesh),
            "prompts": run.data.prompts_per_batch,
            "micro_batches": run.train.micro_batches,
            "least_bytes": least_bytes(run, shape),
            "programs": [each.to_json() for each in programs],
        }
        if not compiles or (len(programs) == 2 and all(each.fits for each in programs)):
            return found | {"too_small": too_small}
        too_small.append(found)
    return {"slice": None, "too_small": too_small}


def _compiled(config: Config, shape: ModelConfig, topology: str) -> list[ProgramCost]:
    """The update and the rollout; one alone where that does not fit already."""
    mesh = checked_mesh(config, shape, topology_devices(topology))
    found = []
    try:
        found.append(update_cost(shape, config, mesh))
        if found[0].fits:
            # The full model has more caches than any plan.
            found.append(rollout_cost(shape, config, mesh, PlanShape(shape.num_layers)))
    except DoesNotFit:
        pass
    return found
