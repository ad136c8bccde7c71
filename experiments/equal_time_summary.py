"""What runs of `equal_time` say: time to a level, its share of the full model's, and where the time goes.

All runs of a seed start at one accuracy. The level that they have to reach lies above it by `SHARE_OF_GAIN` of what the
seed's full run gains. Accuracy is smoothed over evaluations. A run that never reaches the level counts with its whole
time, so its ratio is a lower bound. Ratios are of sums over seeds. Their intervals are 95 % percentile bootstraps in
which the runs of a seed stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.sweeps.intervals import interval, seed_draws
from nested_reft.sweeps.results import cost_to_reach

SMOOTH = 3  # evaluations that one point of a curve is the mean of
SHARE_OF_GAIN = 0.9
TARGET = 0.7  # the share of the full model's time that is aimed at
UNITS = ("seconds", "tokens")
NOTHING_LEARNT = "open: no full run gained accuracy"

Run = dict[str, Any]  # what `equal_time.timed_run` returns, with its `variant` and `seed`


def curve(run: Run, unit: str) -> tuple[Float[np.ndarray, " E"], Float[np.ndarray, " E"]]:
    """Cost until each evaluation, and the mean of its accuracy and those of the evaluations before.

    Args:
        run: of one seed.
        unit: of the cost, one of `UNITS`.
    """
    cost = np.concatenate([[0.0], np.cumsum(run["steps"][unit])])[run["evaluations"]["step"]]
    accuracy = run["evaluations"]["accuracy"]
    return cost, np.array([np.mean(accuracy[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(accuracy))])


def level_of(full: Run) -> float:
    """The accuracy that the runs of a seed have to reach.

    Args:
        full: the seed's run without nesting.
    """
    _, accuracy = curve(full, "seconds")
    return float(accuracy[0] + SHARE_OF_GAIN * (accuracy[-1] - accuracy[0]))


def summarise(runs: Sequence[Run], level: float | None = None) -> dict[str, dict[str, Any]]:
    """Each variant beside the full runs of the same seeds.

    Args:
        runs: with a `full` run of every seed.
        level: the accuracy that all runs have to reach; None takes `level_of` the full run of each seed.

    Returns:
        JSON-able results by variant, in the order of the runs. Seeds whose full run gained nothing are left out; the
        verdict says so where that is all of them.
    """
    full = {run["seed"]: run for run in runs if run["variant"] == "full"}
    levels = {seed: level_of(run) if level is None else level for seed, run in full.items()}
    # Where the full run gains nothing there is no level to reach.
    learnt = {seed for seed, run in full.items() if levels[seed] > curve(run, "seconds")[1][0]}
    runs = [run for run in runs if run["seed"] in learnt or not learnt]
    variants = dict.fromkeys(run["variant"] for run in runs)
    found = {v: _compared([run for run in runs if run["variant"] == v], full, levels) for v in variants}
    if not learnt:
        found = {variant: summary | {"verdict": NOTHING_LEARNT} for variant, summary in found.items()}
    return found


def _compared(runs: Sequence[Run], full: dict[int, Run], level_of_seed: dict[int, float]) -> dict[str, Any]:
    baselines = [full[run["seed"]] for run in runs]
    levels = [level_of_seed[run["seed"]] for run in runs]
    found: dict[str, Any] = {"seeds": [run["seed"] for run in runs], "levels": levels}
    # The same draws serve all intervals of a variant.
    draw_RxS = seed_draws(len(runs))
    for unit in UNITS:
        cost = [cost_to_reach(*curve(run, unit), level) for run, level in zip(runs, levels, strict=True)]
        own_S = np.array([value for value, _ in cost])
        full_S = np.array(
            [cost_to_reach(*curve(r, unit), level)[0] for r, level in zip(baselines, levels, strict=True)]
        )
        # A run that starts at its level took no time to it; the bound prevents a division by zero.
        ratio_R = own_S[draw_RxS].sum(axis=1) / np.maximum(full_S[draw_RxS].sum(axis=1), 1e-9)
        found[unit] = {
            "reached": sum(reached for _, reached in cost),
            "to_level": own_S.tolist(),
            "ratio": float(own_S.sum() / max(full_S.sum(), 1e-9)),
            "interval": interval(ratio_R),
        }
    final_S, full_final_S = (np.array([curve(run, "seconds")[1][-1] for run in each]) for each in (runs, baselines))
    gain_S = final_S - full_final_S
    return found | {
        "start": float(np.mean([run["evaluations"]["accuracy"][0] for run in runs])),
        "final": final_S.tolist(),
        "greedy": [float(np.mean([run["evaluations"]["greedy"][i] for run in runs])) for i in (0, -1)],
        "gain": float(gain_S.mean()),
        "gain_interval": interval(gain_S[draw_RxS].mean(axis=1)),
        "verdict": verdict(found["seconds"], len(runs)),
        "steps": step_costs(runs),
        "kl_by_quarter": kl_by_quarter(runs),
        "load": float(np.max([run["load"] for run in runs])),
    }


def verdict(seconds: dict[str, Any], seeds: int) -> str:
    """Whether a variant takes at most `TARGET` of the full model's time.

    Args:
        seconds: its `ratio`, the ratio's `interval`, and how many seeds `reached` the level.
        seeds: how many there are.
    """
    low, high = seconds["interval"]
    if low > TARGET:
        return "missed"
    # Where a seed does not arrive, the ratio is a lower bound and can show nothing but a miss.
    return "met" if high <= TARGET and seconds["reached"] == seeds else "open"


def step_costs(runs: Sequence[Run]) -> dict[str, float | None]:
    """Where the time of a step goes, over the steps of all runs in which nothing compiled.

    Args:
        runs: of one variant.

    Returns:
        Seconds of a step, of its rollouts and of everything else; its tokens, and those of a second of rollouts; the
        share of rollouts; means of the metrics, from the first fit on; and the seconds of a run's fits.
    """
    steps = {name: [value for run in runs for value in run["steps"][name]] for name in runs[0]["steps"]}
    # Rollouts and updates that compile cannot be told from those that do not, so such steps are left out here.
    ran = np.array(steps["compiling_seconds"]) == 0
    if not ran.any():
        ran[:] = True
    seconds, rollouts, tokens = (np.array(steps[name])[ran].mean() for name in ("seconds", "rollout_seconds", "tokens"))
    fits = [value for value in steps["bridge_seconds"] if value is not None]
    names = ("ess_token", "kl_behavior_target", "plan_price", "draft_acceptance")
    means = {name: _mean(np.concatenate([_from_first_fit(run, name) for run in runs])) for name in names}
    return means | {
        "seconds": float(seconds),
        "rollout_seconds": float(rollouts),
        "other_seconds": float(seconds - rollouts),
        "tokens": float(tokens),
        "tokens_per_second": float(tokens / rollouts),
        "rollout_share": float(rollouts / seconds),
        # The first fit of a process compiles, so the mean would not be that of the others.
        "bridge_seconds": float(np.median(fits) * len(fits) / len(runs)) if fits else 0.0,
    }


def kl_by_quarter(runs: Sequence[Run]) -> list[float | None]:
    """Mean KL(behavior || target) in each quarter of the steps, over all runs: how the divergence drifts.

    Args:
        runs: of one variant.
    """
    quarters = [np.array_split(_from_first_fit(run, "kl_behavior_target"), 4) for run in runs]
    return [_mean(np.concatenate([parts[q] for parts in quarters])) for q in range(4)]


def _from_first_fit(run: Run, metric: str) -> Float[np.ndarray, " steps"]:
    """A metric of each step, NaN where there is none and before the bridges are fitted; all steps without bridges."""
    values = np.array(run["steps"][metric], dtype=float)  # None becomes NaN
    fits = [step for step, seconds in enumerate(run["steps"]["bridge_seconds"]) if seconds is not None]
    # Until the end of the step that fits, the full model samples, which says nothing of the bridges.
    values[: fits[0] + 1 if fits else 0] = np.nan
    return values


def _mean(values: Float[np.ndarray, " N"]) -> float | None:
    """The mean of the values that are no NaN; None without any."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def tables(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as text: time to the level, where the time goes, and the drift of the divergence.

    Args:
        summary: of `summarise`.
    """
    first = next(iter(summary.values()))
    start, levels = first["start"], first["levels"]
    outcome = [
        [
            variant,
            f"{found['seconds']['reached']} of {len(found['seeds'])}",
            f"{np.mean(found['seconds']['to_level']):.1f}",
            *(cell for unit in UNITS for cell in _with_interval(found[unit]["ratio"], found[unit]["interval"], "")),
            f"{np.mean(found['final']):.3f}",
            *_with_interval(found["gain"], found["gain_interval"], "+"),
            f"{found['greedy'][1]:.3f}",
            "-" if variant == "full" else found["verdict"],
        ]
        for variant, found in summary.items()
    ]
    header = ["variant", "reached", "s to level", "of full's s", "95 %", "of its tokens", "95 %"]
    header += ["final", "gain", "95 %", "greedy", f"{TARGET} is"]
    names = {
        "seconds": "s/step",
        "rollout_seconds": "rollouts",
        "other_seconds": "other",
        "rollout_share": "share",
        "tokens": "tokens",
        "tokens_per_second": "tokens/s",
        "plan_price": "price",
        "ess_token": "ESS",
        "kl_behavior_target": "KL",
        "bridge_seconds": "s of fits",
        "draft_acceptance": "accepted",
    }
    costs = [[v, *(_short(found["steps"][name]) for name in names)] for v, found in summary.items()]
    drift = [[v, *(_short(kl) for kl in found["kl_by_quarter"])] for v, found in summary.items()]
    return "\n".join(
        [
            f"Mean accuracy of the starts: {start:.3f}. Levels: {', '.join(f'{level:.3f}' for level in levels)}",
            table(header, outcome),
            "\nMeans of a step; price, ESS, KL and accepted from the first fit on",
            table(["variant", *names.values()], costs),
            "\nKL(behavior || target) by quarter of the steps, from the first fit on",
            table(["variant", "first", "second", "third", "last"], drift),
        ]
    )


def _with_interval(value: float, interval: Sequence[float], sign: str) -> tuple[str, str]:
    low, high = interval
    return f"{value:{sign}.3f}", f"{low:{sign}.2f}..{high:{sign}.2f}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def draw(runs: Sequence[Run], summary: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy above the start over seconds and over tokens: the mean of the seeds, a band of one standard error.

    Seeds start at accuracies that differ more than the variants do, so each curve begins at zero.

    Args:
        runs: of all variants.
        summary: of the same runs.
        path: the PNG file.
        title: of the figure.
    """
    from PIL import Image  # it comes with matplotlib, which is optional

    figure = figure_maker()(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(UNITS), sharey=True)
    starts = [curve(run, UNITS[0])[1][0] for run in runs if run["variant"] == next(iter(summary))]
    mean_rise = np.mean(next(iter(summary.values()))["levels"]) - np.mean(starts)
    for axis, unit in zip(panels, UNITS, strict=True):
        for index, variant in enumerate(summary):
            curves = [curve(run, unit) for run in runs if run["variant"] == variant]
            # Where the first run has ended, the mean would be of other seeds.
            grid = np.linspace(0, min(cost[-1] for cost, _ in curves), 200)
            at_SxG = np.array([np.interp(grid, cost, accuracy - accuracy[0]) for cost, accuracy in curves])
            mean_G, error_G = at_SxG.mean(axis=0), at_SxG.std(axis=0) / np.sqrt(max(len(curves) - 1, 1))
            # The baseline is black and stands above the others.
            style = {"color": "black", "zorder": 3} if variant == "full" else {"color": f"C{index - 1}"}
            axis.plot(grid, mean_G, linewidth=2, label=variant, **style)
            axis.fill_between(grid, mean_G - error_G, mean_G + error_G, alpha=0.1, linewidth=0, color=style["color"])
        axis.axhline(mean_rise, color="gray", linestyle="--", linewidth=1)
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy above the start, smoothed")
    panels[-1].legend(fontsize="small", loc="lower right")
    figure.suptitle(f"{title}: mean of the seeds and its standard error; dashed: mean level")
    figure.savefig(path, dpi=80)
    # Overlapping bands have thousands of shades; a palette keeps the file small. With 64 colors lines became alike.
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
