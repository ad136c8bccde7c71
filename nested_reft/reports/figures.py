"""The report of a run: figures and a short table, from `metrics.jsonl` alone.

Needs matplotlib, of the `report` extra. Figures are drawn without a display.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nested_reft.estimators.rejection import written_bounds
from nested_reft.json_files import read_json_object
from nested_reft.reports.tables import hacking_text, table
from nested_reft.run_directory import read_log
from nested_reft.untrusted import printable

Line = dict[str, Any]
CURRICULUM = "curriculum/"
BOUNDS = "bounds/"
AGES = "staleness_completions"  # counts of trained completions, by age
SPEEDS = ("tokens_per_second", "searched_tokens_per_second", "trained_tokens_per_second")  # what compiling slows down
# Title, unit of the axis, and the metrics that a plain figure shows.
FIGURES = {
    "accuracy": ("Accuracy of the sampled completions", "share right", ("accuracy",)),
    "reward": ("Reward", "mean reward", ("reward", "replay/reward")),
    "ess": ("Effective sample size", "share of the samples", ("ess_token", "ess_sequence")),
    "speed": ("Speed of sampling and learning, without steps that compile", "tokens / second", SPEEDS),
    "staleness": (
        "Age of the completions that were trained on, and of those that are kept",
        "versions",
        ("staleness_mean", "staleness_max", "replay/age"),
    ),
    "waiting": (
        "Waiting for searchers, and for their weights",
        "seconds / step",
        ("search_wait_seconds", "sync_seconds"),
    ),
    "searchers": ("Searchers at work", "share of their time", ("searchers_busy",)),
    "kl": ("Divergences", "nats / token", ("kl_behavior_target", "reference_kl", "self_distillation_kl")),
    "ratio": (
        "Ratios of target and behavior policy",
        "quantiles",
        tuple(f"ratio_quantile_{q}" for q in (95, 50, "05")),
    ),
    "entropy": ("Entropy of the target", "nats / token", ("entropy",)),
    "length": ("Length of the completions", "tokens", ("completion_tokens",)),
    "loss": ("Loss of runs without rollouts", "nats", ("cross_entropy",)),
    "pairs": ("Preference pairs that are ordered right", "share", ("pair_accuracy",)),
    "margin": ("Score of preferred answers and of the others", "score", ("chosen_score", "rejected_score")),
    "gradient_norm": ("Norm of the gradient, before clipping", "norm", ("gradient_norm",)),
}
# A figure for all metrics of a run whose names begin alike.
PREFIXES = {
    "parts": ("Parts of the reward, before their weights", "mean", "reward/"),
    "heldout": ("Held-out greedy accuracy", "share right", "heldout/"),
}
# What is shown of each source of the curriculum.
PANELS = {
    "probability": "probability",
    "learnability": "mean |advantage|",
    "bonus": "exploration bonus",
    "reward": "reward",
    "count": "responses so far",
}


def read_metrics(run: Path) -> list[Line]:
    """The lines of a run's `metrics.jsonl`; a last line cut short by a killed run is left out.

    Args:
        run: directory of the run.

    Returns:
        One dictionary per line, in the order of the file.

    Raises:
        ValueError: there is no such file, it has no complete step, or a line is not JSON.
    """
    lines = _with_last_heldout(read_log(run / "metrics.jsonl"), run)
    # Line 0 is the evaluation before training; a report needs at least one step.
    if not any(line["step"] > 0 for line in lines):
        raise ValueError(f"'{run / 'metrics.jsonl'}' has no complete step yet")
    return lines


def write_report(run: Path) -> dict[str, Any]:
    """Writes figures and `report.md` into `run/report`.

    Args:
        run: directory of the run; `run/report` is made in it.

    Returns:
        The figures of the tables, as JSON-able values: `directory`, `steps`, `metrics` (first, last
        and mean of each), `curriculum` (the last values of each source), `bounds` (see `keeping_bounds`).

    Raises:
        ImportError: matplotlib is not installed; names the extra.
        ValueError: the run has nothing to report; see `read_metrics`.
    """
    # A missing matplotlib is reported before the metrics are read.
    make_figure = figure_maker()
    lines = read_metrics(run)
    directory = run / "report"
    directory.mkdir(exist_ok=True)
    drawings = _drawings(lines)
    for name, draw in drawings.items():
        figure = make_figure(figsize=(8, 4), layout="constrained")
        draw(figure)
        figure.savefig(directory / f"{name}.png", dpi=120)
    result = summarize(lines) | {"directory": str(directory)}
    images = "".join(f"\n![{name}]({name}.png)\n" for name in drawings)
    # Tables stand in a code block: words of the metrics are then shown as they are, and columns line up.
    words = "\n\n".join([report_text(result, lines), *_reward_hacking(run)])
    text = f"# {_one_line(run.name)}\n\n```\n{words}\n```\n{images}"
    (directory / "report.md").write_text(text, encoding="utf-8")
    return result


def summarize(lines: Sequence[Line]) -> dict[str, Any]:
    """First, last and mean value of the main metrics, and the last of each source's.

    Args:
        lines: what `read_metrics` returned.

    Returns:
        `steps`, `metrics`, `curriculum` and `bounds`, as `write_report` returns them.
    """
    shown = dict.fromkeys(metric for _, _, metrics in _plain_figures(lines).values() for metric in metrics)
    found = {name: series(lines, name)[1] for name in shown}
    last: dict[str, dict[str, float | None]] = {}
    for name in curriculum_sources(lines):
        values = {column: series(lines, f"{CURRICULUM}{name}/{column}")[1] for column in PANELS}
        # A source that was never drawn has no reward, and its cell stays empty.
        last[name] = {column: value[-1] if value else None for column, value in values.items()}
    return {
        "steps": max(line["step"] for line in lines),
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
        lines: what `read_metrics` returned.

    Returns:
        The medians over steps of the lower and upper bound for 95 %, then of both for 99 %; None for a side that has no
        bound in most steps.
    """
    found = {}
    for name in dict.fromkeys(name for line in lines for name in line if name.startswith(BOUNDS)):
        rows = [line[name] for line in lines if name in line]
        rows = [row for row in rows if isinstance(row, list) and len(row) == 4]
        columns = [[bound for bound in column if _is_finite(bound)] for column in zip(*rows, strict=True)]
        if any(columns):
            reject_by = name.removeprefix(BOUNDS)
            medians = [statistics.median(column) if 2 * len(column) > len(rows) else None for column in columns]
            # Rounded anew, since a median of two has more digits.
            found[reject_by] = written_bounds(reject_by, medians)
    return found


def report_text(result: dict[str, Any], lines: Sequence[Line], audit_lines: int | None = 5) -> str:
    """The tables of `summarize`, and the curriculum's words of the last steps (None: of all).

    Args:
        result: what `summarize` returned.
        lines: what `read_metrics` returned.
        audit_lines: how many of the latest steps' words are shown; None shows all.
    """
    rows = [
        [_one_line(name), *(f"{value:.3f}" for value in values.values())] for name, values in result["metrics"].items()
    ]
    parts = [table([f"{result['steps']} steps", "first", "last", "mean"], rows)]
    if result["curriculum"]:
        rows = [
            [
                _one_line(name),
                # Counts are whole numbers, and three zeros behind them would only be in the way.
                *("-" if value is None else f"{value:.3f}".removesuffix(".000") for value in values.values()),
            ]
            for name, values in result["curriculum"].items()
        ]
        parts.append(table(["source, last values", *PANELS.values()], rows))
    if result["bounds"]:
        rows = [
            [_one_line(name), *(_bounds_in_words(low, high) for low, high in (bounds[:2], bounds[2:]))]
            for name, bounds in result["bounds"].items()
        ]
        parts.append(table(["loss.reject_by: bounds that keep (median of steps)", "95 %", "99 %"], rows))
    words = audit(lines)
    if words:
        parts.append("\n".join(words if audit_lines is None else words[-audit_lines:]))
    return "\n\n".join(parts)


def _bounds_in_words(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "none" if low is high else f"{low:.9g} or more" if high is None else f"{high:.9g} or less"
    return f"{low:.9g} to {high:.9g}"


def figure_maker() -> Callable[..., Any]:
    """matplotlib's figure class; without pyplot, so that the caller's own backend and figures stay as they are.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need the package matplotlib; run: pip install matplotlib") from error
    return Figure


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged as a finite number.

    Args:
        lines: what `read_metrics` returned.
        name: the metric's key in each line.

    Returns:
        Two lists of the same length.
    """
    if name in SPEEDS:
        lines = _without_compiling(lines)
    points = [
        (line["step"], float(line[name]))
        for line in lines
        # A step without the metric, or with NaN, leaves a gap instead of a point.
        if _is_finite(line.get(name))
    ]
    return [step for step, _ in points], [value for _, value in points]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def curriculum_sources(lines: Sequence[Line]) -> list[str]:
    """Names of the training sources, in their order.

    Args:
        lines: what `read_metrics` returned.
    """
    names = (key for line in lines for key in line if key.startswith(CURRICULUM) and key.endswith("/probability"))
    # A dictionary drops what repeats and keeps the order of the sources.
    return [name.removeprefix(CURRICULUM).removesuffix("/probability") for name in dict.fromkeys(names)]


def draw_curriculum(figure: Any, lines: Sequence[Line]) -> None:
    """Per source over time: probability, mean |advantage|, bonus, reward and responses so far.

    Args:
        figure: an empty figure, which is resized.
        lines: what `read_metrics` returned.
    """
    names = curriculum_sources(lines)
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    # A single source has no range of colours to divide.
    from matplotlib import colormaps

    colours = colormaps["viridis"]([i / max(len(names) - 1, 1) for i in range(len(names))])
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        for name, colour in zip(names, colours, strict=True):
            steps, values = series(lines, f"{CURRICULUM}{name}/{metric}")
            axis.plot(steps, values, color=colour, label=_label(name), linewidth=1.2)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("step")
    axes[0].legend(fontsize="small", ncols=2)
    axes[0].set_title("Curriculum: why each source was drawn, and what came of it")
    # Five panels in the height of one figure could not be read.
    figure.set_size_inches(8, 2.2 * len(PANELS))


def audit(lines: Sequence[Line]) -> list[str]:
    """The curriculum's words of each step: which source rose or fell, and why.

    Args:
        lines: what `read_metrics` returned.

    Returns:
        One line of text per step that logged such words.
    """
    return [
        f"step {line['step']}: {_one_line(line['curriculum_audit'])}" for line in lines if "curriculum_audit" in line
    ]


def _drawings(lines: Sequence[Line]) -> dict[str, Callable[[Any], None]]:
    """What there is to draw, by file name."""
    drawings = {name: _plain(lines, *figure) for name, figure in _plain_figures(lines).items()}
    if any(line.get("left_out_layers") for line in lines):
        # A figure of the full model would be empty, so it is drawn only where a step left layers out.
        drawings["left_out_layers"] = lambda figure: _draw_left_out(figure, lines)
    if any(len(line.get(AGES) or ()) > 1 for line in lines):
        drawings["ages"] = lambda figure: _draw_ages(figure, lines)
    if curriculum_sources(lines):
        drawings["curriculum"] = lambda figure: draw_curriculum(figure, lines)
    return drawings


def _plain_figures(lines: Sequence[Line]) -> dict[str, tuple[str, str, list[str]]]:
    """Title, unit and metrics of each plain figure that has something to show."""
    names = dict.fromkeys(name for line in lines for name in line)
    wanted: dict[str, tuple[str, str, Sequence[str]]] = dict(FIGURES)
    for figure, (title, unit, prefix) in PREFIXES.items():
        wanted[figure] = title, unit, [name for name in names if name.startswith(prefix)]
    # A metric that was never logged as a finite number has no curve.
    found = {
        figure: (title, unit, [metric for metric in metrics if series(lines, metric)[0]])
        for figure, (title, unit, metrics) in wanted.items()
    }
    # A reward that is the accuracy, as it is by default, would be the same curve once more, and so would its one part.
    for figure in ("reward", "parts"):
        if all(series(lines, metric) == series(lines, "accuracy") for metric in found[figure][2]):
            del found[figure]
    return {figure: shown for figure, shown in found.items() if shown[2]}


def _with_last_heldout(lines: Sequence[Line], run: Path) -> list[Line]:
    """The lines with the held-out results at the end of the run, which stand in its summary alone."""
    try:
        summary = read_json_object(run / "summary.json")
        # The summary of a run that goes on is that of an earlier end.
        if not lines or summary.get("steps") != lines[-1]["step"]:
            return list(lines)
        # A run without rollouts has pairs, whose accuracy is no greedy one, or none at all.
        found = {n: each.get("greedy_accuracy", each.get("accuracy")) for n, each in summary["after"].items()}
        last = {f"heldout/{name}": accuracy for name, accuracy in found.items() if accuracy is not None}
    except (ValueError, TypeError, KeyError, AttributeError):  # a summary that cannot be read takes nothing away
        return list(lines)
    return [*lines[:-1], lines[-1] | last]


def _reward_hacking(run: Path) -> list[str]:
    """What the summary says of a reward model, as at most one text."""
    try:
        return [hacking_text(read_json_object(run / "summary.json")["reward_hacking"])]
    except (ValueError, TypeError, KeyError, OSError):  # no summary, or a run without a reward model
        return []


def _without_compiling(lines: Sequence[Line]) -> list[Line]:
    """The steps in which nothing was compiled; all of them where the others leave none."""
    counts = [0, *(line.get("compilations", 0) for line in lines)]
    kept = [line for line, before, now in zip(lines, counts, counts[1:], strict=False) if now <= before]
    return kept if any("step_seconds" in line or "tokens_per_second" in line for line in kept) else list(lines)


def _plain(lines: Sequence[Line], title: str, unit: str, metrics: Sequence[str]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        """Draws each metric over the steps."""
        axis = figure.subplots()
        for metric in metrics:
            # Evaluations may be many steps apart, so their points are marked.
            axis.plot(
                *series(lines, metric), marker="." if metric.startswith("heldout/") else None, label=_label(metric)
            )
        axis.set(title=title, xlabel="step", ylabel=unit)
        if len(metrics) > 1 or metrics[0].startswith(("heldout/", "reward/")):
            axis.legend()

    return draw


def _draw_left_out(figure: Any, lines: Sequence[Line]) -> None:
    axis = figure.subplots()
    points = [(line["step"], layer) for line in lines for layer in line.get("left_out_layers") or ()]
    axis.scatter([step for step, _ in points], [layer for _, layer in points], s=6, marker="s")
    axis.set(title="Layers that the rollouts left out", xlabel="step", ylabel="layer")


def _draw_ages(figure: Any, lines: Sequence[Line]) -> None:
    axis = figure.subplots()
    points = [
        (line["step"], age, count / sum(line[AGES]))
        for line in lines
        for age, count in enumerate(line.get(AGES) or ())
        if count
    ]
    steps, ages, shares = zip(*points, strict=True)
    shown = axis.scatter(steps, ages, c=shares, s=6, marker="s", vmin=0, vmax=1)
    axis.set(title="Ages of the completions that were trained on", xlabel="step", ylabel="versions")
    figure.colorbar(shown, label="share of the step's completions")


def _label(name: str) -> str:
    """A name as a legend shows it: matplotlib reads $ as mathematics, and hides what begins with _."""
    return _one_line(name).replace("$", r"\$").lstrip("_") or " "


def _one_line(text: str) -> str:
    # Names and words come from data, and a backtick could end the code block of the report.
    return printable(str(text)).replace("`", "'")
