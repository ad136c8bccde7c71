"""One clock for a run: every second counts for one stage, so that the stages add up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

OTHER = "other"  # loading, and whatever else has no stage


class Clock:
    """Seconds of each stage since the clock was made. Compiling is a stage of its own, wherever it happens.

    Attributes:
        now_in: the stage that is going on.
        changes: how often a stage began or ended.
    """

    def __init__(self, compile_seconds: Callable[[], float], now: Callable[[], float] = time.monotonic):
        """Args:
        compile_seconds: seconds that compiling took so far.
        now: the time in seconds.
        """
        self._compile_seconds, self._now = compile_seconds, now
        self._seconds: dict[str, float] = {}
        self.now_in, self.changes = OTHER, 0
        self._last, self._compiled = now(), compile_seconds()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time of the block for a stage, and not for the one around it.

        Args:
            name: of the stage.
        """
        self._count()
        outer = self.now_in
        self._enter(name)
        try:
            yield
        finally:
            self._count()
            self._enter(outer)

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage in the order in which they began, and their `total`."""
        self._count()
        # What has no stage comes last.
        stages = {name: value for name, value in self._seconds.items() if name != OTHER}
        stages[OTHER] = self._seconds.get(OTHER, 0.0)
        return stages | {"total": sum(stages.values())}

    def _enter(self, name: str) -> None:
        self.now_in, self.changes = name, self.changes + 1

    def _count(self) -> None:
        """Counts the time since the last call for the stage that is going on."""
        now, compiled = self._now(), self._compile_seconds()
        passed = now - self._last
        # Programs may be compiled side by side, in less time than their sum.
        compiling = min(compiled - self._compiled, passed)
        self._seconds[self.now_in] = self._seconds.get(self.now_in, 0.0) + passed - compiling
        self._seconds["compiling"] = self._seconds.get("compiling", 0.0) + compiling
        self._last, self._compiled = now, compiled


def advance(bar: tqdm, shown: str, timed: bool) -> None:
    """Moves a progress bar on by a step.

    Args:
        bar: the bar.
        shown: the words behind it.
        timed: False for a step whose time says nothing of the others, as it compiles: what is left follows from them.
    """
    if timed:
        bar.update()
    else:
        bar.n += 1
        bar.initial = bar.n
        bar.unpause()  # sets the time so far aside
    bar.set_postfix_str(shown)
