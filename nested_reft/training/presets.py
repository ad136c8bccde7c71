"""Published methods as changes to any configuration: what surrounds the loss, with the paper's numbers.

They compose: `with_dump(with_dapo(config))` keeps the configuration's model, data and nesting.
"""

from __future__ import annotations

import dataclasses

from nested_reft.curriculum import CurriculumConfig
from nested_reft.losses import presets
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.training.config import Config


def with_dapo(config: Config, cache_tokens: int, max_generation_batches: int = 10) -> Config:
    """DAPO (arXiv 2503.14476): clip-higher, token-level loss, dynamic sampling, soft overlong punishment.

    The ratio is to whatever policy sampled (`base`). With nested rollouts the clip therefore acts on their
    correction as well: a right token that the nested policy underrates by more than 1.28 has no gradient in
    the first pass already. The dual clip of the recipe (10) bounds the other side. The paper stops a run at
    the limit of generation batches; here it trains on what there is.

    Args:
        config: what to change; its learning rate and sizes stay.
        cache_tokens: L_cache, tokens before the longest length over which the punishment grows to -1.
        max_generation_batches: the paper's 10.
    """
    return dataclasses.replace(
        config,
        loss=presets.dapo("base", dual_clip=10.0),
        dynamic_sampling=DynamicSamplingConfig(max_generation_batches),
        reward=dataclasses.replace(config.reward, overlong_cache_tokens=cache_tokens),
    )


def with_dump(config: Config) -> Config:
    """DUMP (arXiv 2504.09710): sources drawn by softmax(UCB / 0.1) over windows of 300 absolute advantages."""
    return dataclasses.replace(config, curriculum=CurriculumConfig("dump", window=300, temperature=0.1))
