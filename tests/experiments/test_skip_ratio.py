"""The skip-ratio ablation: its grids, and that the command trains what a preset says."""

import json

import pytest

from experiments.skip_ratio import FULL, PLANS, PRESETS, VARIANTS, main, variants_of
from nested_reft.sweeps import sweep
from nested_reft.training.compatibility import check_start
from nested_reft.training.config import Config
from tests.reports.runs_on_disk import line, write_run


@pytest.mark.parametrize("name", PRESETS)
def test_runs_of_a_task_differ_in_nesting_and_weight_only(name):
    preset = PRESETS[name]()
    runs = variants_of(preset)
    assert len(runs) == len(preset.tasks) * (1 + len(preset.plans) * len(preset.ratios) * len(preset.variants))
    assert set(preset.plans) <= set(PLANS) and set(preset.variants) <= set(VARIANTS)
    first = {json.dumps(config.to_json()["data"]["sources"]): config.to_json() for _, config in reversed(runs)}
    for label, config in runs:
        check_start(config)
        plain = config.to_json()
        full = first[json.dumps(plain["data"]["sources"])]
        assert {part for part in plain if plain[part] != full[part]} <= {"nesting", "loss"}
        assert (config.nesting.skip_ratio == 0) == label.endswith(FULL)
    settings = [json.dumps(config.to_json()) for _, config in runs]
    assert len(set(settings)) == len(runs)


def test_the_papers_grid():
    preset = PRESETS["qwen_math"]()
    assert preset.ratios == (0.05, 0.1, 0.15) and preset.variants == ("one", "base", "practical", "retrace")
    assert [task.data.sources[0].name for task in preset.tasks] == ["gsm8k", "svamp", "math"]
    # With one update on a batch two of the variants would be one.
    assert all(task.train.updates_per_batch > 1 for task in preset.tasks)


def test_the_command_compares_what_it_trained(tmp_path, monkeypatch, capsys):
    def write(config: Config, out):
        accuracy = 0.5 - config.nesting.skip_ratio / 2
        path = out / "runs" / config.name
        path.parent.mkdir(exist_ok=True)
        after = {"digits": {"greedy_accuracy": accuracy, "sampled_accuracy": accuracy}}
        lines = [
            line(0, **{"heldout/digits": 0.1}),
            line(1, step_seconds=1.0, plan_price=1 - config.nesting.skip_ratio),
        ]
        summary = {"after": after, "steps": 1, "nested_speedup": 1.1}
        return write_run(path, lines, config=config.to_json(), summary=summary, versions={})

    monkeypatch.setattr(sweep, "trained_run", write)
    monkeypatch.setattr(sweep, "draw_comparison", lambda tasks, path: None)
    words = ["tiny", "--seeds", "0", "1", "--variants", "base", "--plans", "uniform", "--out", str(tmp_path)]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 0
    variants = json.loads((tmp_path / "out.json").read_text())["tasks"]["three_to_six_digits"]["variants"]
    assert list(variants) == ["full", "uniform 0.2, base", "uniform 0.4, base"]
    deep = variants["uniform 0.4, base"]
    assert deep["difference"]["mean"] == pytest.approx(-0.2) and deep["ideal"]["ratio"] == pytest.approx(1 / 0.6)
    assert main([*words, "--report-only"]) == 0
    assert main(["tiny", "--report-only", "--seeds", "7", "--out", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    assert main(["tiny", "--plans", "bridged", "--out", str(tmp_path)]) == 2
    assert "--plans names none of the preset 'tiny'; it has uniform, measured" in capsys.readouterr().err
