"""How plans are drawn: their distribution, and what is refused."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig, draw_plan


@pytest.mark.parametrize(("ratio", "layers", "skipped"), [(0.0, 30, 0), (0.1, 30, 3), (0.15, 28, 4), (0.05, 12, 0)])
def test_number_skipped_is_the_floor(ratio, layers, skipped):
    # 0.1 * 30 is 3.0000000000000004 and 0.29 * 100 is 28.999999999999996 in floating point.
    assert NestingConfig(skip_ratio=ratio).num_skipped(layers) == skipped
    assert NestingConfig(skip_ratio=0.29).num_skipped(100) == 29


def test_uniform_plans_skip_every_inner_layer_equally_often(key):
    config = NestingConfig(skip_ratio=0.25, border=2)
    counts_L = np.zeros(12)
    for draw in range(400):
        plan = draw_plan(jax.random.fold_in(key, draw), config, 12)
        assert plan.shape.kept == 9
        counts_L[list(plan.left_out(12))] += 1
    assert counts_L[:2].sum() == counts_L[-2:].sum() == 0
    # 3 of 8 layers in each draw: 150 expected, standard deviation 9.7.
    assert np.abs(counts_L[2:-2] - 150).max() < 4 * 9.7


def test_measured_plans_follow_their_probabilities(key):
    # One skipped layer: Gumbel top-1 is a draw from softmax(-divergence / temperature).
    divergence_L = np.array([9.0, 0.1, 0.2, 0.3, 9.0])
    config = NestingConfig(skip_ratio=0.2, choice="measured", divergence_file="-", divergence_temperature=0.1)
    expected = np.exp(-divergence_L[1:4] / 0.1)
    expected /= expected.sum()  # 0.665, 0.245, 0.090
    counts = np.zeros(5)
    for draw in range(600):
        counts[list(draw_plan(jax.random.fold_in(key, draw), config, 5, divergence_L).left_out(5))] += 1
    deviation = np.sqrt(600 * expected * (1 - expected))
    assert np.all(np.abs(counts[1:4] - 600 * expected) < 4 * deviation)


def test_measured_plan_at_temperature_zero_skips_the_cheapest_layers(key):
    config = NestingConfig(skip_ratio=0.4, border=0, choice="measured", divergence_file="-", divergence_temperature=0.0)
    plan = draw_plan(key, config, 5, np.array([0.3, 0.1, 9.0, 0.2, 0.5]))
    assert plan.left_out(5) == (1, 3)


def test_measured_plan_with_equal_divergences_is_the_uniform_plan(key):
    measured = NestingConfig(skip_ratio=0.4, choice="measured", divergence_file="-")
    for draw in range(20):
        draw_key = jax.random.fold_in(key, draw)
        uniform_plan = draw_plan(draw_key, NestingConfig(skip_ratio=0.4), 10)
        assert draw_plan(draw_key, measured, 10, np.full(10, 0.3)).left_out(10) == uniform_plan.left_out(10)


def test_per_layer_plans_follow_layer_skips_rates(key):
    # p_l = exp(l ln 2 / 4) - 1 = 2^(l / 4) - 1: 0.189, 0.414, 0.682 for l = 1, 2, 3; of the sum 0.147, 0.322, 0.531.
    config = NestingConfig(skip_ratio=0.2, choice="per_layer")
    expected = np.array([0.18921, 0.41421, 0.68179])
    expected /= expected.sum()
    counts = np.zeros(5)
    for draw in range(600):
        counts[list(draw_plan(jax.random.fold_in(key, draw), config, 5).left_out(5))] += 1
    assert counts[0] == counts[4] == 0
    deviation = np.sqrt(600 * expected * (1 - expected))
    assert np.all(np.abs(counts[1:4] - 600 * expected) < 4 * deviation)


def test_several_layers_are_drawn_one_after_the_other(key):
    """P({2, 3}) = p_2 p_3 / (1 - p_2) + p_3 p_2 / (1 - p_3), with the probabilities of the test above."""
    config = NestingConfig(skip_ratio=0.4, choice="per_layer")
    p_2, p_3 = 0.41421 / 1.28521, 0.68179 / 1.28521
    expected = p_2 * p_3 / (1 - p_2) + p_3 * p_2 / (1 - p_3)  # 0.616
    hits = sum(draw_plan(jax.random.fold_in(key, draw), config, 5).left_out(5) == (2, 3) for draw in range(600))
    assert abs(hits - 600 * expected) < 4 * np.sqrt(600 * expected * (1 - expected))


def test_per_layer_never_skips_the_first_layer(key):
    config = NestingConfig(skip_ratio=0.8, choice="per_layer", border=0)
    config.validate_for(5)
    assert draw_plan(key, config, 5).left_out(5) == (1, 2, 3, 4)


@pytest.mark.parametrize("choice", ["uniform", "per_layer", "measured"])
def test_the_number_of_left_out_layers_can_be_given(choice, key):
    config = NestingConfig(skip_ratio=0.1, choice=choice, divergence_file="-" if choice == "measured" else None)
    for num_skipped in (0, 1, 5, 8):
        plan = draw_plan(key, config, 10, np.linspace(0, 1, 10), num_skipped)
        assert plan.shape.kept == 10 - num_skipped and not {0, 9} & set(plan.left_out(10))
    assert config.most_skipped(10) == 8
    with pytest.raises(ValueError, match="num_skipped is 9; allowed is 0 to 8"):
        draw_plan(key, config, 10, np.zeros(10), 9)


def test_fixed_plans_ignore_a_given_number(key):
    assert draw_plan(key, NestingConfig(choice="fixed", layers=(2,)), 5, num_skipped=3).left_out(5) == (2,)


def test_fixed_plan_is_what_was_asked_for(key):
    plan = draw_plan(key, NestingConfig(choice="fixed", layers=(5, 3)), 8)
    assert plan.left_out(8) == (3, 5)


def test_no_skipped_layer_is_the_full_model(key):
    assert jnp.array_equal(draw_plan(key, NestingConfig(), 4).layer_S, LayerPlan.full(4).layer_S)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skip_ratio": 1.0}, "nesting.skip_ratio is 1.0; allowed is 0 <= skip_ratio < 1"),
        ({"skip_ratio": -0.1}, "nesting.skip_ratio is -0.1"),
        ({"skip_ratio": float("nan")}, "nesting.skip_ratio is nan"),
        ({"border": -1}, "nesting.border is -1"),
        ({"divergence_temperature": -1.0}, "nesting.divergence_temperature is -1.0"),
        ({"choice": "fixed"}, "nesting.layers is empty"),
        ({"layers": (1,)}, "set choice to 'fixed'"),
        ({"choice": "fixed", "layers": (3, 1, 3)}, "which names a layer twice"),
        ({"choice": "measured"}, "nesting.divergence_file is not set"),
        ({"remeasure_every": 5}, "nesting.remeasure_every is 5, but choice is 'uniform'"),
        ({"remeasure_every": -1}, "nesting.remeasure_every is -1"),
        ({"remeasure_prompts": 0}, "nesting.remeasure_prompts is 0; allowed is 1 or more"),
        ({"remeasure_completions": 0}, "nesting.remeasure_completions is 0"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        NestingConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skip_ratio": 0.5, "border": 4}, "nesting.border is 4 .* 2 of 10 layers may be skipped, but 5 are to be"),
        ({"skip_ratio": 0.1, "border": 9}, "0 of 10 layers may be skipped"),
        (
            {"skip_ratio": 0.09},
            "skip_ratio is 0.09, which of 10 layers is none; allowed is 0, or at least 0.1, which is",
        ),
        ({"choice": "fixed", "layers": (3, 10)}, r"nesting.layers names \[10\]; the model has layers 0 to 9"),
        ({"choice": "fixed", "layers": tuple(range(10))}, "at least one must remain"),
    ],
)
def test_refuses_for_a_models_depth(fields, message):
    with pytest.raises(ValueError, match=message):
        NestingConfig(**fields).validate_for(10)


def test_unknown_choice_is_refused():
    # Called directly, since beartype, where tests switch it on, refuses the constructor's argument first.
    config: Any = SimpleNamespace(choice="deepest")
    with pytest.raises(ValueError, match=r"nesting.choice is 'deepest'; allowed are uniform, per_layer, fixed, measu"):
        NestingConfig.__post_init__(config)


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        ([-1], r"the plan skips \[-1\]; the model has layers 0 to 3"),
        ([1, 4], r"the plan skips \[4\]; the model has layers 0 to 3"),
        ([0, 1, 2, 3], "the plan skips all 4 layers; at least one must remain"),
    ],
)
def test_a_plan_of_layers_that_are_not_there_is_refused(skipped, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan.skipping(4, skipped)
