"""Configurations: through JSON and back, overridden, refused; every one that ships takes a step."""

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_reft.cli.overrides import override
from nested_reft.config_files import config_names
from nested_reft.data.prompts import PromptFormat
from nested_reft.data.sources import DatasetSource, JsonlSource, TaskSource, exactly
from nested_reft.data.splits import SplitConfig
from nested_reft.losses import presets
from nested_reft.losses.registry import OfflineConfig
from nested_reft.losses.supervised import SupervisedConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.models.config import ModelConfig
from nested_reft.models.source import ModelSource
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.run_directory import read_log
from nested_reft.training.config import Config, forbidden_changes, load_config
from nested_reft.training.phases import warm_started
from nested_reft.training.setup import prepare
from nested_reft.training.warm_start import WarmStartConfig
from tests.training.preference_runs import pairs_source, write_pairs
from tests.training.runs import nano, trainer


def small(name: str, folder: Path) -> Config:
    """A configuration that ships, with everything that decides on its cost made small; what it does stays."""
    config = load_config(name)
    shape = ModelConfig(len(string.printable) + 1, 10, 16, 16, 2, 2, 8, max_positions=600)
    generated = [source for source in config.data.sources if isinstance(source, TaskSource)]
    sums = TaskSource("instead_of_a_dataset", "chain_sum", exactly(terms=2, digits=1), 8, 2, seed=0)
    sources = tuple(dataclasses.replace(s, train_size=8, heldout_size=2) for s in generated or [sums])
    if isinstance(config.loss, OfflineConfig) or config.reward.checker == "model":
        sources = (pairs_source(write_pairs(folder / "pairs.jsonl")),)
        if config.reset.is_on:
            config = dataclasses.replace(config, reset=dataclasses.replace(config.reset, references="answers"))
    # Layers and divergences that a configuration names are those of its own model.
    nesting: dict[str, Any] = {"choice": "uniform", "divergence_file": None, "skip_ratio": 0.1}
    if config.nesting.choice == "fixed":
        nesting = {"layers": (3, 4, 7), "bridge": dataclasses.replace(config.nesting.bridge, tokens=32)}
    return dataclasses.replace(
        config,
        model=ModelSource("scratch", shape=shape, alphabet=string.printable),
        data=dataclasses.replace(
            config.data, sources=sources, prompts_per_batch=2, max_prompt_tokens=550, split=SplitConfig()
        ),
        nesting=dataclasses.replace(config.nesting, **nesting),
        rollout=dataclasses.replace(config.rollout, max_completion_tokens=16),
        replay=dataclasses.replace(config.replay, prefill=min(config.replay.prefill, 8)),
        # A learned reward would have to be learnt first.
        reward=dataclasses.replace(
            config.reward,
            checker="exact" if config.reward.checker == "model" else config.reward.checker,
            overlong_cache_tokens=min(config.reward.overlong_cache_tokens, 4),
        ),
        warm_start=dataclasses.replace(config.warm_start, steps=min(config.warm_start.steps, 1)),
        lora=dataclasses.replace(config.lora, rank=min(config.lora.rank, 2)),
        train=dataclasses.replace(config.train, micro_batches=1, steps=1),
        evaluation=dataclasses.replace(config.evaluation, samples_per_prompt=0),
    )


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_takes_a_step(name, tmp_path):
    """After its warm start, where it has one; `test_phases` divides sources."""
    setup = prepare(small(name, tmp_path))
    if setup.config.warm_start.steps:
        started = dataclasses.replace(setup.config, warm_start=WarmStartConfig())
        setup = prepare(started, warm_started(setup))
    run = trainer(setup, tmp_path)
    if isinstance(setup.config.loss, OfflineConfig):
        run.run()
        assert np.isfinite(read_log(tmp_path / "metrics.jsonl")[-1]["loss"])
    else:
        assert np.isfinite(run.step(0).update.loss)


@pytest.mark.parametrize("name", config_names())
def test_configurations_survive_json(name):
    config = load_config(name)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("loss", [nano().loss, SupervisedConfig()])
def test_objectives_of_every_kind_are_read_back_from_json(loss):
    config = nano(loss=loss)
    found = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert found == config and type(found.loss) is type(loss)


def test_the_parts_of_an_objective_are_overridden():
    """`tiny` truncates, which `retrace` has no use for."""
    changed = override(nano(), ["--loss.bias-mitigation", "retrace", "--loss.truncate-at", "None"])
    assert changed.loss == dataclasses.replace(nano().loss, bias_mitigation="retrace", truncate_at=None)
    supervised = override(nano(loss=SupervisedConfig()), ["--train.steps", "7"])
    assert supervised.loss == SupervisedConfig() and supervised.train.steps == 7


@pytest.mark.parametrize("words", [["--loss.kind", "supervised"], ["--loss.kind=supervised"]])
def test_an_objective_is_chosen_on_the_command_line(words):
    changed = override(nano(), [*words, "--train.steps", "7"])
    assert changed.loss == SupervisedConfig() and changed.train.steps == 7
    assert override(nano(), ["--loss.kind", "policy_gradient"]) == nano()
    # A field without a default, before the kind that has it.
    balanced = override(nano(), ["--loss.beta", "0.3", "--loss.kind", "trajectory_balance"])
    assert balanced.loss == TrajectoryBalanceConfig(beta=0.3)


def test_presets_are_chosen_by_name():
    """Each changes what the one before left; fields of the loss change the preset, wherever they stand."""
    loss = load_config("tiny").loss
    icepop = presets.icepop(loss)
    assert load_config("tiny", loss="icepop").loss == icepop
    assert override(load_config("tiny"), ["--loss.preset", "IcePop"]).loss == icepop
    words = ["--loss.reject-above", "4", "--loss.preset", "dapo", "token_mis", "--train.steps", "7"]
    changed = override(load_config("tiny"), words)
    assert changed.loss == presets.token_mis(presets.dapo("base"), reject_above=4.0) and changed.train.steps == 7
    same = load_config("tiny", loss={"preset": ["dapo", "token MIS"], "reject_above": 4.0}, train={"steps": 7})
    assert same == changed
    with pytest.raises(ValueError, match=r"loss.preset is 'icepopp'; allowed are grpo, ppo, .*, k3_rs, icepop"):
        load_config("tiny", loss="icepopp")
    with pytest.raises(ValueError, match=r"loss.preset is given no value; allowed are names of grpo"):
        override(nano(), ["--loss.preset"])


def test_an_objective_is_chosen_in_python():
    assert load_config("tiny", loss={"kind": "supervised"}).loss == SupervisedConfig()
    same = load_config("tiny", loss={"kind": "policy_gradient", "entropy_coefficient": 0.5}).loss
    assert same == dataclasses.replace(load_config("tiny").loss, entropy_coefficient=0.5)
    with pytest.raises(ValueError, match=r"loss\.kind is 'supervized'; allowed are policy_gradient, supervised"):
        load_config("tiny", loss={"kind": "supervized"})


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (nano(), "supervized", "loss.kind is 'supervized'; allowed are policy_gradient, supervised"),
        (
            nano(loss=SupervisedConfig()),
            "policy_gradient",
            r"loss.advantage is missing and has no default; .*leave_one_out",
        ),
    ],
)
def test_an_objective_that_cannot_be_chosen_is_refused(config, kind, message):
    with pytest.raises(ValueError, match=message):
        override(config, ["--loss.kind", kind])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias_mitigation": "guess"}, "loss.bias_mitigation is 'guess'; allowed are base, one"),
        ({"temperature": 1.0}, r"loss.temperature is no field .*; did you mean curriculum.temperature\?"),
    ],
)
def test_what_is_wrong_with_a_stored_objective_is_said(changes, message):
    value = nano().to_json()
    value["loss"] |= changes
    with pytest.raises(ValueError, match=message):
        Config.from_json(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # A missing objective must not pass for the supervised one, whose object is empty.
        ({"loss": None}, "loss is None; allowed is an object"),
        ({"loss": []}, "loss is .*; allowed is an object"),
        ({"loss": "retrace"}, "loss is 'retrace'; allowed is an object"),
        ({"data": nano().to_json()["data"] | {"sources": 3}}, "data.sources is 3; allowed is a list"),
        ({"data": nano().to_json()["data"] | {"sources": {"task": 1}}}, "data.sources is .*; allowed is a list"),
        ({"data": nano().to_json()["data"] | {"sources": ["task"]}}, "data.sources.0 is 'task'; allowed is an object"),
        ({"data": nano().to_json()["data"] | {"sources": [None]}}, "data.sources.0 is None; allowed is an object"),
    ],
)
def test_what_is_no_object_is_refused_with_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_json(nano().to_json() | changes)


def test_what_is_no_configuration_is_refused():
    for value in (None, [], "tiny"):
        with pytest.raises(ValueError, match=r"the configuration is .*; allowed is an object"):
            Config.from_json(value)


def test_a_stored_objective_without_all_its_parts_is_refused():
    value = nano().to_json()
    value["loss"] = {"advantage": "group_std"}
    with pytest.raises(ValueError, match=r"loss.bias_mitigation is missing and has no default; allowed are base"):
        Config.from_json(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__steps": 0}, "train.steps is 0"),
        ({"train__steps": 10**9}, "train.steps is 1000000000; allowed is 1 or more, up to 100000000"),
        ({"train__steps": 10**8, "train__updates_per_batch": 2}, "train.updates_per_batch 2; allowed are at most"),
        ({"train__mini_batches": 0}, "train.mini_batches is 0; allowed is 1 or more"),
        (
            {"train__updates_per_batch": 3, "train__mini_batches": 2},
            "train.updates_per_batch is 3; allowed are multiples of train.mini_batches, which is 2",
        ),
        ({"train__seed": 2**32}, "train.seed is 4294967296; allowed is 0 or more, up to 2147483647"),
        ({"warm_start__steps": 2**31}, "warm_start.steps is 2147483648; allowed is 0 or more"),
        ({"reward__workers": 10**6}, "reward.workers is 1000000; allowed is 1 or more, up to 1024"),
        ({"reward__memory_gib": 1e20}, "reward.memory_gib is 1e\\+20; allowed is 0"),
        ({"reward__memory_gib": 1e-9}, "reward.memory_gib is 1e-09; allowed is 0"),
        ({"rollout__draft_length": 2**31}, "rollout.draft_length is 2147483648; allowed is 1 or more"),
        ({"train__ess_warning": 1.0}, "train.ess_warning is 1.0; allowed is 0 < ess_warning < 1"),
        ({"train__stop_after_empty_updates": 0}, "train.stop_after_empty_updates is 0; allowed is 1 or more"),
        ({"train__stop_after_nonfinite_updates": 0}, "train.stop_after_nonfinite_updates is 0; allowed is 1 or more"),
        ({"train__save_seconds": 0.0}, "train.save_seconds is 0.0; allowed is more than 0, up to 86400"),
        ({"train__save_seconds": float("nan")}, "train.save_seconds is nan; allowed is more than 0"),
        ({"train__seed": -1}, "train.seed is -1; allowed is 0 or more"),
        ({"train__wandb_project": "team/trial"}, "train.wandb_project is 'team/trial'; allowed is a name of up to 128"),
        ({"rollout__max_completion_tokens": 0}, "rollout.max_completion_tokens is 0"),
        ({"rollout__draft_length": 0}, "rollout.draft_length is 0; allowed is 1 or more"),
        ({"rollout__mixture_alpha": 1.5}, "rollout.mixture_alpha is 1.5; allowed is 0 < mixture_alpha <= 1, or None"),
        ({"data__prompts_per_batch": 0}, "data.prompts_per_batch is 0"),
        ({"data__sources": ()}, "data.sources is empty"),
        ({"warm_start__learning_rate": 0.0}, "warm_start.learning_rate is 0.0"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate is 0.0"),
        ({"evaluation__pass_k": 9}, "evaluation.pass_k is 9"),
        (
            {"data__split": SplitConfig("pass_rate", sources=("four",))},
            "data.split.sources has 'four'; allowed are three",
        ),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        nano(**changes)


def test_exact_rollouts_have_nothing_to_mix():
    with pytest.raises(ValueError, match=r"rollout.mode is 'exact' and rollout.mixture_alpha 0.5"):
        nano(rollout=dataclasses.replace(nano().rollout, mode="exact", mixture_alpha=0.5))


def test_rounded_rollouts_are_refused_where_the_targets_own_density_is_needed():
    rounded = dataclasses.replace(nano().rollout, weights="int8")
    with pytest.raises(ValueError, match=r"rollout.weights is 'int8' and rollout.mixture_alpha 0.5"):
        dataclasses.replace(rounded, mixture_alpha=0.5)
    with pytest.raises(ValueError, match=r"rollout.mode is 'exact' and rollout.weights 'int8'"):
        dataclasses.replace(rounded, mode="exact")


def test_template_variables_are_read_back_from_json_and_overridden():
    variables = (("enable_thinking", False), ("level", 3), ("mood", "kind"))
    config = nano(data__prompt=PromptFormat(variables=variables))
    assert Config.from_json(json.loads(json.dumps(config.to_json()))).data.prompt.variables == variables
    changed = override(config, ["--data.prompt.variables", "enable_thinking", "True", "level", "4", "mood", "dry"])
    assert changed.data.prompt.variables == (("enable_thinking", True), ("level", 4), ("mood", "dry"))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_size": 0}, "data.sources.three_to_six_digits.heldout_size is 0; allowed is 1 or more"),
        ({"heldout_sizes": 1}, "data.sources.three_to_six_digits.heldout_sizes is no field"),
        ({"seed": "x"}, "data.sources.three_to_six_digits.seed is 'x'; allowed is a whole number"),
        ({"checker": "guess"}, "data.sources.three_to_six_digits.checker is 'guess'; allowed are exact"),
        ({"file": "x"}, "data.sources.three_to_six_digits needs exactly one of the fields task, dataset, file"),
    ],
)
def test_what_is_wrong_with_a_stored_source_is_said(changes, message):
    value = nano().to_json()
    value["data"]["sources"][0] |= changes
    with pytest.raises(ValueError, match=message):
        Config.from_json(value)


@pytest.mark.parametrize("field", ["train_size", "heldout_size"])
def test_sizes_of_sources_have_a_limit(field):
    with pytest.raises(ValueError, match=rf"{field} is 2147483647; allowed is 1 or more, up to 10000000"):
        dataclasses.replace(nano().data.sources[0], **{field: 2**31 - 1})


def test_samples_of_a_split_have_a_limit():
    with pytest.raises(ValueError, match=r"data.split.samples is 1000000; allowed is 1 or more, up to 1024"):
        SplitConfig("pass_rate", samples=10**6)


@pytest.mark.parametrize("temperature", [1e-30, 1e30, -1.0, float("nan")])
def test_temperatures_that_overflow_are_refused(temperature):
    with pytest.raises(ValueError, match=r"sampling.temperature is .*; allowed is 0 \(greedy\), or 0.001 to 1000"):
        SamplingConfig(temperature)


def test_adapters_have_at_most_full_rank():
    with pytest.raises(ValueError, match=r"lora.rank is 1000000; allowed is 0 to the model's width, 64"):
        prepare(nano(lora__rank=10**6))


def test_a_template_without_a_field_is_refused():
    with pytest.raises(ValueError, match=r"data.prompt.template is 'no field', so all prompts would be alike"):
        PromptFormat("no field")


def test_a_continued_run_may_have_more_steps_another_mesh_and_other_limits():
    stored = load_config("tiny").to_json()
    limits = {"save_seconds": 100.0, "stall_seconds": None, "wandb_project": "trial"}
    may = load_config("tiny", mesh={"data": 4, "tensor": 2}, train={"steps": 301} | limits).to_json()
    assert forbidden_changes(stored, may) == []
    fewer = load_config("tiny", mesh={"data": 4}, train={"steps": 299, "seed": 1}).to_json()
    assert forbidden_changes(stored, fewer) == [("train.seed", 0, 1), ("train.steps", 300, 299)]
