"""Held-out results of the sources of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from nested_reft.evaluation import Evaluation, evaluate_examples
from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout.policy import Policy
from nested_reft.training.config import Config
from nested_reft.training.setup import RunData


def heldout_results(
    policy: Policy,
    data: RunData,
    config: Config,
    key_of: Callable[[int], jax.Array],
    plan: LayerPlan | None = None,
    samples: bool = True,
    sources: Sequence[int] | None = None,
    completions: list[dict[str, Any]] | None = None,
) -> dict[str, Evaluation]:
    """Measures a policy on held-out prompts; the curriculum does not see the results.

    Args:
        policy: what answers.
        data: holds the prompts.
        config: its sources, reward and evaluation.
        key_of: the PRNG key of the samples of a source, by its index.
        plan: the layers that act; None is the full model.
        samples: also measure pass@k.
        sources: indices among the configuration's sources; None takes all of them.
        completions: every completion is added to it, as a line of JSON-able values.

    Returns:
        One result for each source, by its name.
    """
    sources = range(len(config.data.sources)) if sources is None else sources
    found = {}
    for index in sources:
        name, lines = config.data.sources[index].name, list[dict[str, Any]]()
        found[name] = evaluate_examples(
            policy, data.heldout_examples[index], config.reward, config.evaluation, key_of(index), samples, plan, lines
        )
        if completions is not None:
            completions += [{"source": name} | line for line in lines]
    return found
