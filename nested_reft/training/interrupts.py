"""Stopping a run on request: after the step in progress, with a checkpoint.

There is one handler for the whole process while any block of `stop_requests` is open. It only sets a flag, so
whatever a signal interrupts (a log line, a compilation, a checkpoint) goes on.

SIGTERM alone is a pre-emption: the machine is wanted back, and the run is to go on elsewhere. SIGINT and SIGHUP come
from a person, who wants it to end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
SAID = b"\nstopping after the work in progress, with a checkpoint; a second signal stops at once\n"


class Preempted(KeyboardInterrupt):
    """A run was asked to stop by SIGTERM alone."""


def interruption() -> KeyboardInterrupt:
    """What ends a run that was asked to stop: `Preempted` where only SIGTERM came."""
    return Preempted() if _current is not None and _current.is_preemption else KeyboardInterrupt()


# What a run may be asked for, as numbers that processes can compare: a person's request outweighs that of a machine.
GO_ON, LEAVE, STOP = range(3)


def asked_for(stop: bool) -> int:
    """What this process was asked for: `GO_ON`, `LEAVE` by SIGTERM alone, or `STOP`.

    Args:
        stop: what the function of `stop_requests` says.
    """
    return GO_ON if not stop else LEAVE if isinstance(interruption(), Preempted) else STOP


def stop_if(request: int) -> None:
    """Ends a run that was asked to end, by this process or another.

    Args:
        request: one of those of `asked_for`.

    Raises:
        KeyboardInterrupt: it is not `GO_ON`; `Preempted` where it is `LEAVE`.
    """
    if request != GO_ON:
        raise Preempted() if request == LEAVE else KeyboardInterrupt()


def _raise() -> None:
    raise interruption()


class _Requests:
    """What was asked for since the outermost block began, and what a second signal does in each block."""

    def __init__(self):
        self.stop = self.at_once = False
        self.actions: list[Callable[[], None]] = []
        self.shields = 0  # blocks in which even a second signal has to wait
        self.numbers: set[int] = set()

    @property
    def is_preemption(self) -> bool:
        """Whether nothing but SIGTERM asked."""
        return self.numbers == {signal.SIGTERM}

    def handle(self, number: int, _frame: Any) -> None:
        """The handler of every signal."""
        self.numbers.add(number)
        if not self.stop:
            self.stop = True
            # `print` is no choice: the signal may have interrupted a write to the same stream.
            os.write(2, SAID)
            return
        self.at_once = True
        self.act()

    def act(self) -> None:
        """Stops at once where that was asked for and nothing must be finished first.

        Raises:
            KeyboardInterrupt: in the thread that handles signals, unless the block has another action.
        """
        if self.at_once and not self.shields:
            self.at_once = False
            self.actions[-1]()


_current: _Requests | None = None


@contextmanager
def stop_requests(at_once: Callable[[], None] = _raise) -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request to stop after the step; a second one acts at once.

    A block within another one shares its requests, so a run also hears what came before it began.

    Args:
        at_once: what a second signal does; by default it raises KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: the outermost block ended, and nobody had acted on a request. None is lost. It is
            `Preempted` where only SIGTERM came.
    """
    global _current
    # Python lets only the main thread set handlers. In any other thread the run cannot be asked to stop.
    shared = _current
    if threading.current_thread() is not threading.main_thread():
        yield lambda: shared is not None and shared.stop
        return
    if shared is not None:
        shared.actions.append(at_once)
        try:
            yield lambda: shared.stop
        finally:
            shared.actions.pop()
        return
    requests = _current = _Requests()
    requests.actions.append(at_once)
    previous: dict[int, Any] = {}
    try:
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            handler = signal.getsignal(number)
            # `nohup` starts a program with SIGHUP ignored. A shell does the same to SIGINT of what it starts in the
            # background, where it can only have been sent on purpose. None is a handler that is not Python's.
            if handler is not None and (number == signal.SIGINT or handler != signal.SIG_IGN):
                previous[number] = signal.signal(number, requests.handle)
        yield lambda: requests.stop
        if requests.stop:
            raise interruption()
    finally:
        _current = None
        # A notebook goes on after the run and needs its own handlers back.
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def finishing() -> Iterator[None]:
    """A block that even a second signal does not interrupt; it acts right after the block.

    Raises:
        KeyboardInterrupt: a second signal came in the meantime.
    """
    requests = _current
    if requests is None:
        yield
        return
    requests.shields += 1
    try:
        yield
    finally:
        requests.shields -= 1
    requests.act()
