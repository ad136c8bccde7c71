"""The mesh that `mesh.data auto` chooses."""

import dataclasses

import jax
import pytest

from nested_reft.models.lora import LoraConfig
from nested_reft.models.registry import HUB_SHAPES
from nested_reft.sharding import MeshConfig
from nested_reft.training import mesh_choice
from nested_reft.training.config import load_config
from nested_reft.training.mesh_choice import choose_mesh, with_chosen_mesh
from tests.training.runs import nano

SEVEN = HUB_SHAPES["qwen2.5-math-7b-instruct"]
GB = 1e9


def qwen(full: bool = False):
    """The 7B recipe with 64 prompts a batch: adapters on bfloat16 weights, or all of it in float32."""
    config = load_config("qwen_math_gsm8k", mesh={"data": "auto"})
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, prompts_per_batch=64),
        train=dataclasses.replace(config.train, micro_batches=1),
        model=dataclasses.replace(config.model, dtype="float32" if full else "bfloat16"),
        lora=LoraConfig(rank=0 if full else 16),
    )


def test_a_small_model_shares_prompts_alone():
    config = nano(mesh=MeshConfig(data="auto"))
    mesh, reason = choose_mesh(config, config.model.shape, 4, 10 * GB)
    assert mesh == MeshConfig(data=4)
    assert reason.startswith("at least") and "10 GB" in reason


def test_shares_divide_the_prompts():
    """4 prompts make 4 shares, so 4 of 8 devices stay idle unless heads are shared."""
    config = nano(mesh=MeshConfig(data="auto"))
    assert choose_mesh(config, config.model.shape, 8, 10 * GB)[0] == MeshConfig(data=4)


def sized(mesh: MeshConfig, prompts: int = 4, **fields):
    """A run with so many prompts in a batch."""
    return nano(data__prompts_per_batch=prompts, mesh=mesh, **fields)


@pytest.mark.parametrize(
    ("config", "devices", "reason"),
    [
        (sized(MeshConfig(data=4)), 4, None),
        (
            sized(MeshConfig(data=4)),
            8,
            "4 of 8 devices are used, because mesh.data x mesh.fsdp shares prompts evenly and data.prompts_per_batch is"
            " 4; a multiple of 8 would use all",
        ),
        # 6 prompts in two parts are 3, which two devices cannot share; the other two share heads.
        (
            sized(MeshConfig(data=1, tensor=2), 6, train__micro_batches=2),
            4,
            "2 of 4 devices are used, because mesh.data x mesh.fsdp shares prompts evenly and data.prompts_per_batch /"
            " train.micro_batches is 3; a multiple of 2 would use all",
        ),
        (sized(MeshConfig(data=2, fsdp=3), 6), 8, "6 of 8 devices are used, because mesh.fsdp 3 does not divide 8"),
    ],
)
def test_devices_that_are_left_out_have_a_reason(config, devices, reason):
    found = mesh_choice.idle_reason(config, devices)
    assert found == reason or (reason and found and found.startswith(reason))


def test_the_batches_that_use_all_devices_do(monkeypatch, capsys):
    """What the line promises: with 8 prompts all of 8 devices work, and the line is one."""
    monkeypatch.setattr(mesh_choice, "mesh_bytes", lambda mesh: 80 * GB)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    for prompts, used in ((4, 4), (8, 8)):
        assert with_chosen_mesh(sized(MeshConfig(data="auto"), prompts)).mesh == MeshConfig(data=used)
        said = capsys.readouterr().out
        assert ("a multiple of 8 would use all\n" in said) == (used < 8) and said.count("\n") == 1


def test_a_large_model_shares_its_storage_and_what_it_gathers_must_fit():
    """7.6e9 parameters: weights, moments and gradient take 122 GB in float32, and rollouts gather 30 GB."""
    # 122 / 4 + 30 = 61 GB fit 95 GB, of which 76 are filled; 122 / 2 + 30 = 91 would not.
    assert choose_mesh(qwen(full=True), SEVEN, 64, 95 * GB)[0] == MeshConfig(data=16, fsdp=4)
    # Of 16 GB, 12.8 are filled. What is gathered fits only where four share the heads: 7.6 + 122 / 32 + 0.8 of caches.
    assert choose_mesh(qwen(full=True), SEVEN, 64, 16 * GB)[0] == MeshConfig(data=2, fsdp=8, tensor=4)


def test_adapters_need_less():
    assert choose_mesh(qwen(), SEVEN, 64, 95 * GB)[0] == MeshConfig(data=64)


def test_sizes_of_three_digits_are_written_out():
    """The 122 GB that a model takes on one device, of 141 GB, are no powers of ten."""
    config = qwen(full=True)
    with pytest.raises(ValueError, match=r"fits: each needs at least 1[2-9]\d GB and has 141 GB, of which"):
        choose_mesh(config, SEVEN, 1, 141 * GB)
    assert "of each device's 141 GB are used" in choose_mesh(config, SEVEN, 64, 141 * GB)[1]


def test_a_model_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"no mesh over 2 devices fits: each needs at least \d+ GB and has 16 GB"):
        choose_mesh(qwen(full=True), SEVEN, 2, 16 * GB)


def test_the_choice_is_said_and_kept_in_numbers(monkeypatch, capsys):
    monkeypatch.setattr(mesh_choice, "mesh_bytes", lambda mesh: 80 * GB)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    chosen = with_chosen_mesh(nano(mesh=MeshConfig(data="auto"))).mesh
    assert chosen == MeshConfig(data=4)
    assert "mesh.data 4 is 4 devices: at least" in capsys.readouterr().out
    given = with_chosen_mesh(nano(mesh=MeshConfig(data="auto", tensor=2))).mesh
    assert given == MeshConfig(data=2, tensor=2)
    assert "the rest shares prompts" in capsys.readouterr().out
