"""Reinforcement fine-tuning of language models with nested, layer-skipping rollouts."""

__version__ = "0.1.0"
