"""The time limit that a pre-emption sets: from a SIGTERM on, a run has so many seconds to save."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nested_reft.exit_codes import PREEMPTED
from nested_reft.untrusted import printable


@contextmanager
def save_limit(seconds: float, at_end: Callable[[], None]) -> Iterator[None]:
    """A block that has so many seconds from a SIGTERM on; then `at_end` is called in another thread.

    A handler written in Python runs only once the main thread is back in Python, and a long program on a device keeps
    it away. So the time is counted by a thread, which reads what the interpreter's own handler writes into a pipe.

    Args:
        seconds: from the signal to `at_end`.
        at_end: must end the process, since the main thread may be anywhere.
    """
    # Python lets only the main thread hear of signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as `set_wakeup_fd` asks
    ended = threading.Event()
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watching = threading.Thread(target=_watch, args=(reader, previous, seconds, ended, at_end), daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous)
        os.close(writer)  # which ends the thread
        watching.join()
        os.close(reader)


def leave_unsaved(run: str, newest: Callable[[], int | None], seconds: float) -> None:
    """Ends the process while its main thread is still at work: no thread is waited for, and nothing is tidied up.

    Args:
        run: what the user calls it.
        newest: gives the number of its newest checkpoint.
        seconds: the limit that is over.
    """
    try:
        number = newest()
        how = "there is no checkpoint yet, and nothing to continue"
        if number is not None:
            how = f"to continue from checkpoint {number}: nested-reft train --resume {run}"
        line = printable(f"the step and its checkpoint took longer than train.save_seconds, {seconds:g}; {how}")
        # `print` is no choice: the main thread may hold the stream's lock.
        os.write(2, f"\n{line}\n".encode())
    finally:  # whoever read the output may be gone
        end_now(PREEMPTED)


def end_now(code: int) -> None:
    """Ends the process as if it were killed; output that is buffered is lost.

    Args:
        code: its exit code.
    """
    os._exit(code)


def _watch(reader: int, previous: int, seconds: float, ended: threading.Event, at_end: Callable[[], None]) -> None:
    while numbers := os.read(reader, 64):
        if previous != -1:  # an event loop, as in a notebook, hears of its signals too
            os.write(previous, numbers)
        if signal.SIGTERM in numbers:
            if not ended.wait(seconds):
                at_end()
            return
