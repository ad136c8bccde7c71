"""Samples of a run: which ones to show, and how they read as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nested_reft.reports.charts import spread
from nested_reft.reports.run_files import Line, finite
from nested_reft.untrusted import printable

Verdict = Literal["right", "wrong", "unscored", "unknown"]
LOOKED_AT = 6  # samples of each kind on the page of those that are worth a look


@dataclass(frozen=True)
class SampleFilter:
    """Which samples are wanted; None leaves a thing open.

    Attributes:
        steps: the first and the last step.
        source: the name of the source.
        verdict: whether the answer is right.
        rewards: the least and the greatest reward.
        text: that stands in prompt, answer or completion, in any case.
    """

    steps: tuple[int, int] | None = None
    source: str | None = None
    verdict: Verdict | None = None
    rewards: tuple[float | None, float | None] = (None, None)
    text: str | None = None

    def takes(self, sample: Line) -> bool:
        """Whether a sample is wanted.

        Args:
            sample: a line of `samples.jsonl`.
        """
        reward, (least, most) = finite(sample.get("reward")), self.rewards
        return (
            (self.steps is None or self.steps[0] <= sample["step"] <= self.steps[1])
            and (self.source is None or sample.get("source") == self.source)
            and (self.verdict is None or verdict(sample) == self.verdict)
            and (least is None or (reward is not None and reward >= least))
            and (most is None or (reward is not None and reward <= most))
            and (self.text is None or self.text.casefold() in _searched(sample))
        )


def verdict(sample: Line) -> Verdict:
    """Whether a sample's answer is right; unknown in logs that do not tell.

    Args:
        sample: a line of `samples.jsonl`.
    """
    if "accuracy" in sample and sample["accuracy"] is None:
        return "unscored"
    parts = sample.get("parts")
    # Earlier versions logged the accuracy as a part of the reward alone.
    accuracy = finite(sample.get("accuracy", parts.get("accuracy") if isinstance(parts, dict) else None))
    if accuracy is None:
        return "unknown"
    return "right" if accuracy >= 1 else "wrong"


def worth_a_look(samples: Sequence[Line]) -> list[tuple[str, str, list[Line]]]:
    """Samples that show what goes wrong: the best rewarded of the wrong ones, the shortest and the heaviest.

    Args:
        samples: lines of `samples.jsonl`.

    Returns:
        Title, a sentence on why, and the samples, of each kind that there is. Of samples with equal texts for equal
        prompts the first counts.
    """
    wrong = [sample for sample in samples if verdict(sample) == "wrong" and finite(sample.get("reward")) is not None]
    sized = [sample for sample in samples if finite(sample.get("tokens")) is not None]
    heavy = [sample for sample in samples if finite(sample.get("mean_weight")) is not None]
    kinds = [
        (
            "Wrong, and best rewarded",
            "A high reward for a wrong answer is what a policy learns in place of the task.",
            sorted(wrong, key=lambda sample: -sample["reward"]),
        ),
        (
            "Shortest",
            "A policy that gives up, or is cut short, says little.",
            sorted(sized, key=lambda sample: sample["tokens"] - (finite(sample.get("forced_tokens")) or 0)),
        ),
        (
            "Heaviest",
            "The larger its importance weight, the more a sample counts in the update.",
            sorted(heavy, key=lambda sample: -sample["mean_weight"]),
        ),
    ]
    found = [(title, why, _distinct(ordered)) for title, why, ordered in kinds]
    return [(title, why, shown) for title, why, shown in found if shown]


def evenly_chosen(samples: Sequence[Line], most: int) -> list[Line]:
    """At most so many of the samples: those of whole steps, evenly spread over the run.

    Args:
        samples: lines of `samples.jsonl`, in their order.
        most: how many; the samples of one step are cut to it.
    """
    if len(samples) <= most:
        return list(samples)
    steps = list(dict.fromkeys(sample["step"] for sample in samples))
    # Steps have about as many samples each.
    count = max(most * len(steps) // len(samples), 1)
    chosen = {steps[index] for index in spread(len(steps), count)} if count > 1 else {steps[-1]}
    return [sample for sample in samples if sample["step"] in chosen][:most]


def visible(text: Any) -> str:
    """What a model wrote, with its line breaks kept and every other control character as an escape.

    Args:
        text: untrusted.
    """
    return "\n".join(map(printable, str(text).replace("\r\n", "\n").split("\n")))


def facts(sample: Line) -> list[tuple[str, str]]:
    """What a line says of a sample, beside its texts: names and values as text.

    Args:
        sample: a line of `samples.jsonl`.
    """
    parts = sample.get("parts")
    # A part that is the whole reward, or that is 0 because nothing failed, would only be in the way.
    shown_parts = {
        name: value for name, value in (parts if isinstance(parts, dict) else {}).items() if value or name == "accuracy"
    }
    left_out, forced = sample.get("left_out_layers"), sample.get("forced_tokens")
    found = [
        ("reward", _number(sample.get("reward"))),
        *((str(name), _number(value)) for name, value in shown_parts.items()),
        ("advantage", _number(sample.get("advantage"))),
        ("mean weight", _number(sample.get("mean_weight"))),
        ("tokens", _number(sample.get("tokens")) + (f", {_number(forced)} of them given" if forced else "")),
        ("ended by", str(sample.get("stop", "-"))),
        ("layers left out", ", ".join(map(str, left_out)) if isinstance(left_out, list) and left_out else "none"),
    ]
    if finite(sample.get("temperature")) not in (None, 1.0):
        found.append(("temperature", _number(sample["temperature"])))
    return [(printable(name), printable(value)) for name, value in found]


def heading(sample: Line) -> str:
    """Step, policy version, source and verdict of a sample, in one line.

    Args:
        sample: a line of `samples.jsonl`.
    """
    version, source = sample.get("version"), sample.get("source")
    parts = [
        f"step {sample['step']}",
        *([f"version {version}"] if type(version) is int else []),
        *([printable(source)] if isinstance(source, str) else []),
        verdict(sample),
    ]
    return ", ".join(parts)


def sample_text(sample: Line) -> str:
    """A sample as plain text that no line of it can pass for another sample.

    Args:
        sample: a line of `samples.jsonl`.
    """
    values = "; ".join(f"{name} {value}" for name, value in facts(sample))
    return "\n".join(
        [
            f"--- {heading(sample)}: {values}",
            # Each line of a text has its mark before it, so that what a model wrote cannot look like a heading.
            *(f"prompt | {line}" for line in visible(sample.get("prompt", "")).split("\n")),
            *(f"answer | {line}" for line in visible(sample.get("answer", "")).split("\n")),
            *(f"sample | {line}" for line in visible(sample.get("text", "")).split("\n")),
        ]
    )


def _searched(sample: Line) -> str:
    return "\n".join(str(sample.get(name, "")) for name in ("prompt", "answer", "text")).casefold()


def _distinct(samples: Sequence[Line]) -> list[Line]:
    found = dict[tuple[str, str], Line]()
    for sample in samples:
        found.setdefault((str(sample.get("prompt")), str(sample.get("text"))), sample)
        if len(found) == LOOKED_AT:
            break
    return list(found.values())


def _number(value: Any) -> str:
    number = finite(value)
    return "-" if number is None else f"{number:.4g}" if abs(number) < 10_000 else f"{number:.0f}"
