"""Compilation for accelerators that are not here: topologies, and what one decode step costs on one.

XLA compiles for a TPU pod on any machine that has `libtpu` (the `tpu` extra). Its cost analysis
counts a loop body once, so its figures are those of a program with unrolled layers. Its bytes accessed
include on-chip memory. Bytes through HBM are counted by `hbm_traffic`, and for a decode step in the program
that runs, whose layers are a loop: unrolled, the compiler moves caches that fit to on-chip memory and back.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, tree_map_with_path

from nested_reft.layer_plan import LayerPlan, PlanShape
from nested_reft.layer_skip import nested_shape
from nested_reft.models.bridges import MATRICES, Bridges
from nested_reft.models.config import ModelConfig
from nested_reft.models.layer import KeyValues
from nested_reft.models.lora import add_lora, split_trainable
from nested_reft.models.parameters import MLP_PARAMETERS, axes_of, parameter_axes, parameter_shapes, splittable_parts
from nested_reft.models.transformer import PromptCache, Transformer
from nested_reft.plan_price import Workload
from nested_reft.rollout.sampling import SamplingConfig, row_uniforms, sample_token
from nested_reft.sharding import MeshConfig, check_divisible, mesh_of, on_mesh, partition_spec, used_axes
from nested_reft.training.config import Config
from nested_reft.training.reinforcement import reinforcement_task
from nested_reft.training.setup import check_positions
from nested_reft.training.step import BaseModel, TrainState, UpdatePlans, initial_train_state
from nested_reft.types import TrainBatch
from nested_reft.untrusted import shown
from nested_reft.verification.hbm_traffic import hbm_bytes

# What libtpu asks of the environment on a machine without a TPU.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so nothing is contended
}


@dataclass(frozen=True)
class Chip:
    """How the chips of a TPU generation may be laid out in one slice.

    Attributes:
        example: a common slice.
        dimensions: of a slice.
        largest: the largest side that a slice may have.
        most: the most chips that it may have.
    """

    example: str
    dimensions: int
    largest: int
    most: int


CHIPS = {
    # Google Cloud's documentation (docs.cloud.google.com/tpu/docs), the page of each generation. Those of v5e, v6e and
    # v5p name the largest slice: 16x16 and 16x16x24. The others name the chips of a whole pod. The longest side of v4
    # in its examples is 24 (12x12x24), and TPU7x has the same form.
    "v2": Chip("4x4", 2, 16, 256),
    "v3": Chip("4x4", 2, 32, 1024),
    "v4": Chip("2x2x1", 3, 24, 4096),
    "v5e": Chip("4x4", 2, 16, 256),
    "v5p": Chip("2x2x2", 3, 24, 6144),
    "v6e": Chip("2x2", 2, 16, 256),
    "tpu7x": Chip("2x2x1", 3, 24, 9216),
}
"""The generations that libtpu compiles for, by the name that it gives them."""


class DoesNotFit(ValueError):
    """A program needs more memory than a device has; the compiler says so."""


@dataclass(frozen=True)
class Cost:
    """What the compiler says about one program, per device; see `device_unit`.

    Attributes:
        program: what was compiled.
        layers: layers that run, or a part of which does.
        bridged: layers that a bridge stands in for.
        dtype: of the weights.
        argument_bytes: weights, caches and other inputs held.
        temporary_bytes: peak of what it allocates besides.
        flops: floating-point operations, where each step that may take several parts counts as the dearest:
            XLA's figure, as is the next.
        bytes_accessed: bytes read and written, on-chip memory included and asynchronous copies counted
            several times over: XLA's figure.
        hbm_bytes: bytes that cross main memory, counted in the optimised program: what the floor
            is a floor of.
        floor_bytes: the least that must be read: each weight and each cache entry in use, once; None where
            no such simple floor exists.
    """

    program: str
    layers: int
    dtype: str
    argument_bytes: int
    temporary_bytes: int
    flops: float
    bytes_accessed: float
    hbm_bytes: int
    floor_bytes: float | None = None
    bridged: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


def check_topology(topology: str) -> None:
    """Refuses a topology before the compiler sees it, which ends the process where a shape is too large or has a 0.

    Args:
        topology: as `topology_devices` takes it.

    Raises:
        ValueError: the generation is unknown, or has no slice of this shape.
    """
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS:
        raise ValueError(
            f"--topology is {shown(topology)}, which cannot be compiled for: chip {shown(generation)} is unknown; a"
            " topology is GENERATION:SHAPE in chips, and known are "
            + ", ".join(f"{name}:{chip.example}" for name, chip in CHIPS.items())
        )
    chip = CHIPS[generation]
    words = shape.split("x")
    # Digits of other scripts and numbers of hundreds of digits are no sizes.
    sides = [int(word) if word.isascii() and word.isdecimal() and len(word) <= 4 else 0 for word in words]
    is_allowed = (
        len(sides) == chip.dimensions
        and all(1 <= side <= chip.largest for side in sides)
        and math.prod(sides) <= chip.most
    )
    if not is_allowed:
        form = "x".join("ABC"[: chip.dimensions])
        raise ValueError(
            f"--topology is {shown(topology)}; allowed is {generation}:{form} with sides of 1 to {chip.largest} and"
            f" at most {chip.most:,} chips, such as {generation}:{chip.example}"
        )


def topology_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a named TPU topology, such as `v5e:4x4`, none of which need exist.

    Args:
        topology: `generation:shape`, in chips, as libtpu names it.
        slices: how many of that shape there are.

    Raises:
        ValueError: there is no such topology, or libtpu is not installed.
    """
    check_topology(topology)
    for name, value in TPU_ENVIRONMENT.items():
        # What the user has set already stays. libtpu reads the environment once, when it is loaded, so the import
        # comes after.
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(topology.partition(":")[2].split("x")) == {"1"}:
        # libtpu takes a host for one with 2x2 chips, and a single chip for a part of none.
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # the plugin raises several kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    # A missing package is the likeliest reason, and the plugin's own words do not name it.
    if find_spec("libtpu") is None:
        reason = "the compiler is not installed (pip install 'jax[tpu]' brings the version that JAX asks for)"
    raise ValueError(
        f"--topology is '{topology}', which cannot be compiled for: {reason}; a topology is GENERATION:SHAPE in chips,"
        " such as v5e:4x4, v6e:2x2 or v5p:2x2x2, as libtpu names them"
    )


def device_unit(devices: Sequence[Any]) -> str:
    """`chip`, or `core` where a chip's cores are devices of their own, as on v4.

    Args:
        devices: what `topology_devices` returned.
    """
    # Two devices at the same place are two cores of one chip.
    places = {tuple(getattr(device, "coords", (device.id,))) for device in devices}
    return "chip" if len(places) == len(devices) else "core"


def topology_mesh(devices: Sequence[Any], mesh: MeshConfig) -> Mesh:
    """A mesh over the first devices of a topology.

    Args:
        devices: what `topology_devices` returned.
        mesh: how many devices each axis has.

    Raises:
        ValueError: the mesh has more devices than the topology.
    """
    mesh = mesh.over(len(devices))
    if mesh.size > len(devices):
        raise ValueError(f"{mesh.describe()}; the topology has {len(devices)}")
    return mesh_of(devices[: mesh.size], mesh)


def checked_mesh(training: Config, config: ModelConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of a configuration over a topology; all that can be refused without the compiler is refused here.

    Args:
        training: batch sizes, mesh and nesting.
        config: the model, which need not be the configuration's own.
        devices: what `topology_devices` returned.

    Raises:
        ValueError: sequences, mesh or plan do not go with the model.
    """
    training.nesting.validate_for(config.num_layers)
    check_positions(training, config)
    mesh = topology_mesh(devices, training.mesh)
    check_divisible(splittable_parts(config), mesh)
    return mesh


def workload_of(training: Config) -> Workload:
    """The sizes of a configuration's rollouts.

    Args:
        training: the configuration.
    """
    return Workload(
        prompts=training.data.prompts_per_batch,
        group_size=training.rollout.group_size,
        prompt_tokens=training.data.max_prompt_tokens,
        completion_tokens=training.rollout.max_completion_tokens,
    )


def decode_costs(training: Config, config: ModelConfig, mesh: Mesh) -> list[Cost]:
    """Costs of a configuration's decode step, full and nested.

    Args:
        training, config: as `checked_mesh` takes them.
        mesh: that it returned.

    Raises:
        ValueError: a program does not fit a device.
    """
    work, nested = workload_of(training), nested_shape(training.nesting, config.num_layers)
    rank = training.nesting.bridge.rank
    return [decode_cost(config, work, mesh), decode_cost(config, work, mesh, nested, bridge_rank=rank)]


def decode_cost(
    config: ModelConfig,
    workload: Workload,
    mesh: Mesh,
    shape: PlanShape | None = None,
    dtype: Any = jnp.bfloat16,
    bridge_rank: int | None = None,
) -> Cost:
    """One decode step: a token of every row through the steps of a plan, the head, and sampling.

    Args:
        config: the model.
        workload: sizes.
        mesh: of the topology.
        shape: how many layers the plan keeps, bridges or runs in part; None is the full model.
        dtype: of weights and caches.
        bridge_rank: of the bridges' matrices; None is full rank.

    Returns:
        Figures per device, with the floor of what must be read.
    """
    # A plan is known by its shape alone; which layers it keeps is data.
    shape = PlanShape(config.num_layers) if shape is None else shape
    sharded = Shapes(mesh)
    rows = (workload.prompts, workload.group_size)
    heads, size = config.num_kv_heads, config.head_size
    own = sharded(
        (shape.cached, *rows, heads, workload.completion_tokens, size), dtype, None, "batch", None, "kv_heads"
    )
    shared = sharded((shape.cached, rows[0], heads, workload.prompt_tokens, size), dtype, None, "batch", "kv_heads")
    prompt = PromptCache(
        KeyValues(shared, shared),
        sharded((rows[0], workload.prompt_tokens), bool, "batch"),
        sharded((rows[0], config.width), jnp.float32, "batch"),
    )
    plan = plan_of(shape, sharded)
    bridges = sharded.bridges(config, dtype, bridge_rank) if shape.bridged else None

    def step(unrolled, parameters, bridges, token_BG, at, cache, prompt, plan, key_data):
        model = _model(config, parameters, dtype, bridges)
        model.layers_unrolled = unrolled
        hidden, cache = model.decode(token_BG, at, cache, prompt, plan)
        # Keys come as their two raw words, which a shape and a dtype describe.
        uniform = row_uniforms(jax.random.wrap_key_data(key_data), at)
        return sample_token(uniform, model.logits(hidden), SamplingConfig()), cache

    arguments = (
        # A rollout gathers them before its loop.
        sharded.parameters(config, dtype, in_use=True),
        bridges,
        sharded(rows, jnp.int32, "batch"),
        sharded((), jnp.int32),
        KeyValues(own, own),
        prompt,
        plan,
        sharded((*rows, 2), jnp.uint32, "batch"),
    )
    # The caches are donated, as in a decode loop. Otherwise the step would copy them whole.
    looped, unrolled = (
        compiled_program("decode step", shape, jax.jit(partial(step, layers), donate_argnums=4), arguments)
        for layers in (1, config.num_layers)
    )
    return dataclasses.replace(
        _cost("decode step", shape, dtype, unrolled),
        temporary_bytes=looped.memory_analysis().temp_size_in_bytes,
        hbm_bytes=hbm_bytes(looped.as_text(), shape.counts, shape.steps),
        floor_bytes=_decode_floor(config, shape, arguments),
    )


def state_shapes(
    config: ModelConfig, training: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, BaseModel]:
    """The shapes and placements of what an update reads and writes.

    Parameters, adapters and bridges are placed by name, and moments as what they are of.

    Args:
        config: the model.
        training: its dtype and adapters.
        optimizer: whose state it is.
        mesh: where it lies.

    Returns:
        State and frozen parameters, with a shape, a dtype and a placement in the place of each array.
    """
    dtype, bridge = jnp.dtype(training.model.dtype), training.nesting.bridge
    parameters = Shapes(mesh).parameters(config, dtype)
    # The model that trains has its bridges in float32, as they were fitted.
    bridges = Shapes(mesh).bridges(config, jnp.float32, bridge.rank) if bridge.is_on else None

    def initial_state(parameters: dict[str, Any], bridges: dict[str, Any] | None) -> tuple[TrainState, BaseModel]:
        model = _model(config, parameters, dtype, bridges)
        # Adapters are part of what trains, and so of the state.
        if training.lora.rank:
            add_lora(model, training.lora, jax.random.key(0))
        graph, trainable, frozen = split_trainable(model)
        return initial_train_state(trainable, optimizer), BaseModel(frozen, graph)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The names in a path are its dictionary keys; what is around them says whether it is a moment.
        name = "/".join(str(key.key) for key in path if isinstance(key, DictKey))
        return Shapes(mesh)(leaf.shape, leaf.dtype, *axes_of(name))

    # Shapes are found without computing a value, so a model of any size takes no memory here.
    return tree_map_with_path(place, jax.eval_shape(initial_state, parameters, bridges))


def update_arguments(
    config: ModelConfig, workload: Workload, mesh: Mesh, training: Config
) -> tuple[TrainState, BaseModel, TrainBatch, UpdatePlans]:
    """What an update takes, with a shape, a dtype and a placement in the place of each array.

    Args:
        config, workload, mesh: as in `decode_cost`.
        training: dtype, adapters, loss, optimizer and micro-batches.
    """
    sharded = Shapes(mesh)
    task = reinforcement_task(training, shared_prefix=0)
    state, base = state_shapes(config, training, task.optimizer, mesh)
    # An update is on one mini-batch.
    rows, size = (workload.prompts // task.mini_batches, workload.group_size), workload.completion_tokens
    tokens = {name: sharded((*rows, size), jnp.float32, "batch") for name in task.needs.logprobs}
    batch = TrainBatch(
        prompt_BP=sharded((rows[0], workload.prompt_tokens), jnp.int32, "batch"),
        prompt_length_B=sharded((rows[0],), jnp.int32, "batch"),
        tokens_BGC=sharded((*rows, size), jnp.int32, "batch"),
        length_BG=sharded(rows, jnp.int32, "batch"),
        forced_BG=sharded(rows, jnp.int32, "batch"),
        counted_BG=sharded(rows, bool, "batch"),
        signal_BG=sharded(rows, jnp.float32, "batch"),
        behavior_logprob_BGC=sharded((*rows, size), jnp.float32, "batch"),
        full_share_BG=sharded(rows, jnp.float32, "batch") if task.needs.mixture_density else None,
        acceptance_draw_BGC=sharded((*rows, size), jnp.float32, "batch") if task.needs.acceptance_draw else None,
        mix_share_B=sharded(rows[:1], jnp.float32, "batch") if task.needs.mix_share else None,
        beta_B=None if task.needs.beta is None else sharded(rows[:1], jnp.float32, "batch"),
        **tokens,
    )
    plans = UpdatePlans(nested=_plan_shape(training, config, sharded) if task.needs.self_distillation else None)
    return state, base, batch, plans


def _plan_shape(training: Config, config: ModelConfig, sharded: Shapes) -> LayerPlan:
    """The plan that an update reads where it teaches the nested policy."""
    return plan_of(nested_shape(training.nesting, config.num_layers), sharded)


def plan_of(shape: PlanShape, sharded: Shapes) -> LayerPlan:
    """A plan that exists by its shape alone.

    Args:
        shape: how many steps of each kind it has.
        sharded: where it lies.
    """
    steps = sharded((shape.steps,), jnp.int32)
    return LayerPlan(steps, steps, shape)


def _model(
    config: ModelConfig, parameters: dict[str, Any], dtype: Any, bridges: dict[str, Any] | None = None
) -> Transformer:
    model = Transformer(config, parameters)
    if bridges is not None:
        rank = bridges["narrow"].shape[1] if "narrow" in bridges else None
        model.bridges = Bridges(config.num_layers, config.width, rank)
        model.bridges.load(bridges)
    model.cache_dtype = dtype
    return model


def compiled_program(program: str, shape: PlanShape, function: Any, arguments: tuple) -> Any:
    """Compiles for the devices that the arguments name.

    Args:
        program: its name, for messages.
        shape: of the plan that it runs.
        function: jitted.
        arguments: by shape, dtype and placement.

    Raises:
        DoesNotFit: it needs more memory than a device has.
    """
    # The programs of a run are called on their mesh, which tells them how to split what they compute.
    mesh = jax.tree.leaves(arguments)[0].sharding.mesh
    try:
        with on_mesh(mesh):
            return function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        # Any other failure of the compiler is a fault, and should be seen as one.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            f"the {program} of {shape.steps} layers does not fit: {str(error).splitlines()[0][:200]}; lower"
            " data.prompts_per_batch, rollout.group_size or rollout.max_completion_tokens, or raise mesh.tensor"
        ) from None


def _cost(program: str, shape: PlanShape, dtype: Any, compiled: Any) -> Cost:
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    return Cost(
        program=program,
        layers=shape.steps - shape.bridged,
        bridged=shape.bridged,
        dtype=jnp.dtype(dtype).name,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=analysis["flops"],
        bytes_accessed=analysis["bytes accessed"],
        hbm_bytes=hbm_bytes(compiled.as_text()),
    )


def _decode_floor(config: ModelConfig, shape: PlanShape, arguments: tuple) -> float:
    """Bytes per device that a decode step cannot avoid reading: the weights of the plan's steps, the head, caches."""
    parameters, bridges, _, _, cache, prompt, *_ = arguments

    def local_bytes(leaf: jax.ShapeDtypeStruct) -> float:
        assert leaf.sharding is not None
        return float(np.prod(leaf.sharding.shard_shape(leaf.shape))) * jnp.dtype(leaf.dtype).itemsize

    # The stacks hold all layers, and a plan reads its share of them. Completions have no first position.
    read = [leaf for name, leaf in (bridges or {}).items() if name != "first"]
    weights = 0.0 + sum(local_bytes(leaf) * shape.bridged / config.num_layers for leaf in read)
    for name, leaf in parameters.items():
        if name.startswith("layers/"):
            readers = shape.with_mlp if name.removeprefix("layers/") in MLP_PARAMETERS else shape.cached
            weights += local_bytes(leaf) * readers / config.num_layers
        elif name == "head" or (name == "embedding" and config.tied_embeddings):
            weights += local_bytes(leaf)  # an untied embedding is only looked up
    return weights + sum(local_bytes(leaf) for leaf in jax.tree.leaves((cache, prompt.layers)))


class Shapes:
    """Arrays that exist by shape, dtype and placement alone."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def __call__(self, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        # `partition_spec` takes one axis at a time here, since the shapes have axes without a logical name.
        spec = PartitionSpec(*(None if axis is None else partition_spec((axis,))[0] for axis in axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, spec))

    def parameters(self, config: ModelConfig, dtype: Any, in_use: bool = False) -> dict[str, Any]:
        stored = parameter_axes(config)
        axes = {name: used_axes(each) if in_use else each for name, each in stored.items()}
        return {name: self(shape, dtype, *axes[name]) for name, shape in parameter_shapes(config).items()}

    def bridges(self, config: ModelConfig, dtype: Any, rank: int | None) -> dict[str, Any]:
        stack = jax.eval_shape(lambda: Bridges(config.num_layers, config.width, rank).stack())
        # Biases stay in float32, as in low-precision copies.
        return {
            name: self(leaf.shape, dtype if name in MATRICES else jnp.float32, *axes_of(f"bridges/{name}"))
            for name, leaf in stack.items()
        }
