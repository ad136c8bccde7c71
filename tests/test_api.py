"""The Python API: its examples run, its refusals have the words of the command line."""

import dataclasses
import doctest
import inspect
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nested_reft as nr
from nested_reft import api
from nested_reft.losses.supervised import SupervisedConfig
from nested_reft.run_directory import RunDirectory

SMALL = {
    "train": {"steps": 2, "checkpoint_every": 1},
    "warm_start": {"steps": 2},
    "data": {"prompts_per_batch": 4},
    "rollout": {"group_size": 4},
    "evaluation": {"samples_per_prompt": 2, "pass_k": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> nr.Run:
    return nr.train(nr.load_config("tiny", **SMALL), runs=str(tmp_path_factory.mktemp("runs")))


@pytest.mark.slow
def test_the_examples_in_the_docstrings_run(tmp_path, monkeypatch):
    """They share their names, one after the other, as the cells of a notebook do."""
    monkeypatch.chdir(tmp_path)
    names = {name: getattr(nr, name) for name in nr.__all__}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    examples = 0
    for value in (
        nr.load_config,
        api.train,
        api.evaluate,
        api.Run,
        nr.Policy.load,
        nr.Policy.sample,
        nr.Policy.score,
        nr.Policy.prompts_of,
    ):
        for test in finder.find(value, value.__name__, globs={}):
            test.globs = names
            examples += len(test.examples)
            runner.run(test, clear_globs=False)
    assert runner.failures == 0 and examples > 10


def test_a_run_shows_what_it_left_behind(run):
    metrics = run.metrics()
    assert metrics["step"] == [0, 1, 2]
    assert metrics["loss"][0] is None and all(isinstance(value, float) for value in metrics["loss"][1:])
    assert {sample["step"] for sample in run.samples()} == {1, 2}
    assert run.samples(step=2) == [sample for sample in run.samples() if sample["step"] == 2]
    assert run.summary() == json.loads((run.path / "summary.json").read_text())
    assert run.config() == nr.load_config("tiny", **SMALL)


def test_a_run_that_goes_on_has_metrics_and_no_summary(run, tmp_path):
    (tmp_path / "config.json").write_text((run.path / "config.json").read_text())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    going_on = nr.Run(tmp_path)
    assert going_on.metrics() == {"step": [0, 1], "loss": [None, 0.5]}
    with pytest.raises(ValueError, match="has no summary yet: it is going on or was stopped"):
        going_on.summary()


def test_a_finished_run_can_be_asked_to_train_again_and_does_nothing_more(run):
    before = {file: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    assert nr.train(run) is run
    assert {file: file.read_bytes() for file in run.path.iterdir() if file.is_file()} == before


def test_a_run_without_a_checkpoint_is_refused_and_stays_as_it_was(run, tmp_path):
    for name in ("config.json", "versions.json"):
        (tmp_path / name).write_text((run.path / name).read_text())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
        nr.train(nr.Run(tmp_path))
    with pytest.raises(ValueError, match="has no complete checkpoint yet"):
        nr.Policy.load(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def run_to_continue(path):
    """What a run that was killed in its first step leaves, as far as its names go."""
    config = nr.load_config("tiny", **SMALL)
    (path / "checkpoints" / "5").mkdir(parents=True)
    (path / "checkpoints" / "5" / "file").write_text("")
    (path / "config.json").write_text(json.dumps(config.to_json()))
    return nr.Run(path)


def test_a_run_that_another_process_works_on_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "prepare", lambda *_, **__: pytest.fail("something was loaded"))
    with closing(RunDirectory(tmp_path)), pytest.raises(ValueError, match=r"is in use by another process; wait until"):
        nr.train(run_to_continue(tmp_path))


def test_a_run_that_is_refused_can_be_continued_later(tmp_path, monkeypatch):
    def refuse(config, resumes):
        raise ValueError("not today")

    monkeypatch.setattr(api, "prepare", refuse)
    with pytest.raises(ValueError, match="not today"):
        nr.train(run_to_continue(tmp_path))
    RunDirectory(tmp_path).close()


@pytest.mark.parametrize(
    ("text", "complete"),
    [('{"steps": 2}', True), ('{"steps": 3}', False), ('{"ste', False), ("", False), ("[]", False), (None, False)],
)
def test_a_run_is_complete_with_a_summary_that_can_be_read(text, complete, tmp_path):
    run = run_to_continue(tmp_path)  # two steps of warm start, two of reinforcement, one for each beginning
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    assert api.is_complete(tmp_path, run.config()) == complete


def test_a_policy_samples_and_scores(run):
    policy = nr.Policy.load(run)
    plan = nr.LayerPlan.skipping(6, [2])
    for layers in (None, plan):
        (completions,) = policy.sample("123 =", layers, samples=8, seed=1)
        assert all(isinstance(each, nr.Completion) for each in completions) and len(set(completions)) > 1
        # A text does not show special tokens, which an untrained model may draw anywhere.
        told = {each: policy.tokenizer.encode(each.text) for each in completions}
        first = next(each for each, ids in told.items() if len(ids) == len(each.tokens) - each.finished)
        tokens = told[first]
        (logprob_T,) = policy.score(["123 ="], [first.text], layers)
        assert len(logprob_T) == len(tokens)
        # The sampled log-probability also has the stop token's, which the text does not show.
        assert logprob_T.sum() >= first.logprob - 1e-3
        if not first.finished:
            np.testing.assert_allclose(logprob_T.sum(), first.logprob, atol=1e-3)
    again = policy.sample("123 =", plan, samples=2, seed=1)
    assert again == policy.sample(["123 ="], plan, samples=2, seed=1)
    batch = policy.sample(["1 =", "2345 ="], temperature=0.0, max_tokens=3)
    assert [len(group) for group in batch] == [1, 1] and all(len(c.tokens) <= 3 for (c,) in batch)


def test_evaluating_a_run_and_its_policy_agree(run):
    of_run = nr.evaluate(run)
    assert nr.evaluate(nr.Policy.load(run), run.config()) == of_run
    assert nr.evaluate(run, plan=nr.LayerPlan.full(6)) == of_run
    assert run.summary()["after"]["three_to_six_digits"]["greedy_accuracy"] == pytest.approx(
        of_run["three_to_six_digits"].greedy_accuracy
    )


def test_overrides_change_fields_and_parts():
    config = nr.load_config("tiny", name="mine", train={"seed": 7}, loss=SupervisedConfig())
    assert config == dataclasses.replace(
        nr.load_config("tiny"),
        name="mine",
        train=dataclasses.replace(nr.load_config("tiny").train, seed=7),
        loss=SupervisedConfig(),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trian": {"steps": 1}}, "trian is no field of the configuration; allowed are name, model, data"),
        ({"train": {"stepz": 1}}, "train.stepz is no field of the configuration; allowed are steps, "),
        ({"train": {"steps": 0}}, "train.steps is 0; allowed is 1 or more"),
        ({"train": {"steps": "many"}}, "train.steps is 'many'; allowed is a whole number"),
        ({"rollout": {"mode": "fast"}}, "mode"),
    ],
)
def test_overrides_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        nr.load_config("tiny", **overrides)


def test_what_is_no_run_and_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"'{tmp_path}' is not a run directory: it has no config.json"):
        nr.Run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config\.json"):
        nr.Policy.load(tmp_path)
    with pytest.raises(ValueError, match="neither known nor on this machine"):
        nr.Policy.load("no-such-model")
    with pytest.raises(AttributeError, match="has no attribute 'trian'; it has Completion, Config"):
        nr.trian  # noqa: B018


def test_scoring_needs_pairs(run):
    policy = nr.Policy.load(run)
    with pytest.raises(ValueError, match="score got 1 prompts and 2 completions"):
        policy.score(["1 ="], ["1", "2"])
    with pytest.raises(ValueError, match="score got a completion without tokens"):
        policy.score(["1 ="], [""])
    with pytest.raises(ValueError, match="the longest prompt has 3 tokens and max_tokens is 99; allowed are 1 to 64"):
        policy.sample("1 =", max_tokens=99)
    with pytest.raises(ValueError, match="samples is 0; allowed is 1 or more"):
        policy.sample("1 =", samples=0)
    with pytest.raises(ValueError, match="the plan keeps layer 7; the model has layers 0 to 5"):
        policy.sample("1 =", plan=nr.LayerPlan.full(8))
    assert np.array_equal(policy.score("1 =", "1")[0], policy.score(["1 ="], ["1"])[0])
    with pytest.raises(ValueError, match="evaluate got no configuration"):
        nr.evaluate(policy)


def test_the_metric_page_lists_what_the_code_declares():
    import importlib.util

    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("metric_reference", root / "scripts" / "metric_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs" / "metrics.md").read_text(encoding="utf-8") == module.reference()


def test_a_callback_that_is_no_function_is_refused():
    unchecked: Any = inspect.unwrap(nr.train)  # the tests' own check of types would come first
    with pytest.raises(ValueError, match="on_step is 'print'; allowed is a function that takes a StepRecord, or None"):
        unchecked("tiny", on_step="print")


def test_a_policy_of_an_edited_configuration_is_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    value = json.loads(file.read_text())
    value["model"]["shape"]["rope_theta"] = 10.0
    file.write_text(json.dumps(value))
    message = r"config.json' is not that of checkpoint \d+: model.shape.rope_theta is 10.0, and was 10000.0"
    with pytest.raises(ValueError, match=message):
        nr.Policy.load(tmp_path / "copy")
