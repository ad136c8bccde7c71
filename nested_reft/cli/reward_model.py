"""`nested-reft reward-model`: trains a reward model on preference pairs."""

from __future__ import annotations

from nested_reft.cli import train


def run(arguments: list[str]) -> None:
    """As `nested-reft train`, with an objective that learns which of two answers is preferred."""
    train.run(arguments, "reward-model", "bradley_terry")
