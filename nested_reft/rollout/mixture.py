"""Defensive-mixture rollouts: each completion from the full model with probability alpha, else nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout.sampling import row_keys, row_uniforms
from nested_reft.types import ForcedPrefixes, Rollouts, completion_fields

Sample = Callable[[LayerPlan, jax.Array, int, ForcedPrefixes | None], Rollouts]


def mixture_rollouts(
    rollout: Sample,
    key: jax.Array,
    plan: LayerPlan,
    num_layers: int,
    num_prompts: int,
    group_size: int,
    alpha: float,
    forced: ForcedPrefixes | None = None,
) -> Rollouts:
    """Draws every completion's component independently, then samples each component's share.

    Independent draws are what makes alpha * pi_full + (1 - alpha) * pi_nested the density of every
    completion, whatever the others of its group drew; fixed counts per group would bias the
    leave-one-out baseline. Each component is sampled for as many completions per prompt as the
    fullest prompt needs, rounded up to a quarter of the group so that few sizes compile; what is
    left over is dropped unseen.

    Args:
        rollout: `(plan, key, completions per prompt, their forced prefixes) -> rollouts` of the same prompts.
        key: PRNG key of the batch.
        plan: the nested policy.
        num_layers: L.
        num_prompts, group_size: B and G.
        alpha: probability of the full model, in (0, 1].
        forced: first tokens of each completion, whichever component goes on from them.

    Returns:
        Rollouts whose `behavior_logprob_BGC` is that of the component that drew each completion,
        and whose `part_BGL` is the nested plan.
    """
    component_key, full_key, nested_key = jax.random.split(key, 3)
    component_key_BG = row_keys(component_key, jnp.arange(num_prompts), group_size)
    # A row's choice is its own, as its tokens are, so a smaller batch chooses the same for the prompts that it has.
    from_full_BG = np.asarray(row_uniforms(component_key_BG, 0)[0] < alpha)

    def sample(layers: LayerPlan, sample_key: jax.Array, chosen_BG: Bool[np.ndarray, "B G"]) -> Rollouts | None:
        most = int(chosen_BG.sum(axis=1).max())
        quarter = -(-group_size // 4)
        count = min(-(-most // quarter) * quarter, group_size)
        return rollout(layers, sample_key, count, _prefixes_of(forced, chosen_BG, count)) if most else None

    # A component that no completion drew is not sampled at all.
    full = sample(LayerPlan.full(num_layers), full_key, from_full_BG)
    nested = sample(plan, nested_key, ~from_full_BG)
    # Slot g takes its component's next unused completion.
    index_BG = np.where(from_full_BG, from_full_BG.cumsum(axis=1), (~from_full_BG).cumsum(axis=1)) - 1

    def choose(from_full: Array, from_nested: Array) -> Array:
        """A field of the mixture: at each slot, the value of the component that drew it."""
        shape = (num_prompts, group_size) + (1,) * (from_full.ndim - 2)
        index, chosen = jnp.asarray(index_BG).reshape(shape), jnp.asarray(from_full_BG).reshape(shape)
        take = [
            # The index counts within one component and may exceed what the other sampled; that entry is not chosen.
            jnp.take_along_axis(values, jnp.minimum(index, values.shape[1] - 1), axis=1)
            for values in (from_full, from_nested)
        ]
        return jnp.where(chosen, *take)

    # Where one component was not sampled, the other stands in for it and is never chosen.
    either = nested or full
    assert either is not None
    per_completion = {
        name: choose(getattr(full or either, name), getattr(nested or either, name)) for name in completion_fields()
    }
    return dataclasses.replace(
        dataclasses.replace(either, **per_completion),
        nested_BG=~jnp.asarray(from_full_BG),
        # Every completion is weighed by the density of both components, whichever drew it.
        full_share_BG=jnp.full((num_prompts, group_size), alpha, jnp.float32),
        part_BGL=jnp.broadcast_to(plan.to_parts(num_layers), (num_prompts, group_size, num_layers)),
    )


def _prefixes_of(
    forced: ForcedPrefixes | None, chosen_BG: Bool[np.ndarray, "B G"], count: int
) -> ForcedPrefixes | None:
    """The prefixes of the slots that one component fills, in the order in which it fills them."""
    if forced is None:
        return None
    # A stable sort puts the component's own slots first and keeps their order.
    slot_BG = np.argsort(~chosen_BG, axis=1, kind="stable")[:, :count]
    return ForcedPrefixes(
        jnp.take_along_axis(forced.tokens_BGF, jnp.asarray(slot_BG)[..., None], axis=1),
        jnp.take_along_axis(forced.length_BG, jnp.asarray(slot_BG), axis=1),
    )
