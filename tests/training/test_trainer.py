"""Steps and whole runs of a very small model: files, curricula, nesting, devices, kinds of rollouts."""

import dataclasses
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nested_reft import curriculum
from nested_reft.checkpoints import CheckpointError, newest_checkpoint
from nested_reft.curriculum import CurriculumConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.supervised import SupervisedConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.models.low_precision import low_precision
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.prompt_format import PromptFormat
from nested_reft.replay import DynamicSamplingConfig, GenerationLimitError
from nested_reft.reports.tables import summary_table
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.sharding import MeshConfig
from nested_reft.training.config import Config
from nested_reft.training.heldout import heldout_results
from nested_reft.training.reinforcement import EmptyUpdatesError
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.training.runs import (
    MEASURED,
    MOVING,
    assert_equal_arrays,
    comparable_steps,
    controlled,
    metrics_of,
    nano,
    samples_of,
    save_after,
    trainer,
    two_sources,
)

NO_EVALUATION = {"evaluation__samples_per_prompt": 0}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    config = nano()
    run = RunDirectory.create(tmp_path_factory.mktemp("runs"), config.name, config.to_json())
    summary = Trainer(prepare(config), run).open().run()
    return run.path, summary


def test_a_run_leaves_everything_that_explains_it(whole_run):
    path, summary = whole_run
    assert json.loads((path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert Config.from_json(json.loads((path / "config.json").read_text())) == nano()
    assert json.loads((path / "versions.json").read_text())["jax"] == jax.__version__
    assert any(file.name.startswith("events.out.tfevents") for file in path.iterdir())
    lines = read_log(path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert ["heldout/three_to_six_digits" in line for line in lines] == [True, False, True, False, True]
    assert 0 < lines[1]["ess_token"] <= 1 and len(lines[1]["left_out_layers"]) == 1
    samples = read_log(path / "samples.jsonl")
    assert len(samples) == 4 * 4 * 4
    explained = {"step", "source", "version", "prompt", "answer", "text", "reward", "accuracy", "advantage", "parts"}
    assert explained | {"stop", "left_out_layers", "mean_weight"} <= set(samples[0])
    assert summary["kept_layers"] == 5 and summary["layers"] == 6
    assert summary["nested_tokens_per_second"] > 0 and summary["full_tokens_per_second"] > 0
    assert set(summary["before"]["three_to_six_digits"]) == set(summary["after"]["three_to_six_digits"])
    assert newest_checkpoint(path / "checkpoints") == 4


def test_steps_after_the_first_compile_nothing(whole_run):
    """A new plan, a new batch: the same programs."""
    lines = read_log(whole_run[0] / "metrics.jsonl")[1:]
    assert {line["compilations"] for line in lines} == {lines[0]["compilations"]}


def test_the_trained_policy_can_be_loaded(whole_run):
    policy = Policy.load(whole_run[0])
    assert policy.num_layers == 6 and policy.version == 4


def test_a_mesh_runs_policy_loads_on_one_device(tmp_path):
    config = nano(mesh=MeshConfig(data=2), lora=LoraConfig(rank=2), optimizer__learning_rate=0.1, loss=MOVING)
    setup = prepare(config)
    with Trainer(setup, RunDirectory.create(tmp_path, config.name, config.to_json())).open() as run:
        run.step(0)
        save_after(run, 1)
    loaded = Policy.load(run.run_directory.path)
    assert len(loaded.model.embedding[...].devices()) == 1
    prompts, answers = ["12 =", "345 ="], ["12", "7"]
    trained, fresh = (policy.score(prompts, answers) for policy in (run.state.learner.policy(), setup.policy))
    for mine, same, other in zip(loaded.score(prompts, answers), trained, fresh, strict=True):
        np.testing.assert_allclose(mine, same, atol=1e-5)
        assert not np.allclose(mine, other, atol=1e-3)


def test_a_setup_used_twice_gives_the_same_run_twice(tmp_path):
    """The first run trains in buffers of its own as long as somebody holds the setup."""
    setup = prepare(nano(loss=MOVING, optimizer__learning_rate=0.01))
    runs = [Trainer(setup, RunDirectory(tmp_path / name)).open() for name in ("one", "two")]
    one, two = (comparable_steps(run, range(2)) for run in runs)
    assert one == two and one[0] != one[1]
    third = Trainer(setup, RunDirectory(tmp_path / "three")).open()
    assert comparable_steps(third, range(1)) == one[:1]


def test_a_trainer_is_opened_once(tmp_path):
    run = trainer(nano(), tmp_path)
    with pytest.raises(RuntimeError, match="open was called twice"):
        run.open()


def test_whatever_ends_a_run_closes_logs_and_waits_for_checkpoints(tmp_path):
    class Stopped(Exception):
        pass

    def on_step(found):
        # A checkpoint is under way when the step fails.
        save_after(run, found.number)
        raise Stopped

    run = Trainer(prepare(nano(**NO_EVALUATION)), RunDirectory(tmp_path), on_step)
    with pytest.raises(Stopped):
        run.open().run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 1
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl")] == [0, 1]
    with pytest.raises(ValueError, match="closed file"):
        run.run_directory.log_metrics(2, {})


def test_updates_that_stay_not_finite_end_the_run(tmp_path):
    """The first update throws the weights so far that every later loss overflows; no checkpoint holds them."""
    config = nano(loss=MOVING, optimizer__learning_rate=1e38, train__checkpoint_every=2, **NO_EVALUATION)
    with pytest.raises(
        FloatingPointError,
        match=r"step 4: 3 updates in a row .* Loss is \S+ and gradient_norm nan; .* from before. Lower optimizer.learn",
    ):
        trainer(config, tmp_path).run()
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert newest_checkpoint(tmp_path / "checkpoints") == 0


def test_a_model_that_is_not_finite_is_never_saved(tmp_path):
    """The last update has no step after it whose loss would tell."""
    config = nano(loss=MOVING, optimizer__learning_rate=1e39, train__steps=1, **NO_EVALUATION)
    with pytest.raises(FloatingPointError, match=r"nano, step 1: the update left .* is saved; .* Lower optimizer"):
        trainer(config, tmp_path).run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 0 and not (tmp_path / "summary.json").exists()


def test_a_warm_start_that_is_not_finite_ends_before_the_next_phase(tmp_path):
    config = nano(warm_start__steps=1, warm_start__batch_size=8, warm_start__learning_rate=1e39, **NO_EVALUATION)
    with pytest.raises(FloatingPointError, match=r"warm start, step 1: .* Lower warm_start.learning_rate"):
        trainer(config, tmp_path).run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 0


def test_the_loss_of_a_warm_start_is_looked_at_in_every_step(tmp_path):
    config = nano(warm_start__steps=100, warm_start__batch_size=8, warm_start__learning_rate=1e30, **NO_EVALUATION)
    with pytest.raises(
        FloatingPointError,
        match=r"step 4: 3 updates .* gradient_norm nan; .* Lower warm_start.learning_rate. .* nested-reft replay-batch",
    ):
        trainer(config, tmp_path).run()
    assert newest_checkpoint(tmp_path / "failed_update") == 4


def test_a_model_that_starts_with_nan_is_named(tmp_path):
    run = trainer(nano(**NO_EVALUATION), tmp_path)
    state = run.state.learner.state
    broken = jax.tree.map(lambda array: array.at[(0,) * array.ndim].set(jnp.nan), state.trainable)
    run.state.learner.state = dataclasses.replace(state, trainable=broken)
    with pytest.raises(FloatingPointError, match="the model that the run starts from holds a value that is not finite"):
        run.save()


def test_a_checkpoint_that_fails_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    config = nano(train__steps=100, train__checkpoint_every=50, **NO_EVALUATION)
    monkeypatch.setattr("nested_reft.checkpoints.write_json", full)
    with pytest.raises(CheckpointError, match=r"checkpoint 0 could not be written to .*No space left on device"):
        trainer(config, tmp_path).run()
    assert len(read_log(tmp_path / "metrics.jsonl")) < 10


def test_second_update_on_a_batch_is_off_policy(tmp_path):
    """`practical` corrects for the updates since the rollout: weight one in the first pass, not in the second."""
    config = nano(
        loss=dataclasses.replace(MOVING, bias_mitigation="practical"),
        train__updates_per_batch=2,
        optimizer__learning_rate=0.01,
    )
    assert abs(trainer(config, tmp_path).step(0).update.parts["weight_mean"] - 1) > 1e-4


# Curricula


def test_validation_never_touches_the_curriculum(tmp_path):
    run = trainer(two_sources(curriculum=CurriculumConfig("dump"), evaluation__every_steps=1), tmp_path)
    run.step(0)
    before = run.state.curriculum
    state, key = run.state, run.keys.step(1).evaluation
    results = heldout_results(state.learner.policy(), state.data, run.config, key)
    assert set(results) == {"two_terms", "three_terms"}
    one = heldout_results(state.learner.policy(), state.data, run.config, key, samples=False, sources=[1])
    assert list(one) == ["three_terms"]
    assert one["three_terms"].greedy_accuracy == results["three_terms"].greedy_accuracy
    assert run.state.curriculum == before


def test_curriculum_metrics_name_every_source(tmp_path):
    run = trainer(two_sources(curriculum=CurriculumConfig("dump")), tmp_path)
    metrics = metrics_of(run, run.step(0))
    for name, prompts in zip(("two_terms", "three_terms"), metrics["sources"], strict=True):
        assert metrics[f"curriculum/{name}/probability"] == 0.5 and metrics[f"curriculum/{name}/count"] == 0
        assert (f"curriculum/{name}/reward" in metrics) == (prompts > 0)
    assert isinstance(metrics["curriculum_audit"], str)


def test_the_curriculum_learns_from_raw_accuracy(tmp_path):
    """Groups that are all wrong teach nothing, however unequal the punishment of their lengths."""
    config = nano(
        curriculum=CurriculumConfig("dump"),
        reward=RewardConfig(overlong_cache_tokens=8),
        loss=dataclasses.replace(nano().loss, advantage="group_std"),
    )
    run = trainer(config, tmp_path)
    found = run.step(0)
    # The punishment does reach the update.
    assert found.accuracy == 0 and found.update.gradient_norm > 0
    seen = run.state.curriculum
    assert seen.sources[0].count > 0 and curriculum.learnability(seen)[0] == 0


# Devices and adapters


@pytest.mark.parametrize("mesh", [MeshConfig(data=2), MeshConfig(data=2, tensor=2)])
def test_many_devices_train_like_one(mesh, tmp_path):
    config = nano(train__micro_batches=2)
    one, many = trainer(config, tmp_path / "one"), trainer(dataclasses.replace(config, mesh=mesh), tmp_path / "many")
    for step in range(2):
        expected, metrics = metrics_of(one, one.step(step)), metrics_of(many, many.step(step))
        for name in ("reward", "loss", "gradient_norm", "ess_token", "entropy", "completion_tokens"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_adapters_train_and_the_base_stays(tmp_path):
    config = nano(lora=LoraConfig(rank=2), loss=MOVING, optimizer__learning_rate=0.01)
    run = trainer(config, tmp_path)
    base = {name: np.array(value) for name, value in run.state.learner.policy().model.parameters().items()}
    first, second = run.step(0), run.step(1)
    model = run.state.learner.policy().model
    for name, value in model.parameters().items():
        assert np.array_equal(base[name], value), name
    assert jnp.abs(model.layers.down_lora_out[...]).max() > 0  # pyright: ignore[reportAttributeAccessIssue]
    # The reference is the model with its adapters as they began.
    assert first.update.parts["reference_kl"] == 0 < second.update.parts["reference_kl"]


def test_reference_model_survives_the_updates(tmp_path):
    run = trainer(nano(loss=MOVING, optimizer__learning_rate=0.01), tmp_path)
    assert run.step(0).update.parts["reference_kl"] < 1e-10
    assert run.step(1).update.parts["reference_kl"] > 1e-8


# Nesting


def test_nesting_control_moves_the_plans_and_compiles_each_size_once(tmp_path):
    run = trainer(controlled(), tmp_path)
    sizes, reasons = [], []
    for step in range(3):
        metrics = metrics_of(run, run.step(step))
        sizes.append(len(metrics["left_out_layers"]))
        reasons.append(metrics["nesting_reason"])
    assert sizes == [0, 1, 2]
    assert "from 0 to 1 layers left out" in reasons[0] and reasons[2].endswith("stay at 2, the most allowed")
    before = run.compilations.count
    for step, size in enumerate((1, 0, 2), start=3):
        run.state.nesting = dataclasses.replace(run.state.nesting, num_skipped=size)
        assert len(run.step(step).plan.left_out(6)) == size
    assert run.compilations.count == before  # returning to earlier sizes


def test_nesting_control_lowers_over_budget_in_a_whole_run(tmp_path):
    control = NestingControlConfig("ess_token", budget=0.9999, max_skipped=1, patience=1)
    config = controlled(nesting_control=control, nesting=NestingConfig(skip_ratio=0.2), train__steps=2)
    run = RunDirectory.create(tmp_path, config.name, config.to_json())
    summary = Trainer(prepare(config), run).open().run()
    lines = read_log(run.path / "metrics.jsonl")[1:]
    assert [len(line["left_out_layers"]) for line in lines] == [1, 0]
    assert lines[0]["nesting_reason"].endswith("over budget: from 1 to 0 layers left out")
    assert "within budget for 1 of 2 steps, longer since 1 failed 1 times" in lines[1]["nesting_reason"]
    assert summary["kept_layers"] == 6
    assert Policy.load(run.path).num_layers == 6


def test_layers_are_measured_anew_on_a_schedule(tmp_path):
    run = trainer(nano(nesting=MEASURED, optimizer__learning_rate=0.01, loss=MOVING), tmp_path)
    first, second = run.step(0), run.step(1)
    assert first.plan.left_out(6) == (1,)  # nothing measured yet: all alike
    assert first.renewed.divergence_L is not None and second.renewed.divergence_L is None
    cheapest = 1 + int(np.argmin(first.renewed.divergence_L[1:-1]))
    assert second.plan.left_out(6) == (cheapest,)
    third = run.step(2)
    assert third.renewed.divergence_L is not None
    assert not np.array_equal(third.renewed.divergence_L, first.renewed.divergence_L)
    before = run.compilations.count
    run.step(3)
    run.step(4)
    assert run.compilations.count == before


def test_re_measuring_works_on_a_mesh(tmp_path):
    one = trainer(nano(nesting=MEASURED), tmp_path / "one").step(0).renewed
    many = trainer(nano(nesting=MEASURED, mesh=MeshConfig(data=2, tensor=2)), tmp_path / "many").step(0).renewed
    assert one.divergence_L is not None and many.divergence_L is not None
    np.testing.assert_allclose(many.divergence_L, one.divergence_L, rtol=1e-3, atol=1e-4)


def test_an_equal_run_in_the_same_process_compiles_nothing(tmp_path):
    """Also its update, whose task is made anew: equal settings are what counts."""
    for name in ("first", "equal"):
        run = trainer(nano(loss=MOVING), tmp_path / name)
        for number in range(2):
            run.step(number)
    assert run.compilations.count == 0


# What an update trains on


def test_dynamic_sampling_stops_a_run_without_mixed_groups_when_told_to(tmp_path):
    hopeless = DynamicSamplingConfig(max_generation_batches=2, at_limit="stop")
    run = trainer(nano(dynamic_sampling=hopeless, data__prompt=PromptFormat("{expression} =", chat=False)), tmp_path)
    with pytest.raises(GenerationLimitError, match="2 generation batches gave 0 groups"):
        run.run()
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl")] == [0]


def test_dynamic_sampling_counts_generation_batches_apart_from_updates(tmp_path):
    run = trainer(nano(dynamic_sampling=DynamicSamplingConfig(max_generation_batches=2)), tmp_path)
    metrics = metrics_of(run, run.step(0))
    assert metrics["generation_batches"] == 2 and sum(metrics["sources"]) == 8  # an untrained model is never right
    assert metrics["trained_groups"] == 0 and "left 0 of 4 groups" in metrics["shortfall"]


def test_a_batch_without_a_token_to_learn_from_changes_nothing(tmp_path):
    control = NestingControlConfig("ess_token", budget=0.5, max_skipped=2, patience=1)
    run = trainer(nano(loss=MOVING, optimizer__learning_rate=0.01, nesting_control=control), tmp_path)
    run.step(0)  # Adam has momentum now
    run.config = dataclasses.replace(run.config, dynamic_sampling=DynamicSamplingConfig(max_generation_batches=2))
    before, nesting = jax.device_get(run.state.learner.state), run.state.nesting
    metrics = metrics_of(run, run.step(1))
    assert metrics["empty"] and "warning" not in metrics and "ess_token" not in metrics
    assert run.state.nesting == nesting
    assert_equal_arrays(jax.device_get(run.state.learner.state), before)


def all_rejected(**changes) -> PolicyGradientConfig:
    """A mask that keeps completions of the full model and no others; entropy and KL would pull all the same."""
    return dataclasses.replace(MOVING, reject_by="sequence_k3", reject_above=1e-6, **changes)


def test_a_batch_that_is_rejected_whole_changes_nothing_and_the_run_goes_on(tmp_path):
    full = NestingConfig(skip_ratio=0.0)
    run = trainer(
        nano(loss=all_rejected(), optimizer__learning_rate=0.01, train__micro_batches=2, nesting=full), tmp_path
    )
    found = run.step(0)  # Adam has momentum now
    assert not found.update.empty and found.update.parts["accepted_completions"] == 1
    before = jax.device_get(run.state.learner.state)
    nesting = run.state.nesting
    run.state.nesting = dataclasses.replace(nesting, num_skipped=2)
    found = run.step(1)
    metrics = metrics_of(run, found)
    assert metrics["empty"] and metrics["accepted_tokens"] == 0
    assert not {"ess_kept", "kept_weight_mean"} & metrics.keys(), "nothing was kept that could be measured"
    # How far off the batch was is logged, and so is what would keep it.
    low, high = metrics["bounds/sequence_k3"][:2]
    assert low is None and high > 1e-6 and metrics["kl_behavior_target"] > 0
    warnings = found.warnings(run.config)
    assert (
        "rejected every token, so nothing changed: reject_below is None and reject_above 1e-06" in warnings["rejected"]
    )
    assert f"reject_above {high} would keep 95 % of the batch. Widen the bounds" in warnings["rejected"]
    assert_equal_arrays(jax.device_get(run.state.learner.state), before)
    run.state.nesting = nesting
    assert not run.step(2).update.empty and run.state.learner.version == 2


def test_a_run_that_learnt_nothing_says_so_at_its_end(tmp_path):
    config = nano(loss=all_rejected(), train__steps=2, nesting=NestingConfig(skip_ratio=0.4))
    summary = trainer(config, tmp_path).run()
    assert summary["empty_steps"] == 2
    assert "warning: nothing was learnt: see `empty` and `warning` in metrics.jsonl" in summary_table(summary)
    shown = summary_table(summary | {"empty_steps": 1})
    assert "warning: 1 of 2 steps taught nothing" in shown and "changed nothing" in shown
    assert "warning" not in summary_table(summary | {"empty_steps": 0})


@pytest.mark.parametrize(("clip_policies", "version"), [("two", 1), ("three", 2)])
def test_a_mask_judges_each_pass_or_the_sampler_alone(tmp_path, clip_policies, version):
    """The full model sampled. After the first pass two policies compare with a model that has moved, three do not."""
    loss = all_rejected(clip_policies=clip_policies)
    config = nano(loss=loss, optimizer__learning_rate=0.01, train__updates_per_batch=2)
    run = trainer(dataclasses.replace(config, nesting=NestingConfig(skip_ratio=0.0)), tmp_path)
    update = run.step(0).update
    assert run.state.learner.version == version and not update.empty
    assert update.parts["accepted_tokens"] == version - 1


def test_expert_iteration_learns_nothing_where_nothing_is_right(tmp_path):
    """The untrained model is never right; see `test_learner` for what right completions do."""
    run = trainer(nano(loss=SupervisedConfig(), optimizer__learning_rate=0.01), tmp_path)
    before = jax.device_get(run.state.learner.state.trainable)
    found = run.step(0)
    metrics = metrics_of(run, found)
    assert metrics["accuracy"] == metrics["loss"] == metrics["gradient_norm"] == 0
    assert metrics["empty"] and "ess_token" not in metrics and not found.update.weight_BGC.any()
    assert_equal_arrays(jax.device_get(run.state.learner.state.trainable), before)
    stops = trainer(nano(loss=SupervisedConfig(), train__stop_after_empty_updates=2), tmp_path / "stops")
    with pytest.raises(EmptyUpdatesError, match=r"step 2: 2 updates in a row .* mean reward is 0, 0.0% are right, and"):
        stops.run()


def test_a_run_with_a_hanging_and_crashing_reward_completes_with_the_right_counts(tmp_path):
    functions = Path(__file__).parents[1] / "rewards" / "reward_functions.py"
    reward = RewardConfig(function=f"{functions}:by_first_character", workers=4, time_limit_seconds=1.0)
    trainer(nano(train__steps=2, train__seed=1, reward=reward, **NO_EVALUATION), tmp_path).run()
    metrics, samples = read_log(tmp_path / "metrics.jsonl")[1:], read_log(tmp_path / "samples.jsonl")
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


# Kinds of rollouts


def test_mixture_rollouts_train(tmp_path):
    config = nano(
        loss=PolicyGradientConfig("leave_one_out", "mixture", "sequence", "fixed_length", 4),
        rollout__mixture_alpha=0.5,
        optimizer__learning_rate=0.01,
    )
    run = trainer(config, tmp_path)
    found = run.step(0)
    assert np.isfinite(found.update.loss) and 0 < found.update.parts["ess_weight"] <= 1
    samples = samples_of(run, found)
    assert any(not sample["left_out_layers"] for sample in samples)  # some came from the full model
    assert any(sample["left_out_layers"] for sample in samples)
    assert max(sample["mean_weight"] for sample in samples) <= 1 / 0.5 + 1e-3


def test_exact_rollouts_train_on_policy(tmp_path):
    exact = dataclasses.replace(nano().rollout, mode="exact", draft_length=3)
    run = trainer(nano(rollout=exact, nesting=NestingConfig(skip_ratio=0.4)), tmp_path)
    metrics = metrics_of(run, run.step(0))
    assert metrics["ess_token"] == pytest.approx(1, abs=1e-4) and metrics["ess_sequence"] == pytest.approx(1, abs=1e-3)
    assert metrics["draft_length"] == 3 and 0 < metrics["draft_acceptance"] <= 1
    assert metrics["left_out_layers"]  # what drafted
    before = run.compilations.count
    run.step(1)
    assert run.compilations.count == before


def test_self_distillation_teaches_the_policy_that_drafts(tmp_path):
    exact = dataclasses.replace(nano().rollout, mode="exact")
    loss = dataclasses.replace(nano().loss, self_distillation_coefficient=0.5)
    run = trainer(nano(rollout=exact, loss=loss, nesting=NestingConfig(skip_ratio=0.4)), tmp_path)
    assert run.step(0).update.parts["self_distillation_kl"] > 1e-4


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_rollouts_are_off_policy_and_corrected(weights, tmp_path):
    """With all layers kept, the copy's rounding is all that the importance weight has to correct."""
    rollout = dataclasses.replace(nano().rollout, weights=weights)
    config = nano(rollout=rollout, nesting=NestingConfig(skip_ratio=0.0), loss=MOVING, optimizer__learning_rate=0.01)
    run = trainer(config, tmp_path)
    learner = run.state.learner
    for step in range(2):
        sampled_with = learner.behavior_policy().model
        assert learner.behavior_policy().model is sampled_with  # made once per update
        now = low_precision(learner.policy().model, weights)  # the copy is of the weights as they are now
        assert_equal_arrays(nnx.state(sampled_with), nnx.state(now))
        del sampled_with, now
        health = run.step(step).update.health
        assert 1e-9 < abs(health.kl_behavior_target) < 0.01 and 0.9 < health.ess_token < 1 - 1e-9
    before = run.compilations.count
    run.step(2)
    assert run.compilations.count == before
    run.close()


def test_the_page_about_one_step_shows_the_step():
    """Every line of the excerpt stands in `Trainer.step`, in this order."""
    page = (Path(__file__).parents[2] / "docs" / "one_step.md").read_text(encoding="utf-8")
    shown = [line.strip() for line in page.split("```python\n")[1].split("```")[0].splitlines()]
    source = [line.strip() for line in inspect.getsource(Trainer.step).splitlines()]
    assert len(shown) > 8 and [line for line in source if line in shown] == shown
