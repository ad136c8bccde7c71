"""Does self-distillation make nesting cheap, and what does it cost? On the tiny model, a few seeds.

For each seed one warm start, then a run for each coefficient from the same weights, with two of the six
layers skipped. (Without layer dropout in the warm start, nested samples of it are too poor to learn from.)

    python -m experiments.self_distillation [--json FILE] [--seeds N] [--steps N]

The divergence is measured after training, exactly, on held-out completions of the full model, over all
plans that skip two of the inner layers. ESS is the mean of the last third of the steps. Seconds are of
the update of a step, without its rollout: the median, so that compiling does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.plan_divergence import full_completions
from nested_reft.divergence import measure_plan_divergence, texts_of
from nested_reft.evaluation import EvaluationConfig, evaluate_examples
from nested_reft.json_files import write_json
from nested_reft.layer_skip import LayerPlan
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.reports.tables import table
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.training.config import Config, load_config
from nested_reft.training.phases import warm_started
from nested_reft.training.setup import Setup, prepare
from nested_reft.training.trainer import Trainer

SKIPPED = 2
MEASURES = ("kl_full_nested", "ess_token", "ess_sequence", "full_accuracy", "nested_accuracy", "update_seconds")


def configuration(seed: int, steps: int, layer_dropout: float) -> Config:
    """`tiny` with two of its six layers skipped."""
    config = load_config("tiny")
    return dataclasses.replace(
        config,
        nesting=dataclasses.replace(config.nesting, skip_ratio=SKIPPED / 6),
        warm_start=dataclasses.replace(config.warm_start, layer_dropout=layer_dropout),
        train=dataclasses.replace(config.train, steps=steps, seed=seed, checkpoint_every=steps),
        evaluation=EvaluationConfig(every_steps=steps, samples_per_prompt=0, batch_size=128),
    )


def all_plans(num_layers: int) -> list[LayerPlan]:
    """Every plan that skips two of the inner layers."""
    return [LayerPlan.skipping(num_layers, skipped) for skipped in itertools.combinations(range(1, num_layers - 1), 2)]


def measured(setup: Setup) -> dict[str, float]:
    """Divergence of the nested policies, and greedy held-out accuracy of the full and the nested ones.

    Args:
        setup: its policy is measured, on the held-out prompts of its first source.
    """
    config, policy = setup.config, setup.policy
    texts = texts_of(full_completions(setup, 128))
    plans = all_plans(policy.num_layers)
    divergence = measure_plan_divergence(policy.model, texts, 1.0, plans, "measuring plans")

    def accuracy(plan: LayerPlan) -> float:
        examples, key = setup.data.heldout_examples[0], jax.random.key(0)
        return evaluate_examples(
            policy, examples, config.reward, config.evaluation, key, samples=False, plan=plan
        ).greedy_accuracy

    return {
        "kl_full_nested": float(divergence.mean()),
        "full_accuracy": accuracy(LayerPlan.full(policy.num_layers)),
        "nested_accuracy": float(np.mean([accuracy(plan) for plan in plans])),
    }


def trained(setup: Setup, coefficient: float, steps: int) -> dict[str, float]:
    """What one run comes to.

    Args:
        setup: what it starts from; it stays as it is.
        coefficient: gamma, the weight of self-distillation.
        steps: training steps.
    """
    loss = setup.config.loss
    assert isinstance(loss, PolicyGradientConfig)  # `configuration` starts from one
    loss = dataclasses.replace(loss, self_distillation_coefficient=coefficient)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, loss=loss))
    with tempfile.TemporaryDirectory() as directory, Trainer(setup, RunDirectory(Path(directory))).open() as trainer:
        records = [trainer.step(number) for number in range(steps)]
        policy = trainer.state.learner.policy()
    health = [record.update.health for record in records[-(steps // 3) :] if record.update.health is not None]
    return measured(dataclasses.replace(setup, policy=policy)) | {
        "ess_token": float(np.mean([float(found.ess_token) for found in health])),
        "ess_sequence": float(np.mean([float(found.ess_sequence) for found in health])),
        "update_seconds": float(np.median([record.seconds - record.rollout_seconds for record in records])),
    }


def results_of(seeds: int, steps: int, coefficients: list[float], layer_dropout: float) -> list[dict[str, Any]]:
    """A line for each seed and coefficient, and one for each seed before training.

    Args:
        seeds: how many, from 0.
        steps: training steps of each run.
        coefficients: gamma of each run.
        layer_dropout: of the warm start.
    """
    lines = []
    for seed in range(seeds):
        setup = prepare(configuration(seed, steps, layer_dropout))
        # All coefficients start from these weights, so the runs themselves have no warm start.
        policy = warm_started(setup)
        config = dataclasses.replace(setup.config, warm_start=dataclasses.replace(setup.config.warm_start, steps=0))
        setup = dataclasses.replace(setup, policy=policy, config=config)
        lines.append({"seed": seed, "coefficient": None} | measured(setup))
        lines += [
            {"seed": seed, "coefficient": coefficient} | trained(setup, coefficient, steps)
            for coefficient in coefficients
        ]
    return lines


def cell(values: list[float]) -> str:
    """Mean and standard error over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{np.mean(values):.3f} ({np.std(values, ddof=1) / np.sqrt(len(values)):.3f})"


def main() -> None:
    """Trains, and prints a row for each coefficient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each run")
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--layer-dropout", type=float, default=0.4, help="of the warm start")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    known = parser.parse_args()
    lines = results_of(known.seeds, known.steps, known.coefficients, known.layer_dropout)
    rows = []
    for coefficient in (None, *known.coefficients):
        own = [line for line in lines if line["coefficient"] == coefficient]
        label = "before training" if coefficient is None else f"coefficient {coefficient:g}"
        rows.append([label, *(cell([line[name] for line in own if name in line]) for name in MEASURES)])
    header = ["", "KL(full||nested)", "ESS token", "ESS sequence", "full acc.", "nested acc.", "update s"]
    print(table(header, rows))
    print(f"Mean of {known.seeds} seeds (standard error).")
    if known.json is not None:
        write_json(known.json, {"versions": versions(), "arguments": vars(known) | {"json": None}, "results": lines})


if __name__ == "__main__":
    main()
