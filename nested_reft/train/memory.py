"""What a run must hold at once, checked against what the devices have before anything compiles."""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nested_reft.models.config import ModelConfig
from nested_reft.models.transformer import parameter_shapes
from nested_reft.train.config import Config

SIZES = "data.prompts_per_batch, rollout.group_size or rollout.max_completion_tokens"


def check_memory(config: Config, model: ModelConfig, prompt_size: int, mesh: Mesh) -> None:
    """Refuses batches and caches that cannot fit the mesh's devices together.

    The figures are lower bounds (`least_bytes`), so what passes may still not fit; what is refused never does.

    Raises:
        ValueError: says what is needed for what, what there is, and which fields to change.
    """
    capacity = mesh_bytes(mesh)
    for stage, parts in least_bytes(config, model, prompt_size).items():
        if sum(parts.values()) <= capacity:
            continue
        listed = ", ".join(f"{name} {count / 1e9:.1f}" for name, count in parts.items())
        most = max(parts, key=lambda name: parts[name])
        remedy = {
            "caches": f"lower {SIZES}",
            "activations": f"lower {SIZES}, or raise train.micro_batches",
        }.get(
            most, "train adapters (lora.rank), spread the model over more devices (mesh), or take a smaller model.name"
        )
        raise ValueError(
            f"{stage} need at least {sum(parts.values()) / 1e9:.1f} GB ({listed});"
            f" there are {capacity / 1e9:.1f} GB: {remedy}"
        )


def least_bytes(config: Config, model: ModelConfig, prompt_size: int) -> dict[str, dict[str, float]]:
    """Bytes that rollouts and updates cannot do without, by what holds them.

    Caches are keys and values of all layers, for a run ends by timing the full model too; activations are each
    layer's input, of every token of a micro-batch.
    """
    prompts, group, size = (
        config.data.prompts_per_batch,
        config.rollout.group_size,
        config.rollout.max_completion_tokens,
    )
    item = jnp.dtype(config.model.dtype).itemsize
    count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    weights = float(count * item)
    moments = 0.0 if config.lora.rank else 2.0 * weights
    copy = 0 if config.rollout.weights == "target" else count * jnp.dtype(config.rollout.weights).itemsize
    tokens = prompt_size + group * (size - 1)  # of a prompt and its completions; the last ones are never fed
    token_cache = 2 * model.num_layers * model.num_kv_heads * model.head_size * item
    rollouts = {
        "weights": weights + copy,
        "optimizer": moments,
        "caches": float(token_cache * prompts * tokens),
    }
    updates = {
        "weights": weights + copy,
        "optimizer": moments,
        "gradient": 0.0 if config.lora.rank else weights,
        "activations": float(4 * prompts // config.train.micro_batches * tokens * model.num_layers * model.width),
    }
    return {"rollouts": rollouts, "updates": updates}


def mesh_bytes(mesh: Mesh) -> float:
    """Memory of all devices of the mesh; on CPUs, which share it, that of the machine."""
    devices = list(mesh.devices.flat)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    if devices[0].platform != "cpu" and all(limits):
        return float(sum(limit for limit in limits if limit))
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf  # not known
