"""DAPO's ablation: each variant holds the parts of those before it and one more."""

import itertools

from experiments.dapo import VARIANTS, variant_config
from nested_reft.json_files import differences
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.training.config import load_config


def test_variants_differ_by_one_part_and_end_at_the_preset():
    changed = []
    for before, after in itertools.pairwise(VARIANTS):
        parts = differences(variant_config(before, 0, 10).to_json(), variant_config(after, 0, 10).to_json())
        changed.append([field for field, _, _ in parts if field != "name"])
    assert changed == [
        ["loss.clip_high"],
        ["reward.overlong_cache_tokens"],
        ["loss.normalization"],
        ["dynamic_sampling.max_generation_batches"],
    ]
    last, preset = variant_config(VARIANTS[-1], 0, 10), load_config("tiny_dapo")
    for part in ("loss", "reward", "dynamic_sampling", "curriculum", "rollout", "nesting"):
        assert getattr(last, part) == getattr(preset, part)


def test_combined_presets_hold_all_three():
    for name in ("tiny_combined", "smollm2_combined", "qwen_math_combined"):
        config = load_config(name)
        assert config.nesting.skip_ratio > 0 and config.curriculum.kind == "dump"
        assert isinstance(config.loss, PolicyGradientConfig) and config.loss.clip_high == 0.28
        assert config.dynamic_sampling.max_generation_batches > 1
        assert config.reward.overlong_cache_tokens > 0
