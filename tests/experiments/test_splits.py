"""The experiment on divisions: what its parts say, its tables, and that held-out prompts stay the same."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.runs import measured_run, questions_of_parts
from experiments.splits import (
    KINDS,
    experiment_config,
    known_of_source,
    main,
    pooled,
    share_of_draws,
)
from nested_reft.run_directory import read_log
from nested_reft.training.setup import prepare


def result(kind: str, means: list[float], questions: list[list[int]], probability: list[float]) -> dict:
    """A run of two sources with these mean accuracies, evaluated every 10 steps."""
    steps = [10 * i for i in range(len(means))]
    return {
        "kind": kind,
        "steps": steps,
        "accuracy": [[mean - 0.1, mean + 0.1] for mean in means],
        "seconds": 1.0,
        "start_seconds": 0.5,
        "sources": ["a", "b"],
        "parts": [f"part_{i}" for i in range(len(questions))],
        "questions": questions,
        "probability": [probability] * steps[-1],
    }


def test_share_of_draws_by_hand():
    """Part 0 is a quarter of source a and drawn with 0.8; part 1 is of b alone: 0.8 / 4 = 0.2 comes from a.

    Weighing parts by their sizes instead would give a's share of the questions, 1 / 5.5.
    """
    run = result("pass_rate", [0, 0, 0, 0], [[10, 30], [0, 15]], [0.8, 0.2])
    assert share_of_draws(run) == pytest.approx([0.2, 0.8])


def test_known_of_source_by_hand():
    def known(questions):
        return known_of_source(result("pass_rate", [0, 0], questions, [1.0]))

    assert known([[7, 0], [0, 7]]) == pytest.approx(1.0)  # a part for each source
    assert known([[4, 8], [2, 4]]) == pytest.approx(0.0)  # every part is mixed as the pool is
    # p(a) is 1/2 and a part holds 1 and 3 of 4: ln 2 less its entropy, over ln 2.
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert known([[1, 3], [3, 1]]) == pytest.approx(1 - entropy / np.log(2))


def test_kinds_differ_in_the_division_only():
    one, *others = [experiment_config(kind, 3, 40).to_json() for kind in KINDS]
    for other in others:
        assert {part for part in one if one[part] != other[part]} <= {"name", "data"}
        assert {part for part in one["data"] if one["data"][part] != other["data"][part]} <= {"split"}


@pytest.mark.slow
def test_a_pool_trains_in_parts_and_is_tested_on_the_named_sources(tmp_path, monkeypatch):
    """The division is given, because measuring the pass rates of 10,836 questions takes minutes."""
    setup = pooled(prepare(experiment_config("pass_rate", 0, 10)))
    (pool,) = setup.data.train_examples

    def divide(config, data, policy, key):
        assert config.data.split.kind == "pass_rate" and data.source_names == ("pool",)
        parts = [("pool.hard", range(836, len(pool)), 0.1), ("pool.easy", range(836), 0.9)]
        return [[{"name": name, "examples": list(part), "pass_rate": rate} for name, part, rate in parts]]

    monkeypatch.setattr("nested_reft.training.phases.divide", divide)
    before = [np.array(leaf) for leaf in jax.tree.leaves(setup.policy.model)]
    found = measured_run(setup, tmp_path)
    assert found["config"] == setup.config.to_json()  # with its split, so that `finished` knows it again
    assert found["sources"] == [source.name for source in setup.config.data.sources]
    assert found["parts"] == ["pool.easy", "pool.hard"]
    assert np.shape(found["accuracy"]) == (2, 6) and np.shape(found["probability"]) == (10, 2)
    # 3-digit questions are few: the generator gives 836 that are not held out, the first of the pool.
    assert found["questions"] == [[836, 0, 0, 0, 0, 0], [0, 2000, 2000, 2000, 2000, 2000]]
    # Nothing is known before the first step, so its draws are uniform over the parts.
    assert found["probability"][0] == [0.5, 0.5]
    # The logs are those of a training run, whose accuracies are the ones that the result has.
    lines, samples = (read_log(Path(found["run_directory"]) / f"{name}.jsonl") for name in ("metrics", "samples"))
    assert [line["step"] for line in lines] == list(range(11))
    assert sorted({line["step"] for line in samples}) == list(range(1, 11))
    assert lines[0]["heldout/copy_3_digits"] == found["greedy_accuracy"][0][0]
    assert found["metrics"]["completion_tokens"] == [line["completion_tokens"] for line in lines[1:]]
    # Several runs start from one setup, so its weights must outlive each of them.
    assert all((was == now).all() for was, now in zip(before, jax.tree.leaves(setup.policy.model), strict=True))


def test_pass_rates_of_the_start_divide_a_pool(tmp_path):
    """An untrained policy is right nowhere, so no question differs and there is one part."""
    config = experiment_config("pass_rate_2_samples", 0, 10)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1))
    setup = pooled(prepare(config))
    (pool,) = setup.data.train_examples
    setup = dataclasses.replace(setup, data=dataclasses.replace(setup.data, train_examples=(pool[:32],)))
    found = measured_run(setup, tmp_path)
    assert found["parts"] == ["pool.pass_0.00-0.00"] and found["questions"] == [[32, 0, 0, 0, 0, 0]]


def test_questions_of_parts_are_those_that_the_sources_name():
    setup = prepare(experiment_config("source", 0, 10))
    sources = [source.name for source in setup.config.data.sources]
    first, second = (examples[:5] for examples in setup.data.train_examples[:2])
    data = dataclasses.replace(setup.data, train_examples=((*first, *second[:2]), second[2:]))
    assert questions_of_parts(data, sources) == [[5, 2, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0]]


def test_report_of_finished_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    divisions = {"pool": [[50, 50]], "source": [[50, 0], [0, 50]]}
    for kind, questions in divisions.items():
        for seed in (0, 1):
            run = result(kind, [0.0, 0.1, 0.2, 0.3, 0.4], questions, [1 / len(questions)] * len(questions))
            run |= {"config": experiment_config(kind, seed, 40).to_json()}
            (tmp_path / f"{kind}-seed{seed}-steps40.json").write_text(json.dumps(run))
    kept = tmp_path / "kept.json"
    words = ["--report-only", "--seeds", "0", "1", "--steps", "40", "--out", str(tmp_path), "--json", str(kept)]
    assert main(words) == 0
    assert kept.read_text() == (tmp_path / "results.json").read_text()
    assert "tells source" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["against"]["pool"][1]["final_gain"] == pytest.approx(0.0)
    assert found["divisions"]["source"]["known_of_source"] == pytest.approx(1.0)
    assert found["divisions"]["pool"]["known_of_source"] == 0.0


def test_refuses_steps_that_no_evaluation_ends(capsys):
    assert main(["--steps", "25"]) == 2
    assert "--steps is 25; allowed is a multiple of 10" in capsys.readouterr().err
