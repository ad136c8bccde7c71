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

    def tokens_per_second(plan: LayerPlan) -> float:
        tokens = int(np.asarray(rollout(plan).length_BG).sum())
        seconds = []
        for _ in range(repeats):
            started = time.monotonic()
            rollout(plan)
            seconds.append(time.monotonic() - started)
        return tokens / min(seconds)

    full, nested = tokens_per_second(LayerPlan.full(num_layers)), tokens_per_second(plan)
    return {
        "full_tokens_per_second": full,
        "nested_tokens_per_second": nested,
        "nested_speedup": nested / full,
        "kept_layers": plan.num_kept,
        "layers": num_layers,
    }
