"""What a run did, in plain sentences, and what its reader should be warned of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from nested_reft.reports.run_charts import heldout_prompts
from nested_reft.reports.run_files import RunFiles, at, finite
from nested_reft.reports.run_metrics import names_with, series
from nested_reft.reports.tasks import task_of
from nested_reft.untrusted import MAX_WHOLE

WINDOW = 10  # the first and the last of so many parts of a run are compared
LEAST = 6  # steps of which a rise can be told
ERRORS = 3.0  # standard errors that a rise of the reward must exceed
HIGH = 0.95  # held-out accuracy that need not rise any more
SMALL = 0.01  # a rise of the held-out accuracy where the number of prompts is unknown
MOST_DIFFERENCES = 200  # rows of the table of configurations
DEEPEST = 20  # level of a field
MOST_VALUE = 120  # characters of a value in it


def summary_words(run: RunFiles) -> list[str]:
    """What ran, for how long, what it learnt, how fast it sampled and how far off-policy it was.

    Args:
        run: whose files may lack anything.

    Returns:
        One sentence or two for each of these that is known.
    """
    found = [_what(run), *_heldout(run), _samples(run), _speed(run), _off_policy(run)]
    return [sentence for sentence in found if sentence]


def warnings(run: RunFiles) -> list[str]:
    """What may be wrong with a run, a sentence each; the worst first.

    Args:
        run: as in `summary_words`.
    """
    hacking = at(run.summary, "reward_hacking", "warning")
    found = [
        f"The reward model may be exploited: {hacking}" if isinstance(hacking, str) else None,
        _reward_alone(run),
        _counted(run, "empty_steps", "empty", "steps changed nothing, because no completion had anything to teach"),
        _counted(run, "nonfinite_updates", "nonfinite_updates", "updates were left out, since they were not finite"),
        _low_ess(run),
        _said(run),
    ]
    return [sentence for sentence in found if sentence]


def comparison_warnings(runs: Sequence[RunFiles]) -> list[str]:
    """Why curves of these runs must not be compared.

    Args:
        runs: one or more.
    """
    tasks = {task_of(run.config) for run in runs if run.config}
    if len(tasks) < 2:
        return []
    share_names = len({name for name, _ in tasks}) < len(tasks)
    listed = "; ".join(f"{run.name} has {task_of(run.config)[0]}" for run in runs)
    return [
        f"These runs are of different tasks, so their accuracies and rewards cannot be compared. Sources: {listed}."
        + " Sources of one name have other settings." * share_names
    ]


def differences(runs: Sequence[RunFiles]) -> tuple[list[tuple[str, list[str]]], int]:
    """Fields of configurations and versions in which runs differ.

    Args:
        runs: one or more.

    Returns:
        Field and the value of each run, as text, in the order of their fields; and how many fields were left out.
    """
    flat = [
        _flat(run.config) | {f"versions.{name}": value for name, value in _flat(run.versions).items()} for run in runs
    ]
    names = dict.fromkeys(name for each in flat for name in each)
    # The name of a run says nothing about what it did.
    rows = [(name, [each.get(name, "-") for each in flat]) for name in names if name != "name"]
    differing = [row for row in rows if len(set(row[1])) > 1]
    return differing[:MOST_DIFFERENCES], max(len(differing) - MOST_DIFFERENCES, 0)


def settings(run: RunFiles) -> list[tuple[str, str]]:
    """The fields of a run's configuration and versions, as text.

    Args:
        run: whose files may lack anything.
    """
    return [*_flat(run.config).items(), *((f"versions.{name}", value) for name, value in _flat(run.versions).items())]


def duration(seconds: float) -> str:
    """A time in words.

    Args:
        seconds: 0 or more.
    """
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{minutes:.1f} minutes" if minutes >= 1 else f"{seconds:.0f} seconds"


def _what(run: RunFiles) -> str:
    name, wanted = at(run.config, "name"), at(run.config, "train", "steps")
    of = f" of {wanted}" if type(wanted) is int else ""
    seconds = finite(at(run.summary, "training_seconds")) if _is_over(run) else None
    if seconds is None:
        seconds = sum(series(run.lines, "step_seconds")[1])
    words = f"{name or 'A run'} took {run.steps}{of} steps" + (f" in {duration(seconds)}" if seconds > 0 else "")
    device, commit = at(run.versions, "device"), at(run.versions, "commit")
    count = at(run.versions, "devices")
    words += f" on {count if type(count) is int and count > 1 else 'one'} {device}" if isinstance(device, str) else ""
    words += f", at commit {commit[:12]}" if isinstance(commit, str) else ""
    if _is_over(run):
        return f"{words}."
    ended = at(run.summary, "steps")
    if type(ended) is int and run.steps < ended <= MAX_WHOLE:
        return f"{words}. Its summary is of step {ended}: the lines of later steps are missing in metrics.jsonl."
    return f"{words}. It has not ended: it is going on, or it was stopped."


def _is_over(run: RunFiles) -> bool:
    """Whether the summary is of the last step that is logged; a run that goes on may have that of an earlier end."""
    return bool(run.summary) and at(run.summary, "steps") in (None, run.steps)


def _heldout(run: RunFiles) -> list[str]:
    """First and last held-out accuracy of each source."""
    found = list[str]()
    for name in names_with(run.lines, "heldout/"):
        steps, values = series(run.lines, name)
        if not values:
            continue
        source = name.removeprefix("heldout/")
        count = heldout_prompts(run, source)
        of = f" of {count} prompts" if count else ""
        if len(values) == 1:
            found.append(f"Held-out accuracy on {source} was {values[0]:.3f}{of} at step {steps[0]}.")
        else:
            when = f"step {steps[0]} to step {steps[-1]}"
            found.append(
                f"Held-out accuracy on {source} went from {values[0]:.3f} to {values[-1]:.3f}{of}, from {when}."
            )
    return found


def _samples(run: RunFiles) -> str:
    """Accuracy and reward of the first and the last samples."""
    parts = list[str]()
    for name, word in (("accuracy", "accuracy of the samples"), ("reward", "mean reward")):
        values = series(run.lines, name)[1]
        if len(values) >= 2 and not (name == "reward" and values == series(run.lines, "accuracy")[1]):
            first, last = _windows(values)
            parts.append(f"the {word} went from {_mean(first):.3f} to {_mean(last):.3f}")
    if not parts:
        return ""
    size = len(_windows(series(run.lines, "reward")[1] or series(run.lines, "accuracy")[1])[0])
    words = " and ".join(parts)
    return f"{words[0].upper()}{words[1:]} (means of the first and the last {size} steps)."


def _speed(run: RunFiles) -> str:
    """Full against nested, as measured at the end; before that, the mean speed of sampling."""
    full, nested = (finite(at(run.summary, f"{name}_tokens_per_second")) for name in ("full", "nested"))
    if full and nested:
        layers, kept = finite(at(run.summary, "layers")), finite(at(run.summary, "kept_layers"))
        out = f" without {layers - kept:.0f} of its {layers:.0f} layers" if layers and kept and layers > kept else ""
        if not out:
            return f"At the end the model generated {full:,.0f} tokens a second. No layer was left out."
        return (
            f"At the end the full model generated {full:,.0f} tokens a second, and {nested:,.0f}{out}:"
            f" {nested / full:.2f} times as many."
        )
    values = series(run.lines, "tokens_per_second")[1]
    return f"Rollouts generated {_mean(values):,.0f} tokens a second on average." if values else ""


def _off_policy(run: RunFiles) -> str:
    steps, values = series(run.lines, "ess_token")
    if not values:
        return ""
    least = min(range(len(values)), key=lambda index: values[index])
    whole = series(run.lines, "ess_sequence")[1]
    words = f"The effective sample size of tokens was {_mean(values):.3f} on average"
    if values[least] < 0.995:
        words += f", and least, {values[least]:.3f}, at step {steps[least]}"
    return f"{words}; that of completions was {_mean(whole):.3f}." if whole else f"{words}."


def _reward_alone(run: RunFiles) -> str | None:
    """That the reward rose and the held-out accuracy did not."""
    rewards = series(run.lines, "reward")[1]
    names = [name for name in names_with(run.lines, "heldout/") if len(series(run.lines, name)[1]) > 1]
    if len(rewards) < LEAST or not names:
        return None
    first, last = _windows(rewards)
    error = math.sqrt((_variance(first) / len(first)) + (_variance(last) / len(last)))
    if _mean(last) - _mean(first) <= max(ERRORS * error, SMALL):
        return None
    ends = {name: (values[0], values[-1]) for name in names if (values := series(run.lines, name)[1])}
    if any(_has_risen(run, name, *pair) for name, pair in ends.items()):
        return None
    shown = ", ".join(f"{name.removeprefix('heldout/')} {a:.3f} to {b:.3f}" for name, (a, b) in ends.items())
    return (
        f"The reward rose from {_mean(first):.3f} to {_mean(last):.3f}, and held-out accuracy did not rise beyond"
        f" chance ({shown}). The policy may have learnt what the reward pays and not the task, or the prompts by heart:"
        " look at the best-rewarded wrong samples."
    )


def _has_risen(run: RunFiles, name: str, first: float, last: float) -> bool:
    """Whether a held-out accuracy rose by more than two standard errors, or is high already."""
    if last >= HIGH:
        return True
    count = heldout_prompts(run, name.removeprefix("heldout/"))
    if count is None or not 0 <= first <= 1 or not 0 <= last <= 1:
        return last - first > SMALL
    return last - first > 2 * math.sqrt((first * (1 - first) + last * (1 - last)) / count)


def _counted(run: RunFiles, total: str, metric: str, words: str) -> str | None:
    """How often something went wrong, by the log."""
    count = finite(at(run.summary, total)) if _is_over(run) else None
    if count is None:
        count = sum(float(line[metric]) for line in run.lines if isinstance(line.get(metric), bool | int))
    return f"{count:.0f} {words}." if count else None


def _low_ess(run: RunFiles) -> str | None:
    limit, values = finite(at(run.config, "train", "ess_warning")), series(run.lines, "ess_token")[1]
    below = sum(value < limit for value in values) if limit is not None else 0
    if not below:
        return None
    return (
        f"The effective sample size of tokens was below {limit:g} in {below} of {len(values)} steps, so few tokens made"
        " the updates. Lower nesting.skip_ratio, or use another loss.bias_mitigation."
    )


def _said(run: RunFiles) -> str | None:
    """The latest of the warnings that steps logged."""
    said = [line for line in run.lines if isinstance(line.get("warning"), str)]
    if not said:
        return None
    return f"{len(said)} steps logged a warning. The last one, of step {said[-1]['step']}: {said[-1]['warning']}."


def _windows(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    size = max(len(values) // WINDOW, min(2, len(values)))
    return values[:size], values[-size:]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)


def _flat(value: Any, prefix: str = "", depth: int = 0) -> dict[str, str]:
    """The values of nested objects and lists by their path, as text."""
    entries: list[tuple[str, Any]] = []
    # No configuration is this deep, but a damaged file may be.
    if depth > DEEPEST:
        return {prefix: "..."}
    if isinstance(value, dict):
        entries = [(f"{prefix}.{name}" if prefix else str(name), each) for name, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        entries = [(f"{prefix}[{index}]", each) for index, each in enumerate(value)]
    if not entries:
        return {prefix: _shown(value)} if prefix else {}
    return {name: text for path, each in entries for name, text in _flat(each, path, depth + 1).items()}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST_VALUE else f"{text[:MOST_VALUE]}…"
