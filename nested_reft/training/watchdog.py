"""A watchdog: it sees that a run makes no progress any more, and leaves word of where it stood.

A process that waits for ever looks alive to whatever started it, and to JAX's own heartbeats. A device that hangs, a
collective whose peer is gone and a file system that does not answer all look like this.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

from nested_reft import processes

logger = logging.getLogger(__name__)
DIRECTORY = "stalls"  # within the run's
# The module in which JAX waits for XLA's compiler.
COMPILER = os.path.join("jax", "_src", "compiler.py")


class Watchdog:
    """A thread that looks for signs of progress as long as the `with` block goes on."""

    def __init__(
        self,
        seconds: float | None,
        run: Path,
        signs: Callable[[], Hashable],
        where: Callable[[], str],
        on_stall: Callable[[str], None] | None = None,
    ):
        """Args:
        seconds: the longest time without a sign of progress; None looks for none.
        run: the run's directory.
        signs: what changes with every progress.
        where: stage and step, in words.
        on_stall: called with what happened, in words, when the stacks have been written. By default that becomes a
            warning, and the watchdog goes on.
        """
        self._limit, self._run, self._signs, self._where = seconds, run, signs, where
        self._on_stall = on_stall or (lambda words: logger.warning("%s", words))
        self._tick = 5.0 if seconds is None else min(seconds / 10, 5.0)
        self._waited, self._last = 0.0, signs()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit is not None:
            self._over.clear()
            self._last, self._waited = self._signs(), 0.0
            # It must not keep a process alive that has nothing else to do.
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            self.look(now - before)
            before = now

    def look(self, passed: float) -> None:
        """Looks once.

        Args:
            passed: seconds since the last look.
        """
        signs = self._signs()
        if signs != self._last or is_compiling():
            self._last, self._waited = signs, 0.0
            return
        # A process that was stopped for a while (Ctrl-Z, a debugger) has not stalled, so no look counts for more.
        self._waited += min(passed, 2 * self._tick)
        if self._limit is not None and self._waited >= self._limit:
            words = f"{self._where()}: no progress for {self._waited:.0f} seconds (train.stall_seconds {self._limit:g})"
            self._waited = 0.0
            self._on_stall(f"{words}; {self._dump(words)}")

    def _dump(self, words: str) -> str:
        """Writes the stacks of all threads; in words, where they are."""
        path = self._run / DIRECTORY / f"process_{processes.index()}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:  # what stalls may be the very file system
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            return f"the stacks of all threads could not be written to '{path}': {error.strerror or error}"
        return f"the stacks of all threads are in '{path}'"


def is_compiling() -> bool:
    """Whether a thread waits for XLA's compiler, which may take long and gives no sign until it is done."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_filename.endswith(COMPILER):
                return True
            frame = frame.f_back
    return False
