"""DAPO (arXiv 2503.14476) on the sources of `tiny_dump`, drawn uniformly.

Two updates a batch, so that the clip has something to do. `experiments/dapo.py` switches the parts on one at a time.
Command: nested-reft train tiny_dapo
Time: about five minutes on one core, beside other work.
"""

import dataclasses

from nested_reft.curriculum import CurriculumConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.presets import with_dapo


def get_config() -> Config:
    base = load_config("tiny_dump")
    config = dataclasses.replace(
        base,
        name="tiny_dapo",
        rollout=dataclasses.replace(base.rollout, max_completion_tokens=12),
        train=dataclasses.replace(base.train, updates_per_batch=2),
        curriculum=CurriculumConfig("uniform"),
    )
    return with_dapo(config, cache_tokens=3, max_generation_batches=4)
