"""One question and what is needed to check an answer to it."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

logger = logging.getLogger(__name__)

Checker = Literal["exact", "math", "task", "function", "model"]


@dataclass(frozen=True)
class Example:
    """One question and what is needed to check an answer to it.

    Attributes:
        question: the text asked, without instruction or chat template.
        answer: the gold answer; of preference pairs, the preferred one. The other one is `metadata["rejected"]`.
        source: name of the source that it came from.
        metadata: whatever the source's verifier needs beyond the answer.
        reference: a known-good completion, if the source has one.
        checker: how answers to it are checked; None leaves it to `reward.checker`.
    """

    question: str
    answer: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    checker: Checker | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """What two examples must not have in common: the question, or the whole of a preference pair."""
        if "rejected" not in self.metadata:
            return (self.question,)
        return (self.question, self.answer, str(self.metadata["rejected"]))


@contextlib.contextmanager
def about(example: Example) -> Iterator[None]:
    """A block in which errors of a text name the example that it belongs to.

    Args:
        example: the one.

    Raises:
        ValueError: what was raised, with source and question in front.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"source '{example.source}', question {example.question[:60]!r}: {error}") from error


def distinct(examples: Iterable[Example], part: str, excluded: Iterable[Example] = ()) -> list[Example]:
    """The examples whose question was not asked before, in order; what is removed is reported.

    A repeated question would weigh double in training, and one that is held out as well would be
    trained on and then tested. Of two examples with one question the first stays. One prompt may have several
    preference pairs, as long as they differ.

    Args:
        examples: of one source.
        part: what they are, for the warning: `train` or `heldout`.
        excluded: examples whose questions may not come again.

    Returns:
        The examples that stay.
    """
    elsewhere = {example.question for example in excluded}
    kept: dict[tuple[str, ...], Example] = {}
    repeated, heldout = [], []
    # Rows count from 1, as an editor shows them.
    for row, example in enumerate(examples, 1):
        # A question that is held out is reported as that, even if it is also repeated.
        if example.question in elsewhere:
            heldout.append((row, example))
        elif example.identity in kept:
            repeated.append((row, example))
        else:
            kept[example.identity] = example
    for removed, why in ((repeated, "ask what an earlier one asks"), (heldout, "are held out as well")):
        if removed:
            # One row is enough to find the others, and thousands would drown the log.
            row, first = removed[0]
            logger.warning(
                "source '%s': %d %s rows removed, because they %s; the first is row %d: %.80r",
                first.source,
                len(removed),
                part,
                why,
                row,
                first.question,
            )
    return list(kept.values())


def counted_by_reason(removed: Sequence[tuple[Example, str]]) -> str:
    """What is wrong with examples, for a message: each reason with its count and the first question that has it.

    Such as "2 missing, the first to 'Why?'; 1 not right, the first to 'Who?'".

    Args:
        removed: examples and their reasons, in order.
    """
    first = {reason: example.question for example, reason in reversed(removed)}
    counts = Counter(reason for _, reason in removed)
    return "; ".join(f"{count} {reason}, the first to {first[reason][:60]!r}" for reason, count in counts.items())
