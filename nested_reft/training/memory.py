"""What a run must hold at once, checked against what the devices have before anything compiles."""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nested_reft.losses.registry import OfflineConfig
from nested_reft.losses.supervised import SftConfig
from nested_reft.models.parameters import parameter_shapes
from nested_reft.sharding import make_mesh
from nested_reft.training.setup import Setup


def check_memory(setup: Setup) -> None:
    """Refuses training whose batches and caches cannot fit the mesh's devices together.

    The figures are lower bounds (`least_bytes`), so what passes may still not fit.

    Args:
        setup: what the run starts from, before any training.

    Raises:
        ValueError: says what is needed for what, what there is, and which fields to change.
    """
    config, capacity = setup.config, mesh_bytes(make_mesh(setup.config.mesh))
    completions = f"rollout.max_completion_tokens ({config.rollout.max_completion_tokens})"
    batch = (
        f"data.prompts_per_batch ({config.data.prompts_per_batch}), rollout.group_size ({config.rollout.group_size})"
    )
    samples = f"evaluation.samples_per_prompt ({config.evaluation.samples_per_prompt})"
    sizes = {
        "rollouts": f"lower {batch} or {completions}",
        "updates": f"lower {batch} or {completions}, or raise train.micro_batches ({config.train.micro_batches})",
        "evaluation": f"lower evaluation.batch_size ({config.evaluation.batch_size}), {samples} or {completions}",
        "warm start": f"raise warm_start.micro_batches or lower warm_start.batch_size ({config.warm_start.batch_size})",
    }
    # Where weights and moments are too much, a smaller batch would not help.
    smaller = f"train adapters (lora.rank, now {config.lora.rank}), raise mesh.model ({config.mesh.model})"
    for stage, parts in least_bytes(setup).items():
        if sum(parts.values()) <= capacity:
            continue
        listed = ", ".join(f"{name} {_size(count)}" for name, count in parts.items())
        # The largest part decides on the advice: batch sizes act on caches and activations only.
        is_batch = max(parts, key=lambda name: parts[name]) in ("caches", "activations")
        remedy = sizes[stage] if is_batch else f"{smaller} or take a smaller model.name"
        if parts.get("old weights"):
            remedy += f"; with search.lag 0 (now {config.search.lag}) and search.sync_every 1, no old weights are held"
        raise ValueError(
            f"{stage} needs at least {_size(sum(parts.values()))} ({listed}); there are {_size(capacity)}: {remedy}"
        )


def least_bytes(setup: Setup) -> dict[str, dict[str, float]]:
    """Bytes that each stage cannot do without, on all devices together, by what holds them.

    Weights, their moments and gradients lie once on each share of the batch (`mesh.data`). Caches are keys and values
    of all layers, for a run ends by timing the full model too; activations are each layer's input, of every token of
    a micro-batch whose completions take all their tokens.

    Args:
        setup: what the run starts from; it gives the sizes of model, batch and mesh.

    Searchers may hold several versions of the weights; only one of them is certain, because they may be done early.

    Returns:
        Stage -> what holds memory in it -> bytes.
    """
    config, model = setup.config, setup.policy.model.config
    prompts, group = config.data.prompts_per_batch, config.rollout.group_size
    fed = config.rollout.max_completion_tokens - 1  # of each completion; the last is never fed
    own = group * fed
    item = jnp.dtype(config.model.dtype).itemsize
    count = config.mesh.data * sum(math.prod(shape) for shape in parameter_shapes(model).values())
    weights = float(count * item)
    # AdamW keeps two moments of each weight in its dtype. Those of adapters are small enough for a lower bound
    # without them.
    moments = 0.0 if config.lora.rank else 2.0 * weights
    is_copied = config.rollout.weights != "target"
    copy = count * jnp.dtype(config.rollout.weights).itemsize if is_copied else 0
    token_values = 2 * model.num_layers * model.num_kv_heads * model.head_size  # cached for each token
    shared = setup.data.shared_prefix
    # While others search with the weights from before an update, it cannot take over their buffers. Adapters are small
    # again, and a copy of low precision is made anew beside the one in use.
    searches_beside = config.search.backend != "inline" and config.search.lag > 0
    lent = 0.0 if is_copied or config.lora.rank else weights
    old = float(copy) if searches_beside else 0.0
    if searches_beside or config.search.sync_every > 1:
        old += lent
    tokens = shared + config.prompts_per_micro_batch * (
        setup.data.prompt_size - shared + config.trained_group_size * fed
    )
    rollouts = {
        "weights": weights + copy,
        "optimizer": moments,
        # A copy of low precision keeps its caches in bfloat16, which takes 2 bytes.
        "caches": float((2 if is_copied else item) * token_values * prompts * (setup.data.prompt_size + own)),
    }
    updates = {
        "weights": weights + copy,
        "optimizer": moments,
        "gradient": 0.0 if config.lora.rank else weights,
        "old weights": old,
        # The residual stream is float32, which takes 4 bytes.
        "activations": float(4 * tokens * model.num_layers * model.width),
    }
    # Greedy evaluation alone still holds one completion per prompt.
    evaluated = max(config.evaluation.samples_per_prompt, 1) * fed
    evaluation = {
        "weights": weights,
        "optimizer": moments,
        "caches": float(item * token_values * config.evaluation.batch_size * (setup.data.prompt_size + evaluated)),
    }
    stages = {"rollouts": rollouts, "updates": updates, "evaluation": evaluation}
    if isinstance(config.loss, OfflineConfig):
        # Nothing is sampled, and completions are as long as the data say. Packed demonstrations may have no padding.
        own = [len(encoded.tokens) - shared for examples in setup.data.train_examples for encoded in examples]
        prompt = sum(own) / len(own) if isinstance(config.loss, SftConfig) else setup.data.prompt_size
        activations = float(4 * config.prompts_per_micro_batch * prompt * model.num_layers * model.width)
        stages = {"updates": updates | {"weights": weights, "activations": activations}}
    if config.warm_start.steps:
        tokens = config.warm_start.batch_size // config.warm_start.micro_batches * setup.data.prompt_size
        activations = float(4 * tokens * model.num_layers * model.width)
        # Nobody searches yet, and no copy has been made.
        stages["warm start"] = updates | {"weights": weights, "activations": activations, "old weights": 0.0}
    return stages


def mesh_bytes(mesh: Mesh) -> float:
    """Memory of all devices of the mesh; on CPUs, which share it, that of the machine.

    Args:
        mesh: the devices that the run uses.

    Returns:
        Bytes; infinite where they are not known, so that nothing is refused.
    """
    devices = list(mesh.devices.flat)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    # Some backends report no limit, and a sum over the others would be wrong.
    if devices[0].platform != "cpu" and all(limits):
        return float(sum(limit for limit in limits if limit))
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf  # not known


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"
