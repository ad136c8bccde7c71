"""What to give DUMP as its distributions: one pool, sources as named, or parts by pass rate.

    python -m experiments.splits                    # 5 seeds of three divisions

All runs train on the training questions of `tiny_dump`, with its curriculum, from one warm start per
seed. Only the division of these questions differs. The baseline `pool` is one source, where DUMP has
nothing to choose. `source` has the six sources that `tiny_dump` names. `pass_rate` divides the pool
with `data.split`, into at most as many parts. (A division by clusters of the prompts was measured too
and then deleted; `experiments/results/splits.md` says at which commit its result repeats.)

The measure is that of `experiments.dump`, on the held-out prompts of the six named sources in every
run. The level to reach is the final accuracy of the `pool` run of the same seed. What is finished is
kept as JSON in `--out`, so the command can be stopped and repeated. It ends with tables, a JSON
file and a figure.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.arguments import add_json, add_list, add_runs, command, experiment_parser
from experiments.dump import SMOOTH, compare, curve, draw_accuracy, told
from experiments.dump import experiment_config as curriculum_config
from experiments.runs import EVERY, compile_once, measured_run, wanted_run
from nested_reft.cli.arguments import keep_json
from nested_reft.data.splits import SplitConfig
from nested_reft.json_files import write_json
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sweeps.kept import Result, Wanted, kept_runs
from nested_reft.sweeps.starts import shared_start
from nested_reft.training.config import Config, load_config
from nested_reft.training.setup import Setup

PARTS = 6  # as many as `tiny_dump` names, so that no division has more choice than another

KINDS = {
    "pool": SplitConfig(),
    "source": SplitConfig(),
    "pass_rate": SplitConfig("pass_rate", parts=PARTS),
    # Would fewer samples do? It is not run unless asked for.
    "pass_rate_2_samples": SplitConfig("pass_rate", parts=PARTS, samples=2),
}
MAIN_KINDS = ("pool", "source", "pass_rate")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, and reports.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("splits", __doc__)
    add_list(parser, "--kinds", MAIN_KINDS, choices=KINDS)
    add_runs(parser, "experiment-splits", steps=300, least=SMOOTH * EVERY, multiple=EVERY)
    parser.add_argument("--report-only", action="store_true", help="tables and figure of the runs that are there")
    add_json(parser, "the tables")
    known = parser.parse_args(arguments)
    compile_once(known.out)
    wanted = [
        wanted_run(experiment_config(kind, seed, known.steps), known.out, kind, kind=kind)
        for seed in known.seeds
        for kind in known.kinds
    ]

    def compute(each: Wanted) -> Result:
        # `source` is undivided, so its data are the warm start's for every kind.
        undivided = experiment_config("source", each.labels["seed"], known.steps)
        shared = shared_start(undivided, known.out, load_config("tiny_dump").warm_start)
        setup = shared if each.labels["kind"] == "source" else pooled(shared)
        return measured_run(dataclasses.replace(setup, config=each.config), known.out)

    results = [result for result in kept_runs(wanted, compute, told, only_kept=known.report_only) if result is not None]
    keep_json(known.json, report(results, known.out))


def experiment_config(kind: str, seed: int, steps: int) -> Config:
    """The DUMP run of `experiments.dump` with one division.

    Args:
        kind: one of `KINDS`.
        seed: of the run.
        steps: of the run.
    """
    config = curriculum_config("dump", seed, steps)
    data = dataclasses.replace(config.data, split=KINDS[kind])
    return dataclasses.replace(config, name=f"splits-{kind}-{seed}", data=data)


def pooled(setup: Setup) -> Setup:
    """The same training questions as one source; held-out prompts stay those of the named sources."""
    pool = tuple(example for examples in setup.data.train_examples for example in examples)
    # A pool is of no single source. Nothing reads this index, because `runs.train` evaluates every source.
    data = dataclasses.replace(setup.data, train_examples=(pool,), source_names=("pool",), heldout_of_source=(0,))
    return dataclasses.replace(setup, data=data)


def share_of_draws(result: dict[str, Any]) -> Float[np.ndarray, " M"]:
    """The expected share of a run's prompts that came from each named source."""
    question_PxM = np.array(result["questions"], dtype=np.float64)
    mean_probability_P = np.mean(result["probability"], axis=0)
    return mean_probability_P @ (question_PxM / question_PxM.sum(axis=1, keepdims=True))


def known_of_source(result: dict[str, Any]) -> float:
    """How much a question's part says about its named source, in [0, 1].

    The mutual information of part and source over the entropy of the source; 0 says nothing, 1 all.
    """
    joint_PxM = np.array(result["questions"], dtype=np.float64)
    joint_PxM /= joint_PxM.sum()
    part_P, source_M = joint_PxM.sum(axis=1), joint_PxM.sum(axis=0)
    filled = joint_PxM > 0
    information = (joint_PxM[filled] * np.log((joint_PxM / np.outer(part_P, source_M))[filled])).sum()
    return float(information / -(source_M * np.log(source_M)).sum())


def report(results: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Prints the tables, and writes them as JSON beside the figure.

    Args:
        results: of finished runs, each with its `kind` and `seed`.
        out: where the files go.

    Returns:
        What was written; empty without a run of the pool.
    """
    # Every kind is a baseline once, so each pair has its own paired interval.
    kinds = list(dict.fromkeys(result["kind"] for result in results))
    against = {baseline: compare(results, baseline) for baseline in kinds}
    rows = against.get("pool", [])
    if not rows:
        print("no finished pool run to compare with yet")
        return {}
    divisions = {kind: division_facts([result for result in results if result["kind"] == kind]) for kind in kinds}
    sources = results[0]["sources"]
    found = {"versions": versions(), "against": against, "divisions": divisions, "sources": sources}
    write_json(out / "results.json", found)
    print("Steps to the pool run's final accuracy, as a share of its steps and of its own time to there\n")
    print(level_table(rows))
    print(f"\n{gain_table(against)}")
    print("\nWhat the parts are: how much of the source they tell, and the prompts drawn from each source\n")
    print(division_table(divisions, sources))
    by_source = [[row["kind"], *(f"{value:.2f}" for value in row["final_by_source"])] for row in rows]
    print(f"\n{table(['final accuracy of', *sources], by_source)}")
    print(f"\n{seed_table(results)}")
    draw_accuracy(results, out / "accuracy.png")
    print(f"\nwritten: {out / 'results.json'}, {out / 'accuracy.png'}")
    return found


def division_facts(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the parts of one kind of division are, as means over its runs.

    Args:
        runs: the results of one kind.
    """
    return {
        # The number of parts may differ between seeds, so all are kept.
        "parts": [len(run["parts"]) for run in runs],
        "largest_part": float(np.mean([np.sum(r["questions"], axis=1).max() / np.sum(r["questions"]) for r in runs])),
        "known_of_source": float(np.mean([known_of_source(run) for run in runs])),
        "share_of_draws": np.mean([share_of_draws(run) for run in runs], axis=0).tolist(),
        "start_seconds": float(np.mean([run["start_seconds"] for run in runs])),
    }


def level_table(rows: Sequence[dict[str, Any]]) -> str:
    """How soon each division reaches the pool's level, and what it ends at.

    Args:
        rows: of `compare` with the pool.
    """
    header = [
        "division",
        "seeds",
        "reached",
        "steps",
        "of its steps",
        "95%",
        "of its time",
        "95%",
        "final",
        "gain",
        "95%",
    ]
    cells = [
        [
            row["kind"],
            len(row["seeds"]),
            row["reached"],
            f"{np.mean(row['steps_to_level']):.0f}",
            f"{row['share_of_steps']:.2f}",
            "{:.2f}..{:.2f}".format(*row["share_of_steps_interval"]),
            f"{row['share_of_time']:.2f}",
            "{:.2f}..{:.2f}".format(*row["share_of_time_interval"]),
            f"{row['final_accuracy']:.3f}",
            f"{row['final_gain']:+.3f}",
            "{:+.3f}..{:+.3f}".format(*row["final_gain_interval"]),
        ]
        for row in rows
    ]
    return table(header, cells)


def gain_table(against: dict[str, list[dict[str, Any]]]) -> str:
    """The difference in final accuracy of every pair of divisions.

    Args:
        against: rows of `compare` by the baseline that they compare with.
    """
    kinds = list(against)
    gains = [
        [row["kind"], baseline, f"{row['final_gain']:+.3f}", "{:+.3f}..{:+.3f}".format(*row["final_gain_interval"])]
        for baseline in kinds
        for row in against[baseline]
        # Each pair stands there once, and none with itself.
        if kinds.index(row["kind"]) > kinds.index(baseline)
    ]
    return table(["final accuracy of", "less that of", "difference", "95%"], gains)


def division_table(divisions: dict[str, dict[str, Any]], sources: Sequence[str]) -> str:
    """What the parts of each division are.

    Args:
        divisions: by kind, what `division_facts` found.
        sources: names of the sources that prompts are drawn from.
    """
    cells = [
        [
            kind,
            "/".join(str(number) for number in sorted(set(found["parts"]))),
            f"{found['largest_part']:.2f}",
            f"{found['known_of_source']:.2f}",
            f"{found['start_seconds']:.0f}",
            *(f"{share:.2f}" for share in found["share_of_draws"]),
        ]
        for kind, found in divisions.items()
    ]
    return table(["division", "parts", "largest", "tells source", "s to divide", *sources], cells)


def seed_table(results: Sequence[dict[str, Any]]) -> str:
    """The final accuracy of every run; empty where a seed has no run of the kind."""
    finals = {(result["kind"], result["seed"]): curve(result)[-1] for result in results}
    seeds = sorted({seed for _, seed in finals})
    kinds = dict.fromkeys(kind for kind, _ in finals)
    by_seed = [[k, *(f"{finals[k, s]:.3f}" if (k, s) in finals else "" for s in seeds)] for k in kinds]
    return table(["final accuracy of", *(f"seed {seed}" for seed in seeds)], by_seed)


if __name__ == "__main__":
    sys.exit(main())
