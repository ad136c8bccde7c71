"""DUMP against other curricula: steps to reach the accuracy that uniform sampling ends at.

    python -m experiments.dump                      # 5 seeds, DUMP and uniform
    python -m experiments.dump --kinds uniform dump greedy easy_to_hard proportional

All runs of a seed start from one warm-started model. What is finished is kept as JSON in `--out`
and not computed again, so the command can be stopped and repeated. It ends with a table, a JSON
file and two figures: held-out accuracy over steps, and which sources were drawn when.

The measure: held-out accuracy at the rollout temperature (four samples a prompt, what the reward is
the mean of), mean over all sources, smoothed over three evaluations; greedy accuracy is kept beside
it. A run's time is the first step (linear between evaluations) at which it reaches the level that the
uniform run of the same seed ends at; a run that never does counts with its last step, a lower
bound. It is divided by the steps of the uniform run, and, because a curve that flattens reaches its
own end early too, also by the time that the uniform run itself takes to that level.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arguments import add_json, add_list, add_runs, command, experiment_parser
from experiments.runs import EVERY, compile_once, measured_run, runs_from_starts, wanted_run
from nested_reft.cli.arguments import keep_json
from nested_reft.curriculum import CurriculumConfig
from nested_reft.json_files import write_json
from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sweeps.intervals import interval, seed_draws
from nested_reft.sweeps.kept import Result
from nested_reft.sweeps.results import cost_to_reach
from nested_reft.training.config import Config, load_config
from nested_reft.training.warm_start import WarmStartConfig

SMOOTH = 3  # evaluations that one point of a curve is the mean of

KINDS = {
    "uniform": CurriculumConfig("uniform"),
    "dump": CurriculumConfig("dump", window=300, temperature=0.1),
    "greedy": CurriculumConfig("dump", window=300, temperature=0.0),
    "easy_to_hard": CurriculumConfig("easy_to_hard", window=128, promote_at=0.8),
    "proportional": CurriculumConfig("proportional"),
}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, and reports.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("dump", __doc__)
    add_list(parser, "--kinds", ("uniform", "dump"), choices=KINDS)
    add_runs(parser, "experiment-dump", steps=300, least=SMOOTH * EVERY, multiple=EVERY)
    parser.add_argument("--report-only", action="store_true", help="tables and figures of the runs that are there")
    add_json(parser, "the table")
    known = parser.parse_args(arguments)
    compile_once(known.out)
    runs = runs_of(known.kinds, known.seeds, known.steps, known.out, known.report_only)
    keep_json(known.json, report(runs, known.out))


def runs_of(kinds: Sequence[str], seeds: Sequence[int], steps: int, out: Path, only_kept: bool = False) -> list[Result]:
    """Every run that is asked for, computed where it is not kept.

    Args:
        kinds: of `KINDS`.
        seeds: of the runs.
        steps: of each run.
        out: where results and shared starts are kept.
        only_kept: compute nothing.
    """
    wanted = [
        wanted_run(experiment_config(kind, seed, steps), out, kind, kind=kind) for seed in seeds for kind in kinds
    ]
    return runs_from_starts(wanted, partial(measured_run, out=out), told, only_kept=only_kept)


def told(result: Result) -> str:
    """What is printed of a run.

    Args:
        result: a new one.
    """
    return f"{result['seconds']:.0f} s, mean accuracy {curve(result)[-1]:.3f}"


def experiment_config(kind: str, seed: int, steps: int) -> Config:
    """The preset `tiny_dump` with one curriculum and seed, without the warm start, which is shared.

    Args:
        kind: one of `KINDS`.
        seed: of the run.
        steps: of the run.
    """
    config = load_config("tiny_dump")
    return dataclasses.replace(
        config,
        name=f"dump-{kind}-{seed}",
        curriculum=KINDS[kind],
        train=dataclasses.replace(config.train, seed=seed, steps=steps),
        evaluation=dataclasses.replace(config.evaluation, samples_per_prompt=4, pass_k=4),
        warm_start=WarmStartConfig(),
    )


def curve(result: dict[str, Any]) -> np.ndarray:
    """Mean accuracy over the sources at each evaluation, smoothed over it and the ones before."""
    mean = np.mean(result["accuracy"], axis=1)
    return np.array([mean[max(0, i - SMOOTH + 1) : i + 1].mean() for i in range(len(mean))])


def compare(results: Sequence[dict[str, Any]], baseline: str = "uniform") -> list[dict[str, Any]]:
    """Each kind of run against the runs of kind `baseline` of the same seeds.

    Args:
        results: of finished runs, each with its `kind` and `seed`.
        baseline: the kind whose final accuracies are the levels to reach.

    Returns:
        A row of `paired` for each kind that shares a seed with the baseline, in the order of the results.
    """
    by = {(result["kind"], result["seed"]): result for result in results}
    rows = []
    for kind in dict.fromkeys(result["kind"] for result in results):
        # Only seeds of both are compared, because a warm start of its own makes every seed easier or harder.
        seeds = sorted(seed for k, seed in by if k == kind and (baseline, seed) in by)
        if seeds:
            pairs = [(by[kind, seed], by[baseline, seed]) for seed in seeds]
            rows.append({"kind": kind, "seeds": seeds} | paired(*zip(*pairs, strict=True)))
    return rows


def paired(runs: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One kind of run against the baseline runs of the same seeds.

    `share_of_steps` is the mean time over the steps of a run, `share_of_time` over the baseline's mean
    time to the same level; the intervals are 95% percentile bootstraps over seeds (10,000 draws),
    where the runs of a seed stay together.

    Args:
        runs: results of one kind, one for each seed.
        baselines: results of the baseline, of the same seeds in the same order.
    """
    levels = [float(curve(result)[-1]) for result in baselines]
    reached, baseline_reached = (
        [cost_to_reach(own["steps"], curve(own), level) for own, level in zip(results, levels, strict=True)]
        for results in (runs, baselines)
    )
    baseline_time = [steps for steps, _ in baseline_reached]
    time_S, baseline_S = np.array([step for step, _ in reached]), np.array(baseline_time)
    # The same draws serve all three intervals, and a seed is drawn together with its baseline.
    draw_RxS = seed_draws(len(runs))
    # A baseline that starts at its final level takes no time to it; the bound prevents a division by zero.
    share_R = time_S[draw_RxS].sum(axis=1) / np.maximum(baseline_S[draw_RxS].sum(axis=1), 1e-9)
    steps = runs[0]["steps"][-1]
    final_S = np.array([curve(result)[-1] for result in runs])
    gain_S = final_S - np.array(levels)
    return {
        "reached": sum(ok for _, ok in reached),
        "steps_to_level": time_S.tolist(),
        "baseline_steps_to_level": baseline_time,
        "share_of_steps": float(time_S.mean() / steps),
        "share_of_steps_interval": interval(time_S[draw_RxS].mean(axis=1) / steps),
        "share_of_time": float(time_S.sum() / max(baseline_S.sum(), 1e-9)),
        "share_of_time_interval": interval(share_R),
        "final_accuracy": float(final_S.mean()),
        "final_gain": float(gain_S.mean()),
        "final_gain_interval": interval(gain_S[draw_RxS].mean(axis=1)),
        "final_by_source": np.mean([result["accuracy"][-1] for result in runs], axis=0).tolist(),
        "seconds_per_run": float(np.mean([result["seconds"] for result in runs])),
    }


def report(results: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Prints the table, and writes it as JSON beside the figures.

    Args:
        results: of finished runs, each with its `kind` and `seed`.
        out: where the files go.

    Returns:
        What was written; empty without a pair of runs.
    """
    rows = compare(results)
    if not rows:
        print("no finished pair of a curriculum and uniform sampling yet")
        return {}
    found = {"versions": versions(), "rows": rows, "sources": results[0]["sources"]}
    write_json(out / "results.json", found)
    # Each interval stands behind the value that it belongs to.
    header = [
        "curriculum",
        "seeds",
        "reached",
        "of its steps",
        "95%",
        "of its time",
        "95%",
        "final",
        "gain",
        "95%",
        "s/run",
    ]
    cells = [
        [
            row["kind"],
            len(row["seeds"]),
            row["reached"],
            f"{row['share_of_steps']:.2f}",
            "{:.2f}..{:.2f}".format(*row["share_of_steps_interval"]),
            f"{row['share_of_time']:.2f}",
            "{:.2f}..{:.2f}".format(*row["share_of_time_interval"]),
            f"{row['final_accuracy']:.3f}",
            f"{row['final_gain']:+.3f}",
            "{:+.3f}..{:+.3f}".format(*row["final_gain_interval"]),
            f"{row['seconds_per_run']:.0f}",
        ]
        for row in rows
    ]
    print("Steps to the uniform run's final accuracy, as a share of its steps and of its own time to there\n")
    print(table(header, cells))
    by_source = [[row["kind"], *(f"{value:.2f}" for value in row["final_by_source"])] for row in rows]
    print(f"\n{table(['final accuracy of', *results[0]['sources']], by_source)}")
    draw_accuracy(results, out / "accuracy.png")
    draw_hand_over(results, out / "hand_over.png")
    print(f"\nwritten: {out / 'results.json'}, {out / 'accuracy.png'}, {out / 'hand_over.png'}")
    return found


def draw_accuracy(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean accuracy over steps: each seed thin, the mean of a curriculum's seeds thick."""
    figure = figure_maker()(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, kind in enumerate(dict.fromkeys(result["kind"] for result in results)):
        runs = [result for result in results if result["kind"] == kind]
        for result in runs:
            axis.plot(result["steps"], curve(result), color=f"C{index}", alpha=0.25, linewidth=1)
        axis.plot(
            runs[0]["steps"], np.mean([curve(r) for r in runs], axis=0), color=f"C{index}", linewidth=2.5, label=kind
        )
    axis.set(
        xlabel="step", ylabel="held-out accuracy of samples, mean of sources", title="From one warm start per seed"
    )
    axis.legend()
    figure.savefig(path, dpi=120)


def draw_hand_over(results: Sequence[dict[str, Any]], path: Path) -> None:
    """For each adaptive curriculum: probability of each source (mean of seeds, stacked), and its accuracy."""
    from matplotlib import colormaps

    kinds = [k for k in dict.fromkeys(r["kind"] for r in results) if k not in ("uniform", "proportional")]
    if not kinds:
        return
    figure = figure_maker()(figsize=(6.5 * len(kinds), 7), layout="constrained")
    axes = figure.subplots(2, len(kinds), sharex=True, squeeze=False)
    for column, kind in enumerate(kinds):
        runs = [result for result in results if result["kind"] == kind]
        colours = colormaps["viridis"](np.linspace(0, 0.95, len(runs[0]["sources"])))
        probability_TxM = np.mean([result["probability"] for result in runs], axis=0)
        # A single step draws few prompts; the ends are repeated so that every step has nine neighbours.
        kernel = np.ones(9) / 9
        padded = np.pad(probability_TxM, ((4, 4), (0, 0)), mode="edge")
        smooth_MxT = [np.convolve(padded[:, m], kernel, mode="valid") for m in range(padded.shape[1])]
        axes[0, column].stackplot(range(len(probability_TxM)), smooth_MxT, colors=colours, labels=runs[0]["sources"])
        axes[0, column].set(title=f"{kind}: probability of each source", ylim=(0, 1), ylabel="stacked, mean of 9 steps")
        accuracy_TxM = np.mean([result["accuracy"] for result in runs], axis=0)
        for m, colour in enumerate(colours):
            axes[1, column].plot(runs[0]["steps"], accuracy_TxM[:, m], color=colour, label=runs[0]["sources"][m])
        axes[1, column].set(title="held-out accuracy of each source", xlabel="step", ylim=(0, 1))
    axes[1, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
