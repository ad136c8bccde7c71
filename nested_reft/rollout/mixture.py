"""Defensive-mixture rollouts: each completion from the full model with probability alpha, else nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from nested_reft.layer_skip import LayerPlan
from nested_reft.types import Rollouts


def mixture_rollouts(
    rollout: Callable[[LayerPlan, jax.Array, int], Rollouts],
    key: jax.Array,
    plan: LayerPlan,
    num_layers: int,
    num_prompts: int,
    group_size: int,
    alpha: float,
) -> Rollouts:
    """Draws every completion's component independently, then samples each component's share.

    Independent draws are what makes alpha * pi_full + (1 - alpha) * pi_nested the density of every
    completion, whatever the others of its group drew; fixed counts per group would bias the
    leave-one-out baseline. Each component is sampled for as many completions per prompt as the
    fullest prompt needs, rounded up to a quarter of the group so that few sizes compile; what is
    left over is dropped unseen.

    Args:
        rollout: `(plan, key, completions per prompt) -> rollouts` of the same prompts.
        key: PRNG key of the batch.
        plan: the nested policy.
        num_layers: L.
        num_prompts, group_size: B and G.
        alpha: probability of the full model, in (0, 1].

    Returns:
        Rollouts whose `behavior_logprob_BGC` is that of the component that drew each completion,
        and whose `plan` is the nested one.
    """
    component_key, full_key, nested_key = jax.random.split(key, 3)
    from_full_BG = np.asarray(jax.random.bernoulli(component_key, alpha, (num_prompts, group_size)))

    def sample(layers: LayerPlan, sample_key: jax.Array, chosen_BG: Bool[np.ndarray, "B G"]) -> Rollouts | None:
        most = int(chosen_BG.sum(axis=1).max())
        quarter = -(-group_size // 4)
        return rollout(layers, sample_key, min(-(-most // quarter) * quarter, group_size)) if most else None

    full = sample(LayerPlan.full(num_layers), full_key, from_full_BG)
    nested = sample(plan, nested_key, ~from_full_BG)
    if full is None or nested is None:
        only = nested if full is None else full
        assert only is not None
        return dataclasses.replace(only, plan=plan, nested_BG=~jnp.asarray(from_full_BG))
    # Slot g takes its component's next unused completion.
    index_BG = np.where(from_full_BG, from_full_BG.cumsum(axis=1), (~from_full_BG).cumsum(axis=1)) - 1

    def choose(from_full: Array, from_nested: Array) -> Array:
        shape = (num_prompts, group_size) + (1,) * (from_full.ndim - 2)
        index, chosen = jnp.asarray(index_BG).reshape(shape), jnp.asarray(from_full_BG).reshape(shape)
        take = [
            jnp.take_along_axis(values, jnp.minimum(index, values.shape[1] - 1), axis=1)
            for values in (from_full, from_nested)
        ]
        return jnp.where(chosen, *take)

    names = ("tokens_BGC", "length_BG", "finished_BG", "forced_BG", "behavior_logprob_BGC")
    merged = {name: choose(getattr(full, name), getattr(nested, name)) for name in names}
    return dataclasses.replace(nested, nested_BG=~jnp.asarray(from_full_BG), **merged)
