"""Trajectory balance beside policy gradients, where completions are many updates old.

    python -m experiments.tba
    python -m experiments.tba --lags 0 32 --losses "no correction" "trajectory balance" --seeds 0 1
    python -m experiments.tba --lags 0 8 --searchers 8 --judge-seconds 1 --losses "no correction" "trajectory balance"

`tiny` without nesting, so that age alone is off-policy. Searchers run `search.lag` batches ahead, and each batch is
trained on in two passes, so it is 2 x lag updates old. All runs of a seed start from the same weights, take the same
steps and draw as many completions; they differ in loss and lag. What is finished is kept as JSON in `--out` and not
computed again. The command ends with a table for each lag, a table of seconds and a figure.

A run's speed is its mean gain: held-out accuracy above that of the start, averaged over all evaluations. It is compared
with the run of the same seed and lag without a correction. Intervals are 95 % percentile bootstraps over seeds.

With lag 0 among the lags, a table says how much of its speed each loss loses to a lag, paired by seed. The last table
compares times: seconds until a run reaches the accuracy `--target`, or else 0.9 of what the run without a lag gains,
for each loss. Those of lag 0 are synchronous. `--target` computes no run anew.

With `--searchers`, threads search beside the learner wherever there is a lag. Without, the learner samples in turns,
and only the simulation says what searchers would save; it takes the run's own times of batches and updates. With
`--judge-seconds`, each batch waits for its rewards without a core at work, so a machine of few cores shows what many
searchers give. Keep such runs in an `--out` of their own.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arguments import add_json, add_list, add_runs, check_baseline, command, experiment_parser
from experiments.async_sizing import SEARCHERS, SECONDS, Times, simulate
from experiments.corrections import BASELINE, Run, draw, slug, summarise, tables, told
from experiments.equal_time import timed_run
from experiments.equal_time_summary import curve
from experiments.equal_time_summary import summarise as summarise_times
from experiments.runs import compile_once, runs_from_starts, wanted_run
from nested_reft.cli.arguments import INNER_SHARE, keep_json, whole
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.registry import ObjectiveConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sweeps.intervals import interval, seed_draws
from nested_reft.sweeps.results import cost_to_reach
from nested_reft.training.config import Config, load_config
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.warm_start import WarmStartConfig

PLAIN = PolicyGradientConfig("group_std", "one", "token", "token_mean")
# GRPO clips the ratio to the policy before the update. Where batches are old, another policy drew them, and the ratio
# here is to that one.
LOSSES: dict[str, ObjectiveConfig] = {
    BASELINE: PLAIN,
    "GRPO, clip to the sampler": dataclasses.replace(PLAIN, bias_mitigation="base", clip_low=0.2, clip_high=0.2),
    "token TIS": dataclasses.replace(PLAIN, bias_mitigation="base", truncate_at=2.0),
    "sequence TIS": dataclasses.replace(PLAIN, bias_mitigation="base", level="sequence", truncate_at=2.0),
    "decoupled PPO": dataclasses.replace(
        PLAIN, bias_mitigation="base", truncate_at=2.0, clip_policies="three", clip_low=0.2, clip_high=0.2
    ),
    "trajectory balance": TrajectoryBalanceConfig(beta=0.3),
}


def experiment_config(lag: int, loss: str, seed: int, steps: int, searchers: int = 0) -> Config:
    """`tiny` with one lag and one loss, without the warm start, which all runs of a seed share.

    Args:
        lag: batches that searchers run ahead.
        loss: one of `LOSSES`.
        seed: of the run.
        steps: of the run.
        searchers: threads that search ahead, no more than a lag has batches; 0 where the learner samples in turns.
    """
    config = load_config("tiny")
    is_balance = loss == "trajectory balance"
    threads = {"backend": "thread", "searchers": min(searchers, lag)} if searchers and lag else {}
    return dataclasses.replace(
        config,
        name=f"tba-lag{lag}-{slug(loss)}-{seed}",
        nesting=NestingConfig(),
        rollout=dataclasses.replace(config.rollout, weights="target"),
        loss=LOSSES[loss],
        # The residuals of trajectory balance are in units of 1 / beta; Adam divides the length of gradients out.
        optimizer=dataclasses.replace(config.optimizer, max_gradient_norm=1e6) if is_balance else config.optimizer,
        search=SearchConfig(lag=lag, **threads),
        train=dataclasses.replace(config.train, seed=seed, steps=steps, updates_per_batch=2),
        evaluation=EvaluationConfig(10, 4, pass_k=4, batch_size=64),
        warm_start=WarmStartConfig(),
    )


def runs_of(
    lags: Sequence[int],
    losses: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    out: Path,
    searchers: int = 0,
    judge_seconds: float = 0.0,
    only_kept: bool = False,
) -> list[Run]:
    """Every run that is asked for, computed where it is not kept.

    Args:
        lags: batches that searchers run ahead.
        losses: of `LOSSES`.
        seeds: of the runs.
        steps: of each run.
        out: where results and shared starts are kept.
        searchers: as `experiment_config` takes it.
        judge_seconds: as `timed_run` takes it.
        only_kept: compute nothing.
    """
    # The judge is no part of the configuration, which says what a kept run is of.
    judge = f"-judge{judge_seconds:g}" if judge_seconds else ""
    wanted = [
        wanted_run(
            experiment_config(lag, loss, seed, steps, searchers),
            out,
            f"lag{lag}-{slug(loss)}{judge}",
            mismatch=f"lag {lag}",
            correction=loss,
        )
        for seed in seeds
        for lag in lags
        for loss in losses
    ]
    measure = partial(timed_run, judge_seconds=judge_seconds)
    return runs_from_starts(wanted, measure, told, load_config("tiny").warm_start, only_kept)


def lost_to_lag(summary: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """How much of its speed each loss loses to a lag.

    Args:
        summary: of `summarise`, with lag 0.

    Returns:
        JSON-able results by loss and lag: the mean `change` of the mean gain from the run of the same seed without a
        lag, and its `interval`.
    """
    fresh = summary["lag 0"]
    found: dict[str, dict[str, dict[str, Any]]] = {loss: {} for loss in fresh}
    for lag, losses in summary.items():
        for loss, one in losses.items():
            if lag == "lag 0":
                continue
            change_S = np.array(one["mean_gain"]) - np.array(fresh[loss]["mean_gain"])
            draws = change_S[seed_draws(len(change_S))].mean(axis=1)
            found[loss][lag] = {"change": float(change_S.mean()), "interval": interval(draws)}
    return found


def times_to_level(runs: Sequence[Run], target: float | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Seconds to a level, beside those of the synchronous run of the same seed and loss.

    Args:
        runs: with one of lag 0 for every seed and loss.
        target: the level, an accuracy; None takes that of the synchronous run.

    Returns:
        JSON-able results by loss and lag: seconds of each seed in which the run came to the level, measured and
        simulated for several numbers of searchers, how many seeds `reached` it, and the `ratio` of the sums with its
        `interval`.
    """
    found = dict[str, dict[str, dict[str, Any]]]()
    for loss in dict.fromkeys(run["correction"] for run in runs):
        # The summary calls the runs that others are compared with `full`.
        names = {run["mismatch"]: run["mismatch"] if _lag(run) else "full" for run in runs}
        own = [run | {"variant": names[run["mismatch"]]} for run in runs if run["correction"] == loss]
        found[loss] = {}
        for variant, summary in summarise_times(own, target).items():
            chosen = [run for run in own if run["variant"] == variant and run["seed"] in summary["seeds"]]
            reached = [steps_to_reach(run, level) for run, level in zip(chosen, summary["levels"], strict=True)]
            found[loss][chosen[0]["mismatch"]] = summary["seconds"] | {
                "steps_to_level": reached,
                "simulated": {
                    searchers: [simulated(run, steps, searchers) for run, steps in zip(chosen, reached, strict=True)]
                    for searchers in SEARCHERS
                    if searchers <= max(_lag(chosen[0]), 1)
                },
            }
    return found


def steps_to_reach(run: Run, level: float) -> float:
    """Steps until a run first reached a level; all of them where it never did.

    Args:
        run: of one seed.
        level: accuracy, as a share.
    """
    steps = {"step": [1.0] * len(run["steps"]["seconds"])}
    return cost_to_reach(*curve(run | {"steps": steps}, "step"), level)[0]


def simulated(run: Run, steps: float, searchers: int) -> float:
    """Seconds of the first steps if searchers worked beside the learner, each with devices of its own.

    Args:
        run: whose batches and updates say how long these take.
        steps: how many; rounded up.
        searchers: how many; a run without a lag has none and samples in turns.
    """
    lag, updates = _lag(run), max(math.ceil(steps), 1)
    # A median, because the first steps compile.
    sample, update = (float(np.median(run["steps"][name])) for name in ("search_seconds", "update_seconds"))
    search = SearchConfig(lag=lag, backend="thread", searchers=searchers) if lag else SearchConfig()
    return simulate(Times(np.full(updates + lag, sample), np.full(updates, update)), search).seconds


def _lag(run: Run) -> int:
    return run["config"]["search"]["lag"]


def table_of_times(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Those times as text.

    Args:
        found: of `times_to_level`.
    """
    rows = [
        [
            loss,
            lag,
            f"{one['reached']} of {len(one['to_level'])}",
            f"{np.mean(one['steps_to_level']):.0f}",
            f"{np.mean(one['to_level']):.1f}",
            f"{one['ratio']:.2f}",
            "{:.2f}..{:.2f}".format(*one["interval"]),
            ", ".join(f"{searchers}: {np.mean(seconds):.1f}" for searchers, seconds in one["simulated"].items()),
        ]
        for loss, lags in found.items()
        for lag, one in lags.items()
    ]
    header = ["loss", "searching", "reached", "steps", "s to level", "of lag 0's", "95 %", "simulated s, by searchers"]
    return table(header, rows)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, prints the tables and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("tba", __doc__)
    add_list(parser, "--lags", (0, 16, 48), type=whole(0), help="batches that searchers are ahead")
    add_list(parser, "--losses", LOSSES, choices=LOSSES, metavar="NAME")
    add_runs(parser, "experiment-tba", steps=100)
    parser.add_argument("--searchers", type=whole(0), default=0, help="threads beside the learner; 0 samples in turns")
    parser.add_argument("--judge-seconds", type=SECONDS, default=0.0, help="that each batch waits for its rewards")
    parser.add_argument(
        "--target", type=INNER_SHARE, default=None, help="level of the times; it alone computes no run anew"
    )
    add_json(parser, "the summary")
    known = parser.parse_args(arguments)
    check_baseline("--losses", known.losses, BASELINE)
    if known.target is not None and 0 not in known.lags:
        parser.error("--target needs 0 among --lags, since times are compared with those of synchronous runs")
    compile_once(known.out)
    options = known.searchers, known.judge_seconds
    runs = runs_of(known.lags, known.losses, known.seeds, known.steps, known.out, *options)
    summary, times = summarise(runs), times_to_level(runs, known.target) if 0 in known.lags else {}
    print(tables(summary))
    lost = lost_to_lag(summary) if 0 in known.lags else {}
    if any(lost.values()):
        rows = [
            [loss, lag, f"{one['change']:+.3f}", "{:+.3f}..{:+.3f}".format(*one["interval"])]
            for loss, lags in lost.items()
            for lag, one in lags.items()
        ]
        print(f"\nMean gain, from lag 0 to a lag\n\n{table(['loss', 'lag', 'change', '95 %'], rows)}")
    if times:
        print(f"\nSeconds to the level\n\n{table_of_times(times)}")
    figure = known.out / "tba.png"
    draw(runs, figure, title="tiny, old completions")
    keep_json(known.json, {"versions": versions(), "lags": summary, "lost": lost, "times": times})
    print(f"written: {figure}")


if __name__ == "__main__":
    sys.exit(main())
