"""A task whose reward is too rare to be found from the prompt: rollouts from the prompt against resets.

    python -m experiments.resets                    # 5 seeds of three arms, about ten minutes on two quiet cores
    python -m experiments.resets --arms prompt uniform backward annealed --seeds 0 1

The task of `tiny_reset`: repeat a number of eight digits, where only the whole number earns a reward. All runs of a
seed start from one short warm start, take the same steps and draw as many completions. They differ in `reset` alone.
What is finished is kept as JSON in `--out` and not computed again, so the command can be stopped and repeated. It ends
with a table, a figure and, with `--json`, a file.

`uniform` is the paper's schedule. `backward` starts at the end of the answers and moves towards the prompt as it
succeeds. `annealed` moves there whether it succeeds or not, over three quarters of the steps; `--arms` can add it.

The measure: held-out accuracy of samples from the bare prompt, four for each of 128 questions. Resets act in training
only. A run counts as solved where its last greedy accuracy is at least 0.5. Intervals are 95 % percentile bootstraps
over seeds (10,000 draws).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arguments import add_json, add_list, add_runs, check_baseline, command, experiment_parser
from experiments.runs import EVERY, compile_once, measured_run, runs_from_starts, wanted_run
from nested_reft.cli.arguments import keep_json
from nested_reft.dataset_reset import ResetConfig
from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sweeps.intervals import interval, seed_draws
from nested_reft.training.config import Config, load_config
from nested_reft.training.warm_start import WarmStartConfig

PROMPT = "prompt"  # the arm that the others are compared with
SOLVED = 0.5  # greedy accuracy

Run = dict[str, Any]  # what `measured_run` returns, with its `arm` and `seed`


def arms(steps: int) -> dict[str, ResetConfig]:
    """Where rollouts start, by name.

    Args:
        steps: of a run; one schedule depends on it.
    """
    often = ResetConfig(share=0.75, references="answers")
    annealed = {"schedule": "annealed", "fraction": 0.95, "steps": max(steps * 3 // 4, 1)}
    return {
        PROMPT: ResetConfig(),
        "uniform": often,
        "backward": dataclasses.replace(often, schedule="backward", stages=9, promote_at=0.6, window=256),
        "annealed": dataclasses.replace(often, **annealed),
    }


def experiment_config(arm: str, seed: int, steps: int) -> Config:
    """`tiny_reset` with the resets of one arm, without the warm start, which all runs of a seed share.

    Args:
        arm: one of `arms`.
        seed: of the run.
        steps: of the run.
    """
    config = load_config("tiny_reset")
    return dataclasses.replace(
        config,
        name=f"resets-{arm}-{seed}",
        reset=arms(steps)[arm],
        train=dataclasses.replace(config.train, seed=seed, steps=steps),
        evaluation=dataclasses.replace(config.evaluation, samples_per_prompt=4, pass_k=4),
        warm_start=WarmStartConfig(),
    )


def runs_of(
    chosen: Sequence[str], seeds: Sequence[int], steps: int, out: Path, warm_start: WarmStartConfig | None = None
) -> list[Run]:
    """Every run that is asked for, computed where it is not kept.

    Args:
        chosen: names of arms.
        seeds: of the runs.
        steps: of each run.
        out: where results and shared starts are kept.
        warm_start: what the runs of a seed share; None takes that of `tiny_reset`.
    """
    wanted = [wanted_run(experiment_config(arm, seed, steps), out, arm, arm=arm) for seed in seeds for arm in chosen]
    # The weights are kept; the references of an arm are prepared with its configuration.
    warm_start = warm_start or load_config("tiny_reset").warm_start
    return runs_from_starts(wanted, partial(measured_run, out=out), _told, warm_start)


def _told(run: Run) -> str:
    return f"{run['seconds']:.0f} s, sampled accuracy {_final(run):.3f}"


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Each arm beside the runs from the prompt, of the same seeds.

    Args:
        runs: with one of `PROMPT` for every seed.

    Returns:
        JSON-able results by arm, in the order of the runs.
    """
    baseline = {run["seed"]: _final(run) for run in runs if run["arm"] == PROMPT}
    found = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        final_S = np.array([_final(run) for run in own])
        gain_S = final_S - np.array([baseline[run["seed"]] for run in own])
        draw_RxS = seed_draws(len(own))
        found[arm] = {
            "seeds": [run["seed"] for run in own],
            "start": float(np.mean([run["accuracy"][0][0] for run in own])),
            "final": final_S.tolist(),
            "final_interval": interval(final_S[draw_RxS].mean(axis=1)),
            "gain": float(gain_S.mean()),
            "gain_interval": interval(gain_S[draw_RxS].mean(axis=1)),
            "solved": sum(run["greedy_accuracy"][-1][0] >= SOLVED for run in own),
            "seconds_per_run": float(np.mean([run["seconds"] for run in own])),
        }
    return found


def _final(run: Run) -> float:
    """Accuracy of samples at the last evaluation, of the one source."""
    return float(run["accuracy"][-1][0])


def summary_table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as text.

    Args:
        summary: of `summarise`.
    """
    header = ["rollouts start from", "seeds", "solved", "start", "final", "95 %", "over prompt", "95 %", "s/run"]
    rows = [
        [
            arm,
            len(one["seeds"]),
            one["solved"],
            f"{one['start']:.3f}",
            f"{np.mean(one['final']):.3f}",
            "{:.3f}..{:.3f}".format(*one["final_interval"]),
            f"{one['gain']:+.3f}",
            "{:+.3f}..{:+.3f}".format(*one["gain_interval"]),
            f"{one['seconds_per_run']:.0f}",
        ]
        for arm, one in summary.items()
    ]
    return table(header, rows)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Held-out accuracy over steps: each seed thin, the mean of an arm's seeds thick.

    Args:
        runs: of all arms.
        path: the PNG file.
    """
    figure = figure_maker()(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, arm in enumerate(dict.fromkeys(run["arm"] for run in runs)):
        own = [run for run in runs if run["arm"] == arm]
        curves = np.array([[accuracy[0] for accuracy in run["accuracy"]] for run in own])
        for curve in curves:
            axis.plot(own[0]["steps"], curve, color=f"C{index}", alpha=0.25, linewidth=1)
        axis.plot(own[0]["steps"], curves.mean(axis=0), color=f"C{index}", linewidth=2.5, label=arm)
    axis.set(
        xlabel="step",
        ylabel="held-out accuracy of samples from the prompt",
        ylim=(-0.02, 1.02),
        title="Eight digits, one reward for all of them: where rollouts start",
    )
    axis.legend(title="rollouts start from")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, prints the table and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("resets", __doc__)
    add_list(parser, "--arms", (PROMPT, "uniform", "backward"), choices=list(arms(EVERY)))
    add_runs(parser, "experiment-resets", steps=240, least=EVERY, multiple=EVERY)
    add_json(parser, "the summary")
    known = parser.parse_args(arguments)
    check_baseline("--arms", known.arms, PROMPT)
    compile_once(known.out)
    runs = runs_of(known.arms, known.seeds, known.steps, known.out)
    summary = summarise(runs)
    print(summary_table(summary))
    draw(runs, known.out / "resets.png")
    keep_json(known.json, {"steps": known.steps, "versions": versions(), "arms": summary})
    print(f"written: {known.out / 'resets.png'}")


if __name__ == "__main__":
    sys.exit(main())
