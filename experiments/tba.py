"""Trajectory balance beside policy gradients, where completions are many updates old.

    python -m experiments.tba
    python -m experiments.tba --lags 0 32 --losses "no correction" "trajectory balance" --seeds 0 1

`tiny` without nesting, so that age alone is off-policy. Searchers run `search.lag` batches ahead, and each batch is
trained on in two passes, so it is 2 x lag updates old. All runs of a seed start from the same weights, take the same
steps and draw as many completions; they differ in loss and lag. What is finished is kept as JSON in `--out` and not
computed again. The command ends with a table for each lag and a figure.

A run's speed is its mean gain: held-out accuracy above that of the start, averaged over all evaluations. It is compared
with the run of the same seed and lag without a correction. Intervals are 95 % percentile bootstraps over seeds.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.corrections import BASELINE, Run, draw, slug, summarise, tables, told
from experiments.equal_time import timed_run
from experiments.runs import compile_once, kept_run
from nested_reft.cli.arguments import Parser, whole
from nested_reft.cli.bad_input import BadInput
from nested_reft.evaluation import EvaluationConfig
from nested_reft.json_files import write_json
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.registry import ObjectiveConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.run_directory import versions
from nested_reft.training.config import Config, load_config
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.warm_start import WarmStartConfig

PLAIN = PolicyGradientConfig("group_std", "one", "token", "token_mean")
# The clip of GRPO takes the policy that sampled for the one at rollout time: with old batches that is not the same.
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


def experiment_config(lag: int, loss: str, seed: int, steps: int) -> Config:
    """`tiny` with one lag and one loss, without the warm start, which all runs of a seed share.

    Args:
        lag: batches that searchers run ahead.
        loss: one of `LOSSES`.
        seed: of the run.
        steps: of the run.
    """
    config = load_config("tiny")
    is_balance = loss == "trajectory balance"
    return dataclasses.replace(
        config,
        name=f"tba-lag{lag}-{slug(loss)}-{seed}",
        nesting=NestingConfig(),
        rollout=dataclasses.replace(config.rollout, weights="target"),
        loss=LOSSES[loss],
        # The residuals of trajectory balance are in units of 1 / beta; Adam divides the length of gradients out.
        optimizer=dataclasses.replace(config.optimizer, max_gradient_norm=1e6) if is_balance else config.optimizer,
        search=SearchConfig(lag=lag),
        train=dataclasses.replace(config.train, seed=seed, steps=steps, updates_per_batch=2),
        evaluation=EvaluationConfig(10, 4, pass_k=4, batch_size=64),
        warm_start=WarmStartConfig(),
    )


def runs_of(lags: Sequence[int], losses: Sequence[str], seeds: Sequence[int], steps: int, out: Path) -> list[Run]:
    """Every run that is asked for, computed where it is not kept.

    Args:
        lags: batches that searchers run ahead.
        losses: of `LOSSES`.
        seeds: of the runs.
        steps: of each run.
        out: where results and shared starts are kept.
    """
    warm_start, found = load_config("tiny").warm_start, list[dict[str, Any]]()
    for seed in seeds:
        for lag in lags:
            for loss in losses:
                config = experiment_config(lag, loss, seed, steps)
                file = out / f"lag{lag}-{slug(loss)}-seed{seed}.json"
                run = kept_run(file, config, timed_run, told, warm_start)
                found.append(run | {"mismatch": f"lag {lag}", "correction": loss, "seed": seed})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is not finished yet, prints the tables and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = Parser("experiments.tba", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lags", type=whole(0), nargs="+", default=[0, 16, 48])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="NAME")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=whole(1), default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/experiment-tba"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary here")
    try:
        known = parser.parse_args(arguments)
        if BASELINE not in known.losses:
            raise BadInput(f"--losses lacks '{BASELINE}', which the others are compared with")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compile_once(known.out)
    runs = runs_of(known.lags, known.losses, known.seeds, known.steps, known.out)
    summary = summarise(runs)
    print(tables(summary))
    figure = known.out / "tba.png"
    draw(runs, figure, title="tiny, old completions")
    if known.json is not None:
        write_json(known.json, {"versions": versions(), "lags": summary})
    print(f"written: {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
