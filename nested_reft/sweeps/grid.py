"""Configurations x overrides x seeds: which runs a sweep is made of, and what each is called."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from nested_reft.sweeps.kept import Wanted
from nested_reft.training.config import Config

MOST_RUNS = 10_000
RESULTS = "results"  # the folder of kept results in that of a sweep


def grid(variants: Sequence[tuple[str, Config]], seeds: Sequence[int], out: Path) -> list[Wanted]:
    """The runs of all variants and seeds; those of a seed follow each other, so that the load of a machine meets all.

    Args:
        variants: label and configuration of each; the seed is replaced.
        seeds: of the runs.
        out: the folder of the sweep.

    Raises:
        ValueError: two variants have one label or one configuration.
    """
    labels = [label for label, _ in variants]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"'{twice}' is asked for twice; allowed is each once")
    # One value may be written in two ways, such as 0.1 and 1e-1.
    for (label, config), (other, same) in itertools.combinations(variants, 2):
        if config == same:
            raise ValueError(f"'{other}' is the configuration of '{label}'; allowed is each once")
    return [wanted(label, config, seed, out) for seed in seeds for label, config in variants]


def wanted(label: str, config: Config, seed: int, out: Path) -> Wanted:
    """One run of a sweep.

    Args:
        label: of its variant.
        config: of its variant.
        seed: of the run.
        out: the folder of the sweep.
    """
    name = slug(label) if label.startswith(config.name) else f"{config.name}-{slug(label)}"
    train = dataclasses.replace(config.train, seed=seed)
    config = dataclasses.replace(config, name=f"{name}-seed{seed}", train=train)
    # A result of another configuration has another name, so none takes the place of another.
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[:8]
    return Wanted(config, out / RESULTS / f"{config.name}-{digest}.json", {"label": label, "seed": seed})


def slug(label: str) -> str:
    """A label as part of a file's name.

    Args:
        label: of a variant.
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", label).strip("_")[:80]


def combinations(options: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> list[tuple[str, list[str]]]:
    """Every combination of the alternatives of all options: its label, and its words for `override`.

    Args:
        options: an option with its dashes, and the words of each of its alternatives. Labels name the options that
            have several.

    Raises:
        ValueError: there are too many.
    """
    size = 1
    for _, alternatives in options:
        size *= len(alternatives)
    if size > MOST_RUNS:
        raise ValueError(f"the overrides make {size} combinations; allowed are at most {MOST_RUNS}")
    found = []
    for chosen in itertools.product(*(alternatives for _, alternatives in options)):
        pairs = list(zip(options, chosen, strict=True))
        label = ", ".join(
            f"{option.removeprefix('--')} {' '.join(words)}".strip()
            for (option, alternatives), words in pairs
            if len(alternatives) > 1
        )
        found.append((label, [word for (option, _), words in pairs for word in (option, *words)]))
    return found
