"""DAPO's ablation: each variant holds the parts of those before it and one more."""

import itertools
import json

from experiments.dapo import VARIANTS, main, variant_config
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


def test_the_table_of_finished_runs(tmp_path, capsys):
    """Accuracies are means over two sources: 0.2 and 0.3 over the seeds, so 0.25 with a standard error of 0.05."""
    for variant in VARIANTS[:2]:
        for seed in (0, 1):
            run = {"config": variant_config(variant, seed, 20).to_json(), "seconds": 2.0, "accuracy": [[0.1, 0.3]] * 2}
            run["accuracy"] += [[0.1 + seed / 10, 0.3 + seed / 10]]
            run["metrics"] = {name: [1.0] * 20 for name in ("entropy", "completion_tokens", "generation_batches")}
            (tmp_path / f"{variant}-seed{seed}-steps20.json").write_text(json.dumps(run))
    kept = tmp_path / "kept.json"
    words = ["--variants", *VARIANTS[:2], "--seeds", "0", "1", "--steps", "20", "--out", str(tmp_path)]
    assert main([*words, "--json", str(kept)]) == 0
    assert "+ clip_higher" in capsys.readouterr().out
    rows = json.loads(kept.read_text())["rows"]
    assert [row["accuracy before"] for row in rows] == ["0.200 (0.000)"] * 2
    assert [row["accuracy after"] for row in rows] == ["0.250 (0.050)"] * 2
