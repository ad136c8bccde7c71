"""How much faster a plan generates than the full model, on the same prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nested_reft.layer_skip import LayerPlan
from nested_reft.types import Rollouts


def compare_throughput(
    rollout: Callable[[LayerPlan], Rollouts], plan: LayerPlan, num_layers: int, repeats: int = 3
) -> dict[str, Any]:
    """Generated tokens per second under `plan` and under all layers; prefill included, best of `repeats`.

    Args:
        rollout: generates under a plan and waits for the result; give it no stop tokens, so that
            both policies generate the same number.
        plan: the nested policy.
        num_layers: L.
        repeats: timed calls of each; one more before them may compile.
    """

    plans = (LayerPlan.full(num_layers), plan)
    tokens = [int(np.asarray(rollout(each).length_BG).sum()) for each in plans]
    seconds = np.full((repeats, 2), np.inf)
    for row, column in np.ndindex(seconds.shape):  # in turn: a slow minute of the machine falls on both
        started = time.monotonic()
        rollout(plans[column])
        seconds[row, column] = time.monotonic() - started
    full, nested = (float(x) for x in np.array(tokens) / seconds.min(axis=0))
    return {
        "full_tokens_per_second": full,
        "nested_tokens_per_second": nested,
        "nested_speedup": nested / full,
        "kept_layers": plan.num_kept,
        "layers": num_layers,
    }
