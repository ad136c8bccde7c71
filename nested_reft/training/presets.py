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

    The clips, 10 on the other side as in the recipe, bound what the optimizer does to pi / pi_old, as in the paper,
    where pi_old itself samples. Clips of pi / pi_b would take the gradient of every right token that the nested policy
    underrates by more than 1.28, in the first pass already. The nesting is corrected beside them, by ratios of tokens
    truncated at 2 (`token_tis`): nothing else would bound these. With one update per batch the clips have nothing to
    do. The paper stops a run at the limit of generation batches; here it trains on what there is.

    Args:
        config: what to change; its learning rate and sizes stay.
        cache_tokens: L_cache, tokens before the longest length over which the punishment grows to -1.
        max_generation_batches: the paper's 10.
    """
    return dataclasses.replace(
        config,
        loss=presets.token_tis(presets.dapo("base", dual_clip=10.0)),
        dynamic_sampling=DynamicSamplingConfig(max_generation_batches),
        reward=dataclasses.replace(config.reward, overlong_cache_tokens=cache_tokens),
    )


def with_dump(config: Config) -> Config:
    """DUMP (arXiv 2504.09710): sources drawn by softmax(UCB / 0.1) over windows of 300 absolute advantages."""
    return dataclasses.replace(config, curriculum=CurriculumConfig("dump", window=300, temperature=0.1))
