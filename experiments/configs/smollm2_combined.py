"""SmolLM2-135M-Instruct on sums of six difficulties: nested rollouts, DAPO and DUMP together.

Command: nested-reft train smollm2_combined
Time: not measured.
"""

import dataclasses

from nested_reft.training.config import Config, load_config
from nested_reft.training.presets import with_dapo


def get_config() -> Config:
    base = load_config("smollm2_dump")
    roomy = dataclasses.replace(base, rollout=dataclasses.replace(base.rollout, max_completion_tokens=24))
    return dataclasses.replace(with_dapo(roomy, cache_tokens=4, max_generation_batches=4), name="smollm2_combined")
