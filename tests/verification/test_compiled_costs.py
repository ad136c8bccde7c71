"""Costs of compiled steps: floors by hand, and that the compiled programs are those that train."""

import dataclasses
import importlib.util
import math
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from nested_reft.bridging import BridgeConfig
from nested_reft.cli.main import main
from nested_reft.layer_plan import PlanShape
from nested_reft.layer_skip import NestingConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.models.registry import QWEN2_5_SHAPE
from nested_reft.plan_price import Workload
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training.config import load_config
from nested_reft.training.optimizer import make_optimizer
from nested_reft.training.warm_start import WarmStartConfig
from nested_reft.verification import compiled_costs, slice_choice
from nested_reft.verification.compiled_costs import (
    Cost,
    checked_mesh,
    decode_cost,
    decode_costs,
    device_unit,
    state_shapes,
    topology_devices,
    topology_mesh,
    update_arguments,
    workload_of,
)
from nested_reft.verification.pod_costs import local_bytes, update_cost
from tests.tiny_models import TINY

WORKLOAD = Workload(prompts=2, group_size=3, prompt_tokens=8, completion_tokens=4)


def decode_floor(layers: int, mlps: int | None = None) -> int:
    """Bytes of float32 weights of the layers and the head, and of both caches."""
    heads, keys = TINY.num_heads * TINY.head_size, TINY.num_kv_heads * TINY.head_size
    attention = 2 * TINY.width * heads + 2 * TINY.width * keys + TINY.width
    attention += (heads + 2 * keys) * TINY.qkv_bias + 2 * TINY.head_size * TINY.qk_norm
    mlp = 3 * TINY.width * TINY.hidden_width + TINY.width
    caches = 2 * keys * (2 * 3 * 4 + 2 * 8)
    mlps = layers if mlps is None else mlps
    return 4 * (layers * (attention + caches) + mlps * mlp + TINY.vocab_size * TINY.width)


def test_the_floor_of_a_decode_step_by_hand():
    mesh = make_mesh(MeshConfig())
    full = decode_cost(TINY, WORKLOAD, mesh, dtype=jnp.float32)
    nested = decode_cost(TINY, WORKLOAD, mesh, shape=PlanShape(3), dtype=jnp.float32)
    assert full.layers == TINY.num_layers and nested.layers == 3
    assert full.floor_bytes == decode_floor(TINY.num_layers)
    assert nested.floor_bytes == decode_floor(3)
    assert full.bytes_accessed > decode_floor(TINY.num_layers) and nested.bytes_accessed > decode_floor(3)
    assert nested.flops < full.flops


@pytest.mark.parametrize(
    ("shape", "rank", "bridges"),
    [
        (PlanShape(3, bridged=2), 4, 2 * (2 * 4 * TINY.width + TINY.width)),
        (PlanShape(2, 1, without_attention=3, without_mlp=1), None, TINY.width**2 + TINY.width),
    ],
)
def test_the_floor_counts_each_part_of_a_plan(shape, rank, bridges):
    """A layer without attention has no caches, and one without MLP reads three matrices less."""
    found = decode_cost(TINY, WORKLOAD, make_mesh(MeshConfig()), shape, jnp.float32, rank)
    mlps = shape.kept + shape.without_attention
    assert found.floor_bytes == decode_floor(shape.cached, mlps) + 4 * bridges
    assert found.bridged == shape.bridged


def test_a_bridge_holds_its_matrix_in_the_dtype_of_the_weights():
    mesh = make_mesh(MeshConfig())
    plain, bridged = (decode_cost(TINY, WORKLOAD, mesh, shape) for shape in (PlanShape(3), PlanShape(3, bridged=1)))
    stacks = TINY.num_layers * (2 * TINY.width**2 + 4 * TINY.width)  # a matrix in bfloat16, its bias in float32
    assert bridged.argument_bytes - plain.argument_bytes == stacks + 2 * 4  # and one more step of the plan


def test_devices_share_weights_and_rows():
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    whole = decode_cost(TINY, WORKLOAD, make_mesh(MeshConfig()), dtype=jnp.float32)
    shared = decode_cost(dataclasses.replace(TINY, vocab_size=32), WORKLOAD, mesh, dtype=jnp.float32)
    assert shared.argument_bytes < 0.55 * whole.argument_bytes  # weights split alone: 0.66


def test_adapters_hold_no_moments_of_the_base():
    run, mesh = load_config("tiny"), make_mesh(MeshConfig())
    adapted = dataclasses.replace(run, lora=LoraConfig(rank=1), warm_start=WarmStartConfig())
    whole, adapters = (local_bytes(update_arguments(TINY, WORKLOAD, mesh, config)[:2]) for config in (run, adapted))
    parameters = sum(4 * jnp.prod(jnp.array(s)).item() for s in _shapes())
    assert whole > 3 * parameters  # weights and two moments
    assert parameters < adapters < 2 * parameters


def _shapes():
    from nested_reft.models.parameters import parameter_shapes

    return parameter_shapes(TINY).values()


def placements(training):
    """Path of every array of a state -> its partition, where heads times head size is the width: on shapes alone, query
    and output are the same, and so are a key and an adapter of rank 16."""
    square = dataclasses.replace(TINY, width=TINY.num_heads * TINY.head_size, vocab_size=32)
    mesh = make_mesh(MeshConfig(tensor=2))
    state, base = state_shapes(square, training, make_optimizer(training.optimizer, 1), mesh)
    leaves = jax.tree_util.tree_leaves_with_path({"state": state, "base": base})
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec for path, leaf in leaves}


def test_a_state_is_placed_by_name():
    specs = placements(load_config("tiny"))
    by_output, by_input = PartitionSpec(None, "tensor", "fsdp"), PartitionSpec(None, "fsdp", "tensor")
    for name, spec in (("query", by_output), ("key", by_output), ("output", by_input), ("down", by_input)):
        found = [specs[path] for path in specs if path.endswith(f"layers/{name}/value")]
        assert found == [spec] * 3  # the parameter and its two moments
    assert [specs[path] for path in specs if "embedding" in path] == [PartitionSpec("tensor", "fsdp")] * 3
    assert specs["state/updates"] == PartitionSpec()


@pytest.mark.parametrize(
    ("rank", "names"), [(None, ["first", "map", "map_bias"]), (4, ["first", "narrow", "widen", "widen_bias"])]
)
def test_bridges_are_held_frozen(rank, names):
    run = load_config("tiny")
    bridge = BridgeConfig(kind="per_layer", rank=rank)
    specs = placements(dataclasses.replace(run, nesting=dataclasses.replace(run.nesting, bridge=bridge)))
    found = {path: spec for path, spec in specs.items() if "bridges" in path}
    split = {"map": (None, None, "fsdp"), "narrow": (None, None, "fsdp"), "widen": (None, "fsdp", None)}
    assert found == {f"base/frozen/bridges/{name}/value": PartitionSpec(*split.get(name, ())) for name in names}


def test_the_nested_step_has_the_bridges_of_the_configuration(monkeypatch):
    """The steps are not compiled here; other tests do that."""
    asked = []

    def decode_cost(config, workload, mesh, shape=None, **rank):
        asked.append((shape, rank))
        return Cost("decode step", 0, "bfloat16", 0, 0, 0.0, 0.0, 0)

    monkeypatch.setattr(compiled_costs, "decode_cost", decode_cost)
    nesting = NestingConfig(skip_ratio=0.4, bridge=BridgeConfig(kind="per_layer", rank=4))
    config = dataclasses.replace(load_config("tiny"), nesting=nesting)
    decode_costs(config, TINY, checked_mesh(config, TINY, jax.devices()))
    assert asked == [(None, {}), (PlanShape(3, bridged=2), {"bridge_rank": 4})]


def test_adapters_are_split_as_what_they_adapt():
    specs = placements(dataclasses.replace(load_config("tiny"), lora=LoraConfig(rank=16), warm_start=WarmStartConfig()))
    adapters = {path: spec for path, spec in specs.items() if "_lora_" in path}
    assert len(adapters) == 3 * 2 * 7  # with two moments, in and out, of seven projections
    for name, read, written in (("query", "fsdp", "tensor"), ("down", "tensor", "fsdp")):
        reads = [spec for path, spec in adapters.items() if f"layers/{name}_lora_in" in path]
        writes = [spec for path, spec in adapters.items() if f"layers/{name}_lora_out" in path]
        assert reads == [PartitionSpec(None, None, read)] * 3 and writes == [PartitionSpec(None, written, None)] * 3
    assert specs["base/frozen/layers/query/value"] == PartitionSpec(None, "tensor", "fsdp")


def test_a_topology_that_cannot_be_had_is_refused(capsys):
    assert main(["compile", "tiny", "--topology", "v0:9x9"]) == 2
    assert "--topology is 'v0:9x9', which cannot be compiled for" in capsys.readouterr().err
    assert main(["compile", "tiny", "--model", "smollm2-360m"]) == 2
    assert "the shape of model 'smollm2-360m' is not known without its files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        # These end libtpu with a signal.
        ("v5e:100x100", "allowed is v5e:AxB with sides of 1 to 16 and at most 256 chips, such as v5e:4x4"),
        ("v5e:0x2", "allowed is v5e:AxB"),
        ("v6e:16x32", "allowed is v6e:AxB"),
        ("v5p:24x24x24", "allowed is v5p:AxBxC with sides of 1 to 24 and at most 6,144 chips, such as v5p:2x2x2"),
        ("v4:4x4x256", "allowed is v4:AxBxC"),
        # libtpu takes these for something else.
        ("v5e:2x2x2", "allowed is v5e:AxB"),
        ("v5p:2x2", "allowed is v5p:AxBxC"),
        ("", "chip '' is unknown; a topology is GENERATION:SHAPE in chips, and known are v2:4x4, v3:4x4, v4:2x2x1"),
        ("v5e", "allowed is v5e:AxB"),
        ("v5e:", "allowed is v5e:AxB"),
        ("v5e:٢x2", "allowed is v5e:AxB"),
        (f"v5e:{'9' * 5000}x2", "allowed is v5e:AxB"),
        ("v9x", "chip 'v9x' is unknown"),
    ],
)
def test_what_no_chip_has_is_refused_before_the_compiler_is_asked(topology, message, monkeypatch, capsys):
    """Also where it is not installed: what is wrong with the name is said first."""
    monkeypatch.setattr(topologies, "get_topology_desc", Mock(side_effect=AssertionError("the compiler was asked")))
    assert main(["compile", "tiny", "--topology", topology]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --topology is '") and message in said and "pip install" not in said


@pytest.mark.parametrize("topology", ["v5e:16x16", "v6e:16x16", "v5p:16x16x24", "v4:12x12x24", "v3:32x32", "v2:16x16"])
def test_the_largest_slices_are_allowed(topology):
    compiled_costs.check_topology(topology)


@pytest.mark.parametrize("generation", slice_choice.SLICES)
def test_the_slices_of_the_table_are_allowed(generation):
    for shape in slice_choice.slices_of(generation):
        compiled_costs.check_topology(f"{generation}:{shape}")


@pytest.mark.parametrize(("topology", "bounds"), [("v5e:1x1", (1, 1, 1)), ("v5e:2x2", None), ("v5p:2x2x1", None)])
def test_a_single_chip_has_a_host_of_its_own(topology, bounds, monkeypatch):
    """Else libtpu refuses it, since its hosts have 2x2 chips."""
    asked = Mock(return_value=SimpleNamespace(devices=[]))
    monkeypatch.setattr(topologies, "get_topology_desc", asked)
    topology_devices(topology)
    assert asked.call_args.kwargs.get("chips_per_host_bounds") == bounds


@pytest.mark.parametrize("installed", [True, False])
def test_a_topology_that_libtpu_refuses_is_refused_with_what_is_missing(monkeypatch, installed):
    """Its hosts have 2x2 chips, which do not divide 3x3."""
    monkeypatch.setattr(compiled_costs, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(ValueError, match="--topology is 'v5e:3x3', which cannot be compiled for") as refusal:
        topology_devices("v5e:3x3")
    assert "a topology is GENERATION:SHAPE in chips, such as v5e:4x4" in str(refusal.value)
    assert ("pip install 'jax[tpu]'" in str(refusal.value)) == (not installed)


def test_compile_says_for_what(monkeypatch, capsys):
    monkeypatch.setattr(compiled_costs, "topology_devices", lambda *topology: jax.devices()[:4])
    assert main(["compile", "tiny", "--no-update", "--no-rollout", "--topology", "v5e:2x2", "--mesh.data", "2"]) == 0
    first, _, header, *_ = capsys.readouterr().out.splitlines()
    assert first == "decode step in bfloat16, for 2 of 4 chips of v5e:2x2"
    assert header.startswith("per chip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh.data", "4", "--mesh.tensor", "2"], "mesh.data 4 x mesh.tensor 2 is 8 devices; the topology has 4"),
        (["--mesh.tensor", "3"], "mesh.tensor is 3, but the model has 2 key/value heads; allowed are 1, 2"),
        (["--rollout.max-completion-tokens", "100"], "is 116; the model allows 64 positions"),
    ],
)
def test_what_cannot_be_compiled_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(compiled_costs, "topology_devices", lambda *topology: jax.devices()[:4])
    assert main(["compile", "tiny", "--no-update", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_cores_that_are_devices_are_not_called_chips():
    chips = [SimpleNamespace(id=x, coords=[x, 0, 0]) for x in range(2)]
    assert device_unit(chips) == "chip"
    assert device_unit([*chips, *chips]) == "core"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the tpu extra) is not installed")
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5e:1x1", "v6e:2x2", "v5p:2x2x2", "v4:2x2x1"])
def test_topologies_have_as_many_chips_as_their_shape_says(topology):
    devices = topology_devices(topology)
    shape = topology.partition(":")[2]
    assert len({tuple(device.coords) for device in devices}) == math.prod(map(int, shape.split("x")))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the tpu extra) is not installed")
def test_compiles_for_a_tpu_that_is_not_here():
    decode_cost(TINY, WORKLOAD, topology_mesh(topology_devices("v5e:2x2"), MeshConfig(data=2)), shape=PlanShape(3))
    assert jax.devices()[0].platform == "cpu"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the tpu extra) is not installed")
def test_a_program_that_does_not_fit_a_tpu_is_refused(capsys):
    sizes = ["--data.prompts-per-batch", "10000000", "--data.max-prompt-tokens", "16"]
    assert main(["compile", "tiny", "--no-update", "--no-rollout", "--topology", "v5e:2x2", *sizes]) == 2
    message = capsys.readouterr().err
    assert "the decode step of 6 layers does not fit: " in message and "lower data.prompts_per_batch" in message


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the tpu extra) is not installed")
@pytest.mark.parametrize("shape", [None, PlanShape(6), PlanShape(5, bridged=3)])
def test_a_tpu_moves_little_more_than_the_floor(shape):
    """With q, k and v transposed every step and caches written by every layer it was 1.086 and 1.071. A choice between
    parts must copy neither caches nor weights."""
    config = dataclasses.replace(QWEN2_5_SHAPE, num_layers=8, vocab_size=16_384)
    workload = Workload(prompts=8, group_size=8, prompt_tokens=192, completion_tokens=64)
    cost = decode_cost(config, workload, topology_mesh(topology_devices("v5e:2x2"), MeshConfig()), shape)
    assert cost.floor_bytes is not None
    assert cost.floor_bytes < cost.hbm_bytes < 1.01 * cost.floor_bytes


def test_an_update_never_holds_the_logits_of_all_tokens():
    """With Qwen's vocabulary, its peak memory stays under the size of one [N, C, V] array."""
    config = dataclasses.replace(TINY, vocab_size=151_936)
    sizes = {"data": {"prompts_per_batch": 8, "max_prompt_tokens": 4}, "rollout": {"max_completion_tokens": 32}}
    run, mesh = load_config("tiny", **sizes), make_mesh(MeshConfig())
    cost, state = update_cost(config, run, mesh), local_bytes(update_arguments(config, workload_of(run), mesh, run)[:2])
    assert cost.bytes - state < 0.7 * (8 * 8 * 32 * config.vocab_size * 4)
