"""Configurations, set-up and the run directory: what is still to be brought to files of its own."""

import dataclasses
import json
from unittest.mock import MagicMock

import pytest

from nested_reft.cli.arguments import override
from nested_reft.config_files import config_names
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.prompts import PromptFormat
from nested_reft.data.sources import DatasetSource, JsonlSource, TaskSource, exactly
from nested_reft.data.splits import SplitConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.run_directory import RunDirectory
from nested_reft.sharding import MeshConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.setup import prepare
from tests.training.runs import MEASURED, nano


def test_resuming_drops_log_lines_after_the_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    for step in range(4):
        run.log_metrics(step, {"reward": 0.5})
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing
    resumed = RunDirectory(tmp_path)
    resumed.drop_after(2)
    resumed.log_metrics(3, {"reward": 0.25})
    assert [line["step"] for line in resumed.read_metrics()] == [0, 1, 2, 3]


def test_resuming_drops_tensorboard_points_after_the_checkpoint(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda path, purge_step: made.append(purge_step) or MagicMock())
    fresh, resumed = RunDirectory(tmp_path), RunDirectory(tmp_path)
    resumed.drop_after(2)
    assert made == []  # a run that cannot be restored gets no events file
    for run in (fresh, resumed):
        run.log_metrics(3, {"reward": 0.25})
    assert made == [None, 3]


def test_configurations_survive_json():
    for name in config_names():
        config = load_config(name)
        assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__micro_batches": 3}, "train.micro_batches is 3; it must divide data.prompts_per_batch"),
        ({"mesh": MeshConfig(data=3)}, "mesh.data is 3; it must divide the prompts of a micro-batch"),
        ({"train__steps": 0}, "train.steps is 0"),
        ({"rollout__max_completion_tokens": 0}, "rollout.max_completion_tokens is 0"),
        ({"data__prompts_per_batch": 0}, "data.prompts_per_batch is 0"),
        ({"data__sources": ()}, "data.sources is empty"),
        ({"lora": LoraConfig(rank=1), "warm_start__steps": 5}, "lora.rank and warm_start.steps are both set"),
        ({"model__dtype": "bfloat16"}, "model.dtype is 'bfloat16' and lora.rank 0"),
        ({"warm_start__learning_rate": 0.0}, "warm_start.learning_rate is 0.0"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate is 0.0"),
        ({"evaluation__pass_k": 9}, "evaluation.pass_k is 9"),
        (
            {"data__split": SplitConfig("cluster", sources=("four",))},
            "data.split.sources has 'four'; allowed are three",
        ),
        ({"curriculum": CurriculumConfig("static", weights=(1.0, 2.0))}, "curriculum.weights has 2 weights"),
        (
            {"curriculum": CurriculumConfig("static", weights=(1.0,)), "data__split": SplitConfig("cluster")},
            "curriculum.kind is 'static' and data.split.kind 'cluster'",
        ),
        (
            {"curriculum": CurriculumConfig("dump"), "loss__advantage": "no_baseline"},
            "curriculum.kind is 'dump' and loss.advantage 'no_baseline'",
        ),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        nano(**changes)


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
        ({"mesh": MeshConfig(data=4, model=4)}, "4 x 4 = 16 devices; 8 are here"),
        ({"mesh": MeshConfig(model=5)}, "mesh.model is 5, but 'embedding' has 16 along 'vocab'"),
        ({"data__prompt": PromptFormat("{expression} = ü", chat=False)}, "cannot encode"),
    ],
)
def test_refuses_before_any_compute(changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(nano(**changes))


def test_overlong_cache_larger_than_a_completion_is_refused():
    with pytest.raises(
        ValueError, match=r"reward.overlong_cache_tokens is 9; allowed is 0 to rollout.max_completion_tokens"
    ):
        nano(reward=RewardConfig(overlong_cache_tokens=9))


def test_sources_of_every_kind_are_read_back_from_json_and_overridden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = JsonlSource("own", "own.jsonl", None, 2, 0, prompt=PromptFormat("{question}=", chat=False), checker="math")
    published = DatasetSource("gsm8k", "gsm8k", 100, 10, 0, folder="somewhere")
    config = nano()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources=(*config.data.sources, own, published), too_long="drop")
    )
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    changed = override(config, ["--data.sources.1.file", "x.jsonl", "--data.sources.2.train-size", "None"])
    assert changed.data.sources[1] == dataclasses.replace(own, file="x.jsonl")
    assert changed.data.sources[2] == dataclasses.replace(published, train_size=None)


def test_a_source_with_its_own_prompt_and_dropped_rows(tmp_path):
    rows = [{"question": f"{n}+1", "answer": n + 1} for n in range(9)] + [{"question": "1" * 40, "answer": 1}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = PromptFormat("{question} =", chat=False)
    own = JsonlSource("own", str(tmp_path / "own.jsonl"), None, 2, 1, prompt=prompt)
    config = nano()
    data = dataclasses.replace(config.data, sources=(own,), prompt=PromptFormat("{no}"), too_long="drop")
    setup = prepare(dataclasses.replace(config, data=data))
    texts = [example.text for examples in (setup.train_examples[0], setup.heldout_examples[0]) for example in examples]
    assert sorted(texts) == [f"{n}+1 =" for n in range(9)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_size": 0}, "data.sources.three_to_six_digits.heldout_size is 0; allowed is 1 or more"),
        ({"heldout_sizes": 1}, "data.sources.three_to_six_digits: can not match .*heldout_sizes"),
        ({"seed": "x"}, "data.sources.three_to_six_digits: wrong value type for field .*seed"),
        ({"checker": "guess"}, "data.sources.three_to_six_digits: wrong value type for field .*checker"),
        ({"file": "x"}, "data.sources.three_to_six_digits needs exactly one of the fields task, dataset, file"),
    ],
)
def test_what_is_wrong_with_a_stored_source_is_said(changes, message):
    value = nano().to_json()
    value["data"]["sources"][0] |= changes
    with pytest.raises(ValueError, match=message):
        Config.from_json(value)


def test_exact_rollouts_have_nothing_to_mix():
    mixture = dataclasses.replace(nano().loss, bias_mitigation="mixture", level="sequence", mixture_alpha=0.5)
    exact = dataclasses.replace(nano().rollout, mode="exact")
    with pytest.raises(ValueError, match=r"rollout.mode is 'exact' and loss.mixture_alpha 0.5"):
        nano(loss=mixture, rollout=exact)
    control = NestingControlConfig("ess_token", budget=0.5, max_skipped=2)
    with pytest.raises(ValueError, match=r"rollout.mode is 'exact' and nesting_control.hold 'ess_token'"):
        nano(nesting_control=control, rollout=exact)
    with pytest.raises(ValueError, match=r"rollout.draft_length is 3; allowed are"):
        dataclasses.replace(exact, draft_length=3)


def test_a_question_held_out_in_one_source_is_trained_on_in_none():
    easy = TaskSource("all_of_them", "chain_sum", exactly(terms=2, digits=1), 200, 1, seed=0)
    other = TaskSource("some", "chain_sum", exactly(terms=2, digits=1), 20, 100, seed=1)
    setup = prepare(nano(data=dataclasses.replace(nano().data, sources=(easy, other))))
    questions = [{e.example.question for e in part} for part in (*setup.train_examples, *setup.heldout_examples)]
    assert not (questions[0] | questions[1]) & (questions[2] | questions[3])
    assert 90 <= len(questions[0]) <= 110


def test_a_reward_that_is_no_function_of_text_and_example_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("number = 3\n\n\ndef nullary():\n    return 1\n")
    for name, reason in (("number", "is of type int, not a function"), ("nullary", "too many positional arguments")):
        reward = RewardConfig(checker="function", function=f"{file}:{name}")
        with pytest.raises(ValueError, match=f"reward.function is .*{reason}"):
            prepare(nano(reward=reward))


def test_re_measuring_reads_no_more_than_a_batch_has():
    nesting = dataclasses.replace(MEASURED, remeasure_completions=5)
    with pytest.raises(ValueError, match=r"nesting.remeasure_completions is 5; allowed is 1 to rollout.group_size"):
        nano(nesting=nesting)


def test_rounded_rollouts_are_refused_where_the_targets_own_density_is_needed():
    rounded = dataclasses.replace(nano().rollout, weights="int8")
    mixture = dataclasses.replace(nano().loss, bias_mitigation="mixture", level="sequence", mixture_alpha=0.5)
    with pytest.raises(ValueError, match=r"rollout.weights is 'int8' and loss.mixture_alpha 0.5"):
        nano(loss=mixture, rollout=rounded)
    with pytest.raises(ValueError, match=r"rollout.mode is 'exact' and rollout.weights 'int8'"):
        dataclasses.replace(rounded, mode="exact")
