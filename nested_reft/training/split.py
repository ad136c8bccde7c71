"""The training sources of a run: those of the configuration, or parts of them found automatically."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nested_reft.data.prompts import EncodedExample
from nested_reft.data.splits import split_by_pass_rate
from nested_reft.evaluation import num_correct
from nested_reft.rollout.policy import Policy
from nested_reft.training.config import Config
from nested_reft.training.setup import RunData

Division = list[list[dict[str, Any]]]
"""For each source its parts: `name`, `examples` (indices) and, if measured, the mean `pass_rate`."""


def divide(config: Config, data: RunData, policy: Policy, key: jax.Array) -> Division:
    """Divides the training examples as `data.split` says.

    Args:
        config: of the run.
        data: with the sources of the configuration.
        policy: the starting policy, whose pass rates may be measured.
        key: PRNG key of the samples.

    Returns:
        A division, as JSON-able values, that `divided` applies.
    """
    split, division = config.data.split, []
    for source, (name, examples) in enumerate(zip(data.source_names, data.train_examples, strict=True)):
        # A source that stays whole is one part, so all sources have the same form.
        if split.sources and name not in split.sources:
            division.append([{"name": name, "examples": list(range(len(examples)))}])
        else:
            # Each source has a key of its own, whatever other sources there are.
            rate_E = _pass_rates(config, policy, examples, jax.random.fold_in(key, source))
            division.append(_parts_by_pass_rate(name, rate_E, split.parts))
    return division


def divided(data: RunData, division: Division) -> RunData:
    """The data with its sources divided; the held-out examples stay as they are.

    Args:
        data: with the sources of the configuration.
        division: what `divide` returned, perhaps from a checkpoint.

    Returns:
        The data whose training sources are the parts, the easiest first.

    Raises:
        ValueError: the division is of other examples.
    """
    sizes = [sum(len(part["examples"]) for part in parts) for parts in division]
    # The indices of a division mean nothing in other data.
    if sizes != [len(examples) for examples in data.train_examples]:
        raise ValueError(f"the checkpoint divides sources of {sizes} examples; this run has others")
    parts = [(source, part) for source, parts in enumerate(division) for part in parts]
    # The easiest first, whatever source it is of; a source that was not divided counts as easy.
    parts.sort(key=lambda part: -part[1].get("pass_rate", 1.0))
    return dataclasses.replace(
        data,
        train_examples=tuple(tuple(data.train_examples[s][e] for e in part["examples"]) for s, part in parts),
        source_names=tuple(part["name"] for _, part in parts),
        heldout_of_source=tuple(source for source, _ in parts),
    )


def _parts_by_pass_rate(name: str, rate_E: Float[np.ndarray, " E"], parts: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{name}.pass_{rate_E[part].min():.2f}-{rate_E[part].max():.2f}",
            "examples": part,
            "pass_rate": float(rate_E[part].mean()),
        }
        for part in split_by_pass_rate(rate_E, parts)
    ]


def _pass_rates(
    config: Config, policy: Policy, examples: tuple[EncodedExample, ...], key: jax.Array
) -> Float[np.ndarray, " E"]:
    """The share of right answers among the samples of each example."""
    samples = config.data.split.samples
    how = config.evaluation
    correct_E, _ = num_correct(policy, examples, config.reward, how.batch_size, None, key, samples, decoded=how.rows)
    return correct_E / samples
