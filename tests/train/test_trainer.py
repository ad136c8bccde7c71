"""Whole runs of a very small model: files, determinism, resuming, adapters, devices."""

import dataclasses
import json
import string
from pathlib import Path
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nested_reft import curriculum
from nested_reft.cli.arguments import override
from nested_reft.config_files import config_names
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.prompts import PromptFormat
from nested_reft.data.sources import DatasetSource, JsonlSource, TaskSource, difficulty_ladder, exactly
from nested_reft.data.splits import SplitConfig
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import LayerPlan, NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.models.config import ModelConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.models.low_precision import low_precision
from nested_reft.models.source import ModelSource
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.replay import DynamicSamplingConfig, GenerationLimitError
from nested_reft.rewards.reward import RewardConfig
from nested_reft.run_directory import RunDirectory
from nested_reft.sharding import MeshConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.setup import prepare, trained_policy
from nested_reft.training.split import split_sources
from nested_reft.training.trainer import Trainer, completion_bucket

WITH_KL = PolicyGradientConfig(
    "leave_one_out", "base", "token", "token_mean", reference_kl="k3_loss", reference_kl_coefficient=0.1
)
# Every update moves the model, whether or not an untrained one earns any reward.
MOVING = dataclasses.replace(WITH_KL, entropy_coefficient=1.0)
UNTIMED = ("seconds", "tokens_per_second", "compilations")


def nano(**changes) -> Config:
    """The `tiny` configuration, smaller still and without its warm start; `a__b=c` changes field b of part a."""
    config = load_config("tiny")
    changes = {
        "warm_start__steps": 0,
        "train__steps": 4,
        "optimizer__warmup_steps": 0,  # the first update of a warm-up is at rate zero
        "optimizer__schedule": "constant",
        "train__checkpoint_every": 2,
        "data__prompts_per_batch": 4,
        "rollout__group_size": 4,
        "evaluation": EvaluationConfig(every_steps=2, samples_per_prompt=2, pass_k=2, batch_size=8),
    } | changes
    source = dataclasses.replace(config.data.sources[0], train_size=20, heldout_size=8)
    config = dataclasses.replace(config, name="nano", data=dataclasses.replace(config.data, sources=(source,)))
    for name, value in changes.items():
        part, _, attribute = name.partition("__")
        value = dataclasses.replace(getattr(config, part), **{attribute: value}) if attribute else value
        config = dataclasses.replace(config, **{part: value})
    return config


def two_sources(**changes) -> Config:
    """`nano` with a second, easier source."""
    config = nano(**changes)
    levels = {"two_terms": exactly(terms=2, digits=1), "three_terms": exactly(terms=3, digits=1)}
    sources = difficulty_ladder("chain_sum", levels, train_size=20, heldout_size=8, seed=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def trainer(config: Config, path, resume=False) -> Trainer:
    return Trainer(prepare(config), RunDirectory(path), resume=resume)


def comparable(metrics):
    return {name: value for name, value in metrics.items() if not any(word in name for word in UNTIMED)}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    config = nano()
    run = RunDirectory.create(tmp_path_factory.mktemp("runs"), config.name, config.to_json())
    summary = Trainer(prepare(config), run).run()
    return run.path, summary


def test_a_run_leaves_everything_that_explains_it(whole_run):
    path, summary = whole_run
    assert json.loads((path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert Config.from_json(json.loads((path / "config.json").read_text())) == nano()
    assert json.loads((path / "versions.json").read_text())["jax"] == jax.__version__
    assert any(file.name.startswith("events.out.tfevents") for file in path.iterdir())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert "heldout/three_to_six_digits" in lines[0] and "heldout/three_to_six_digits" in lines[2]
    assert 0 < lines[1]["ess_token"] <= 1 and len(lines[1]["skipped_layers"]) == 1
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 4 * 4
    assert {"step", "prompt", "answer", "text", "reward", "parts", "stop", "skipped_layers", "mean_weight"} <= set(
        samples[0]
    )
    assert summary["kept_layers"] == 5 and summary["layers"] == 6
    assert summary["nested_tokens_per_second"] > 0 and summary["full_tokens_per_second"] > 0
    assert set(summary["before"]["three_to_six_digits"]) == set(summary["after"]["three_to_six_digits"])


def test_steps_after_the_first_compile_nothing(whole_run):
    """A new plan, a new batch: the same programs."""
    lines = [json.loads(line) for line in (whole_run[0] / "metrics.jsonl").read_text().splitlines()][1:]
    assert {line["compilations"] for line in lines} == {lines[0]["compilations"]}


def test_the_trained_policy_can_be_loaded(whole_run):
    setup = trained_policy(whole_run[0])
    assert setup.model.config.num_layers == 6


def test_a_mesh_runs_policy_loads_on_one_device(tmp_path):
    config = nano(mesh=MeshConfig(data=2), lora=LoraConfig(rank=2), optimizer__learning_rate=0.1, loss=MOVING)
    run = Trainer(prepare(config), RunDirectory.create(tmp_path, config.name, config.to_json()))
    run.step(0)
    run._save()
    run.close()
    policy = trained_policy(run.run_directory.path)
    tokens_BT = jnp.arange(6)[None]
    assert len(policy.model.embedding[...].devices()) == 1
    np.testing.assert_allclose(policy.model(tokens_BT), run.state.model(tokens_BT), atol=1e-5)
    fresh = prepare(dataclasses.replace(config, mesh=MeshConfig())).model
    assert not np.allclose(policy.model(tokens_BT), fresh(tokens_BT), atol=1e-3)


def test_same_seed_same_metrics_and_resuming_continues_bit_for_bit(tmp_path):
    config = nano(train__steps=8)
    straight = trainer(config, tmp_path / "straight")
    expected = [comparable(straight.step(step)) for step in range(4)]

    first = trainer(config, tmp_path / "resumed")
    assert [comparable(first.step(step)) for step in range(2)] == expected[:2]
    first.steps_done = 2
    first._save()
    first.close()
    second = trainer(config, tmp_path / "resumed", resume=True)
    assert second.steps_done == 2
    assert [comparable(second.step(step)) for step in range(2, 4)] == expected[2:]
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(second.state), strict=True):
        assert jnp.array_equal(a, b)
    other_seed = trainer(nano(train__seed=1), tmp_path / "other")
    assert comparable(other_seed.step(0)) != expected[0]


@pytest.mark.parametrize("kind", ["easy_to_hard", "dump"])
def test_resuming_continues_the_curriculum(kind, tmp_path):
    """From above level 0, and with windows that are not empty."""
    config = two_sources(curriculum=CurriculumConfig(kind, window=16, promote_at=0.05))
    first = trainer(config, tmp_path)
    first.curriculum = dataclasses.replace(first.curriculum, level=1)
    assert (first.step(0)["sources"] == [0, 4]) == (kind == "easy_to_hard")
    first.steps_done = 1
    first._save()
    kept = first.curriculum
    expected = comparable(first.step(1))
    first.close()
    second = trainer(config, tmp_path, resume=True)
    assert second.curriculum == kept and kept.level == 1
    assert sum(source.count for source in kept.sources) == 4 * 4
    assert comparable(second.step(1)) == expected


def test_validation_never_touches_the_curriculum(tmp_path):
    run = trainer(two_sources(curriculum=CurriculumConfig("dump")), tmp_path)
    metrics = run.step(0)
    before = run.curriculum
    assert run._evaluate_trained_sources(metrics) and run._evaluate_all(1)
    assert run.curriculum == before


def test_curriculum_metrics_name_every_source(tmp_path):
    run = trainer(two_sources(curriculum=CurriculumConfig("dump")), tmp_path)
    metrics = run.step(0)
    for name, prompts in zip(("two_terms", "three_terms"), metrics["sources"], strict=True):
        assert metrics[f"curriculum/{name}/probability"] == 0.5 and metrics[f"curriculum/{name}/count"] == 0
        assert (f"curriculum/{name}/reward" in metrics) == (prompts > 0)
    assert isinstance(metrics["curriculum_audit"], str)


@pytest.mark.parametrize("kind", ["pass_rate", "cluster"])
def test_sources_are_divided_once_and_a_resumed_run_keeps_them(kind, tmp_path):
    config = nano(curriculum=CurriculumConfig("dump"), data__split=SplitConfig(kind, parts=2, samples=2))
    first = trainer(config, tmp_path)
    names = first.setup.source_names
    parts = [[e.text for e in examples] for examples in first.setup.train_examples]
    assert len(names) == len(parts) and sum(len(part) for part in parts) == 20
    assert len(parts) == 2 or kind == "pass_rate"  # an untrained model may be wrong everywhere
    assert [len(examples) for examples in first.setup.heldout_examples] == [8]
    assert set(first._evaluate_trained_sources(first.step(0))) == {"heldout/three_to_six_digits"}
    first.steps_done = 1
    first._save()
    expected = comparable(first.step(1))
    first.close()
    second = trainer(config, tmp_path, resume=True)
    assert second.setup.source_names == names
    assert comparable(second.step(1)) == expected
    second.close()
    (tmp_path / "sources.json").unlink()
    with pytest.raises(
        ValueError, match=r"sources.json', which says how the run's sources are divided, cannot be read"
    ):
        trainer(config, tmp_path, resume=True)


def test_pass_rates_of_the_starting_policy_divide_the_sources(tmp_path, monkeypatch):
    """Every second question always right: two parts, the easy one first, named by their pass rates."""
    monkeypatch.setattr(
        "nested_reft.training.split.num_correct", lambda *rest: (np.arange(len(rest[2])) % 2 * rest[-1], 0)
    )
    config = nano(data__split=SplitConfig("pass_rate", parts=4, samples=8))
    setup = trainer(config, tmp_path).setup
    assert setup.source_names == ("three_to_six_digits.pass_1.00-1.00", "three_to_six_digits.pass_0.00-0.00")
    whole = prepare(config).train_examples[0]
    assert [e.text for e in setup.train_examples[0]] == [e.text for e in whole[1::2]]
    (written,) = json.loads((tmp_path / "sources.json").read_text())
    assert written[0]["pass_rate"] == 1 and written[0]["examples"] == list(range(1, 20, 2))


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


def test_adapters_train_and_the_base_stays(tmp_path):
    config = nano(lora=LoraConfig(rank=2), loss=WITH_KL, optimizer__learning_rate=0.01)
    run = trainer(config, tmp_path)
    base = {name: np.array(value) for name, value in run.state.model.parameters().items()}
    first, second = run.step(0), run.step(1)
    for name, value in run.state.model.parameters().items():
        assert np.array_equal(base[name], value), name
    assert jnp.abs(run.state.model.layers.down_lora_out[...]).max() > 0 or first["gradient_norm"] == 0
    # The reference is the model with its adapters off: equal before the first update.
    assert first["reference_kl"] == 0
    assert second["reference_kl"] > 0 or first["gradient_norm"] == 0


def test_reference_model_survives_the_updates(tmp_path):
    run = trainer(nano(loss=MOVING, optimizer__learning_rate=0.01), tmp_path)
    assert run.step(0)["reference_kl"] < 1e-10
    assert run.step(1)["reference_kl"] > 1e-8


def test_second_update_on_a_batch_is_off_policy(tmp_path):
    """`practical` corrects for the updates since the rollout: weight one in the first pass, not in the second."""
    config = nano(
        loss=dataclasses.replace(MOVING, bias_mitigation="practical"),
        train__updates_per_batch=2,
        optimizer__learning_rate=0.01,
    )
    assert abs(trainer(config, tmp_path).step(0)["weight_mean"] - 1) > 1e-4


def test_a_run_on_a_mesh_resumes(tmp_path):
    config = nano(mesh=MeshConfig(data=2), lora=LoraConfig(rank=2), train__micro_batches=2)
    first = trainer(config, tmp_path)
    first.step(0)
    first.steps_done = 1
    first._save()
    expected = comparable(first.step(1))
    first.close()
    second = trainer(config, tmp_path, resume=True)
    assert comparable(second.step(1)) == expected


def test_an_update_that_is_not_finite_ends_the_run(tmp_path):
    run = trainer(nano(), tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 1: loss is nan .* Lower optimizer.learning_rate"):
        run._check_finite({"loss": float("nan"), "gradient_norm": 1.0})


def test_mixture_rollouts_train(tmp_path):
    config = nano(
        loss=PolicyGradientConfig("leave_one_out", "mixture", "sequence", "fixed_length", 4, mixture_alpha=0.5),
        optimizer__learning_rate=0.01,
    )
    run = trainer(config, tmp_path)
    metrics = run.step(0)
    assert np.isfinite(metrics["loss"]) and 0 < metrics["ess_weight"] <= 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {tuple(sample["skipped_layers"]) for sample in samples} >= {()}  # some came from the full model
    assert any(sample["skipped_layers"] for sample in samples)
    assert max(sample["mean_weight"] for sample in samples) <= 1 / 0.5 + 1e-3


@pytest.mark.parametrize("mesh", [MeshConfig(data=2), MeshConfig(data=2, model=2)])
def test_many_devices_train_like_one(mesh, tmp_path):
    config = nano(train__micro_batches=2)
    one, many = trainer(config, tmp_path / "one"), trainer(dataclasses.replace(config, mesh=mesh), tmp_path / "many")
    for step in range(2):
        expected, metrics = one.step(step), many.step(step)
        for name in ("reward", "loss", "gradient_norm", "ess_token", "entropy", "completion_tokens"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_takes_a_step(name, tmp_path):
    config = load_config(name)
    shape = ModelConfig(len(string.printable) + 1, 10, 16, 16, 2, 2, 8, max_positions=400)
    generated = [source for source in config.data.sources if isinstance(source, TaskSource)]
    sums = TaskSource("instead_of_a_dataset", "chain_sum", exactly(terms=2, digits=1), 8, 2, seed=0)
    sources = tuple(dataclasses.replace(s, train_size=8, heldout_size=2) for s in generated or [sums])
    data = dataclasses.replace(config.data, sources=sources, prompts_per_batch=2, max_prompt_tokens=300)
    config = dataclasses.replace(
        config,
        model=ModelSource("scratch", shape=shape, alphabet=string.printable),
        data=data,
        nesting=dataclasses.replace(config.nesting, choice="uniform", divergence_file=None, skip_ratio=0.1),
        rollout=dataclasses.replace(config.rollout, max_completion_tokens=16),
        reward=dataclasses.replace(config.reward, overlong_cache_tokens=min(config.reward.overlong_cache_tokens, 4)),
        warm_start=dataclasses.replace(config.warm_start, steps=min(config.warm_start.steps, 1)),
        train=dataclasses.replace(config.train, micro_batches=1),
    )
    assert np.isfinite(trainer(config, tmp_path).step(0)["loss"])


@pytest.mark.parametrize(("longest", "size"), [(1, 4), (4, 4), (5, 8), (9, 12), (13, 16), (16, 16)])
def test_completion_buckets(longest, size):
    assert completion_bucket(longest, 16) == size


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


def controlled(**changes) -> Config:
    """Any reading is within budget, so the controller adds a layer each step up to two."""
    control = NestingControlConfig("ess_token", budget=1e-6, max_skipped=2, patience=1)
    return nano(**({"nesting_control": control, "nesting": NestingConfig(border=1)} | changes))


def test_nesting_control_moves_the_plans_and_compiles_each_size_once(tmp_path):
    run = trainer(controlled(), tmp_path)
    sizes, reasons = [], []
    for step in range(3):
        metrics = run.step(step)
        sizes.append(len(metrics["skipped_layers"]))
        reasons.append(metrics["nesting_reason"])
    assert sizes == [0, 1, 2]
    assert "from 0 to 1 skipped layers" in reasons[0] and reasons[2].endswith("stay at 2, the most allowed")
    before = run.compilations.count
    for step, size in enumerate((1, 0, 2), start=3):
        run.nesting = dataclasses.replace(run.nesting, num_skipped=size)
        assert len(run.step(step)["skipped_layers"]) == size
    assert run.compilations.count == before  # returning to earlier sizes


def test_nesting_control_lowers_over_budget_in_a_whole_run(tmp_path):
    control = NestingControlConfig("ess_token", budget=0.9999, max_skipped=1, patience=1)
    config = controlled(nesting_control=control, nesting=NestingConfig(skip_ratio=0.2), train__steps=2)
    run = RunDirectory.create(tmp_path, config.name, config.to_json())
    summary = Trainer(prepare(config), run).run()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()][1:]
    assert [len(line["skipped_layers"]) for line in lines] == [1, 0]
    assert lines[0]["nesting_reason"].endswith("over budget: from 1 to 0 skipped layers")
    assert "within budget for 1 of 2 steps, longer since 1 failed 1 times" in lines[1]["nesting_reason"]
    assert summary["kept_layers"] == 6
    assert trained_policy(run.path).model.config.num_layers == 6


MEASURED = NestingConfig(skip_ratio=0.2, choice="measured", remeasure_every=2, divergence_temperature=0.0)


def test_layers_are_measured_anew_on_a_schedule(tmp_path):
    run = trainer(nano(nesting=MEASURED, optimizer__learning_rate=0.01, loss=MOVING), tmp_path)
    first, second = run.step(0), run.step(1)
    assert first["skipped_layers"] == [1]  # nothing measured yet: all alike
    assert "layer_divergence" not in second
    cheapest = 1 + int(np.argmin(first["layer_divergence"][1:-1]))
    assert second["skipped_layers"] == [cheapest]
    third = run.step(2)
    assert third["layer_divergence"] != first["layer_divergence"]
    before = run.compilations.count
    run.step(3), run.step(4)
    assert run.compilations.count == before


def test_re_measuring_works_on_a_mesh(tmp_path):
    one = trainer(nano(nesting=MEASURED), tmp_path / "one").step(0)
    many = trainer(nano(nesting=MEASURED, mesh=MeshConfig(data=2, model=2)), tmp_path / "many").step(0)
    np.testing.assert_allclose(many["layer_divergence"], one["layer_divergence"], rtol=1e-3, atol=1e-4)


def test_nesting_control_and_measurements_resume_bit_for_bit(tmp_path):
    config = controlled(nesting=dataclasses.replace(MEASURED, skip_ratio=0.0, remeasure_every=1))
    straight = trainer(config, tmp_path / "straight")
    expected = [comparable(straight.step(step)) for step in range(3)]
    first = trainer(config, tmp_path / "resumed")
    first.step(0)
    first.steps_done = 1
    first._save()
    first.close()
    second = trainer(config, tmp_path / "resumed", resume=True)
    assert [comparable(second.step(step)) for step in (1, 2)] == expected[1:]
    assert second.nesting == straight.nesting
    assert np.array_equal(second.divergence_L, straight.divergence_L)


DISTILLING = dataclasses.replace(MOVING, self_distillation_coefficient=1.0)


def test_self_distillation_trains_and_compiles_once(tmp_path):
    run = trainer(nano(loss=DISTILLING, train__micro_batches=2), tmp_path)
    values = [run.step(0)["self_distillation_kl"]]
    before = run.compilations.count
    values += [run.step(step)["self_distillation_kl"] for step in (1, 2)]
    assert run.compilations.count == before and all(value > 0 for value in values)
    whole = trainer(nano(loss=DISTILLING), tmp_path / "whole").step(0)
    np.testing.assert_allclose(whole["self_distillation_kl"], values[0], rtol=1e-5)


def test_without_its_coefficient_self_distillation_costs_nothing(tmp_path):
    """A plan in the batch changes nothing: the compiled update has the operations that it had without."""
    run = trainer(nano(loss=MOVING), tmp_path)
    prompts = run._next_prompts(np.zeros(4, np.int32))
    plan = run._draw_plan(run.key)
    rollouts = run.generation.rollout(run.state, prompts, plan, run.key)
    batch = run._train_batch(run.generation.score(rollouts, prompts), plan)
    assert batch.plan is None

    def flops(trainer_run, batch):
        return trainer_run.update.lower(trainer_run.state, batch).compile().cost_analysis()["flops"]

    without = flops(run, batch)
    assert flops(run, dataclasses.replace(batch, plan=rollouts.plan)) == without
    distilling = trainer(nano(loss=DISTILLING), tmp_path / "distilling")
    assert flops(distilling, dataclasses.replace(batch, plan=rollouts.plan)) > 1.3 * without


def test_dynamic_sampling_stops_a_run_without_mixed_groups_when_told_to(tmp_path):
    hopeless = DynamicSamplingConfig(max_generation_batches=2, at_limit="stop")
    run = trainer(nano(dynamic_sampling=hopeless, data__prompt=PromptFormat("{expression} =", chat=False)), tmp_path)
    with pytest.raises(GenerationLimitError, match="2 generation batches gave 0 groups"):
        run.run()
    assert [line["step"] for line in RunDirectory(tmp_path).read_metrics()] == [0]


def test_dynamic_sampling_counts_generation_batches_apart_from_updates(tmp_path):
    run = trainer(nano(dynamic_sampling=DynamicSamplingConfig(max_generation_batches=2)), tmp_path)
    metrics = run.step(0)
    assert metrics["generation_batches"] == 2 and sum(metrics["sources"]) == 8  # an untrained model is never right
    assert metrics["trained_groups"] == 0 and "left 0 of 4 groups" in metrics["shortfall"]


def test_a_batch_without_a_token_to_learn_from_changes_nothing(tmp_path):
    control = NestingControlConfig("ess_token", budget=0.5, max_skipped=2, patience=1)
    run = trainer(nano(loss=MOVING, optimizer__learning_rate=0.01, nesting_control=control), tmp_path)
    run.step(0)  # Adam has momentum now
    run.config = dataclasses.replace(run.config, dynamic_sampling=DynamicSamplingConfig(max_generation_batches=2))
    before, nesting, updates = jax.tree.map(jnp.copy, run.state.trainable), run.nesting, int(run.state.updates)
    metrics = run.step(1)
    assert metrics["empty"] and "warning" not in metrics and "ess_token" not in metrics
    assert int(run.state.updates) == updates and run.nesting == nesting
    jax.tree.map(np.testing.assert_array_equal, run.state.trainable, before)


def test_a_run_with_a_hanging_and_crashing_reward_completes_with_the_right_counts(tmp_path):
    functions = Path(__file__).parents[1] / "rewards" / "reward_functions.py"
    reward = RewardConfig(function=f"{functions}:by_first_character", workers=4, time_limit_seconds=1.0)
    config = nano(train__steps=2, evaluation__samples_per_prompt=0, reward=reward)
    trainer(config, tmp_path).run()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 4 * 4  # every completion of the run
    hung = crashed = 0
    for step, line in enumerate(metrics, 1):
        texts = [sample["text"] for sample in samples if sample["step"] == step]
        counts = [sum(text[:1] in first for text in texts) for first in (("0", "1"), ("2", "3"))]
        assert [line["unscored/timed_out"], line["unscored/crashed"], line["unscored/failed"]] == [*counts, 0]
        assert line["unscored"] == sum(counts) < len(texts)
        hung, crashed = hung + counts[0], crashed + counts[1]
        scored = [text for text in texts if text[:1] not in ("0", "1", "2", "3")]
        assert line["reward/function"] == pytest.approx(sum(len(text) % 2 for text in scored) / len(scored))
    assert hung and crashed  # otherwise nothing was tested
    for sample in samples:
        if sample["text"][:1] in ("0", "1", "2", "3"):
            assert sample["reward"] == 0 and sample["parts"]["function"] == 0


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


def test_exact_rollouts_train_on_policy(tmp_path):
    exact = dataclasses.replace(nano().rollout, mode="exact", draft_length=2)
    run = trainer(nano(rollout=exact, nesting=NestingConfig(skip_ratio=0.4)), tmp_path)
    metrics = run.step(0)
    assert metrics["ess_token"] == pytest.approx(1, abs=1e-4) and metrics["ess_sequence"] == pytest.approx(1, abs=1e-3)
    assert metrics["draft_length"] == 2 and 0 < metrics["draft_acceptance"] <= 1
    assert metrics["skipped_layers"]  # what drafted
    run.step(1)
    run._save()
    saved = run.generation.draft_length
    run.close()
    run.steps_done = 2
    assert trainer(run.config, tmp_path, resume=True).generation.draft_length == saved


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


def test_self_distillation_teaches_the_policy_that_drafts(tmp_path):
    exact = dataclasses.replace(nano().rollout, mode="exact")
    loss = dataclasses.replace(nano().loss, self_distillation_coefficient=0.5)
    run = trainer(nano(rollout=exact, loss=loss, nesting=NestingConfig(skip_ratio=0.4)), tmp_path)
    assert run.step(0)["self_distillation_kl"] > 1e-4


def test_the_curriculum_learns_from_raw_accuracy(tmp_path):
    """Groups that are all wrong teach nothing, however unequal the punishment of their lengths."""
    config = nano(
        curriculum=CurriculumConfig("dump"),
        reward=RewardConfig(overlong_cache_tokens=8),
        loss=dataclasses.replace(nano().loss, advantage="group_std"),
    )
    run = trainer(config, tmp_path)
    metrics = run.step(0)
    assert metrics["accuracy"] == 0 and metrics["gradient_norm"] > 0  # the punishment does reach the update
    assert run.curriculum.sources[0].count > 0 and curriculum.learnability(run.curriculum)[0] == 0


def test_a_question_held_out_in_one_source_is_trained_on_in_none():
    easy = TaskSource("all_of_them", "chain_sum", exactly(terms=2, digits=1), 200, 1, seed=0)
    other = TaskSource("some", "chain_sum", exactly(terms=2, digits=1), 20, 100, seed=1)
    setup = prepare(nano(data=dataclasses.replace(nano().data, sources=(easy, other))))
    questions = [{e.example.question for e in part} for part in (*setup.train_examples, *setup.heldout_examples)]
    assert not (questions[0] | questions[1]) & (questions[2] | questions[3])
    assert 90 <= len(questions[0]) <= 110


def test_parts_of_sources_come_the_easiest_first_whatever_their_source(tmp_path):
    sources = difficulty_ladder(
        "chain_sum", {"a": exactly(terms=1, digits=1), "b": exactly(terms=2, digits=1)}, 20, 4, 1
    )
    config = nano(data=dataclasses.replace(nano().data, sources=sources, split=SplitConfig("pass_rate", parts=2)))
    setup = prepare(config)
    file = tmp_path / "sources.json"
    parts = [
        [
            {"name": f"{name}{i}", "examples": list(range(i, len(examples), 2)), "pass_rate": rate}
            for i, rate in enumerate(rates)
        ]
        for name, examples, rates in zip("ab", setup.train_examples, ((0.9, 0.1), (0.5, 0.0)), strict=True)
    ]
    file.write_text(json.dumps(parts))
    divided = split_sources(setup, setup.model, jax.random.key(0), file, resume=True)
    assert divided.source_names == ("a0", "b0", "a1", "b1")
    assert divided.heldout_of_source == (0, 1, 0, 1)


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


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_rollouts_are_off_policy_and_corrected(weights, tmp_path):
    """With all layers kept, the copy's rounding is all that the importance weight has to correct."""
    rollout = dataclasses.replace(nano().rollout, weights=weights)
    run = trainer(nano(rollout=rollout, nesting=NestingConfig(skip_ratio=0.0)), tmp_path)
    metrics = run.step(0)
    assert 1e-9 < abs(metrics["kl_behavior_target"]) < 0.01 and 0.9 < metrics["ess_token"] < 1 - 1e-9
    moved = dataclasses.replace(run.state, trainable=jax.tree.map(lambda x: 1.5 * x, run.state.trainable))
    for state in (run.state, moved):  # the copy is of the weights as they are now
        sampling, now = run.generation._behavior_model(state), low_precision(state.model, weights)
        assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(sampling), nnx.state(now)))
    before = run.compilations.count
    run.step(1)
    run.step(2)
    assert run.compilations.count == before
    run.close()


def test_rounded_rollouts_are_refused_where_the_targets_own_density_is_needed():
    rounded = dataclasses.replace(nano().rollout, weights="int8")
    mixture = dataclasses.replace(nano().loss, bias_mitigation="mixture", level="sequence", mixture_alpha=0.5)
    with pytest.raises(ValueError, match=r"rollout.weights is 'int8' and loss.mixture_alpha 0.5"):
        nano(loss=mixture, rollout=rounded)
    with pytest.raises(ValueError, match=r"rollout.mode is 'exact' and rollout.weights 'int8'"):
        dataclasses.replace(rounded, mode="exact")


def test_adapters_do_not_pay_for_gradients_of_the_base(tmp_path):
    """Forward, activations' gradient and weights' gradient cost alike, so leaving the last out saves a third."""

    def flops(**changes) -> float:
        run = trainer(nano(**changes), tmp_path)
        prompts = run._next_prompts(np.zeros(4, np.int32))
        plan = LayerPlan.full(run.num_layers)
        scored = run.generation.score(run.generation.rollout(run.state, prompts, plan, run.key), prompts)
        cost = run.update.lower(run.state, run._train_batch(scored, plan)).compile().cost_analysis()
        run.close()
        return cost["flops"]

    assert flops(lora=LoraConfig(rank=1)) < 0.75 * flops()
