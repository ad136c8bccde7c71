"""`nested-reft dpo`: trains on preference pairs directly, without rollouts."""

from __future__ import annotations

from nested_reft.cli import train


def run(arguments: list[str]) -> None:
    """As `nested-reft train`, with an objective that prefers the chosen answers and stays near the start."""
    train.run(arguments, "dpo", "dpo")
