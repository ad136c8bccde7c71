"""Does self-distillation make nesting cheap, and what does it cost? On the tiny model, a few seeds.

For each seed one warm start, then a run for each coefficient from the same weights, with two of the six
layers skipped. (Without layer dropout in the warm start, nested samples of it are too poor to learn from.)

    python -m experiments.self_distillation [--json FILE] [--seeds N] [--steps N]

The divergence is measured after training, exactly, on held-out completions of the full model, over all
plans that skip two of the inner layers. ESS is the mean of the last third of the steps. Seconds are of
the update of a step, without its rollout: the median, so that compiling does not count.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.arguments import BELOW_ONE, add_json, add_list, add_steps, command, experiment_parser
from experiments.plan_divergence import full_completions
from nested_reft.cli.arguments import keep_json, number, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.divergence import measure_plan_divergence, texts_of
from nested_reft.evaluation import EvaluationConfig, evaluate_examples
from nested_reft.layer_plan import LayerPlan
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
        setup: its policy is measured.
    """
    config, policy = setup.config, setup.policy
    texts = texts_of(full_completions(setup, 128))
    plans = all_plans(policy.num_layers)
    divergence = measure_plan_divergence(policy.model, texts, 1.0, plans, "measuring plans")

    def accuracy(plan: LayerPlan | None) -> float:
        # Nothing is sampled, so the key is not read.
        return evaluate_examples(
            policy,
            setup.data.heldout_examples[0],
            config.reward,
            config.evaluation,
            jax.random.key(0),
            samples=False,
            plan=plan,
        ).greedy_accuracy

    return {
        "kl_full_nested": float(divergence.mean()),
        "full_accuracy": accuracy(None),
        "nested_accuracy": float(np.mean([accuracy(plan) for plan in plans])),
    }


def trained(setup: Setup, coefficient: float, steps: int) -> dict[str, float]:
    """One run from the setup's policy, which stays as it is.

    Args:
        setup: the start, without a warm start of its own.
        coefficient: of self-distillation; 0 leaves it out.
        steps: training steps, 3 or more.
    """
    # Other objectives know no self-distillation.
    assert isinstance(setup.config.loss, PolicyGradientConfig)
    loss = dataclasses.replace(setup.config.loss, self_distillation_coefficient=coefficient)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, loss=loss))
    with tempfile.TemporaryDirectory() as directory, Trainer(setup, RunDirectory(Path(directory))).open() as trainer:
        records = [trainer.step(step) for step in range(steps)]
        policy = trainer.state.learner.policy()
    # A step without a token to learn from has no health.
    late = [found.update.health for found in records[-(steps // 3) :] if found.update.health is not None]
    return measured(dataclasses.replace(setup, policy=policy)) | {
        "ess_token": float(np.mean([float(health.ess_token) for health in late])),
        "ess_sequence": float(np.mean([float(health.ess_sequence) for health in late])),
        "update_seconds": float(np.median([found.seconds - found.rollout_seconds for found in records])),
    }


def results_of(seeds: int, steps: int, coefficients: list[float], layer_dropout: float) -> list[dict[str, Any]]:
    """A line for each seed and coefficient, and one for each seed before training.

    Args:
        seeds: how many, from 0.
        steps: training steps of each run.
        coefficients: of self-distillation, one run each.
        layer_dropout: of the warm start that the runs of a seed share.
    """
    lines = []
    for seed in range(seeds):
        setup = prepare(configuration(seed, steps, layer_dropout))
        # The runs must not warm up again, so their configuration has no warm start.
        config = dataclasses.replace(setup.config, warm_start=dataclasses.replace(setup.config.warm_start, steps=0))
        setup = dataclasses.replace(setup, policy=warm_started(setup), config=config)
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


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints a row for each coefficient.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("self_distillation", __doc__)
    parser.add_argument("--seeds", type=whole(1), default=3, help="how many, from 0 on")
    add_steps(parser, 60, least=3)
    weight = number("0 or more", lambda value: 0 <= value < math.inf)
    add_list(parser, "--coefficients", (0.0, 0.3), type=weight, help="of self-distillation")
    parser.add_argument("--layer-dropout", type=BELOW_ONE, default=0.4, help="of the warm start")
    add_json(parser)
    known = parser.parse_args(arguments)
    with checking_input():
        # What cannot be is found before the first warm start.
        configuration(0, known.steps, known.layer_dropout)
    lines = results_of(known.seeds, known.steps, known.coefficients, known.layer_dropout)
    rows = []
    for coefficient in (None, *known.coefficients):
        own = [line for line in lines if line["coefficient"] == coefficient]
        label = "before training" if coefficient is None else f"coefficient {coefficient:g}"
        rows.append([label, *(cell([line[name] for line in own if name in line]) for name in MEASURES)])
    header = ["", "KL(full||nested)", "ESS token", "ESS sequence", "full acc.", "nested acc.", "update s"]
    print(table(header, rows))
    print(f"Mean of {known.seeds} seeds (standard error).")
    keep_json(known.json, {"versions": versions(), "arguments": vars(known) | {"json": None}, "results": lines})


if __name__ == "__main__":
    sys.exit(main())
