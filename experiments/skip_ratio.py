"""What a skip ratio costs and gains: accuracy, speed of rollouts, ESS and KL by ratio, correction and choice of layers.

    python -m experiments.skip_ratio                       # `tiny`: minutes on a laptop
    python -m experiments.skip_ratio smollm2               # one night on two cores
    python -m experiments.skip_ratio qwen_math             # the paper's grid, on a TPU or GPU
    nested-reft compare runs/experiment-skip-ratio/tiny    # the table once more

All runs of a seed start from the same weights, take the same steps and draw as many completions. They differ in how
many layers rollouts skip, which layers these are and how the loss corrects for it. Ratio 0 is the full model; it has no
mismatch to correct, so there is one such run for each task and seed. It is what the others are compared with.

`base`, `one`, `practical` and `retrace` are the paper's variants of the importance weight (`loss.bias_mitigation`).
Layers are drawn uniformly, or those that are measured to be the cheapest, or these with bridges in their place.

What is finished is kept as JSON in `--out` and not computed again, and a run that was stopped is continued. The command
ends with a table for each task and a figure. `ideal` is the speed-up that the plan's price allows, by the least time of
a decode step. Seconds to `--target` leave out evaluations and compiling. Intervals are 95 % percentile bootstraps over
seeds, and differences are paired by seed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.arguments import add_json, add_list, add_runs, check_folder, command, experiment_parser
from experiments.runs import compile_once
from nested_reft.bridging import BridgeConfig
from nested_reft.cli.arguments import INNER_SHARE, keep_json
from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.cli.output import complain, say
from nested_reft.cli.sweep import say_missing
from nested_reft.data.sources import DatasetSource
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.run_directory import versions
from nested_reft.sweeps.grid import grid
from nested_reft.sweeps.kept import Result, Wanted
from nested_reft.sweeps.sweep import Missing, changes, compare, run_sweep
from nested_reft.training.config import Config, load_config

FULL = "full"  # the label of ratio 0
# The variants of the paper, and what else of the loss each of them needs.
VARIANTS: dict[str, dict[str, Any]] = {
    "one": {"bias_mitigation": "one", "truncate_at": None},
    "base": {"bias_mitigation": "base", "truncate_at": 2.0},
    "practical": {"bias_mitigation": "practical", "truncate_at": None},
    "retrace": {"bias_mitigation": "retrace", "truncate_at": None},
}
PLANS = ("uniform", "measured", "bridged")


@dataclass(frozen=True)
class Preset:
    """A grid.

    Attributes:
        tasks: the runs without nesting.
        ratios: of layers that rollouts leave out, 0 not among them.
        variants: of `VARIANTS`.
        plans: how the layers are chosen, by name.
        measure: that variants are compared by.
        target: accuracy to which seconds are counted.
    """

    tasks: tuple[Config, ...]
    ratios: tuple[float, ...]
    variants: tuple[str, ...]
    plans: dict[str, NestingConfig]
    measure: str
    target: float


def _full(name: str, evaluation: EvaluationConfig | None = None, **train: Any) -> Config:
    """A shipped configuration that samples with the full model in the weights that are trained."""
    config = load_config(name)
    return dataclasses.replace(
        config,
        nesting=NestingConfig(),
        rollout=dataclasses.replace(config.rollout, weights="target"),
        train=dataclasses.replace(config.train, **train),
        evaluation=evaluation or config.evaluation,
    )


def tiny() -> Preset:
    """The shipped `tiny`: repeat a number of 3 to 6 digits with six layers, of which one or two are left out."""
    base = _full("tiny", EvaluationConfig(10, 4, pass_k=4, batch_size=128), steps=100, checkpoint_every=50)
    plans = {"uniform": NestingConfig(), "measured": _measured(every=10)}
    # With one update on each batch `practical` is `one`.
    return Preset((base,), (0.2, 0.4), ("one", "base"), plans, "sampled_accuracy", target=0.7)


def smollm2() -> Preset:
    """`smollm2_step_sum`: chains of additions. Layers are drawn, measured, or measured and bridged."""
    base = _full("smollm2_step_sum", EvaluationConfig(8, 0, batch_size=64), checkpoint_every=8)
    bridged = NestingConfig(
        choice="measured", divergence_temperature=0.0, bridge=BridgeConfig("per_layer", ridge=0.03, tokens=4000)
    )
    plans = {"uniform": NestingConfig(), "measured": _measured(every=8), "bridged": bridged}
    return Preset((base,), (0.1, 0.2, 0.3), ("one", "base"), plans, "accuracy", target=0.5)


def qwen_math() -> Preset:
    """Qwen2.5-Math-1.5B-Instruct on GSM8K, SVAMP and MATH, with the ratios and variants of the paper."""
    # Two updates on each batch, since `practical` is `one` with one of them.
    base = _full("qwen_math_gsm8k", updates_per_batch=2)
    # The variants alone differ: no clip acts beside them, and all runs sample as many completions.
    loss = PolicyGradientConfig("group_std", "base", "token", "token_mean", truncate_at=2.0)
    base = dataclasses.replace(base, loss=loss, dynamic_sampling=DynamicSamplingConfig())
    tasks = tuple(
        dataclasses.replace(
            base,
            name=f"qwen_math_{dataset}",
            data=dataclasses.replace(base.data, sources=(DatasetSource(dataset, dataset, None, 256, seed=0),)),
        )
        for dataset in ("gsm8k", "svamp", "math")
    )
    return Preset(
        tasks, (0.05, 0.1, 0.15), tuple(VARIANTS), {"uniform": NestingConfig()}, "sampled_accuracy", target=0.7
    )


def _measured(every: int) -> NestingConfig:
    """The cheapest layers, as they are measured on the run's own rollouts; drawn uniformly before that."""
    return NestingConfig(choice="measured", divergence_temperature=0.0, remeasure_every=every)


PRESETS: dict[str, Callable[[], Preset]] = {"tiny": tiny, "smollm2": smollm2, "qwen_math": qwen_math}


def variants_of(preset: Preset, steps: int | None = None) -> list[tuple[str, Config]]:
    """Label and configuration of each run of a seed, the full model of each task first.

    Args:
        preset: the grid.
        steps: of each run; None takes the preset's.
    """
    found = list[tuple[str, Config]]()
    for task in preset.tasks:
        assert isinstance(task.loss, PolicyGradientConfig)  # the variants are fields of it
        train = task.train if steps is None else dataclasses.replace(task.train, steps=steps)
        base = dataclasses.replace(task, train=train)
        # Tables are by task, so labels need the task only to tell runs apart.
        prefix = f"{task.name}, " if len(preset.tasks) > 1 else ""
        found.append((f"{prefix}{FULL}", base))
        for plan, nesting in preset.plans.items():
            for ratio in preset.ratios:
                for variant in preset.variants:
                    loss = dataclasses.replace(task.loss, **VARIANTS[variant])
                    changed = {"nesting": dataclasses.replace(nesting, skip_ratio=ratio), "loss": loss}
                    label = f"{prefix}{plan} {ratio:g}, {variant}"
                    found.append((label, dataclasses.replace(base, **changed)))
    return found


def runs_of(
    preset: Preset, seeds: Sequence[int], steps: int | None, out: Path, only_kept: bool = False
) -> tuple[list[Result], list[Missing]]:
    """Every run of a preset, computed where it is not kept, and what is missing.

    Args:
        preset: the grid.
        seeds: of the runs.
        steps: of each run; None takes the preset's.
        out: the folder of the sweep.
        only_kept: compute nothing.
    """
    return run_sweep(_wanted(preset, seeds, steps, out), out, only_kept)


def _wanted(preset: Preset, seeds: Sequence[int], steps: int | None, out: Path) -> list[Wanted]:
    return grid(variants_of(preset, steps), seeds, out)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, prints the tables and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("skip_ratio", __doc__)
    parser.add_argument("preset", choices=PRESETS, nargs="?", default="tiny")
    add_runs(parser, "experiment-skip-ratio", steps=None)
    add_list(parser, "--variants", VARIANTS, choices=VARIANTS, help="of those that the preset has")
    add_list(parser, "--plans", PLANS, choices=PLANS, help="of those that the preset has")
    parser.add_argument("--target", type=INNER_SHARE, help="accuracy to reach")
    parser.add_argument("--report-only", action="store_true", help="tables and figure of the runs that are there")
    add_json(parser, "the summary")
    known = parser.parse_args(arguments)
    preset, out = PRESETS[known.preset](), known.out / known.preset
    variants = tuple(name for name in preset.variants if name in known.variants)
    plans = {name: nesting for name, nesting in preset.plans.items() if name in known.plans}
    if not variants or not plans:
        option, own = ("--plans", preset.plans) if variants else ("--variants", preset.variants)
        raise BadInput(f"{option} names none of the preset '{known.preset}'; it has {', '.join(own)}")
    preset = dataclasses.replace(preset, variants=variants, plans=plans)
    with checking_input():
        check_folder(out)
        changed = changes(_wanted(preset, known.seeds, known.steps, out), out)
    if changed:
        complain(f"warning: {changed}")
    compile_once(known.out)
    results, missing = runs_of(preset, known.seeds, known.steps, out, known.report_only)
    say_missing(missing, len(results) + len(missing))
    if not results:
        raise BadInput(f"no run in '{out}' has a result")
    figure = out / "comparison.png"
    text, tasks, no_figure = compare(results, preset.measure, known.target or preset.target, figure)
    say(text)
    keep_json(known.json, {"preset": known.preset, "versions": versions(), "tasks": tasks})
    say(f"\nno figure: {no_figure}" if no_figure else f"\nwritten: {figure}")


if __name__ == "__main__":
    sys.exit(main())
