"""What runs say together: each variant's mean over seeds, and its difference from the first variant, paired by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_reft.json_files import differences
from nested_reft.reports.figures import figure_maker, label
from nested_reft.reports.run_files import at
from nested_reft.reports.tables import table
from nested_reft.reports.tasks import task_of
from nested_reft.sweeps.intervals import mean_over_seeds, ratio_over_seeds
from nested_reft.sweeps.kept import Result
from nested_reft.sweeps.results import COSTS, OUTCOMES, cost_to_reach

MOST_FIELDS = 40  # rows of the table of differing fields
SHOWN_VALUE = 60  # characters of a value in it
BESIDE = ("train.seed", "name")  # fields in which the runs of one variant differ


def by_task(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each task, by its name; a number tells tasks of one name apart.

    Args:
        results: with `config`.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault(task_of(result["config"]), []).append(result)
    names = [name for name, _ in found]
    numbered = [
        name if names.count(name) == 1 else f"{name} #{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
    return dict(zip(numbered, found.values(), strict=True))


def summarise(results: Sequence[Result], measure: str | None = None, target: float | None = None) -> dict[str, Any]:
    """Each variant of one task beside the first one.

    Args:
        results: of one task, with `label`, `seed`, `measures` and `curve`; the first label is that of the baseline.
        measure: one of `OUTCOMES` that variants are compared by; None takes the first that all runs have.
        target: accuracy to which seconds are counted; None counts none.

    Returns:
        JSON-able values: the `measure`, and `variants` by label. Each has its `seeds`, `outcome` (values, mean,
        interval), `difference` (the same of the differences from the baseline's runs of the same seeds; None of the
        baseline, and where no seed is shared), `costs` by name, `speed` (the ratio of `nested_speedup` to the
        baseline's, with interval), `ideal` (the ratio that the plans' prices allow) and, with a target, `to_target`.

    Raises:
        ValueError: a run lacks the measure.
    """
    common = [name for name in OUTCOMES if all(_value(each, name) is not None for each in results)]
    measure = measure or next(iter(common), None)
    lacking = [each for each in results if measure is None or _value(each, measure) is None]
    if measure is None or lacking:
        run = lacking[0].get("run_directory") or lacking[0]["label"]
        raise ValueError(
            f"run '{run}' has no {'outcome' if measure is None else measure}; allowed with --measure are those that all"
            f" runs have, of {', '.join(OUTCOMES)}"
        )
    labels = list(dict.fromkeys(each["label"] for each in results))
    runs = {name: {each["seed"]: each for each in results if each["label"] == name} for name in labels}
    first = runs[labels[0]]
    return {
        "measure": measure,
        "target": target,
        "variants": {name: _compared(own, first, measure, target) for name, own in runs.items()},
    }


def _compared(own: dict[int, Result], first: dict[int, Result], measure: str, target: float | None) -> dict[str, Any]:
    shared = [seed for seed in own if seed in first]
    pairs = [(own[seed], first[seed]) for seed in shared]
    is_baseline = own is first
    costs = {name: [value for each in own.values() if (value := _value(each, name)) is not None] for name in COSTS}
    found: dict[str, Any] = {
        "seeds": list(own),
        "paired_seeds": shared,
        "outcome": mean_over_seeds([_value(each, measure) or 0.0 for each in own.values()]),
        "difference": None,
        "costs": {name: float(np.mean(values)) if values else None for name, values in costs.items()},
        "speed": None if is_baseline else _ratio(pairs, _speed),
        "ideal": None if is_baseline else _ratio(pairs, _ideal),
        "to_target": None if target is None else _to_target(own, pairs, is_baseline, target),
    }
    if pairs and not is_baseline:
        found["difference"] = mean_over_seeds([_value(a, measure) - _value(b, measure) for a, b in pairs])
    return found


def _value(result: Result, name: str) -> Any:
    return result["measures"].get(name)


def _speed(result: Result) -> float | None:
    """How many times as fast as the full model rollouts are; measuring the full model against itself is noise alone."""
    return 1.0 if _value(result, "plan_price") == 1 else _value(result, "nested_speedup")


def _ideal(result: Result) -> float | None:
    price = _value(result, "plan_price")
    return 1 / price if price else None


def _ratio(pairs: Sequence[tuple[Result, Result]], value: Callable[[Result], float | None]) -> dict[str, Any] | None:
    values = [(value(a), value(b)) for a, b in pairs]
    known = [(a, b) for a, b in values if a and b]
    return ratio_over_seeds(*zip(*known, strict=True)) if known else None


def _seconds_to_reach(result: Result, target: float) -> tuple[float, bool]:
    return cost_to_reach(result["curve"]["seconds"], result["curve"]["accuracy"], target)


def _to_target(
    own: dict[int, Result], pairs: Sequence[tuple[Result, Result]], is_baseline: bool, target: float
) -> dict[str, Any] | None:
    """Seconds to an accuracy. A run that never arrives counts with its whole time, so ratios are bounds.

    There is no ratio where no run of the baseline arrives: both times would be those of whole runs.
    """
    reached = {seed: _seconds_to_reach(each, target) for seed, each in own.items() if each["curve"]["seconds"]}
    if not reached:
        return None
    pairs = [(a, b) for a, b in pairs if a["seed"] in reached and b["curve"]["seconds"]]
    firsts = [_seconds_to_reach(b, target) for _, b in pairs]
    has_ratio = not is_baseline and any(arrived for _, arrived in firsts)
    both = [(reached[a["seed"]][0], seconds) for (a, _), (seconds, _) in zip(pairs, firsts, strict=True)]
    return {
        "reached": sum(arrived for _, arrived in reached.values()),
        "of": len(reached),
        **mean_over_seeds([seconds for seconds, _ in reached.values()]),
        "ratio": ratio_over_seeds(*zip(*both, strict=True)) if has_ratio else None,
    }


def comparison_table(summary: dict[str, Any]) -> str:
    """A summary as text.

    Args:
        summary: of `summarise`.
    """
    variants = list(summary["variants"].values())
    outcome = OUTCOMES[summary["measure"]]
    columns: list[tuple[str, list[str]]] = [
        ("seeds", [str(len(each["seeds"])) for each in variants]),
        (outcome.title, [f"{each['outcome']['mean']:.{outcome.digits}f}" for each in variants]),
        ("95 %", [_interval(each["outcome"], outcome.digits) for each in variants]),
        ("over the first", [_signed(each["difference"], outcome.digits) for each in variants]),
        ("95 %", [_interval(each["difference"], outcome.digits, "+") for each in variants]),
    ]
    for name, measure in COSTS.items():
        columns.append((measure.title, [_number(each["costs"][name], measure.digits) for each in variants]))
        if name == "nested_speedup":
            # Both speeds of a run come from one minute, so the load of a machine falls on both.
            columns[-1:] = [
                ("speed-up", [_number((each["speed"] or {}).get("ratio"), 2) for each in variants]),
                ("95 %", [_interval(each["speed"], 2) for each in variants]),
            ]
        if name == "plan_price":
            columns.append(("ideal", [_number((each["ideal"] or {}).get("ratio"), 2) for each in variants]))
    if summary["target"] is not None:
        found = [each["to_target"] or {} for each in variants]
        columns.append((f"s to {summary['target']:g}", [_seconds_to(each) for each in found]))
        columns.append(("reached", [f"{each['reached']} of {each['of']}" if each else "-" for each in found]))
        columns.append(("of the first's s", [_number((each.get("ratio") or {}).get("ratio"), 2) for each in found]))
        columns.append(("95 %", [_interval(each.get("ratio"), 2) for each in found]))
    # A column in which no variant has a value says nothing.
    columns = [(title, cells) for title, cells in columns if set(cells) != {"-"}]
    rows = [[name, *cells] for name, *cells in zip(summary["variants"], *(cells for _, cells in columns), strict=True)]
    return table(["variant", *(title for title, _ in columns)], rows)


def differing_fields(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Fields in which variants differ, and the value of each variant.

    Args:
        results: with `config` and `label`.

    Returns:
        The fields in order; values in the order of the labels.
    """
    configs = {each["label"]: each["config"] for each in reversed(results)}
    configs = {name: configs[name] for name in dict.fromkeys(each["label"] for each in results)}
    first, *others = configs.values()
    names = {name for other in others for name, _, _ in differences(first, other) if name not in BESIDE}
    return [(name, [_text(at(config, *name.split("."))) for config in configs.values()]) for name in sorted(names)]


def field_table(results: Sequence[Result]) -> str:
    """Those fields as text; empty where variants do not differ.

    Args:
        results: with `config` and `label`.
    """
    rows = [[name, " | ".join(values)] for name, values in differing_fields(results)]
    if not rows:
        return ""
    more = f"\n{len(rows) - MOST_FIELDS} more fields differ" if len(rows) > MOST_FIELDS else ""
    return table(["field", "values, in the order of the variants"], rows[:MOST_FIELDS], left=2) + more


def draw_comparison(tasks: Mapping[str, tuple[Sequence[Result], dict[str, Any]]], path: Path) -> None:
    """A row for each task: held-out accuracy over steps, and the outcome of each variant over that of the first.

    Args:
        tasks: results and summary of each task.
        path: the PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = max(len(summary["variants"]) for _, summary in tasks.values())
    size = (12, max(3.6, 0.3 * rows + 1.2) * len(tasks))
    figure = figure_maker()(figsize=size, layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(3, 2))
    for (curves, outcomes), (task, (results, summary)) in zip(axes, tasks.items(), strict=True):
        is_paired = any(each["difference"] is not None for each in summary["variants"].values())
        for index, (name, each) in enumerate(summary["variants"].items()):
            own = [result["curve"] for result in results if result["label"] == name and result["curve"]["step"]]
            style = _style(index)
            # Curves of other steps have no common mean.
            own = [curve for curve in own if curve["step"] == own[0]["step"]]
            if own:
                curves.plot(own[0]["step"], np.mean([curve["accuracy"] for curve in own], axis=0), **style)
            # Seeds differ by more than variants do, so what is shown is paired where there is a baseline.
            shown = each["difference"] if is_paired else each["outcome"]
            if shown is not None:
                outcomes.plot(shown["interval"], [index, index], **style)
                outcomes.plot(shown["mean"], index, "o", color=style["color"])
        if is_paired:
            outcomes.axvline(0, color="black", linewidth=1)
        curves.set(xlabel="step", ylabel="greedy held-out accuracy", title=label(task))
        titles = [label(name) for name in summary["variants"]]
        outcomes.set(
            xlabel=f"{OUTCOMES[summary['measure']].title}{', less that of the first' * is_paired} (95 %)",
            ylim=(-0.5, len(titles) - 0.5),
            yticks=range(len(titles)),
            yticklabels=titles,
        )
        outcomes.invert_yaxis()
        outcomes.locator_params(axis="x", nbins=6)  # more labels of small differences would overlap
        for axis in (curves, outcomes):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def _style(index: int) -> dict[str, Any]:
    """The first variant is black; ten colours come back with other dashes."""
    colour = "black" if index == 0 else f"C{(index - 1) % 10}"
    return {"color": colour, "linestyle": ("-", "--", ":")[max(index - 1, 0) // 10 % 3], "linewidth": 1.5}


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."


def _number(value: float | None, digits: int) -> str:
    # `z` leaves out the sign of what rounds to 0, such as the divergence of a model from itself.
    return "-" if value is None else f"{value:z.{digits}f}"


def _seconds_to(found: dict[str, Any]) -> str:
    # The mean is a lower bound where a run did not arrive.
    return f"{'>' * (found['reached'] < found['of'])}{found['mean']:.1f}" if found else "-"


def _signed(found: dict[str, Any] | None, digits: int) -> str:
    return "-" if found is None else f"{found['mean']:+.{digits}f}"


def _interval(found: dict[str, Any] | None, digits: int, sign: str = "") -> str:
    # One seed has no spread, so an interval would be a point that says nothing.
    if found is None or len(found.get("values", (0, 0))) < 2:
        return "-"
    low, high = found["interval"]
    return f"{low:{sign}.{digits}f}..{high:{sign}.{digits}f}"
