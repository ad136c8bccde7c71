"""The mesh, and where parameters, adapters, bridges and batches lie on it."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from nested_reft import sharding
from nested_reft.bridging import BridgeConfig
from nested_reft.models import source
from nested_reft.models.formats.stacking import stack_parameters
from nested_reft.models.lora import LoraConfig
from nested_reft.models.parameters import axes_of, parameter_axes, parameter_shapes, splittable_parts
from nested_reft.models.placement import gathered
from nested_reft.models.registry import HUB_SHAPES
from nested_reft.sharding import (
    MeshConfig,
    batch_devices,
    check_divisible,
    constrain,
    make_mesh,
    mesh_of,
    on_mesh,
    partition_spec,
    place,
    to_host,
    used_axes,
)
from nested_reft.training.config import Config, load_config
from tests.tiny_models import TINY
from tests.training.runs import nano

EIGHT = MeshConfig(slices=2, fsdp=2, tensor=2)


def specs(state: nnx.State) -> dict[str, PartitionSpec]:
    return {
        "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)): array.sharding.spec
        for path, array in jax.tree_util.tree_leaves_with_path(state)
    }


def test_an_axis_of_a_mesh_may_take_a_part_of_an_axis_of_chips():
    """Chips of a TPU v5p that stand in a cube of four: eight of them are one side and half of another."""
    chips = [
        SimpleNamespace(
            id=number,
            platform="tpu",
            device_kind="TPU v5",
            coords=place,
            core_on_chip=0,
            slice_index=0,
            process_index=0,
        )
        for number, place in enumerate(itertools.product(range(4), repeat=3))
    ]
    grid = sharding.device_grid(chips, (1, 1, 8, 8))
    assert sorted(chip.id for chip in grid.flat) == list(range(64))
    for line in grid.reshape(8, 8):  # tensor is the fastest axis, so those that share it are near
        spans = [len({chip.coords[axis] for chip in line}) for axis in range(3)]
        assert sorted(spans) == [1, 2, 4]


def test_the_mesh_has_four_axes_the_slowest_first():
    mesh = make_mesh(EIGHT)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert batch_devices(mesh) == EIGHT.batch == 4 and EIGHT.size == 8
    # Neighbours share the fastest axis.
    assert [device.id for device in mesh.devices.ravel()] == list(range(8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(fsdp=0), "mesh.fsdp is 0; allowed is 1 or more$"),
        (lambda: MeshConfig(data=0), "mesh.data is 0; allowed is 1 or more, or auto$"),
        (lambda: MeshConfig(data="auto").size, "mesh.data is 'auto', which has no size before the devices are known"),
        (lambda: make_mesh(MeshConfig(data=3, fsdp=3)), "mesh.data 3 x mesh.fsdp 3 is 9 devices; allowed are 1 to 8"),
        (
            lambda: mesh_of([SimpleNamespace(slice_index=0)] * 4, MeshConfig(slices=2, data=2)),
            "mesh.slices is 2, and the devices form 1; give the number of slices",
        ),
        (
            lambda: partition_spec(("width", "batch")),
            r"map to mesh axes .*: one mesh axis can split only one of them",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cpus_of_several_processes_form_slices():
    """JAX says slice 0 of all of them, and a mesh of theirs is that of one process."""

    class Device:
        slice_index, platform, device_kind = 0, "cpu", "cpu"

    devices = [Device() for _ in range(4)]
    mesh = mesh_of(devices, MeshConfig(slices=2, data=2))
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 1, "tensor": 1}
    assert list(mesh.devices.ravel()) == devices


@pytest.mark.parametrize(
    ("mesh", "shape", "message"),
    [
        # 3 heads of 64 are 192 columns, which two devices could share: half a head each.
        (
            MeshConfig(tensor=2),
            {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "hidden_width": 1536, "vocab_size": 49_152},
            "mesh.tensor is 2, but the model has 3 key/value heads; allowed are 1, 3",
        ),
        (MeshConfig(tensor=2), {}, "mesh.tensor is 2, but the model has 31 tokens in its vocabulary; allowed are 1$"),
        (
            MeshConfig(tensor=4),
            {"num_kv_heads": 4, "num_heads": 4, "hidden_width": 6, "vocab_size": 32},
            "mesh.tensor is 4, but the model has 6 hidden units; allowed are 1, 2",
        ),
        (MeshConfig(fsdp=3), {}, "mesh.fsdp is 3, but the model has 16 units of width; allowed are 1, 2, 4, 8, 16"),
    ],
)
def test_a_mesh_that_does_not_split_the_model_is_refused_with_what_would_do(mesh, shape, message):
    with pytest.raises(ValueError, match=message):
        check_divisible(splittable_parts(dataclasses.replace(TINY, **shape)), make_mesh(mesh))


def test_known_models_can_be_split_by_their_key_value_heads():
    for shape in HUB_SHAPES.values():
        check_divisible(splittable_parts(shape), make_mesh(MeshConfig(fsdp=4, tensor=2)))


def test_every_kind_of_array_has_its_place():
    """Adapters read and write what their projection does; layers are never split, so a plan's gather stays local."""
    config = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True, tied_embeddings=False)
    for name, axes in parameter_axes(config).items():
        assert axes.count("layer") == name.startswith("layers/")
        assert axes[0] != "layer" or partition_spec(axes)[0] is None
    assert axes_of("embedding") == axes_of("head") == ("vocab", "width")
    assert axes_of("layers/query") == ("layer", "heads", "width")
    assert axes_of("layers/output") == ("layer", "width", "heads")
    assert axes_of("layers/down") == ("layer", "width", "hidden")
    assert axes_of("layers/value_bias") == ("layer", "kv_heads")
    assert axes_of("layers/query_lora_in") == ("layer", "rank", "width")
    assert axes_of("layers/query_lora_out") == ("layer", "heads", "rank")
    assert axes_of("layers/down_lora_in") == ("layer", "rank", "hidden")
    assert axes_of("layers/down_lora_out") == ("layer", "width", "rank")
    assert axes_of("layers/key_scale") == ("layer", "kv_heads")
    assert axes_of("embedding_scale") == ("vocab",)
    assert axes_of("bridges/widen") == ("layer", "width", "rank")
    assert axes_of("value_head/weight") == axes_of("bridges/first") == ()
    assert used_axes(("layer", "width", "hidden")) == ("layer", "", "hidden")


def test_a_starting_model_is_split_with_its_adapters_and_bridges():
    model, _ = source.starting_model(
        nano().model, LoraConfig(rank=2), BridgeConfig("per_layer", rank=4), 3, make_mesh(EIGHT)
    )
    found = specs(nnx.state(model))
    assert found["layers/down"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["layers/down_lora_in"] == PartitionSpec(None, None, "tensor")
    assert found["layers/down_lora_out"] == PartitionSpec(None, "fsdp", None)
    assert found["bridges/narrow"] == PartitionSpec(None, None, "fsdp")
    assert found["final_norm"] == PartitionSpec(None)


def test_no_device_holds_a_parameter_whole_while_a_model_is_read(monkeypatch):
    """Each stack goes to the mesh in one call that splits it, and none goes to a single device before."""
    config = dataclasses.replace(TINY, vocab_size=32)
    names = {name: f"{name}.{{layer}}" if "/" in name else name for name in parameter_axes(config)}
    placed, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, to: placed.append(to.spec) or put(x, to))
    monkeypatch.setattr(jnp, "asarray", None)
    shapes = parameter_shapes(config)

    def read(name: str) -> np.ndarray:
        whole = name.partition(".")[0]
        return np.ones(shapes[whole][1:] if "/" in name else shapes[whole], np.float32)

    parameters = stack_parameters(config, names, read, np.float32, make_mesh(EIGHT))
    assert placed == [partition_spec(axes) for axes in parameter_axes(config).values()]
    for name, array in parameters.items():
        parts = np.prod([2 for axis in parameter_axes(config)[name] if partition_spec((axis,))[0]])
        assert array.addressable_data(0).nbytes * parts == array.nbytes


def test_a_value_is_split_where_the_mesh_divides_it():
    mesh = make_mesh(EIGHT)
    with on_mesh(mesh):
        even, odd = (jax.jit(lambda x: constrain(x, "batch", "", "heads"))(jnp.ones((n, 3, 2))) for n in (4, 5))
    assert even.sharding.shard_shape(even.shape) == (1, 3, 1)
    assert odd.sharding.shard_shape(odd.shape) == (5, 3, 1)
    # Without a mesh, and on one device, nothing is said.
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch"))(jnp.ones(4)))
    with on_mesh(make_mesh(MeshConfig())):
        assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch"))(jnp.ones(4)))


def test_a_loop_of_steps_reads_matrices_that_are_whole_in_their_width():
    model, _ = source.starting_model(nano().model, LoraConfig(), BridgeConfig(), 3, mesh := make_mesh(EIGHT))
    with on_mesh(mesh):
        found = specs(jax.jit(lambda model: nnx.state(gathered(model)))(model))
    assert found["layers/down"] == PartitionSpec(None, None, "tensor")
    assert found["embedding"] in (PartitionSpec("tensor"), PartitionSpec("tensor", None))


def test_values_go_there_and_back():
    mesh = make_mesh(EIGHT)
    tree = {"a": np.arange(8.0, dtype=np.float32), "b": jnp.arange(4)}
    found = to_host(place(tree, mesh, ("batch",)))
    assert all(isinstance(x, np.ndarray) for x in found.values())
    assert np.array_equal(found["a"], tree["a"]) and np.array_equal(found["b"], tree["b"])


def test_one_device_has_one_way_to_place_an_array():
    """Arrays from a program, from a checkpoint and from the host would need programs of their own otherwise."""
    mesh = make_mesh(MeshConfig())
    matrix = place(np.ones((4, 4), np.float32), mesh, ("vocab", "width"))
    double = jax.jit(lambda x: {"of": x + x, "turned": x.T, "row": x[0]})
    assert {array.sharding.spec for array in jax.tree.leaves([matrix, double(matrix)])} == {PartitionSpec()}


def test_a_configuration_of_an_earlier_version_splits_as_it_did():
    stored = load_config("tiny").to_json()
    stored["mesh"] = {"data": 4, "model": 2}
    assert Config.from_json(stored).mesh == MeshConfig(data=4, tensor=2)
