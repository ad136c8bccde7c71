"""What a whole rollout and an update cost on devices that are not here: memory, products, traffic, time and MFU.

    seconds = max(flops / peak, HBM bytes / bandwidth, ICI bytes / bandwidth) + DCN bytes / bandwidth

Programs are compiled for the topology and counted in their text (`program_costs`). Rates are published ones
(`plan_price.CEILINGS`), so the seconds are the least that the program can take. They are no measurement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.tree_util import DictKey, tree_map_with_path

from nested_reft.layer_plan import LayerPlan, PlanShape
from nested_reft.layer_skip import nested_shape
from nested_reft.models.config import ModelConfig
from nested_reft.models.low_precision import low_precision
from nested_reft.models.parameters import axes_of
from nested_reft.models.transformer import Transformer
from nested_reft.plan_price import (
    Ceilings,
    Workload,
    bridge_parameters,
    ceilings_of,
    half_parameters,
    head_parameters,
)
from nested_reft.rollout.generate import generate
from nested_reft.rollout.schedule import decode_loops
from nested_reft.sharding import on_mesh
from nested_reft.training.config import Config
from nested_reft.training.reinforcement import reinforcement_task
from nested_reft.training.step import BaseModel, TrainState, make_update
from nested_reft.verification.compiled_costs import (
    Shapes,
    compiled_program,
    plan_of,
    state_shapes,
    update_arguments,
    workload_of,
)
from nested_reft.verification.program_costs import Collective, ProgramCounts, program_costs

FITS = 0.9  # of a chip's memory
OnCompiled = Callable[[Any, tuple[Any, ...]], None]


@dataclass(frozen=True)
class ProgramCost:
    """One program on a mesh; all figures are per device.

    Attributes:
        program: `rollout` or `update`.
        layers, bridged: layers that run, or a part of which does; and layers that a bridge stands in for.
        devices: of the mesh.
        program_bytes: that the program takes while it runs, its arguments included.
        held_bytes: what a run holds besides, such as moments during a rollout.
        memory_bytes: that a device has; None where it is not known.
        flops: of matrix products.
        useful_flops: the least that such a pass takes: what is recomputed, padded or done by several devices is left
            out.
        hbm_bytes: through main memory.
        collectives: as `Collective`, those alike added up.
        ici_bytes, dcn_bytes: that a device sends within its slice, and to other slices.
        seconds: the least, by what takes them: `flops`, `hbm`, `ici`, `dcn`, and `total`; empty where a rate is
            not known.
        mfu: useful operations as a share of what the device could do in `total`; None where that is not known.
    """

    program: str
    layers: int
    bridged: int
    devices: int
    program_bytes: int
    held_bytes: int
    memory_bytes: float | None
    flops: float
    useful_flops: float
    hbm_bytes: float
    collectives: tuple[dict[str, Any], ...]
    ici_bytes: float
    dcn_bytes: float
    seconds: dict[str, float]
    mfu: float | None

    @property
    def bytes(self) -> int:
        """All that a device holds while the program runs."""
        return self.program_bytes + self.held_bytes

    @property
    def fits(self) -> bool | None:
        """Whether it leaves a tenth of the device's memory; None where that is not known."""
        return None if self.memory_bytes is None else self.bytes <= FITS * self.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """The fields, and whether it fits, as plain values."""
        return dataclasses.asdict(self) | {"bytes": self.bytes, "fits": self.fits}


def rollout_costs(config: ModelConfig, training: Config, mesh: Mesh) -> list[ProgramCost]:
    """A whole rollout of the full model, and one under a plan of the configuration.

    Every completion takes all its tokens, and no prompt shares its beginning with others.

    Args:
        config: the model.
        training: batch, weights that rollouts read, and nesting.
        mesh: of the topology.

    Raises:
        ValueError: the program does not fit a device, or the configuration refills rows.
    """
    shapes = [PlanShape(config.num_layers), nested_shape(training.nesting, config.num_layers)]
    return [rollout_cost(config, training, mesh, shape) for shape in shapes]


def check_plain_rollouts(training: Config) -> None:
    """Refuses rollouts of another program than the one that is compiled.

    Args:
        training: its rollouts.

    Raises:
        ValueError: rows are refilled.
    """
    if training.rollout.rows:
        raise ValueError(f"rollout.rows is {training.rollout.rows}; compile knows plain rollouts only: set it to 0")


def rollout_cost(
    config: ModelConfig, training: Config, mesh: Mesh, shape: PlanShape, on_compiled: OnCompiled | None = None
) -> ProgramCost:
    """A whole rollout under one plan: prompts, every decoding step, and sampling.

    Args:
        config, training, mesh: as in `rollout_costs`.
        shape: of the plan.
        on_compiled: called with the program and the shapes of its arguments, which are weights, prompts, their lengths,
            plan, stop tokens and the words of a key.

    Raises:
        ValueError: as in `rollout_costs`.
    """
    check_plain_rollouts(training)
    work, sharded = workload_of(training), Shapes(mesh)
    state, base = state_shapes(config, training, reinforcement_task(training, shared_prefix=0).optimizer, mesh)
    graph, weights = _read_by_rollouts(training, state, base, mesh)
    sampling, rows = training.rollout.sampling, (work.prompts, work.group_size)
    cache_dtype = jnp.dtype(training.model.dtype if training.rollout.weights == "target" else "bfloat16")

    def rollout(weights: nnx.State, prompt_BP, length_B, plan: LayerPlan, stop_ids, key_data):
        model: Transformer = nnx.merge(graph, weights)
        model.cache_dtype = cache_dtype
        # The key comes as its two raw words, which a shape and a dtype describe.
        key = jax.random.wrap_key_data(key_data)
        sizes = {"group_size": rows[1], "max_completion_tokens": work.completion_tokens}
        return generate(model, prompt_BP, length_B, plan, stop_ids, key, sampling=sampling, **sizes)

    arguments = (
        weights,
        sharded((rows[0], work.prompt_tokens), jnp.int32, "batch"),
        sharded((rows[0],), jnp.int32, "batch"),
        plan_of(shape, sharded),
        sharded((2,), jnp.int32),
        sharded((2,), jnp.uint32),
    )
    # Where rollouts read the weights that train, these are held once.
    held = local_bytes((state, base)) - (local_bytes(weights) if training.rollout.weights == "target" else 0)
    compiled = compiled_program("rollout", shape, jax.jit(rollout), arguments)
    if on_compiled is not None:
        on_compiled(compiled, arguments)
    with on_mesh(mesh):
        loops = decode_loops(*rows, work.completion_tokens)
    costs = program_costs(
        compiled.as_text(),
        mesh.shape,
        open_loops=loops,
        branch_counts=shape.counts,
    )
    useful = rollout_flops(config, work, shape, training.nesting.bridge.rank)
    return _cost("rollout", shape, mesh, compiled, held, costs, useful)


def update_cost(
    config: ModelConfig, training: Config, mesh: Mesh, on_compiled: OnCompiled | None = None
) -> ProgramCost:
    """One update of what trains, the adapters or else all parameters, as `training.step` makes it.

    Args:
        config: the model.
        training: dtype, adapters, loss, optimizer, micro-batches and rematerialisation.
        mesh: of the topology.
        on_compiled: called with the program and the shapes of its arguments, of which it takes the first one's buffers.
    """
    task = reinforcement_task(training, shared_prefix=0)
    arguments, full = update_arguments(config, workload_of(training), mesh, training), PlanShape(config.num_layers)
    compiled = compiled_program("update", full, make_update(task), arguments)
    if on_compiled is not None:
        on_compiled(compiled, arguments)
    held = 0
    if training.rollout.weights != "target":
        held = local_bytes(_read_by_rollouts(training, *arguments[:2], mesh)[1])
    costs = program_costs(compiled.as_text(), mesh.shape)
    work = dataclasses.replace(workload_of(training), prompts=training.data.prompts_per_batch // task.mini_batches)
    # Each product of the forward pass has two of its size in the backward pass: one for what it read, which frozen
    # weights need too, and one for its weights.
    passes = 2 if training.lora.rank else 3
    return _cost("update", full, mesh, compiled, held, costs, passes * scoring_flops(config, work))


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays that are known by shape, dtype and placement.

    Args:
        tree: of such arrays.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def rollout_flops(config: ModelConfig, work: Workload, shape: PlanShape, bridge_rank: int | None) -> float:
    """The operations that all devices must do for a rollout.

    Args:
        config: the model.
        work: the batch.
        shape: of the plan.
        bridge_rank: of its bridges.
    """
    rows, fed = work.prompts * work.group_size, work.completion_tokens - 1  # the last token is never fed
    tokens = work.prompts * work.prompt_tokens + rows * fed
    attention, mlp = half_parameters(config)
    each = shape.cached * attention + shape.with_mlp * mlp + shape.bridged * bridge_parameters(config, bridge_rank)
    heads = rows * work.completion_tokens * head_parameters(config)
    return 2.0 * (tokens * each + heads) + shape.cached * _score_flops(config, work)


def scoring_flops(config: ModelConfig, work: Workload) -> float:
    """The operations that all devices must do to score the completions of a batch.

    Args:
        config: the model.
        work: the batch.
    """
    return rollout_flops(config, work, PlanShape(config.num_layers), None)


def _score_flops(config: ModelConfig, work: Workload) -> float:
    """Of one layer's attention: scores and weighted sums, over the tokens that each token sees."""
    rows, fed = work.prompts * work.group_size, work.completion_tokens - 1
    seen = work.prompts * work.prompt_tokens * (work.prompt_tokens + 1) / 2
    seen += rows * fed * (work.prompt_tokens + (fed + 1) / 2)
    return 4.0 * config.num_heads * config.head_size * seen


def _read_by_rollouts(training: Config, state: TrainState, base: BaseModel, mesh: Mesh) -> tuple[Any, nnx.State]:
    """The structure and the arrays of the model that samples: that which trains, or its copy in fewer bits."""
    weights = training.rollout.weights

    def model(trainable: nnx.State, frozen: nnx.State) -> Transformer:
        trained = dataclasses.replace(base, frozen=frozen).with_parameters(trainable)
        return trained if weights == "target" else low_precision(trained, weights)

    found = jax.eval_shape(model, state.trainable, base.frozen)
    graph, arrays = nnx.split(found)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = "/".join(str(key.key) for key in path if isinstance(key, DictKey))
        # On a CPU, copies hold the bits of bfloat16 as whole numbers.
        dtype = jnp.bfloat16 if leaf.dtype == jnp.uint16 else leaf.dtype
        return Shapes(mesh)(leaf.shape, dtype, *axes_of(name))

    return graph, tree_map_with_path(place, arrays)


def _cost(
    program: str, shape: PlanShape, mesh: Mesh, compiled: Any, held: int, costs: ProgramCounts, useful: float
) -> ProgramCost:
    memory, rates = compiled.memory_analysis(), ceilings_of(mesh.devices.flat[0].device_kind)
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    taken += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    ici = sum((each.ici_bytes for each in costs.collectives), 0.0)
    dcn = sum((each.dcn_bytes for each in costs.collectives), 0.0)
    seconds, mine = _seconds(rates, costs, ici, dcn), useful / mesh.size
    return ProgramCost(
        program=program,
        layers=shape.steps - shape.bridged,
        bridged=shape.bridged,
        devices=mesh.size,
        program_bytes=taken,
        held_bytes=held,
        memory_bytes=rates.memory_bytes,
        flops=costs.flops,
        useful_flops=mine,
        hbm_bytes=costs.hbm_bytes,
        collectives=_added_up(costs.collectives),
        ici_bytes=ici,
        dcn_bytes=dcn,
        seconds=seconds,
        mfu=mine / rates.flops_per_second / seconds["total"] if seconds else None,
    )


def _seconds(rates: Ceilings, costs: ProgramCounts, ici: float, dcn: float) -> dict[str, float]:
    if rates.ici_bytes_per_second is None or rates.dcn_bytes_per_second is None:
        return {}
    seconds = {
        "flops": costs.flops / rates.flops_per_second,
        "hbm": costs.hbm_bytes / rates.bytes_per_second,
        "ici": ici / rates.ici_bytes_per_second,
    }
    most, between = max(seconds.values()), dcn / rates.dcn_bytes_per_second
    return seconds | {"dcn": between, "total": most + between}


def _added_up(collectives: Sequence[Collective]) -> tuple[dict[str, Any], ...]:
    """Collectives of one kind, group and depth of loops, the dearest first."""
    sums: dict[tuple, dict[str, Any]] = {}
    for each in collectives:
        if not each.times:
            continue
        key = (each.kind, each.over, each.group, each.loops)
        entry = sums.setdefault(
            key,
            dict(
                zip(("kind", "over", "group", "loops"), key, strict=True),
                times=0,
                bytes=0.0,
                ici_bytes=0.0,
                dcn_bytes=0.0,
                largest=0,
                of="",
            ),
        )
        entry["times"] += each.times
        entry["bytes"] += each.times * each.bytes
        entry["ici_bytes"] += each.ici_bytes
        entry["dcn_bytes"] += each.dcn_bytes
        if each.bytes > entry["largest"]:
            entry |= {"largest": each.bytes, "of": each.result}
    return tuple(sorted(sums.values(), key=lambda entry: -entry["bytes"]))
