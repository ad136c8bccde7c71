"""Bootstrap over seeds: how far a mean of few runs can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

DRAWS = 10_000  # of the bootstrap over seeds


def seed_draws(seeds: int) -> Int[np.ndarray, "R S"]:
    """Which seeds each draw of the bootstrap takes; the same ones for every measure, so that runs stay paired.

    Args:
        seeds: how many there are.
    """
    return np.random.default_rng(0).integers(0, seeds, (DRAWS, seeds))


def interval(values_R: Float[np.ndarray, " R"]) -> list[float]:
    """The middle 95 % of the bootstrap's draws.

    Args:
        values_R: a measure under each draw.
    """
    return np.quantile(values_R, [0.025, 0.975]).tolist()


def mean_over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """A measure of several seeds, as JSON-able values: the `values`, their `mean` and its `interval`.

    Args:
        values: one for each seed, at least one. Differences of two runs of a seed make a paired difference.
    """
    values_S = np.array(values, np.float64)
    means_R = values_S[seed_draws(len(values_S))].mean(axis=1)
    return {"values": values_S.tolist(), "mean": float(values_S.mean()), "interval": interval(means_R)}


def ratio_over_seeds(values: Sequence[float], baselines: Sequence[float]) -> dict[str, Any]:
    """The ratio of two sums over seeds, as JSON-able values: the `ratio`, its `interval` and the `values` of the seeds.

    A seed is drawn together with its baseline.

    Args:
        values: one for each seed.
        baselines: of the same seeds in the same order.
    """
    own_S, other_S = np.array(values, np.float64), np.array(baselines, np.float64)
    draw_RxS = seed_draws(len(own_S))
    # A baseline of zero would divide by zero; any ratio to it is meaningless anyhow.
    least = 1e-9
    ratio_R = own_S[draw_RxS].sum(axis=1) / np.maximum(other_S[draw_RxS].sum(axis=1), least)
    return {
        "values": (own_S / np.maximum(other_S, least)).tolist(),
        "ratio": float(own_S.sum() / max(other_S.sum(), least)),
        "interval": interval(ratio_R),
    }
