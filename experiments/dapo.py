"""DAPO's parts switched on one at a time, on `tiny_dapo`.

    python -m experiments.dapo                      # five seeds of five variants

Every variant holds all parts of those above it, and all runs of a seed start from the same warm-started model. What is
finished is kept as JSON in `--out` and not computed again. The table shows held-out accuracy of samples (mean over the
sources) and, over the last ten steps, the policy's entropy, the length of its completions, and generation batches for
each update. Brackets hold the standard error over the seeds.
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
from nested_reft.json_files import write_json
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sweeps.kept import Result
from nested_reft.training.config import Config, load_config
from nested_reft.training.warm_start import WarmStartConfig

VARIANTS = ("grpo", "clip_higher", "overlong_punishment", "token_mean", "dynamic_sampling")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, and prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("dapo", __doc__)
    add_list(parser, "--variants", VARIANTS, choices=VARIANTS)
    add_runs(parser, "experiment-dapo", steps=60, least=EVERY, multiple=EVERY)
    add_json(parser, "the table")
    known = parser.parse_args(arguments)
    compile_once(known.out)
    results = runs_of(known.variants, known.seeds, known.steps, known.out)
    rows = [_row(variant, [result for result in results if result["variant"] == variant]) for variant in known.variants]
    columns = ["with", "accuracy before", "accuracy after", "entropy", "tokens", "generation batches", "seconds"]
    print(table(columns, rows))
    found = {"versions": versions(), "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
    write_json(known.out / "results.json", found)
    keep_json(known.json, found)
    print(f"written: {known.out / 'results.json'}")


def runs_of(
    variants: Sequence[str], seeds: Sequence[int], steps: int, out: Path, only_kept: bool = False
) -> list[Result]:
    """Every run that is asked for, computed where it is not kept.

    Args:
        variants: of `VARIANTS`.
        seeds: of the runs.
        steps: of each run.
        out: where results and shared starts are kept.
        only_kept: compute nothing.
    """
    wanted = [
        wanted_run(variant_config(variant, seed, steps), out, variant, variant=variant)
        for seed in seeds
        for variant in variants
    ]
    return runs_from_starts(wanted, partial(measured_run, out=out), "{0[seconds]:.0f} s".format, only_kept=only_kept)


def variant_config(variant: str, seed: int, steps: int) -> Config:
    """`tiny_dapo` without the parts that come after `variant`, and without the warm start, which is shared.

    Args:
        variant: one of `VARIANTS`.
        seed: of the run.
        steps: of the run.
    """
    full = load_config("tiny_dapo")
    have = VARIANTS[: VARIANTS.index(variant) + 1]
    # Other objectives have no clips.
    assert isinstance(full.loss, PolicyGradientConfig)
    loss = dataclasses.replace(
        full.loss,
        # Without clip-higher both sides have the lower one.
        clip_high=full.loss.clip_high if "clip_higher" in have else full.loss.clip_low,
        normalization=full.loss.normalization if "token_mean" in have else "sequence_mean",
    )
    cache_tokens = full.reward.overlong_cache_tokens if "overlong_punishment" in have else 0
    return dataclasses.replace(
        full,
        name=f"dapo-{variant}-{seed}",
        loss=loss,
        reward=dataclasses.replace(full.reward, overlong_cache_tokens=cache_tokens),
        dynamic_sampling=full.dynamic_sampling if "dynamic_sampling" in have else DynamicSamplingConfig(),
        train=dataclasses.replace(full.train, seed=seed, steps=steps),
        evaluation=dataclasses.replace(full.evaluation, samples_per_prompt=4, pass_k=4),
        warm_start=WarmStartConfig(),
    )


def _row(variant: str, results: list[dict[str, Any]]) -> list[str]:
    def mean(values: Sequence[float]) -> str:
        spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return f"{np.mean(values):.3f} ({spread:.3f})"

    def late(name: str) -> list[float]:
        return [float(np.mean(result["metrics"][name][-EVERY:])) for result in results]

    accuracy = [np.mean(result["accuracy"], axis=1) for result in results]
    return [
        ("" if variant == VARIANTS[0] else "+ ") + variant,
        mean([curve[0] for curve in accuracy]),
        mean([curve[-1] for curve in accuracy]),
        mean(late("entropy")),
        mean(late("completion_tokens")),
        mean(late("generation_batches")),
        mean([result["seconds"] for result in results]),
    ]


if __name__ == "__main__":
    sys.exit(main())
