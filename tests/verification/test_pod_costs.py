"""Whole programs on a mesh: useful operations by hand, what is held besides, least times, and the smallest slice."""

import dataclasses
import importlib.util
import json
import math

import jax
import pytest

from nested_reft.cli.main import main
from nested_reft.layer_plan import PlanShape
from nested_reft.models.parameters import parameter_shapes
from nested_reft.models.registry import HUB_MODELS, HUB_SHAPES, model_shape
from nested_reft.plan_price import CEILINGS, Workload
from nested_reft.reports.tables import resource_table
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training.config import load_config
from nested_reft.verification import compiled_costs, pod_costs, slice_choice
from nested_reft.verification.pod_costs import rollout_cost, rollout_flops
from nested_reft.verification.slice_choice import cloud_name, least_bytes, minimum_resources, smallest_on, trained
from tests.tiny_models import TINY

WORK = Workload(prompts=2, group_size=3, prompt_tokens=4, completion_tokens=5)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed; make tpu-compile adds it"
)


def test_useful_operations_by_hand():
    attention = 2 * TINY.width * (TINY.num_heads + TINY.num_kv_heads) * TINY.head_size
    mlp, head = 3 * TINY.width * TINY.hidden_width, TINY.width * TINY.vocab_size
    tokens = 2 * 4 + 6 * 4  # of the prompts, and of the completions without their last
    # A prompt's tokens see 1 to 4 tokens; a completion's see 4 and 1 to 4 of their own.
    seen = 2 * (1 + 2 + 3 + 4) + 6 * (4 * 4 + 1 + 2 + 3 + 4)
    scores = 4 * TINY.num_heads * TINY.head_size * seen
    heads = 2 * 6 * 5 * head
    assert rollout_flops(TINY, WORK, PlanShape(3), None) == 3 * (2 * tokens * (attention + mlp) + scores) + heads
    mixed = PlanShape(2, bridged=1, without_attention=1)
    expected = 2 * tokens * (2 * attention + 3 * mlp + TINY.width**2) + 2 * scores + heads
    assert rollout_flops(TINY, WORK, mixed, None) == expected


def test_a_rollout_is_counted_whole(monkeypatch):
    """With rates given, the least time follows from the counts, and moments lie beside the program."""
    kind = jax.devices()[0].device_kind
    rates = dataclasses.replace(CEILINGS["cpu"], memory_bytes=1e9, ici_bytes_per_second=1e6, dcn_bytes_per_second=1e3)
    monkeypatch.setitem(CEILINGS, kind, rates)
    config = load_config("tiny", data={"prompts_per_batch": 2, "max_prompt_tokens": 4},
                         rollout={"group_size": 3, "max_completion_tokens": 5})  # fmt: skip
    cost = rollout_cost(TINY, config, make_mesh(MeshConfig()), PlanShape(3))
    parameters = sum(math.prod(shape) for shape in parameter_shapes(TINY).values())
    assert cost.held_bytes == 2 * 4 * parameters + 3 * 4  # two moments, and counters
    assert cost.useful_flops == rollout_flops(TINY, WORK, PlanShape(3), None)
    # Attention over all slots of a cache is more than over those that are filled; the products are all there.
    assert 1.0 < cost.flops / cost.useful_flops < 1.3
    assert not cost.collectives and cost.fits
    assert cost.seconds["total"] == max(cost.flops / rates.flops_per_second, cost.hbm_bytes / rates.bytes_per_second)
    assert cost.mfu == pytest.approx(cost.useful_flops / rates.flops_per_second / cost.seconds["total"])
    assert not dataclasses.replace(cost, held_bytes=900_000_000).fits


def test_all_parameters_take_more_than_adapters():
    config, shape = load_config("qwen_math_gsm8k"), model_shape("qwen2.5-math-7b-instruct")
    whole, adapters = trained(config, True), trained(config, False)
    assert (whole.model.dtype, whole.lora.rank, whole.rollout.weights) == ("float32", 0, "bfloat16")
    assert (adapters.model.dtype, adapters.lora.rank, adapters.rollout.weights) == ("bfloat16", 16, "target")
    count = sum(math.prod(size) for size in parameter_shapes(shape).values())
    one = dataclasses.replace(
        whole, mesh=MeshConfig(fsdp=4, tensor=4), train=dataclasses.replace(whole.train, micro_batches=8)
    )
    activations = 4 * (320 + 8 * 767) * 28 * 3584
    caches = 2 * 28 * 4 * 128 * 2 * 8 * (320 + 8 * 768) / 4  # keys and values of 8 prompts, a quarter of the heads
    update, rollout = count * 4 / 16 + activations, count * 2 / 4 + caches
    # Weights, two moments and the copy are held by both; an update has a gradient, a rollout the gathered copy.
    assert least_bytes(one, shape) == pytest.approx(count * (3 * 4 + 2) / 16 + max(update, rollout))
    assert least_bytes(dataclasses.replace(adapters, mesh=one.mesh, train=one.train), shape) < least_bytes(one, shape)


def test_the_mesh_with_the_least_memory():
    config, shape = trained(load_config("qwen_math_gsm8k"), True), model_shape("qwen2.5-math-7b-instruct")
    assert smallest_on(config, shape, 8, 16e9) is None
    found = smallest_on(config, shape, 128, 16e9)
    assert found is not None and found.mesh == MeshConfig(fsdp=32, tensor=4) and found.data.prompts_per_batch == 32
    assert smallest_on(config, shape, 256, 16e9).data.prompts_per_batch == 64  # one for each share


def test_slices_are_tried_until_one_fits(monkeypatch):
    """The bound lets 2x2 through, and the compiler does not."""
    tried = []

    def compiled(config, shape, topology):
        tried.append(topology)
        return [cost(name, 15e9 if topology == "v5e:2x2" else 9e9) for name in ("update", "rollout")]

    monkeypatch.setattr(slice_choice, "_compiled", compiled)
    shapes = {"qwen2.5-math-1.5b-instruct": HUB_SHAPES["qwen2.5-math-1.5b-instruct"]}
    done = [{"model": "qwen2.5-math-1.5b-instruct", "generation": "v5e", "all_parameters": False}]
    (row,) = minimum_resources(load_config("qwen_math_gsm8k"), shapes, ["v5e"], done)
    assert tried == ["v5e:2x2", "v5e:2x4"]
    assert (row["slice"], row["cloud_name"], row["chips"], len(row["too_small"])) == ("2x4", "v5litepod-8", 8, 1)
    last = resource_table([row]).splitlines()[-1]
    assert last.startswith("| qwen2.5-math-1.5b-instruct | all parameters | v5litepod-8 (v5e:2x4) | 8 | ")


def test_the_bound_alone_compiles_nothing(capsys):
    command = [
        "compile",
        "qwen_math_gsm8k",
        "--table",
        "--no-rollout",
        "--no-update",
        "--generations",
        "v5e",
        "--models",
    ]
    assert main([*command, "qwen2.5-math-7b-instruct", "qwen2.5-72b-instruct"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    # 4x4 is the first with room for the moments of 7B. 72B keeps 16.9 GB of activations on each chip.
    assert rows[0].startswith(
        "| qwen2.5-math-7b-instruct | all parameters | v5litepod-16 (v5e:4x4) | 16 | fsdp 4 x tensor 4"
    )
    assert [row.split(" | ")[2].strip(" |") for row in rows[2:]] == ["none of v5e"] * 2


def cost(program, size):
    return pod_costs.ProgramCost(
        program=program, layers=1, bridged=0, devices=1, program_bytes=int(size), held_bytes=0, memory_bytes=16e9,
        flops=0.0, useful_flops=0.0, hbm_bytes=0.0, collectives=(), ici_bytes=0.0, dcn_bytes=0.0, seconds={}, mfu=None,
    )  # fmt: skip


def test_the_table_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    file, asked = tmp_path / "table.json", []

    def rows(config, shapes, generations, done, compiles):
        assert compiles
        asked.append(len(done))
        yield {"model": "m", "generation": generations[0], "all_parameters": True, "slice": None, "too_small": []}

    monkeypatch.setattr(slice_choice, "minimum_resources", rows)
    command = ["compile", "tiny", "--table", "--models", "qwen2.5-7b", "--generations", "v5p", "--json", str(file)]
    assert main(command) == main(command) == 0
    assert asked == [0, 1] and len(json.loads(file.read_text())["rows"]) == 2
    assert "| m | all parameters | none of v5p |" in capsys.readouterr().out
    assert main([*command, "--generations", "v9"]) == 2
    assert "--generations has 'v9'; allowed are v5e, v5p" in capsys.readouterr().err


def test_names_of_slices():
    """Google Cloud counts chips of v5e and TensorCores of v5p."""
    assert cloud_name("v5e", "8x8") == "v5litepod-64"
    assert cloud_name("v5p", "2x4x4") == "v5p-64" and cloud_name("v5p", "4x4x8") == "v5p-256"


def test_shapes_without_files_are_of_known_models():
    assert set(HUB_SHAPES) <= set(HUB_MODELS)
    count = sum(math.prod(size) for size in parameter_shapes(HUB_SHAPES["qwen2.5-72b-instruct"]).values())
    assert count == pytest.approx(72.7e9, rel=0.001)  # as its card says


@pytest.mark.parametrize("asked", [[], ["--table"], ["--no-decode", "--no-update"]])
def test_refilled_rows_are_refused_before_anything_compiles(asked, capsys):
    """What would be compiled is another program, with other caches."""
    assert main(["compile", "tiny", "--rollout.rows", "64", *asked]) == 2
    assert capsys.readouterr().err == ("error: rollout.rows is 64; compile knows plain rollouts only: set it to 0\n")


def test_rows_matter_only_where_a_rollout_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(slice_choice, "minimum_resources", lambda *arguments: [])
    command = ["compile", "tiny", "--rollout.rows", "64", "--table", "--json", str(tmp_path / "table.json")]
    assert main([*command, "--no-rollout", "--no-update"]) == 0
    config = load_config("tiny", rollout={"rows": 64})
    with pytest.raises(ValueError, match=r"rollout.rows is 64"):
        rollout_cost(TINY, config, make_mesh(config.mesh), PlanShape(TINY.num_layers))


@needs_libtpu
def test_several_tpu_slices():
    devices = compiled_costs.topology_devices("v5e:2x2", slices=2)
    assert len(devices) == 8 and {device.slice_index for device in devices} == {0, 1}


@needs_libtpu
def test_an_axis_of_a_mesh_may_take_a_part_of_an_axis_of_chips():
    devices = compiled_costs.topology_devices("v5p:4x4x4")
    mesh = compiled_costs.topology_mesh(devices, MeshConfig(fsdp=8, tensor=8))
    assert mesh.size == 64 and len(set(mesh.devices.flat)) == 64


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_exchanges_logits_by_rows():
    """Gathered whole, they took as many bytes of HBM as the weights."""
    config = load_config("tiny", mesh={"tensor": 2}, rollout={"max_completion_tokens": 8})
    shape = dataclasses.replace(TINY, vocab_size=4096, width=256, head_size=64)
    devices = compiled_costs.topology_devices("v5e:2x2")
    mesh = compiled_costs.topology_mesh(devices, config.mesh)
    cost = rollout_cost(shape, config, mesh, PlanShape(5))
    logits = config.data.prompts_per_batch * config.rollout.group_size * 4096 * 4
    assert all(each["largest"] < logits for each in cost.collectives if each["kind"] == "all-gather")
    assert cost.fits and cost.seconds["total"] > 0
