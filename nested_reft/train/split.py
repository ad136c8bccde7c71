"""The training sources of a run: those of the configuration, or parts of them found automatically."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nested_reft.data.prompts import EncodedExample
from nested_reft.data.splits import split_by_cluster, split_by_pass_rate
from nested_reft.evaluation import num_correct
from nested_reft.json_files import write_json
from nested_reft.models.transformer import Transformer
from nested_reft.train.setup import Setup


def split_sources(setup: Setup, model: Transformer, key: jax.Array, file: Path, resume: bool) -> Setup:
    """Divides the training examples as `data.split` says; the held-out ones stay as they are.

    Args:
        setup: with the sources of the configuration.
        model: the starting policy, whose pass rates may be measured.
        key: PRNG key of the samples.
        file: where the division is written, for people to read and for the run to resume with.
        resume: take the division from `file`: the model has moved on since.

    Raises:
        ValueError: a resumed run's `file` is missing or not of these examples.
    """
    config = setup.config.data.split
    if config.kind == "none":
        return setup
    division = _read(file, setup) if resume else [_divide(setup, index, model, key) for index in _indices(setup)]
    if not resume:
        write_json(file, division)
    parts = [(source, part) for source, parts in enumerate(division) for part in parts]
    if config.kind == "pass_rate":  # the easiest first, whatever source it is of
        parts.sort(key=lambda part: -part[1].get("pass_rate", 1.0))
    return dataclasses.replace(
        setup,
        train_examples=[[setup.train_examples[source][e] for e in part["examples"]] for source, part in parts],
        source_names=tuple(part["name"] for _, part in parts),
        heldout_of_source=tuple(source for source, _ in parts),
    )


def _indices(setup: Setup) -> Iterable[int]:
    return range(len(setup.train_examples))


def _divide(setup: Setup, source: int, model: Transformer, key: jax.Array) -> list[dict[str, Any]]:
    """The parts of one source: name, indices of examples and, if measured, the mean pass rate."""
    config, name = setup.config.data.split, setup.source_names[source]
    examples = setup.train_examples[source]
    if config.sources and name not in config.sources:
        return [{"name": name, "examples": list(range(len(examples)))}]
    if config.kind == "cluster":
        parts = split_by_cluster([e.tokens for e in examples], config.parts, setup.config.train.seed)
        return [{"name": f"{name}.cluster_{i}", "examples": part} for i, part in enumerate(parts)]
    rate_E = _pass_rates(setup, examples, model, jax.random.fold_in(key, source))
    parts = split_by_pass_rate(rate_E, config.parts)
    return [
        {
            "name": f"{name}.pass_{rate_E[part].min():.2f}-{rate_E[part].max():.2f}",
            "examples": part,
            "pass_rate": float(rate_E[part].mean()),
        }
        for part in parts
    ]


def _pass_rates(setup: Setup, examples: list[EncodedExample], model: Transformer, key: jax.Array) -> np.ndarray:
    config = setup.config
    correct_E, _ = num_correct(
        model,
        setup.tokenizer,
        examples,
        config.reward,
        config.evaluation.batch_size,
        config.rollout.max_completion_tokens,
        config.rollout.sampling,
        key,
        config.data.split.samples,
    )
    return correct_E / config.data.split.samples


def _read(file: Path, setup: Setup) -> list[list[dict[str, Any]]]:
    """The division of a run that resumes."""
    try:
        division = json.loads(file.read_text(encoding="utf-8"))
        sizes = [sum(len(part["examples"]) for part in parts) for parts in division]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}', which says how the run's sources are divided, cannot be read: {error}") from None
    if sizes != [len(examples) for examples in setup.train_examples]:
        raise ValueError(f"'{file}' divides sources of {sizes} examples; this run has others")
    return division
