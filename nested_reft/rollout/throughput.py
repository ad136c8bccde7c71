"""How much faster a plan generates than the full model, on the same prompts."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import to_host
from nested_reft.types import Prompts

MOST_TOKENS = 256  # of each completion: to decode longer ones eight times would take as long as many steps of training


@dataclass(frozen=True)
class Throughput:
    """Generated tokens per second of two policies, prefill included.

    Attributes:
        full_tokens_per_second: of the full model.
        nested_tokens_per_second: under the plan.
        nested_speedup: the second over the first.
        kept_layers: layers that the plan runs whole.
        bridges: bridges that stand in for others.
        layers: L.
    """

    full_tokens_per_second: float
    nested_tokens_per_second: float
    nested_speedup: float
    kept_layers: int
    bridges: int
    layers: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def compare_throughput(
    policy: Policy,
    prompts: Prompts,
    plan: LayerPlan,
    key: jax.Array,
    group_size: int,
    shared_prefix: int = 0,
    repeats: int = 3,
    rows: int = 0,
) -> Throughput:
    """Measures generation under `plan` and under all layers; the best of `repeats` counts.

    No stop token ends a completion, so that both policies generate the same number of tokens: as many as the policy's
    limit allows, and `MOST_TOKENS` at most.

    Args:
        policy: what generates.
        prompts: what it answers.
        plan: the nested policy.
        key: PRNG key.
        group_size: completions of each prompt.
        shared_prefix: leading tokens that all prompts have in common.
        repeats: timed calls of each; one more before them may compile.
        rows: completions that are decoded at the same time, as in `Policy.generate`; 0 decodes all of them.
    """

    def tokens(layers: LayerPlan) -> int:
        rollouts = policy.generate(
            prompts,
            layers,
            key,
            group_size=group_size,
            max_completion_tokens=min(policy.max_completion_tokens, MOST_TOKENS),
            shared_prefix=shared_prefix,
            stops=False,
            rows=rows,
        )
        return int(to_host(jax.block_until_ready(rollouts).length_BG).sum())

    plans = (LayerPlan.full(policy.num_layers), plan)
    # These calls compile, so they are not timed.
    counts = [tokens(each) for each in plans]
    seconds = np.full((repeats, 2), np.inf)
    for row, column in np.ndindex(seconds.shape):  # in turn: a slow minute of the machine falls on both
        started = time.monotonic()
        tokens(plans[column])
        seconds[row, column] = time.monotonic() - started
    # The fastest call is the one that other work on the machine disturbed least.
    full, nested = (float(x) for x in np.array(counts) / seconds.min(axis=0))
    return Throughput(full, nested, nested / full, plan.shape.kept, plan.shape.bridged, policy.num_layers)
