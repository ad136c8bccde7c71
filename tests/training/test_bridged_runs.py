"""Runs whose nested policy has bridges: when they are fitted, what they draw, and that they resume bit for bit."""

import shutil
from typing import Any

import jax
import numpy as np
import pytest

from nested_reft.bridging import BridgeConfig
from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory
from nested_reft.sharding import MeshConfig
from nested_reft.training.config import Config
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.training.runs import (
    MOVING,
    assert_equal_arrays,
    comparable_steps,
    lines_of,
    metrics_of,
    nano,
    save_after,
    trainer,
)

BRIDGE = BridgeConfig("per_layer", tokens=150, refit_every=2, ridge=0.1)


def bridged(**changes: Any) -> Config:
    """`nano`, whose batches have at least 16 tokens and at most 128, with two of six layers bridged."""
    return nano(**{"nesting": NestingConfig(skip_ratio=0.34, bridge=BRIDGE), "rollout__group_size": 8} | changes)


def test_rollouts_are_full_until_the_bridges_are_fitted(tmp_path):
    run = trainer(bridged(), tmp_path)
    records = [run.step(number) for number in range(6)]
    fits = [record.renewed.bridge_tokens is not None for record in records]
    first = fits.index(True)
    assert fits[first + 1 : first + 3] == [False, True]  # and again two steps later
    for number, record in enumerate(records):
        part_BGL = np.asarray(record.groups.rollouts.part_BGL)
        assert ((part_BGL == Part.BRIDGE).sum(axis=-1) == (2 if number > first else 0)).all()
        assert ((part_BGL == Part.SKIP).sum(axis=-1) == 0).all()
    metrics = metrics_of(run, records[first + 1])
    assert len(metrics["bridged_layers"]) == 2 and metrics["bridged_layers"] == metrics["left_out_layers"]
    assert metrics_of(run, records[first])["bridge_tokens"] >= 150
    # On-policy before, off-policy after.
    assert records[first].update.health.ess_token > 0.9999 > records[first + 1].update.health.ess_token


def test_refits_compile_nothing(tmp_path):
    run = trainer(bridged(), tmp_path)
    number, fits = 0, 0
    while fits < 2 or number < 5:
        fits += run.step(number).renewed.bridge_tokens is not None
        number += 1
    before = run.compilations.count
    for later in range(number, number + 4):
        run.step(later)
    assert run.compilations.count == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": LoraConfig(rank=2), "rollout__weights": "bfloat16"},
        {"nesting": NestingConfig(choice="measured", skip_ratio=0.34, divergence_temperature=0.0, bridge=BRIDGE)},
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, changes):
    """Killed with texts that wait for a fit, and with bridges that were fitted."""
    config = bridged(train__steps=8, loss=MOVING, optimizer__learning_rate=0.01, **changes)
    straight = trainer(config, tmp_path / "straight")
    expected = comparable_steps(straight, range(6))
    fits = [step for step, line in enumerate(expected) if "bridge_tokens" in line]
    assert len(fits) >= 2
    for steps in (fits[0], fits[1]):
        first = trainer(config, tmp_path / str(steps))
        comparable_steps(first, range(steps))
        save_after(first, steps)
        first.close()
        second = trainer(config, tmp_path / str(steps), resume=True)
        assert comparable_steps(second, range(steps, 6)) == expected[steps:]
        arrays = [run.state.learner.arrays(False) for run in (straight, second)]
        assert np.any(np.asarray(arrays[0]["bridges"]["map"]))
        assert_equal_arrays(*arrays)


def test_the_bridges_of_a_fixed_plan_are_fitted_in_sequence(tmp_path):
    fixed = {"choice": "fixed", "layers": (2, 3)}
    runs = [
        trainer(bridged(nesting=NestingConfig(**fixed, bridge=bridge)), tmp_path / bridge.kind)
        for bridge in (BRIDGE, BridgeConfig("per_run", tokens=150, ridge=0.1))
    ]
    for run in runs:
        number = 0
        while run.step(number).renewed.bridge_tokens is None:
            number += 1
    plans = [run.step(number + 1).plan for run in runs]
    keep, bridge = Part.KEEP, Part.BRIDGE
    assert plans[0].host_parts(6).tolist() == [keep, keep, bridge, bridge, keep, keep]
    assert plans[1].host_parts(6).tolist() == [keep, keep, bridge, Part.SKIP, keep, keep]
    for run, fitted in zip(runs, ([2, 3], [2]), strict=True):
        # Fitted alone, every layer would have a bridge.
        map_LDD = np.asarray(run.state.learner.policy().model.stacked_bridges()["map"])
        assert np.flatnonzero(np.abs(map_LDD).max(axis=(1, 2))).tolist() == fitted


def test_a_mixture_scores_bridged_policies(tmp_path):
    """The density of a mixture needs the nested policy's log-probabilities, bridges and all."""
    changes = {
        "rollout": RolloutConfig(group_size=8, max_completion_tokens=8, mixture_alpha=0.5),
        "loss": PolicyGradientConfig(
            advantage="group_std", bias_mitigation="mixture", level="sequence", normalization="token_mean"
        ),
    }
    run = trainer(bridged(**changes), tmp_path)
    number = 0
    while run.step(number).renewed.bridge_tokens is None:
        number += 1
    record = run.step(number + 1)
    rollouts, learner = record.groups.rollouts, run.state.learner
    assert rollouts.nested_BG.any() and not rollouts.nested_BG.all()
    assert np.isfinite(record.update.loss)
    # What was sampled nested is scored as it was sampled.
    fresh = run.searcher.search(
        learner.behavior_policy(), run.state.next_prompts(np.zeros(4, np.int32)), record.plan, jax.random.key(5)
    )
    scored = learner.batch(fresh).arrays
    size = scored.tokens_BGC.shape[-1]
    mask = np.asarray(scored.mask_BGC) & np.asarray(fresh.rollouts.nested_BG)[..., None]
    difference = np.asarray(scored.nested_logprob_BGC) - np.asarray(fresh.rollouts.behavior_logprob_BGC[..., :size])
    assert mask.any() and np.abs(difference[mask]).max() < 1e-4


def test_a_mesh_samples_the_same(tmp_path):
    one, many = (
        trainer(bridged(mesh=mesh), tmp_path / str(mesh.data)) for mesh in (MeshConfig(), MeshConfig(data=2, tensor=2))
    )
    for number in range(4):
        records = [run.step(number) for run in (one, many)]
        tokens = [np.asarray(record.found[0].rollouts.tokens_BGC) for record in records]
        assert np.array_equal(*tokens)
    assert one.state.bridging.fits == many.state.bridging.fits >= 1


def test_the_controller_waits_for_the_bridges(tmp_path):
    control = NestingControlConfig("ess_token", budget=1e-6, max_skipped=3, patience=1)
    run = trainer(bridged(nesting_control=control), tmp_path)
    number = 0
    while run.step(number).renewed.bridge_tokens is None:
        assert run.state.nesting.num_skipped == 2  # full rollouts say nothing about two bridged layers
        number += 1
    run.step(number + 1)
    assert run.state.nesting.num_skipped == 3


def test_a_policy_of_a_run_has_its_bridges(tmp_path):
    measured = NestingConfig(choice="measured", skip_ratio=0.34, divergence_temperature=0.0, bridge=BRIDGE)
    config = bridged(train__steps=3, train__keep_checkpoints=9, nesting=measured)
    run = RunDirectory.create(tmp_path, config.name, config.to_json())
    summary = Trainer(prepare(config), run).open().run()
    assert summary["kept_layers"] == 4
    policy = Policy.load(run.path)
    bridged_plan = LayerPlan.skipping(6, [2, 3], Part.BRIDGE)
    (with_bridges,), (without,) = (
        policy.score("123 =", "123", plan) for plan in (bridged_plan, LayerPlan.skipping(6, [2, 3]))
    )
    assert not np.allclose(with_bridges, without)
    # It draws the plans that the run would draw next: those of least divergence by its latest measurement.
    (*_, measured_L) = (line["layer_divergence"] for line in lines_of(run.path) if "layer_divergence" in line)
    cheapest = sorted(range(1, 5), key=lambda layer: measured_L[layer])[:2]
    assert policy.plans is not None
    part_L = policy.plans.draw(jax.random.key(0)).host_parts(6)
    assert np.flatnonzero(part_L == Part.BRIDGE).tolist() == sorted(cheapest)
    # Before the first fit they are full.
    for number in (2, 3):
        shutil.rmtree(run.path / "checkpoints" / str(number))
    unfitted = Policy.load(run.path).plans
    assert unfitted is not None and unfitted.draw(jax.random.key(0)).shape.kept == 6


def test_more_tokens_than_the_rank_needs(tmp_path):
    with pytest.raises(ValueError, match=r"nesting.bridge.tokens is 100; a bridge of full rank needs 128 or more"):
        prepare(bridged(nesting=NestingConfig(skip_ratio=0.34, bridge=BridgeConfig("per_layer", tokens=100))))
