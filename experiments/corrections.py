"""Which correction learns fastest at equal samples, where nested rollouts are a little or far off?

    python -m experiments.corrections tiny
    python -m experiments.corrections smollm2 --mismatch small --corrections "no correction" "sequence TIS"

All runs of a seed start from the same weights, take the same steps and draw as many completions. They differ in the
loss's correction alone. What is finished is kept as JSON in `--out` and not computed again, so the command can be
stopped and repeated. It ends with a table for each mismatch and a figure.

A run's speed is its mean gain: held-out accuracy above that of the start, averaged over all evaluations. It is compared
with the run of the same seed and mismatch without a correction. Intervals are 95 % percentile bootstraps over seeds.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arguments import add_json, add_list, add_runs, check_baseline, check_folder, command, experiment_parser
from experiments.equal_time import timed_run
from experiments.runs import compile_once, runs_from_starts, wanted_run
from nested_reft.cli.arguments import keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses import presets
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.mix_control import MixControlConfig
from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sweeps.intervals import interval, seed_draws
from nested_reft.training.config import Config, load_config
from nested_reft.training.warm_start import WarmStartConfig

BASELINE = "no correction"
MIXED = "mixed to an ESS of 0.5"

Run = dict[str, Any]  # what `equal_time.timed_run` returns, with its `mismatch`, `correction` and `seed`


@dataclass(frozen=True)
class Task:
    """What is learnt, and how far off its rollouts are.

    Attributes:
        base: the run without nesting; its warm start makes the shared start of a seed.
        mismatches: the layers that rollouts skip, by name.
    """

    base: Config
    mismatches: dict[str, NestingConfig]


def tiny() -> Task:
    """The shipped `tiny`: repeat a number of 3 to 6 digits, at most 8 tokens."""
    mismatches = {"small": NestingConfig(skip_ratio=0.2, border=1), "large": NestingConfig(skip_ratio=0.4, border=1)}
    return Task(_base("tiny", steps=100, every_steps=10, samples=4), mismatches)


def smollm2() -> Task:
    """`smollm2_step_sum`: chains of additions, at most 44 tokens."""
    mismatches = {
        "small": NestingConfig(choice="fixed", layers=(5,)),
        "large": NestingConfig(choice="fixed", layers=(3, 4, 5)),
    }
    base = _base("smollm2_step_sum", steps=32, every_steps=8, samples=0)
    # Most processors have no products in bfloat16, and the same numbers should come out of all of them.
    train = dataclasses.replace(base.train, compute_dtype="float32")
    return Task(dataclasses.replace(base, train=train), mismatches)


def _base(name: str, steps: int, every_steps: int, samples: int) -> Config:
    """A shipped configuration without nesting, with the loss that corrections are put into."""
    config = load_config(name)
    return dataclasses.replace(
        config,
        nesting=NestingConfig(),
        rollout=dataclasses.replace(config.rollout, weights="target"),
        loss=PolicyGradientConfig("group_std", "one", "token", "token_mean"),
        train=dataclasses.replace(config.train, steps=steps),
        evaluation=EvaluationConfig(every_steps, samples, pass_k=max(samples, 1), batch_size=64),
    )


TASKS: dict[str, Callable[[], Task]] = {"tiny": tiny, "smollm2": smollm2}


def _changed(**fields: Any) -> Callable[[PolicyGradientConfig], PolicyGradientConfig]:
    return lambda loss: dataclasses.replace(loss, **({"bias_mitigation": "base"} | fields))


# What each correction makes of the loss that has none. The tasks make one update per batch, so that the clips of
# published presets have nothing to do, and three policies are two.
CORRECTIONS: dict[str, Callable[[PolicyGradientConfig], PolicyGradientConfig]] = {
    BASELINE: lambda loss: loss,
    "token": _changed(),
    "prefix, truncated at 2": _changed(level="prefix", truncate_at=2.0),
    "sequence": _changed(level="sequence"),
    "sequence, truncated at 5": _changed(level="sequence", truncate_at=5.0),
    "geometric": _changed(level="geometric"),
    "retrace": _changed(bias_mitigation="retrace"),
    **presets.CORRECTIONS,
    "sequence TIS, leave-one-out": _changed(level="sequence", truncate_at=2.0, advantage="leave_one_out"),
    "sequence TIS, weighted leave-one-out": _changed(
        level="sequence", truncate_at=2.0, advantage="weighted_leave_one_out"
    ),
    "budgeted rejection": _changed(level="sequence", obrs_lambda=1.0),
    MIXED: _changed(bias_mitigation="interpolated", level="sequence"),
}


def corrected_config(task: Task, mismatch: str, correction: str, seed: int, steps: int | None = None) -> Config:
    """The run of a correction, without the warm start, which all runs of a seed share.

    Args:
        task: what is learnt.
        mismatch: one of the task's.
        correction: one of `CORRECTIONS`.
        seed: of the run.
        steps: of the run; None takes the task's.
    """
    base = task.base
    assert isinstance(base.loss, PolicyGradientConfig)
    return dataclasses.replace(
        base,
        name=f"corrections-{mismatch}-{slug(correction)}-{seed}",
        nesting=task.mismatches[mismatch],
        loss=CORRECTIONS[correction](base.loss),
        mix_control=MixControlConfig(ess=0.5 if correction == MIXED else None),
        train=dataclasses.replace(base.train, seed=seed, steps=base.train.steps if steps is None else steps),
        warm_start=WarmStartConfig(),
    )


def runs_of(
    task: Task,
    mismatches: Sequence[str],
    corrections: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    out: Path,
) -> list[Run]:
    """Every run that is asked for, computed where it is not kept.

    Args:
        task: what is learnt.
        mismatches: of the task.
        corrections: of `CORRECTIONS`.
        seeds: of the runs.
        steps: of each run; None takes the task's.
        out: where results and shared starts are kept.
    """
    wanted = [
        wanted_run(
            corrected_config(task, mismatch, correction, seed, steps),
            out,
            f"{mismatch}-{slug(correction)}",
            mismatch=mismatch,
            correction=correction,
        )
        for seed in seeds
        for mismatch in mismatches
        for correction in corrections
    ]
    return runs_from_starts(wanted, timed_run, told, task.base.warm_start)


def told(run: Run) -> str:
    """What is printed of a run.

    Args:
        run: a new one.
    """
    return f"mean gain {mean_gain(run):+.3f}"


def mean_gain(run: Run) -> float:
    """Accuracy above that of the start, averaged over all later evaluations.

    Args:
        run: with at least one evaluation after the start.
    """
    start, *later = run["evaluations"]["accuracy"]
    return float(np.mean(later) - start)


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each correction beside the runs without one, of the same seeds.

    Args:
        runs: with one of `BASELINE` for every mismatch and seed.

    Returns:
        JSON-able results by mismatch and correction, in the order of the runs.
    """
    baseline = {(run["mismatch"], run["seed"]): run for run in runs if run["correction"] == BASELINE}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for mismatch in dict.fromkeys(run["mismatch"] for run in runs):
        own = [run for run in runs if run["mismatch"] == mismatch]
        found[mismatch] = {}
        for correction in dict.fromkeys(run["correction"] for run in own):
            chosen = [run for run in own if run["correction"] == correction]
            found[mismatch][correction] = _compared(chosen, [baseline[mismatch, run["seed"]] for run in chosen])
    return found


def _compared(runs: Sequence[Run], baselines: Sequence[Run]) -> dict[str, Any]:
    gain_S = np.array([mean_gain(run) for run in runs])
    difference_S = gain_S - np.array([mean_gain(run) for run in baselines])
    draw_RxS = seed_draws(len(runs))
    return {
        "seeds": [run["seed"] for run in runs],
        "mean_gain": gain_S.tolist(),
        "over_baseline": float(difference_S.mean()),
        "interval": interval(difference_S[draw_RxS].mean(axis=1)),
        "final": [run["evaluations"]["accuracy"][-1] for run in runs],
        "tokens": float(np.mean([np.sum(run["steps"]["tokens"]) for run in runs])),
        **{name: _mean([run["steps"][name] for run in runs]) for name in ("ess_token", "kl_behavior_target")},
    }


def _mean(values: Sequence[Sequence[float | None]]) -> float | None:
    """The mean of the values that there are; None without any."""
    numbers = np.array(values, dtype=float)  # None becomes NaN
    return float(np.nanmean(numbers)) if np.isfinite(numbers).any() else None


def tables(summary: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The summary as text, the fastest correction of each mismatch first.

    Args:
        summary: of `summarise`.
    """
    header = ["correction", "mean gain", "over none", "95 %", "final accuracy", "ESS", "tokens"]
    parts = []
    for mismatch, found in summary.items():
        kl = found[BASELINE]["kl_behavior_target"]
        rows = [
            [
                correction,
                f"{np.mean(one['mean_gain']):.3f}",
                f"{one['over_baseline']:+.3f}",
                "{:+.3f}..{:+.3f}".format(*one["interval"]),
                f"{np.mean(one['final']):.3f}",
                "-" if one["ess_token"] is None else f"{one['ess_token']:.2f}",
                f"{one['tokens']:.0f}",
            ]
            for correction, one in sorted(found.items(), key=lambda item: -float(np.mean(item[1]["mean_gain"])))
        ]
        size = "" if kl is None else f", KL(behavior || target) {kl:.2f} nats a token"
        parts.append(f"mismatch: {mismatch}{size}, {len(found[BASELINE]['seeds'])} seeds\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def draw(runs: Sequence[Run], path: Path, title: str) -> None:
    """Held-out accuracy over steps, the mean of the seeds, a panel for each mismatch.

    Args:
        runs: of all corrections.
        path: the PNG file.
        title: of the figure.
    """
    mismatches = list(dict.fromkeys(run["mismatch"] for run in runs))
    figure = figure_maker()(figsize=(5 * len(mismatches) + 2.5, 4.4), layout="constrained")
    panels = figure.subplots(1, len(mismatches), sharey=True, squeeze=False)[0]
    for axis, mismatch in zip(panels, mismatches, strict=True):
        own = [run for run in runs if run["mismatch"] == mismatch]
        for index, correction in enumerate(dict.fromkeys(run["correction"] for run in own)):
            chosen = [run["evaluations"] for run in own if run["correction"] == correction]
            accuracy = np.mean([evaluations["accuracy"] for evaluations in chosen], axis=0)
            is_baseline = correction == BASELINE
            style = {"color": "black", "zorder": 3} if is_baseline else {"linestyle": ("-", "--", ":")[index % 3]}
            axis.plot(chosen[0]["step"], accuracy, linewidth=1.4, label=correction, **style)
        axis.set(title=f"mismatch: {mismatch}", xlabel="step")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.suptitle(f"{title}: mean of the seeds")
    figure.savefig(path, dpi=80)


def slug(correction: str) -> str:
    """A correction's name as part of a file's.

    Args:
        correction: its name in tables.
    """
    return correction.replace(",", "").replace(" ", "_")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, prints the tables and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("corrections", __doc__)
    parser.add_argument("task", choices=TASKS)
    add_list(parser, "--mismatch", ("small", "large"), choices=("small", "large"))
    add_list(parser, "--corrections", CORRECTIONS, choices=CORRECTIONS, metavar="NAME")
    add_runs(parser, "experiment-corrections", steps=None)
    add_json(parser, "the summary")
    known = parser.parse_args(arguments)
    check_baseline("--corrections", known.corrections, BASELINE)
    out = known.out / known.task
    with checking_input():
        check_folder(out)
    compile_once(out)
    runs = runs_of(TASKS[known.task](), known.mismatch, known.corrections, known.seeds, known.steps, out)
    summary = summarise(runs)
    print(tables(summary))
    figure = known.out / f"{known.task}.png"
    draw(runs, figure, title=known.task)
    keep_json(known.json, {"task": known.task, "versions": versions(), "mismatches": summary})
    print(f"written: {figure}")


if __name__ == "__main__":
    sys.exit(main())
