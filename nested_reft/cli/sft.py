"""`nested-reft sft`: supervised fine-tuning without rollouts."""

from __future__ import annotations

from nested_reft.cli import train


def run(arguments: list[str]) -> None:
    """As `nested-reft train`, with an objective that imitates the references of the sources, or their answers."""
    train.run(arguments, "sft", "sft")
