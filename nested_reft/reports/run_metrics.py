"""The metrics of a run as series, tables and words, from its log alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from nested_reft.estimators.rejection import written_bounds
from nested_reft.reports.run_files import Line, finite
from nested_reft.reports.tables import table
from nested_reft.untrusted import printable

CURRICULUM = "curriculum/"
BOUNDS = "bounds/"
SPEEDS = ("tokens_per_second", "searched_tokens_per_second", "trained_tokens_per_second")  # what compiling slows down
# What is shown of each source of the curriculum.
SOURCE_METRICS = {
    "probability": "probability",
    "learnability": "mean |advantage|",
    "bonus": "exploration bonus",
    "reward": "reward",
    "count": "responses so far",
}
# What the table shows of any run that logs it, beside all that begins with the prefixes.
SUMMARIZED = (
    *("accuracy", "reward", "replay/reward", "ess_token", "ess_sequence", *SPEEDS),
    *("staleness_mean", "staleness_max", "replay/age", "search_wait_seconds", "sync_seconds", "searchers_busy"),
    *("kl_behavior_target", "reference_kl", "self_distillation_kl"),
    *("ratio_quantile_95", "ratio_quantile_50", "ratio_quantile_05", "entropy", "completion_tokens"),
    *("cross_entropy", "pair_accuracy", "chosen_score", "rejected_score", "gradient_norm"),
)
PREFIXES = ("reward/", "heldout/")


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged as a finite number.

    Args:
        lines: of `metrics.jsonl`.
        name: the metric's key in each line.

    Returns:
        Two lists of the same length.
    """
    if name in SPEEDS:
        lines = _without_compiling(lines)
    # A step without the metric, or with NaN, leaves a gap instead of a point.
    points = [(line["step"], value) for line in lines if (value := finite(line.get(name))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def names_with(lines: Sequence[Line], prefix: str) -> list[str]:
    """The metrics whose names begin alike, in the order in which they were first logged.

    Args:
        lines: of `metrics.jsonl`.
        prefix: of the names.
    """
    # A dictionary drops what repeats and keeps the order.
    return list(dict.fromkeys(name for line in lines for name in line if name.startswith(prefix)))


def curriculum_sources(lines: Sequence[Line]) -> list[str]:
    """Names of the training sources, in their order.

    Args:
        lines: of `metrics.jsonl`.
    """
    names = [name for name in names_with(lines, CURRICULUM) if name.endswith("/probability")]
    return [name.removeprefix(CURRICULUM).removesuffix("/probability") for name in names]


def summarize(lines: Sequence[Line]) -> dict[str, Any]:
    """First, last and mean value of the main metrics, and the last of each source's.

    Args:
        lines: of `metrics.jsonl`.

    Returns:
        `steps`, `metrics` (first, last and mean of each), `curriculum` (the last values of each source) and `bounds`
        (see `keeping_bounds`).
    """
    shown = [*SUMMARIZED, *(name for prefix in PREFIXES for name in names_with(lines, prefix))]
    found = {name: values for name in shown if (values := series(lines, name)[1])}
    last: dict[str, dict[str, float | None]] = {}
    for name in curriculum_sources(lines):
        values = {column: series(lines, f"{CURRICULUM}{name}/{column}")[1] for column in SOURCE_METRICS}
        # A source that was never drawn has no reward, and its cell stays empty.
        last[name] = {column: value[-1] if value else None for column, value in values.items()}
    return {
        "steps": max((line["step"] for line in lines), default=0),
        "metrics": {
            name: {"first": value[0], "last": value[-1], "mean": sum(value) / len(value)}
            for name, value in found.items()
        },
        "curriculum": last,
        "bounds": keeping_bounds(lines),
    }


def keeping_bounds(lines: Sequence[Line]) -> dict[str, list[float | None]]:
    """For each value of `loss.reject_by`, the bounds that keep 95 % and 99 % of a typical step's samples.

    Args:
        lines: of `metrics.jsonl`.

    Returns:
        The medians over steps of the lower and upper bound for 95 %, then of both for 99 %; None for a side that has no
        bound in most steps.
    """
    found = {}
    for name in names_with(lines, BOUNDS):
        rows = [line[name] for line in lines if name in line]
        rows = [row for row in rows if isinstance(row, list) and len(row) == 4]
        columns = [[bound for bound in map(finite, column) if bound is not None] for column in zip(*rows, strict=True)]
        reject_by = name.removeprefix(BOUNDS)
        if any(columns):
            medians = [statistics.median(column) if 2 * len(column) > len(rows) else None for column in columns]
            # Rounded anew, since a median of two has more digits.
            found[reject_by] = written_bounds(reject_by, medians)
    return found


def report_text(result: dict[str, Any], lines: Sequence[Line], audit_lines: int | None = 5) -> str:
    """The tables of `summarize`, and the curriculum's words of the last steps (None: of all).

    A curriculum of one source has nothing to choose, so only who asks for all of its words gets them.

    Args:
        result: what `summarize` returned.
        lines: of `metrics.jsonl`.
        audit_lines: how many of the latest steps' words are shown; None shows all.
    """
    rows = [[name, *(f"{value:.3f}" for value in values.values())] for name, values in result["metrics"].items()]
    parts = [table([f"{result['steps']} steps", "first", "last", "mean"], rows)]
    chooses = len(result["curriculum"]) > 1
    if chooses:
        rows = [
            # Counts are whole numbers, and three zeros behind them would only be in the way.
            [name, *("-" if value is None else f"{value:.3f}".removesuffix(".000") for value in values.values())]
            for name, values in result["curriculum"].items()
        ]
        parts.append(table(["source, last values", *SOURCE_METRICS.values()], rows))
    if result["bounds"]:
        rows = [
            [name, *(_bounds_in_words(low, high) for low, high in (bounds[:2], bounds[2:]))]
            for name, bounds in result["bounds"].items()
        ]
        parts.append(table(["loss.reject_by: bounds that keep (median of steps)", "95 %", "99 %"], rows))
    words = audit(lines) if chooses or audit_lines is None else []
    if words:
        parts.append("\n".join(words if audit_lines is None else words[-audit_lines:]))
    return "\n\n".join(parts)


def audit(lines: Sequence[Line]) -> list[str]:
    """The curriculum's words of each step: which source rose or fell, and why.

    Args:
        lines: of `metrics.jsonl`.

    Returns:
        One line of text per step that logged such words.
    """
    return [
        f"step {line['step']}: {printable(str(line['curriculum_audit']))}"
        for line in lines
        if "curriculum_audit" in line
    ]


def _bounds_in_words(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "none" if low is high else f"{low:.9g} or more" if high is None else f"{high:.9g} or less"
    return f"{low:.9g} to {high:.9g}"


def _without_compiling(lines: Sequence[Line]) -> list[Line]:
    """The steps in which nothing was compiled; all of them where the others leave none."""
    counts = [0.0, *(finite(line.get("compilations")) or 0.0 for line in lines)]
    kept = [line for line, before, now in zip(lines, counts, counts[1:], strict=False) if now <= before]
    return kept if any("step_seconds" in line or "tokens_per_second" in line for line in kept) else list(lines)
