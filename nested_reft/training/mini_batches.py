"""Dealing the groups of a batch to mini-batches, which get an update each (PPO, arXiv 1707.06347, algorithm 1).

Every pass over a batch deals all groups anew, at random. A group stays whole, because its completions share a prompt
and a baseline. What is made of the whole batch, such as advantages, is made before the first pass.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Int


def deal(
    num_groups: int, mini_batches: int, passes: int, key: jax.Array | None
) -> Int[np.ndarray, "passes mini_batches M"]:
    """The groups of each mini-batch of each pass; within a pass, every group comes once.

    Args:
        num_groups: B.
        mini_batches: how many a pass has; divides B.
        passes: over the batch.
        key: PRNG key of the batch; one mini-batch needs none.
    """
    if mini_batches == 1:
        # Another order would change nothing but rounding.
        return np.broadcast_to(np.arange(num_groups), (passes, 1, num_groups))
    assert key is not None, "mini-batches are dealt at random, and no key was given"
    orders = [jax.random.permutation(jax.random.fold_in(key, number), num_groups) for number in range(passes)]
    return np.stack([np.asarray(order) for order in orders]).reshape(passes, mini_batches, -1)
