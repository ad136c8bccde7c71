"""What a run is compared by: a few numbers and a curve, read from its directory."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_reft.reports.run_files import Line, RunFiles, at, finite, read_run
from nested_reft.reports.run_metrics import names_with, series
from nested_reft.sweeps.kept import Result

LAST_SHARE = 0.1  # of the steps, whose mean reward is the run's


@dataclass(frozen=True)
class Measure:
    """A number that runs have.

    Attributes:
        title: of its column.
        digits: that are shown.
        meaning: one line for the help.
    """

    title: str
    digits: int
    meaning: str


# Those that runs can be ranked by; the others stand beside them.
OUTCOMES = {
    "accuracy": Measure("accuracy", 3, "greedy held-out accuracy at the end, mean of the sources"),
    "sampled_accuracy": Measure("sampled accuracy", 3, "held-out accuracy of samples at the end, mean of the sources"),
    "mean_accuracy": Measure("mean accuracy", 3, "greedy held-out accuracy, mean of all evaluations after the start"),
    "reward": Measure("reward", 3, "mean reward of the samples of the last tenth of the steps"),
}
COSTS = {
    "tokens_per_second": Measure("tokens/s", 0, "sampled tokens a second of rollouts, without steps that compile"),
    "nested_speedup": Measure(
        "nested/full", 2, "tokens/s under a plan over those of the full model, measured in turns at the end of the run"
    ),
    "plan_price": Measure("price", 2, "what a plan costs of a full decode step, at the least"),
    "ess_token": Measure("ESS", 2, "effective sample size per token, mean of the steps"),
    "kl_behavior_target": Measure("KL", 3, "KL(behavior || target) in nats a token, mean of the steps"),
    "step_seconds": Measure("s/step", 2, "seconds of a step, median"),
}
LOGGED = ("tokens_per_second", "plan_price", "ess_token", "kl_behavior_target")  # of which steps have a mean


def run_result(path: Path) -> Result:
    """What there is to compare of a run.

    Args:
        path: its directory.

    Returns:
        JSON-able values: `run_directory`, `steps`, `measures` by the names of `OUTCOMES` and `COSTS` (None where the
        run has no such value), `curve` (`step`, `seconds` and `accuracy` of each evaluation), and `versions`.

    Raises:
        ValueError: it is no run directory.
    """
    files = read_run(path)
    curve = accuracy_curve(files.lines)
    later = [value for step, value in zip(curve["step"], curve["accuracy"], strict=True) if step > 0]
    rewards = series(files.lines, "reward")[1]
    measures = {
        "accuracy": _mean_of_sources(files, "greedy_accuracy", "accuracy"),
        "sampled_accuracy": _mean_of_sources(files, "sampled_accuracy"),
        "mean_accuracy": _mean(later),
        "reward": _mean(rewards[-max(round(len(rewards) * LAST_SHARE), 1) :]),
        **{name: _mean(series(files.lines, name)[1]) for name in LOGGED},
        "nested_speedup": finite(files.summary.get("nested_speedup")),
        "step_seconds": _median(_step_seconds(files.lines)),
    }
    return {
        "run_directory": str(path),
        "steps": files.steps,
        "measures": measures,
        "curve": curve,
        "versions": files.versions,
    }


def accuracy_curve(lines: Sequence[Line]) -> dict[str, list[Any]]:
    """Held-out accuracy over steps, as the mean of the sources, and the seconds of all steps until then.

    A source that an evaluation left out keeps its last value. A step that compiled counts as much as a median one, and
    evaluations take no time.

    Args:
        lines: of `metrics.jsonl`.
    """
    names = names_with(lines, "heldout/")
    seconds = dict(zip((line["step"] for line in lines if line["step"] > 0), _step_seconds(lines), strict=True))
    latest, spent = dict[str, float](), 0.0
    curve: dict[str, list[Any]] = {"step": [], "seconds": [], "accuracy": []}
    for line in lines:
        spent += seconds.get(line["step"], 0.0)
        new = {name: value for name in names if (value := finite(line.get(name))) is not None}
        latest |= new
        if new and len(latest) == len(names):
            curve["step"].append(line["step"])
            curve["seconds"].append(spent)
            curve["accuracy"].append(sum(latest.values()) / len(latest))
    return curve


def is_whole(result: Result) -> bool:
    """Whether a result has all that tables and figures read: its file may have been damaged or written by hand.

    Args:
        result: as it was read.
    """
    if any(not isinstance(result.get(name), dict) for name in ("config", "measures", "curve", "versions")):
        return False
    measures, curve = result["measures"], [result["curve"].get(name) for name in ("step", "seconds", "accuracy")]
    if any(not isinstance(column, list) for column in curve) or len({len(column) for column in curve}) > 1:
        return False
    numbers = [*(value for value in measures.values() if value is not None), *itertools.chain(*curve)]
    return any(name in measures for name in OUTCOMES) and all(type(value) in (int, float) for value in numbers)


def cost_to_reach(
    costs: Sequence[float | int] | np.ndarray, accuracies: Sequence[float | int] | np.ndarray, level: float
) -> tuple[float, bool]:
    """What a run had spent when its accuracy first reached a level, linear between evaluations.

    Args:
        costs: until each evaluation, such as seconds, tokens or steps; at least one.
        accuracies: of the evaluations.
        level: the accuracy.

    Returns:
        The cost, and True; that of the whole run, a lower bound, and False where it never did.
    """
    first = next((index for index, value in enumerate(accuracies) if value >= level), None)
    if first is None:
        return float(costs[-1]), False
    if first == 0:
        return float(costs[0]), True
    low, high = accuracies[first - 1], accuracies[first]
    part = (level - low) / (high - low)
    return float(costs[first - 1] + part * (costs[first] - costs[first - 1])), True


def _mean_of_sources(files: RunFiles, *names: str) -> float | None:
    """The mean of the first of these results that the sources have, from the summary of a run that has ended."""
    after = files.summary.get("after")
    if not isinstance(after, dict) or not after or files.summary.get("steps") not in (None, files.steps):
        return None
    known = list[float]()
    for each in after.values():
        values = [value for name in names if (value := finite(at(each, name))) is not None]
        known += values[:1]
    return _mean(known) if len(known) == len(after) else None


def _step_seconds(lines: Sequence[Line]) -> list[float]:
    """Seconds of each step after step 0; a step that compiled, or has none logged, counts as much as a median one."""
    steps = [line for line in lines if line["step"] > 0]
    counts = [0.0, *(finite(line.get("compilations")) or 0.0 for line in steps)]
    logged = [finite(line.get("step_seconds")) for line in steps]
    quiet = [
        seconds
        for seconds, before, now in zip(logged, counts, counts[1:], strict=False)
        if seconds is not None and now <= before
    ]
    typical = _median(quiet or [seconds for seconds in logged if seconds is not None]) or 0.0
    compiled = [now > before for before, now in itertools.pairwise(counts)]
    return [
        typical if seconds is None or (has_compiled and quiet) else seconds
        for seconds, has_compiled in zip(logged, compiled, strict=True)
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
