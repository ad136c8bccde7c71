"""What a run must hold at once, checked against what the devices have before anything compiles."""

from __future__ import annotations

import logging
import math

import jax.numpy as jnp

from nested_reft.losses.registry import OfflineConfig
from nested_reft.losses.supervised import SftConfig
from nested_reft.models.parameters import parameter_shapes
from nested_reft.rollout.schedule import cached_tokens, refills, row_slots
from nested_reft.sharding import make_mesh, mesh_bytes
from nested_reft.training.reinforcement import reinforcement_task
from nested_reft.training.setup import Setup
from nested_reft.training.update_memory import update_working_bytes

logger = logging.getLogger(__name__)

PREDICTION_ERROR = 0.15  # the prediction may be up to 15 % too high
# Upper bound of what is kept, in units of the layers' inputs (heads of 64). Below it nothing need be traced.
MOST_KEPT = 64


def check_memory(setup: Setup) -> None:
    """Refuses training whose batches and caches cannot fit the mesh's devices together.

    The figures are lower bounds (`least_bytes`), and a prediction for updates (`update_peak`) where these may come near
    what there is. What is predicted not to fit by more than `PREDICTION_ERROR` is refused, and by less is a warning. So
    is the case that all versions that searchers may hold (`old_weights`) would not fit.

    Args:
        setup: what the run starts from, before any training.

    Raises:
        ValueError: says what is needed for what, what there is, and which fields to change.
    """
    config, capacity = setup.config, mesh_bytes(make_mesh(setup.config.mesh))
    prompts, group = config.data.prompts_per_batch, config.rollout.group_size
    completions = f"rollout.max_completion_tokens ({config.rollout.max_completion_tokens})"
    # What is 1 cannot be lowered.
    counts = {"data.prompts_per_batch": prompts, "rollout.group_size": group}
    batch = ", ".join(f"{field} ({count})" for field, count in counts.items() if count > 1)
    batch = f"{batch} or {completions}" if batch else completions
    samples = f"evaluation.samples_per_prompt ({config.evaluation.samples_per_prompt})"
    rows, decoded = f"rollout.rows ({config.rollout.rows})", f"evaluation.rows ({config.evaluation.rows})"
    is_refilled = refills(config.rollout.rows, prompts * group)
    evaluated = config.evaluation.batch_size * max(config.evaluation.samples_per_prompt, 1)
    is_evaluation_refilled = refills(config.evaluation.rows, evaluated)
    micro_batches = config.train.micro_batches
    remedies = {
        "rollouts": (f"lower {rows} or {completions}" if is_refilled else f"lower {batch}")
        + ("" if is_refilled or config.rollout.mode == "exact" else ", or set rollout.rows to decode fewer at a time"),
        "updates": f"lower {batch}"
        + (f", or raise train.micro_batches ({micro_batches})" if micro_batches < prompts else ""),
        "evaluation": f"lower {decoded} or {completions}"
        if is_evaluation_refilled
        else f"lower evaluation.batch_size ({config.evaluation.batch_size}), {samples} or {completions}, or set"
        " evaluation.rows to decode fewer at a time",
        "warm start": f"raise warm_start.micro_batches or lower warm_start.batch_size ({config.warm_start.batch_size})",
    }
    # Where weights and moments are too much, a smaller batch would not help.
    smaller = f"train adapters (lora.rank, now {config.lora.rank}), raise mesh.fsdp ({config.mesh.fsdp})"
    smaller += f" or mesh.tensor ({config.mesh.tensor})"
    for stage, parts in least_bytes(setup).items():
        if sum(parts.values()) <= capacity:
            continue
        cached = f" of {_cached(setup, stage)}" if "caches" in parts else ""
        listed = ", ".join(
            f"{name} {_size(count)}{cached if name == 'caches' else ''}" for name, count in parts.items() if count
        )
        # The largest part decides on the advice: batch sizes act on caches and activations only.
        is_batch = max(parts, key=lambda name: parts[name]) in ("caches", "activations")
        remedy = remedies[stage] if is_batch else f"{smaller} or take a smaller model.name"
        if parts.get("old weights"):
            remedy += f"; with search.lag 0 (now {config.search.lag}) and search.sync_every 1, no old weights are held"
        raise ValueError(
            f"{stage} {'need' if stage.endswith('s') else 'needs'} at least {_size(sum(parts.values()))} ({listed});"
            f" there are {_size(capacity)}: {remedy}"
        )
    # Layers' inputs are kept in any case, so the bound above is that of `remat full`.
    more = "" if config.train.remat == "full" else f", or set train.remat full (now {config.train.remat})"
    _check_update_peak(setup, capacity, remedies["updates"] + more)
    parts, held = least_bytes(setup)["updates"], old_weights(setup)
    most = sum(parts.values()) - parts["old weights"] + held[1]
    if most > capacity:
        logger.warning(
            "updates may need up to %s, of which %s are old weights for searchers; there are %s. Lower search.lag"
            " (%d), raise search.sync_every (%d), or train adapters (lora.rank)",
            *map(_size, (most, held[1], capacity)),
            config.search.lag,
            config.search.sync_every,
        )


def _check_update_peak(setup: Setup, capacity: float, remedy: str) -> None:
    parts = least_bytes(setup)["updates"]
    # Tracing takes about a second, which a small run need not wait for.
    if sum(parts.values()) + MOST_KEPT * parts["activations"] <= capacity or not math.isfinite(capacity):
        return
    peak = update_peak(setup)
    needed = sum(peak.values())
    listed = ", ".join(f"{name} {_size(count)}" for name, count in peak.items() if count)
    message = f"updates need about {_size(needed)} ({listed}); there are {_size(capacity)}: {remedy}"
    if needed * (1 - PREDICTION_ERROR) > capacity:
        raise ValueError(message)
    if needed > capacity:
        logger.warning("%s", message)


def update_peak(setup: Setup) -> dict[str, float]:
    """Bytes that an update is predicted to hold at its peak, on all devices together, by what holds them.

    Args:
        setup: what the run starts from.

    Returns:
        The parts of `least_bytes`, with activations as the program keeps them, and what its backward pass adds. Where
        nothing is sampled, completions are as long as the data say, and the parts are those of `least_bytes`.
    """
    config, parts = setup.config, least_bytes(setup)["updates"]
    if isinstance(config.loss, OfflineConfig):
        return parts
    working = update_working_bytes(
        setup.policy.model,
        reinforcement_task(config, setup.data.shared_prefix),
        config.prompts_per_micro_batch,
        config.trained_group_size,
        setup.data.prompt_size,
    )
    # Micro-batches add up their gradients: there is the sum, and that of the present one.
    gradient = parts["gradient"] * (2 if config.train.micro_batches > 1 else 1)
    return parts | {"gradient": gradient} | working


def old_weights(setup: Setup) -> tuple[float, float]:
    """Bytes of earlier versions on the learner's devices during an update: those that are certain, and the most.

    Threads hold the weights of an order until it is carried out, so slow searchers hold several versions; fast ones may
    be done early, and then no more than one is certain. Ray's searchers find theirs in its object store.

    Args:
        setup: what the run starts from; it gives the sizes of the model.
    """
    config, search = setup.config, setup.config.search
    if isinstance(config.loss, OfflineConfig):
        return 0.0, 0.0
    # An update cannot take over the buffers of weights that others hold. A copy of low precision is made anew beside
    # those in use. Adapters are small, and share what they adapt.
    is_copied = config.rollout.weights != "target"
    each = _copy_bytes(setup) if is_copied else 0.0 if config.lora.rank else _weight_bytes(setup)
    # Within a period the weights of its start are kept for further orders; without a copy they are one version more.
    kept = int(search.sync_every > 1 and not is_copied)
    if search.backend != "thread" or search.lag == 0:
        return kept * each, kept * each
    # The orders of `lag` steps are under way, and a period shares its version.
    return each, (1 + math.ceil((search.lag - 1) / search.sync_every)) * each


def _weight_bytes(setup: Setup) -> float:
    """Of the model's parameters; they lie once on each slice and each device of `mesh.data`."""
    return float(_parameters(setup) * jnp.dtype(setup.config.model.dtype).itemsize)


def _copy_bytes(setup: Setup) -> float:
    """Of the copy that rollouts read, where they do not read the model's own parameters."""
    weights = setup.config.rollout.weights
    return 0.0 if weights == "target" else float(_parameters(setup) * jnp.dtype(weights).itemsize)


def _parameters(setup: Setup) -> int:
    shapes = parameter_shapes(setup.policy.model.config).values()
    # Every slice and every device along `data` holds them all, and the other axes share them.
    return (setup.config.mesh.batch // setup.config.mesh.fsdp) * sum(math.prod(shape) for shape in shapes)


def least_bytes(setup: Setup) -> dict[str, dict[str, float]]:
    """Bytes that each stage cannot do without, on all devices together, by what holds them.

    Weights, their moments and gradients lie once on each slice and each device of `mesh.data`. Caches are keys and
    values of all layers, for a run ends by timing the full model too, with as many rows. Activations are each layer's
    input, of every token of a micro-batch whose completions take all their tokens. Of the versions that searchers may
    hold, those that are certain count (`old_weights`).

    Args:
        setup: what the run starts from; it gives the sizes of model, batch and mesh.

    Returns:
        Stage -> what holds memory in it -> bytes.
    """
    config, model = setup.config, setup.policy.model.config
    item = jnp.dtype(config.model.dtype).itemsize
    weights, copy = _weight_bytes(setup), _copy_bytes(setup)
    # AdamW keeps two moments of each weight in its dtype. Those of adapters are small enough for a lower bound
    # without them.
    moments = 0.0 if config.lora.rank else 2.0 * weights
    is_copied = config.rollout.weights != "target"
    token_values = 2 * model.num_layers * model.num_kv_heads * model.head_size  # cached for each token
    # The last token of a completion is never fed.
    shared, fed = setup.data.shared_prefix, config.rollout.max_completion_tokens - 1
    tokens = shared + config.prompts_per_micro_batch * (
        setup.data.prompt_size - shared + config.trained_group_size * fed
    )
    rollouts = {
        "weights": weights + copy,
        "optimizer": moments,
        # A copy of low precision keeps its caches in bfloat16, which takes 2 bytes.
        "caches": float((2 if is_copied else item) * token_values * cached_tokens(*_decoded(setup, "rollouts"))),
    }
    updates = {
        "weights": weights + copy,
        "optimizer": moments,
        "gradient": 0.0 if config.lora.rank else weights,
        "old weights": old_weights(setup)[0],
        # The residual stream is float32, which takes 4 bytes.
        "activations": float(4 * tokens * model.num_layers * model.width),
    }
    evaluation = {
        "weights": weights,
        "optimizer": moments,
        "caches": float(item * token_values * cached_tokens(*_decoded(setup, "evaluation"))),
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


def _decoded(setup: Setup, stage: str) -> tuple[int, int, int, int, int, int]:
    """What `cached_tokens` asks for, of a stage that samples."""
    config, evaluation = setup.config, setup.config.evaluation
    if stage == "rollouts":
        sizes = config.data.prompts_per_batch, config.rollout.group_size, config.rollout.rows, setup.data.forced_size
    else:
        # Greedy evaluation alone still holds one completion per prompt.
        sizes = evaluation.batch_size, max(evaluation.samples_per_prompt, 1), evaluation.rows, 0
    prompts, group, rows, forced = sizes
    limit = config.rollout.max_completion_tokens
    # Longer prefixes are cut off at the limit.
    return prompts, group, setup.data.prompt_size, limit, rows, min(forced, limit)


def _cached(setup: Setup, stage: str) -> str:
    """The rows and tokens that a stage caches, as a message names them."""
    prompts, group, prompt_tokens, limit, rows, forced = _decoded(setup, stage)
    is_refilled = refills(rows, prompts * group)
    slots = row_slots(limit, forced, is_refilled)
    if is_refilled:
        return f"{rows} rows of {prompt_tokens} + {slots} tokens"
    return f"{prompts} prompts of {prompt_tokens} tokens and {prompts * group} completions of {slots}"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2g} MB"
