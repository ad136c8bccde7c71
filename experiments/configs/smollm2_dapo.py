"""SmolLM2-135M-Instruct on one-digit sums with DAPO (arXiv 2503.14476), rollouts nested.

The model, prompts and layer plans of `smollm2_chain_sum`. Command: nested-reft train smollm2_dapo
Time: not measured.
"""

import dataclasses

from nested_reft.training.config import Config, load_config
from nested_reft.training.presets import with_dapo


def get_config() -> Config:
    base = load_config("smollm2_chain_sum")
    roomy = dataclasses.replace(base, rollout=dataclasses.replace(base.rollout, max_completion_tokens=24))
    return dataclasses.replace(with_dapo(roomy, cache_tokens=4, max_generation_batches=4), name="smollm2_dapo")
