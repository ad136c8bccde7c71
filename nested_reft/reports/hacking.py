"""Whether a policy exploits its reward model, as far as the log of a run can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nested_reft.untrusted import printable

Line = dict[str, Any]
SHARE = 10  # a window is this part of the steps; a peak may be short
LEAST = 2  # steps of a window, which need a spread
EARLIEST = 50  # steps before a run that goes on is judged; shorter windows have too little to tell a fall by
ERRORS = 3.0  # standard errors that a fall must exceed
GROWTH = 1.5  # of length, or of the disagreement between reward models
# The first of these that a run logs.
DIVERGENCES = ("completion_kl", "reference_log_ratio", "reference_kl")


def reward_hacking(lines: Sequence[Line], gold: str | None) -> dict[str, Any] | None:
    """Learned reward beside gold reward, divergence, length and disagreement, and one warning where they part.

    With a gold reward the sign of hacking is that it falls from its best, by more than three standard errors, while
    the learned one does not. Without one there are weaker signs: the learned reward rose, and completions changed their
    length by half, or reward models came to disagree by half as much again.

    Args:
        lines: of `metrics.jsonl`.
        gold: the metric that holds the gold reward; None where nothing checks the answers.

    Returns:
        None of runs without a reward model. Else JSON-able values: first and last window of each measure,
        `gold_best` and the step that it ends at, and `warning`, None or a plain sentence with a remedy.
    """
    steps = [line for line in lines if line.get("reward/model") is not None]
    if not steps:
        return None
    size = min(max(len(steps) // SHARE, LEAST), len(steps))
    kl = next((name for name in DIVERGENCES if any(line.get(name) is not None for line in steps)), None)
    names = {"learned": "reward/model", "gold": gold, "kl": kl}
    names |= {"tokens": "completion_tokens", "disagreement": "reward/model_std"}
    found: dict[str, Any] = {"window_steps": size, "gold_metric": gold}
    for name, metric in names.items():
        windows = [_mean(steps[part], metric) for part in (slice(size), slice(-size, None))]
        if None not in windows:
            found[name] = windows
    if "gold" in found:
        found |= _gold_best(steps, str(gold), size)
    return found | {"warning": _gold_warning(steps, found, size) if "gold" in found else _signs(found)}


def _gold_best(steps: Sequence[Line], gold: str, size: int) -> dict[str, Any]:
    """The best of the windows that do not overlap, and where it ends."""
    starts = range(0, len(steps) - size + 1, size)
    # A window may hold no gold reward at all. A mean of exactly 0 is not such a one.
    means = {start: mean for start in starts if (mean := _mean(steps[start : start + size], gold)) is not None}
    best = max(means, key=lambda start: means[start])
    return {"gold_best": means[best], "gold_best_step": steps[best + size - 1]["step"]}


def _gold_warning(steps: Sequence[Line], found: dict[str, Any], size: int) -> str | None:
    metric = found["gold_metric"]
    end = next(index for index, line in enumerate(steps) if line["step"] == found["gold_best_step"]) + 1
    best, last = steps[end - size : end], steps[-size:]
    fall = found["gold_best"] - found["gold"][1]
    error = math.sqrt(_variance(best, metric) / size + _variance(last, metric) / size)
    learned_then, learned_now = _mean(best, "reward/model"), found["learned"][1]
    if fall <= ERRORS * error or learned_then is None or learned_now < learned_then:
        return None
    return (
        f"the gold reward ({printable(metric)}) fell from {found['gold_best']:.3g} around step"
        f" {found['gold_best_step']} to {found['gold'][1]:.3g}, while the learned reward went from {learned_then:.3g}"
        f" to {learned_now:.3g}: the policy exploits the reward model. {_remedy(found)}, or stop near step"
        f" {found['gold_best_step']}"
    )


def _signs(found: dict[str, Any]) -> str | None:
    signs = []
    for name, words in (("tokens", "the length of completions"), ("disagreement", "the reward models' disagreement")):
        first, last = found.get(name, (0.0, 0.0))
        if first > 0 and not 1 / GROWTH < last / first < GROWTH and (name == "tokens" or last > first):
            signs.append(f"{words} went from {first:.3g} to {last:.3g}")
    first, last = found["learned"]
    if not signs or last <= first:
        return None
    return (
        f"the learned reward rose from {first:.3g} to {last:.3g}, and {' and '.join(signs)}. No gold reward says"
        f" whether answers got better: read its samples. {_remedy(found)}"
    )


def _remedy(found: dict[str, Any]) -> str:
    ensemble = "" if "disagreement" in found else ", average several reward models (reward.model A B C)"
    return f"Raise the KL penalty, raise reset.share{ensemble}, train the reward model on this policy's samples"


def _values(steps: Sequence[Line], metric: str | None) -> list[float]:
    return [float(line[metric]) for line in steps if metric is not None and line.get(metric) is not None]


def _mean(steps: Sequence[Line], metric: str | None) -> float | None:
    values = _values(steps, metric)
    return sum(values) / len(values) if values else None


def _variance(steps: Sequence[Line], metric: str) -> float:
    values = _values(steps, metric)
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
