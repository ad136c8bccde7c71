"""The nesting controller holds its budget: on two synthetic plants, and on the tiny model in training.

    python -m experiments.nesting_control [--out DIRECTORY] [--steps N]   (about three minutes on two cores)

Writes `nesting_control.png` and `nesting_control.json`: skipped layers, effective sample size and budget
over steps. The plants are ESS = exp(-c size^1.5) with log-normal noise on the exponent; of the second, c
falls to a fifth, as divergence does in training, and jumps back at three quarters of its steps.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.arguments import add_json, add_out, add_steps, command, experiment_parser
from nested_reft.cli.arguments import keep_json
from nested_reft.estimators.health import Health
from nested_reft.json_files import write_json
from nested_reft.nesting_control import NestingControlConfig, initial_state, update
from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.run_directory import RunDirectory, read_log, versions
from nested_reft.training.config import load_config
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer

PLANT_STEPS, NOISE = 240, 0.15
PLANT_CONTROL = NestingControlConfig("ess_token", budget=0.5, max_skipped=6)
# Which layers a plan skips matters on a real model, so one step says little about a size.
TINY_CONTROL = NestingControlConfig("ess_token", budget=0.6, max_skipped=4, patience=3, trial=3)


def steady(step: int) -> float:
    """c of a plant that does not change: three layers are within budget, four are not."""
    return 0.1


def drifting(step: int) -> float:
    """c of a plant whose layers get cheaper, until they do not."""
    turn = 3 * PLANT_STEPS // 4
    return 0.2 * 0.2 ** (step / turn) if step < turn else 0.2


def plant_run(cost: Callable[[int], float], control: NestingControlConfig, seed: int = 0) -> list[dict[str, Any]]:
    """The controller on a plant: what it would log at each step.

    Args:
        cost: c of the plant at a step.
        control: the rule.
        seed: of the noise.
    """
    generator, state, lines = np.random.default_rng(seed), initial_state(control, 0), []
    for step in range(PLANT_STEPS):
        size = state.num_skipped
        ess = math.exp(-cost(step) * size**1.5 * math.exp(NOISE * generator.standard_normal()))
        state = update(state, control, _health(ess))
        lines.append({"step": step + 1, "skipped": size, "ess_token": ess, "reason": state.reason})
    return lines


def _health(ess_token: float) -> Health:
    """A health whose one reading is the metric that is held; no plant has the others."""
    unread = {field.name: jnp.float32(math.nan) for field in dataclasses.fields(Health)}
    return Health(**unread | {"ess_token": jnp.float32(ess_token)})


def tiny_run(steps: int, runs: Path) -> list[dict[str, Any]]:
    """The same of a training run of the tiny model, from no skipped layer up.

    Args:
        steps: training steps.
        runs: where the run's directory is made.
    """
    config = load_config("tiny")
    config = dataclasses.replace(
        config,
        name="tiny_nesting_control",
        nesting=dataclasses.replace(config.nesting, skip_ratio=0.0),
        nesting_control=TINY_CONTROL,
        train=dataclasses.replace(config.train, steps=steps, checkpoint_every=steps),
        evaluation=dataclasses.replace(config.evaluation, every_steps=steps),
    )
    run = RunDirectory.create(runs, config.name, config.to_json())
    Trainer(prepare(config), run).open().run()
    return [
        {
            "step": line["step"],
            "skipped": len(line["left_out_layers"]),
            "ess_token": line["ess_token"],
            "accuracy": line["accuracy"],
            "compilations": line["compilations"],
            "reason": line["nesting_reason"],
        }
        for line in read_log(run.path / "metrics.jsonl")
        # The line before the first step holds held-out accuracy alone.
        if "nesting_reason" in line
    ]


def summary(name: str, control: NestingControlConfig, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How well the budget was held, over the second half of the steps too."""
    late = lines[len(lines) // 2 :]
    sizes = np.array([line["skipped"] for line in lines])
    return {
        "plant": name,
        "budget": control.budget,
        "steps": len(lines),
        "ess_mean": float(np.mean([line["ess_token"] for line in lines])),
        "ess_mean_late": float(np.mean([line["ess_token"] for line in late])),
        "steps_over_budget": float(np.mean([line["ess_token"] < (control.budget or 0) for line in lines])),
        "skipped_mean_late": float(np.mean([line["skipped"] for line in late])),
        "raised": int((np.diff(sizes) > 0).sum()),
        "lowered": int((np.diff(sizes) < 0).sum()),
    }


def plot(path: Path, results: dict[str, tuple[NestingControlConfig, list[dict[str, Any]]]]) -> None:
    """Skipped layers above, effective sample size and budget below, a column for each plant."""
    figure = figure_maker()(figsize=(4.2 * len(results), 5))
    axes = figure.subplots(2, len(results), sharex="col", squeeze=False)
    for column, (name, (control, lines)) in enumerate(results.items()):
        steps = [line["step"] for line in lines]
        above, below = axes[:, column]
        above.step(steps, [line["skipped"] for line in lines], where="mid", color="tab:blue")
        above.set_title(name)
        above.yaxis.get_major_locator().set_params(integer=True)
        below.plot(steps, [line["ess_token"] for line in lines], ".", markersize=3, color="tab:blue", label="ESS")
        below.axhline(control.budget, color="tab:red", linestyle="--", label="budget")
        below.set_ylim(0, 1.25)
        below.set_xlabel("step")
        below.legend(loc="upper right", ncols=2)
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("skipped layers")
    axes[1, 0].set_ylabel("effective sample size, per token")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all three, prints the table, writes the figure and the JSON file.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("nesting_control", __doc__)
    add_out(parser, "runs")
    add_steps(parser, 120, what="of the tiny model")
    add_json(parser)
    known = parser.parse_args(arguments)
    known.out.mkdir(parents=True, exist_ok=True)
    results = {
        "synthetic, steady": (PLANT_CONTROL, plant_run(steady, PLANT_CONTROL)),
        "synthetic, drifting": (PLANT_CONTROL, plant_run(drifting, PLANT_CONTROL)),
        "tiny model, training": (TINY_CONTROL, tiny_run(known.steps, known.out)),
    }
    summaries = [summary(name, control, lines) for name, (control, lines) in results.items()]
    rows = [
        [
            line["plant"],
            line["budget"],
            f"{line['ess_mean']:.3f}",
            f"{line['ess_mean_late']:.3f}",
            f"{line['steps_over_budget']:.3f}",
            f"{line['skipped_mean_late']:.2f}",
            line["raised"],
            line["lowered"],
        ]
        for line in summaries
    ]
    header = ["plant", "budget", "mean ESS", "late ESS", "steps over", "late skipped", "raised", "lowered"]
    print(table(header, rows))
    plot(known.out / "nesting_control.png", results)
    content = {name: {"control": dataclasses.asdict(c), "steps": lines} for name, (c, lines) in results.items()}
    found = {"versions": versions(), "summaries": summaries, "results": content}
    write_json(known.out / "nesting_control.json", found)
    keep_json(known.json, found)
    print(f"written: {known.out / 'nesting_control.png'}, {known.out / 'nesting_control.json'}")


if __name__ == "__main__":
    sys.exit(main())
