"""What does not fit is refused before anything compiles, with what is needed and which field to change."""

import dataclasses

import pytest

from nested_reft.models.config import ModelConfig
from nested_reft.sharding import make_mesh
from nested_reft.train import memory
from nested_reft.train.config import load_config
from nested_reft.train.memory import check_memory, least_bytes

SHAPE = ModelConfig(
    vocab_size=100, num_layers=4, width=12, hidden_width=20, num_heads=2, num_kv_heads=1, head_size=4, max_positions=64
)


def config(prompts=2, group=3, size=5, micro_batches=1):
    tiny = load_config("tiny")
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, prompts_per_batch=prompts),
        rollout=dataclasses.replace(tiny.rollout, group_size=group, max_completion_tokens=size),
        train=dataclasses.replace(tiny.train, micro_batches=micro_batches),
    )


def test_least_bytes_by_hand():
    parts = least_bytes(config(), SHAPE, prompt_size=8)
    # Embedding 1200, final norm 12; a layer: norms 24, query 96, key and value 48 each, output 96, MLP 720.
    weights = 4 * (1200 + 12 + 4 * (24 + 96 + 96 + 96 + 720))
    tokens = 2 * (8 + 3 * 4)
    assert parts["rollouts"] == {"weights": weights, "optimizer": 2 * weights, "caches": 2 * 4 * 4 * 4 * tokens}
    assert parts["updates"]["activations"] == tokens * 4 * 12 * 4
    rounded = config()
    rounded = dataclasses.replace(rounded, rollout=dataclasses.replace(rounded.rollout, weights="bfloat16"))
    assert least_bytes(rounded, SHAPE, 8)["rollouts"]["weights"] == weights + weights // 2  # the target and its copy
    assert least_bytes(config(micro_batches=2), SHAPE, 8)["updates"]["activations"] == tokens // 2 * 4 * 12 * 4


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            {"prompts": 2000, "size": 5000, "micro_batches": 2000},
            "rollouts need at least .* caches .* lower data.prompts_per_batch",
        ),
        ({"prompts": 100, "size": 500}, "updates need at least .* activations .* raise train.micro_batches"),
        ({}, "rollouts need at least 0.0 GB .* there are 0.0 GB: train adapters"),
    ],
)
def test_what_cannot_fit_is_refused(sizes, message, monkeypatch):
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: 2.5e7 if sizes else 1e4)
    with pytest.raises(ValueError, match=message):
        check_memory(config(**sizes), SHAPE, 8, make_mesh(config().mesh))


def test_what_fits_passes():
    check_memory(config(), SHAPE, 8, make_mesh(config().mesh))
    assert memory.mesh_bytes(make_mesh(config().mesh)) > 1e9
