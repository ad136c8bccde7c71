"""What a checkpoint is of: by which version it was written, and of which model and tokenizer.

It is compared before any array is read, so that a checkpoint of something else is refused by its name. The shapes of
arrays would differ as well, but nobody could tell from them what was changed; and another tokenizer changes no shape.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nested_reft import __version__
from nested_reft.json_files import differences
from nested_reft.models.config import ModelConfig
from nested_reft.tokenizer import Tokenizer

FORMAT = 1  # of checkpoints; it rises when a version writes what earlier ones would read wrongly


def checkpoint_identity(name: str, model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The identity of a run's checkpoints, as JSON-able values.

    Args:
        name: of the model, as the configuration has it.
        model: its shape.
        tokenizer: reads its texts.
    """
    return {
        "version": __version__,
        "format": FORMAT,
        "name": name,
        "shape": dataclasses.asdict(model),
        "tokenizer": tokenizer.fingerprint(),
    }


def check_format(stored: dict[str, Any] | None, where: str) -> None:
    """Refuses a checkpoint that a later version wrote in a form of its own.

    Args:
        stored: the identity in the checkpoint; None of one from before there were identities.
        where: what messages call the checkpoint.

    Raises:
        ValueError: names both versions.
    """
    if stored is not None and stored["format"] > FORMAT:
        raise ValueError(
            f"{where} was written by nested_reft {stored['version']} in format {stored['format']}; this is"
            f" {__version__}, which reads formats up to {FORMAT}: continue the run with version {stored['version']}"
        )


def check_identity(stored: dict[str, Any] | None, mine: dict[str, Any], where: str) -> None:
    """Refuses a checkpoint of another model or tokenizer.

    Args:
        stored: the identity in the checkpoint; None of one from before there were identities.
        mine: that of the run.
        where: what messages call the checkpoint.

    Raises:
        ValueError: names both models, or the first values in which their shapes differ.
    """
    if stored is None:
        return
    name = mine["name"]
    if stored["name"] != name:
        raise ValueError(f"{where} is of model '{stored['name']}', and this run has model '{name}'")
    changed = differences(stored["shape"], mine["shape"])
    if changed:
        listed = "; ".join(f"{field} was {was!r} and is {now!r}" for field, was, now in changed)
        raise ValueError(
            f"{where} is of another model under the name '{name}': {listed}. Its files were changed; use those that"
            " the run began with"
        )
    if stored["tokenizer"] != mine["tokenizer"]:
        raise ValueError(
            f"{where} was written with another tokenizer of model '{name}': its files were changed; use those that the"
            " run began with"
        )
