"""The decode step that a run's plans are priced by."""

from __future__ import annotations

import jax.numpy as jnp

from nested_reft.plan_price import DecodeStep, Workload, ceilings_of
from nested_reft.training.setup import Setup


def decode_step(setup: Setup) -> DecodeStep:
    """A decode step of the run's rollouts: all rows at once, caches as large as they become.

    Args:
        setup: what the run starts from; it gives the sizes of model, batch and prompts, and the device.
    """
    config, policy = setup.config, setup.policy
    rollout, is_copied = config.rollout, config.rollout.weights != "target"
    item = jnp.dtype(rollout.weights if is_copied else config.model.dtype).itemsize
    bridges = policy.model.bridges
    return DecodeStep(
        model=policy.model.config,
        workload=Workload(
            prompts=config.data.prompts_per_batch,
            group_size=rollout.group_size,
            prompt_tokens=setup.data.prompt_size,
            completion_tokens=rollout.max_completion_tokens,
        ),
        ceilings=ceilings_of(policy.mesh.devices.flat[0].device_kind),
        weight_bytes=item,
        # A copy of low precision keeps its caches in bfloat16.
        cache_bytes=2 if is_copied else item,
        bridge_rank=None if bridges is None else bridges.rank,
    )
