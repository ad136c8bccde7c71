"""Stopping a run on request: after the step in progress, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one acts at once.

    The handler only sets a flag: whatever it interrupts (a log line, a checkpoint) goes on.
    """
    requested = False

    def request(number: int, _frame: Any) -> None:
        nonlocal requested
        requested = True
        # The handler takes itself away, so the next signal of this kind does what it did before the run.
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    # Python lets only the main thread set handlers. In any other thread the run cannot be asked to stop.
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        # A notebook goes on after the run and needs its own handlers back.
        for number, handler in previous.items():
            signal.signal(number, handler)
