"""From a configuration to a start: everything that cannot work is refused before any compute."""

import dataclasses
import json
import re

import pytest

from nested_reft import processes
from nested_reft.data.prompts import PromptFormat
from nested_reft.data.sources import JsonlSource, TaskSource, exactly
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.sharding import MeshConfig
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import prepare, run_config
from tests.training.runs import nano


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warm_start__steps": 1, "rollout__max_completion_tokens": 2}, r"takes \d tokens with its end"),
        ({"data__max_prompt_tokens": 5}, "data.max_prompt_tokens is 5, but the longest prompt"),
        (
            {"data__prompt": PromptFormat("{nothing}", chat=False)},
            "data.prompt.template is '{nothing}'.*allowed fields are",
        ),
        ({"rollout__max_completion_tokens": 60}, "the model allows 64 positions"),
        ({"nesting__border": 3}, "nesting.border is 3"),
        ({"nesting__skip_ratio": 0.16}, "nesting.skip_ratio is 0.16, which of 6 layers is none; .* at least 0.1667"),
        (
            {"warm_start__steps": 1, "warm_start__layer_dropout": 0.1},
            "warm_start.layer_dropout is 0.1, which of 6 layers is none",
        ),
        (
            {"mesh": MeshConfig(data=4, tensor=4)},
            "mesh.data 4 x mesh.tensor 4 is 16 devices; allowed are 1 to 8, which are here",
        ),
        ({"mesh": MeshConfig(tensor=4)}, "mesh.tensor is 4, but the model has 2 key/value heads; allowed are 1, 2"),
        ({"data__prompt": PromptFormat("{expression} = ü", chat=False)}, r"question '.*': .*cannot encode"),
    ],
)
def test_refuses_before_any_compute(changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(nano(**changes))


@pytest.mark.parametrize(
    "template", ["{question[a]}", "{question.a}", "{question", "{question:d}", "{0}", "{question!x}", "{}"]
)
def test_a_template_that_cannot_be_filled_is_refused(template):
    with pytest.raises(
        ValueError, match=r"^data.prompt.template is .*, which cannot be filled for source 'three_to_six"
    ):
        prepare(nano(data__prompt=PromptFormat(template, chat=False)))


@pytest.mark.parametrize(
    "template", ["{question:9999}", "{question:99999999999999999999}", "{question:.99999}", "{question:{question}}"]
)
def test_a_template_that_would_fill_the_memory_is_refused(template):
    with pytest.raises(ValueError, match=r"^data.prompt.template is .*has a width; allowed is a number up to 999"):
        prepare(nano(data__prompt=PromptFormat(template, chat=False)))


def test_a_prefill_beyond_what_all_prompts_may_keep_is_refused():
    replay = ReplayConfig(capacity=100, recent_share=0.5, completions_per_prompt=3, prefill=60)
    prepare(nano(replay=replay, loss=TrajectoryBalanceConfig(beta=0.5)))
    with pytest.raises(ValueError, match=r"replay.prefill is 61; allowed is 0 to 60, since there are 20 training"):
        prepare(nano(replay=dataclasses.replace(replay, prefill=61), loss=TrajectoryBalanceConfig(beta=0.5)))


def test_threads_share_no_mesh_of_several_devices():
    """Of eight devices the learner takes four, which leaves one place for a searcher."""
    search = SearchConfig(lag=1, backend="thread", searchers=1)
    prepare(nano(mesh=MeshConfig(data=4), search=search))
    message = r"search.searchers is 2 with backend 'thread', and a mesh of 4 devices .*; .* of 8 here .* room for 1"
    with pytest.raises(ValueError, match=message):
        prepare(nano(mesh=MeshConfig(data=4), search=dataclasses.replace(search, searchers=2)))


@pytest.mark.parametrize(
    ("warmup", "steps", "updates", "warning"),
    [
        (3, 4, 1, None),
        (4, 4, 1, "optimizer.warmup_steps is 4, and the run makes 4 updates: .* to 0.0005 of 0.0005"),
        (7, 4, 2, None),
        (10, 4, 1, "optimizer.warmup_steps is 10, and the run makes 4 updates: .* to 0.0002 of 0.0005"),
    ],
)
def test_a_warmup_as_long_as_the_run_is_said(warmup, steps, updates, warning, caplog):
    prepare(nano(optimizer__warmup_steps=warmup, train__steps=steps, train__updates_per_batch=updates))
    assert bool(warning) == ("warmup_steps" in caplog.text)
    assert re.search(warning or "", caplog.text)


def test_a_source_with_its_own_prompt_and_dropped_rows(tmp_path):
    rows = [{"question": f"{n}+1", "answer": n + 1} for n in range(9)] + [{"question": "1" * 40, "answer": 1}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = PromptFormat("{question} =", chat=False)
    own = JsonlSource("own", str(tmp_path / "own.jsonl"), None, 2, 1, prompt=prompt)
    data = prepare(nano(data__sources=(own,), data__prompt=PromptFormat("{no}"), data__too_long="drop")).data
    texts = [example.text for examples in (data.train_examples[0], data.heldout_examples[0]) for example in examples]
    assert sorted(texts) == [f"{n}+1 =" for n in range(9)]


@pytest.mark.parametrize("backend", ["thread", "ray"])
def test_several_processes_search_together_and_no_other_way(backend, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    search = SearchConfig(backend=backend, lag=1)
    config = nano(mesh=MeshConfig(data=8), data__prompts_per_batch=8, search=search)
    message = f"search.backend is '{backend}', with 2 processes; allowed is 'inline', .*search.lag works with it too"
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_a_question_held_out_in_one_source_is_trained_on_in_none():
    easy = TaskSource("all_of_them", "chain_sum", exactly(terms=2, digits=1), 200, 1, seed=0)
    other = TaskSource("some", "chain_sum", exactly(terms=2, digits=1), 20, 100, seed=1)
    data = prepare(nano(data__sources=(easy, other))).data
    questions = [{e.example.question for e in part} for part in (*data.train_examples, *data.heldout_examples)]
    assert not (questions[0] | questions[1]) & (questions[2] | questions[3])
    assert 90 <= len(questions[0]) <= 110


def test_a_reward_that_is_no_function_of_text_and_example_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("number = 3\n\n\ndef nullary():\n    return 1\n")
    for name, reason in (("number", "is of type int, not a function"), ("nullary", "too many positional arguments")):
        reward = RewardConfig(checker="function", function=f"{file}:{name}")
        with pytest.raises(ValueError, match=f"reward.function is .*{reason}"):
            prepare(nano(reward=reward))


def test_a_given_policy_is_what_the_run_starts_from():
    setup = prepare(nano())
    other = prepare(nano(train__seed=1), policy=setup.policy)
    assert other.policy is setup.policy and other.config.train.seed == 1


def test_the_sources_are_those_of_the_configuration():
    data = prepare(nano()).data
    assert data.source_names == ("three_to_six_digits",) and data.heldout_of_source == (0,)
    assert [len(examples) for examples in data.train_examples] == [20]
    assert [len(examples) for examples in data.heldout_examples] == [8]
    longest = max(len(example.tokens) for example in data.train_examples[0])
    assert data.prompt_size % 8 == 0 and longest <= data.prompt_size < longest + 8


def test_the_configuration_of_a_run_directory(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config.json"):
        run_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(nano().to_json()))
    assert run_config(tmp_path) == nano()
    for text in ("{", "[]", json.dumps({"name": "old"})):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config.json' cannot be read"):
            run_config(tmp_path)
