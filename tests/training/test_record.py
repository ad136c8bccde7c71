"""What a step becomes: metrics that are declared, samples, and the line of progress."""

import dataclasses
import math

import numpy as np
import pytest

from nested_reft.curriculum import CurriculumConfig
from nested_reft.layer_plan import Part
from nested_reft.nesting_control import NestingControlConfig, NestingControlState
from nested_reft.plan_price import head_parameters, part_price
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.training import record
from nested_reft.training.record import METRICS
from tests.training.runs import WITH_KL, comparable, lines_of, metrics_of, samples_of, trainer, two_sources

# What a run logs only with the part of the configuration that it is about, or when something happened.
ONLY_SOMETIMES = {
    "nonfinite_updates",
    "bridged_layers",
    "layers_without_attention",
    "layers_without_mlp",
    "trained_groups",
    "shortfall",
    "draft_length",
    "draft_acceptance",
    "empty",
    "accepted_tokens",
    "accepted_completions",
    "kept_weight_mean",
    "ess_kept",
    "cross_entropy",
    "beta",
    "log_z",
    "residual_std",
    "reference_log_ratio",
    "staleness_mean",
    "staleness_max",
    "replay/recent",
    "replay/completions",
    "replay/prompts",
    "replay/age",
    "replay/reward",
    "turned_away/{reason}",
    "self_distillation_kl",
    "warning",
    "next_num_left_out",
    "nesting_reason",
    "next_mix_share",
    "mix_reason",
    "reset/share",
    "reset/referenced",
    "reset/forced_tokens",
    "reset/fraction",
    "reset/coverage",
    "reset/length_bias",
    "reset/score_bias",
    "reset/accuracy",
    "reset/free_accuracy",
    "reset/stage",
    "value_loss",
    "value_clipped_share",
    "value_mean",
    "return_mean",
    "explained_variance",
    "completion_kl",
    "kl_coefficient",
    "pair_accuracy",
    "margin",
    "chosen_score",
    "rejected_score",
    "heldout_loss/{source}",
    "bridge_tokens",
    "bridge_seconds",
    "layer_divergence",
    "remeasure_seconds",
    "staleness_completions",
    "search_wait_seconds",
    "searchers_busy",
    "searched_tokens_per_second",
    "trained_tokens_per_second",
    "sync_seconds",
    "orders_under_way",
    "searchers_started",
    "searchers_replaced",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a curriculum and a reference, and the record of each step."""
    path, records = tmp_path_factory.mktemp("run"), []
    config = two_sources(loss=WITH_KL, curriculum=CurriculumConfig("dump"), train__steps=2)
    run = trainer(config, path, on_step=records.append)
    run.run()
    return path, run, records


def test_every_logged_metric_is_declared_and_every_declared_one_is_logged(run):
    logged = {name for line in lines_of(run[0]) for name in line}
    undeclared = [name for name in logged if not any(metric.matches(name) for metric in METRICS)]
    assert not undeclared
    unused = {metric.name for metric in METRICS if not any(metric.matches(name) for name in logged)}
    assert unused == ONLY_SOMETIMES
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) and all(metric.meaning for metric in METRICS)


def test_each_logged_metric_is_one_declared_metric(run):
    """Otherwise its unit would be ambiguous; the two kinds of placeholders must not swallow each other's names."""
    for name in {name for line in lines_of(run[0]) for name in line}:
        assert sum(metric.matches(name) for metric in METRICS) == 1, name


def test_a_metric_that_is_not_declared_is_refused(run):
    _, finished, (found, _) = run
    parts = found.update.parts | {"surprise": 1.0}
    changed = dataclasses.replace(found, update=dataclasses.replace(found.update, parts=parts))
    with pytest.raises(AssertionError, match=r"metrics \['surprise'\] are not declared in METRICS"):
        metrics_of(finished, changed)


def test_the_record_becomes_the_line_that_was_logged(run):
    path, finished, records = run
    for line, found in zip(lines_of(path)[1:], records, strict=True):
        assert {"step": found.number} | comparable(metrics_of(finished, found)) == comparable(line)


def test_metrics_count_what_was_found(run):
    _, finished, (found, _) = run
    metrics, rollouts = metrics_of(finished, found), found.all.rollouts
    assert metrics["sources"] == np.bincount(found.all.prompts.source_B, minlength=2).tolist()
    assert metrics["completion_tokens"] == pytest.approx(rollouts.length_BG.mean())
    assert metrics["finished"] == pytest.approx(rollouts.finished_BG.mean())
    assert metrics["left_out_layers"] == list(found.plan.left_out(6)) and len(metrics["left_out_layers"]) == 1
    assert metrics["tokens_per_second"] == pytest.approx(rollouts.length_BG.sum() / metrics["rollout_seconds"])
    assert metrics["generation_batches"] == 1


def test_the_mean_reward_is_over_completions_that_have_a_score(run):
    """By hand: of four completions three have a score, (1 + 0 + 2) / 3 = 1; over all four it would be 3/4."""
    _, _, (found, _) = run
    batch = found.found[0]
    reward_BG, scored_BG = np.zeros((4, 4), np.float32), np.zeros((4, 4), bool)
    reward_BG[0, :3], scored_BG[0, :3] = (1, 0, 2), True
    changed = dataclasses.replace(found, found=(dataclasses.replace(batch, reward_BG=reward_BG, scored_BG=scored_BG),))
    assert changed.reward == pytest.approx(1)
    none = dataclasses.replace(batch, scored_BG=np.zeros((4, 4), bool))
    assert dataclasses.replace(found, found=(none,)).reward == 0


def test_metrics_name_every_source_of_the_curriculum(run):
    """`probability` and `count` are those that the step's draws came from."""
    _, finished, (found, _) = run
    metrics = metrics_of(finished, found)
    for name, prompts in zip(("two_terms", "three_terms"), metrics["sources"], strict=True):
        assert metrics[f"curriculum/{name}/probability"] == 0.5 and metrics[f"curriculum/{name}/count"] == 0
        assert (f"curriculum/{name}/reward" in metrics) == (prompts > 0)
    assert isinstance(metrics["curriculum_audit"], str)


def test_samples_explain_the_completions_of_the_first_prompts(run):
    path, finished, (found, _) = run
    lines = samples_of(finished, found)
    assert len(lines) == 4 * 4
    logged = [line for line in lines_of(path, "samples") if line["step"] == 1]
    assert logged == [{"step": 1} | line for line in lines]
    groups, weight_BGC = found.groups, found.update.weight_BGC
    for b in range(4):
        for g in range(4):
            line = lines[4 * b + g]
            length = groups.rollouts.length_BG[b, g]
            assert (line["text"], line["tokens"]) == (groups.texts[b][g], length)
            assert line["stop"] == ("stop token" if groups.rollouts.finished_BG[b, g] else "length")
            assert line["left_out_layers"] == list(found.plan.left_out(6))
            assert line["mean_weight"] == pytest.approx(weight_BGC[b, g].sum() / length)
            assert line["version"] == 0 and line["source"] == ("two_terms", "three_terms")[groups.prompts.source_B[b]]


def test_samples_tell_right_from_unscored_and_give_advantages(run):
    """By hand, leave-one-out of rewards 1, 0, 0 and one without a score: 1 - 0, and 0 - 1/2 twice."""
    _, finished, (found, _) = run
    reward_BG, scored_BG = np.zeros((4, 4), np.float32), np.ones((4, 4), bool)
    reward_BG[0, 0], scored_BG[0, 3] = 1, False
    groups = dataclasses.replace(found.groups, reward_BG=reward_BG, accuracy_BG=reward_BG, scored_BG=scored_BG)
    lines = samples_of(finished, dataclasses.replace(found, groups=groups))
    assert [line["accuracy"] for line in lines[:5]] == [1, 0, 0, None, 0]
    # A mean of three has float32's rounding.
    assert [line["advantage"] for line in lines[:5]] == pytest.approx([1, -0.5, -0.5, 0, 0], abs=1e-6)


def test_a_completion_of_the_full_model_skips_no_layer(run):
    _, finished, (found, _) = run
    nested_BG = np.zeros((4, 4), bool)
    nested_BG[0, 0] = True
    rollouts = dataclasses.replace(found.groups.rollouts, nested_BG=nested_BG)
    changed = dataclasses.replace(found, groups=dataclasses.replace(found.groups, rollouts=rollouts))
    lines = samples_of(finished, changed)
    assert [len(line["left_out_layers"]) for line in lines] == [1] + [0] * 15


def test_a_step_that_is_too_far_off_policy_warns_with_a_remedy(run):
    _, finished, (found, _) = run
    calm, strict = (
        dataclasses.replace(finished.config, train=dataclasses.replace(finished.config.train, ess_warning=threshold))
        for threshold in (1e-9, 1 - 1e-9)
    )
    names = finished.state.data.source_names
    assert found.warnings(calm) == {} and "warning" not in record.metrics(found, calm, names)
    warning = found.warnings(strict)["off_policy"]
    assert "nesting.skip_ratio" in warning and record.metrics(found, strict, names)["warning"] == warning


def test_a_mask_that_keeps_little_warns_with_bounds_that_would(run):
    """Its weights are fine then, so nothing is said of them: 2 % of the tokens, of which all count alike."""
    _, finished, (found, _) = run
    loss = dataclasses.replace(finished.config.loss, reject_by="geometric_mean", reject_above=1.01)
    config = dataclasses.replace(finished.config, loss=loss)

    def warnings(share, *keeping):
        parts = found.update.parts | {"accepted_tokens": share, "ess_kept": 1.0, "ess_weight": share}
        bounds = found.update.bounds | {"geometric_mean": [*keeping, 0.5, 1.5]}
        health = dataclasses.replace(found.update.health, ess_token=0.9)
        update = dataclasses.replace(found.update, parts=parts, bounds=bounds, health=health)
        return dataclasses.replace(found, update=update).warnings(config)

    assert warnings(0.02, 0.6, 1.3).keys() == {"rejected"}
    warning = warnings(0.02, 0.6, 1.3)["rejected"]
    assert "kept 2.0% of the tokens: reject_below is None and reject_above 1.01; reject_below 0.6 and reject" in warning
    assert "reject_above 1.3 would keep 95 % of the batch. Widen the bounds" in warning
    assert "no bounds that may be set would keep 95 %" in warnings(0.02, math.nan, math.nan)["rejected"]
    assert not warnings(0.2, 0.6, 1.3)


def test_a_step_whose_budget_no_plan_meets_warns_too(run):
    _, finished, (found, _) = run
    control = NestingControlConfig("ratio_tail", budget=0.1, max_skipped=2)
    nesting = NestingControlState(0, recent_excess=(0.3,), failures=(0, 0, 0), reason="ratio_tail 0.300, over budget")
    config = dataclasses.replace(
        finished.config,
        nesting_control=control,
        train=dataclasses.replace(finished.config.train, ess_warning=1 - 1e-9),
    )
    changed = dataclasses.replace(found, nesting=nesting)
    both = changed.warnings(config)
    assert list(both) == ["off_policy", "budget"] and "no plan meets nesting_control.budget" in both["budget"]
    logged = record.metrics(changed, config, finished.state.data.source_names)["warning"]
    assert logged == f"{both['off_policy']}; {both['budget']}"


def test_the_price_is_that_of_the_runs_rows_and_caches(run):
    """One of 6 layers is skipped: the other five and the head, of 16 rows."""
    _, finished, (found, _) = run
    step = finished.decode_step
    assert (step.workload.prompts, step.workload.group_size, step.weight_bytes) == (4, 4, 4)
    assert step.workload.completion_tokens == finished.config.rollout.max_completion_tokens
    head = step.product_seconds(head_parameters(step.model))
    layer = part_price(step)[Part.KEEP]
    expected = (head + 5 * layer) / (head + 6 * layer)
    assert metrics_of(finished, found)["plan_price"] == pytest.approx(expected) and 0.83 < expected < 0.9


def test_progress_shows_the_latest_accuracies(run):
    _, _, (found, _) = run
    shown = record.progress(found, {"heldout/two_terms": 0.25})
    assert shown.startswith("reward 0.") and "tok/s, ESS 0." in shown and shown.endswith("heldout/two_terms 0.25")


def test_an_empty_step_says_so_and_has_no_health(run):
    _, finished, (found, _) = run
    update = dataclasses.replace(found.update, empty=True, loss=0.0, gradient_norm=0.0, parts={}, health=None)
    update = dataclasses.replace(update, entropy=None, bounds={})
    empty = dataclasses.replace(found, update=update)
    metrics = metrics_of(finished, empty)
    assert metrics["empty"] and not {"warning", "ess_token", "entropy"} & set(metrics)
    assert "ESS nan" in record.progress(empty, {})


def test_dynamic_sampling_says_how_much_it_trained_on(run):
    """Two batches of 4 groups, of which 1 and 2 are mixed: 3 of the 4 groups wanted are trained on."""
    _, finished, (found, _) = run
    batches = []
    for mixed in (1, 2):
        accuracy_BG = np.zeros((4, 4), np.float32)
        accuracy_BG[:mixed, 0] = 1
        batches.append(dataclasses.replace(found.found[0], accuracy_BG=accuracy_BG, scored_BG=np.ones((4, 4), bool)))
    config = dataclasses.replace(finished.config, dynamic_sampling=DynamicSamplingConfig(max_generation_batches=2))
    metrics = record.metrics(dataclasses.replace(found, found=tuple(batches)), config, finished.state.data.source_names)
    assert (metrics["generation_batches"], metrics["trained_groups"]) == (2, 3)
    assert metrics["mixed_groups"] == pytest.approx(3 / 8) and "left 3 of 4 groups" in metrics["shortfall"]
