"""A pool of processes that score completions and can be killed.

Answers that a model wrote, and functions that a user wrote, may hang or crash the process that
reads them. Here that costs one completion its score: the worker is killed and replaced, and the
run goes on. Requests and replies are JSON over pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from nested_reft.config_files import PACKAGE

# A first import of SymPy or of a user's own packages may be slow on a busy machine.
START_LIMIT_SECONDS = 120.0

# Workers import this package from where their parent did, installed or not.
START = "import sys; sys.path[:] = sys.argv[1:]; from nested_reft.rewards.worker import main; main()"

Failure = Literal["timed_out", "crashed", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
        value: the score; None where there is none.
        failure: `timed_out` (killed at the limit), `crashed` (the process ended), `failed` (an
            exception, or no finite number); None where there is a score.
        message: what happened.
    """

    value: float | None
    failure: Failure | None = None
    message: str = ""


class WorkerPool:
    """Workers that are started when needed, and replaced when they hang or crash.

    Args:
        workers: processes at work at once.
        time_limit_seconds: for each completion; more than 0.
        memory_gib: memory that a worker may ask for; 0 for no limit.
        function: the user's function, `package.module:function` or `path/file.py:function`.
    """

    def __init__(self, workers: int, time_limit_seconds: float, memory_gib: float = 0, function: str | None = None):
        self._time_limit_seconds = time_limit_seconds
        self._setup = {
            "memory_bytes": int(memory_gib * 2**30),
            # This is longer than any limit of the pool, so it acts only when the pool is gone.
            "last_resort_seconds": 2 * max(time_limit_seconds, START_LIMIT_SECONDS),
            "function": function,
        }
        self._path = _import_path(function)
        # The threads only wait on pipes, so the interpreter's lock does not slow them.
        self._threads = ThreadPoolExecutor(workers)
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._alive: set[_Worker] = set()
        for _ in range(workers):
            self._idle.put(None)  # a place whose worker is yet to be started
        # The callback holds the set and not the pool, which could otherwise never be collected.
        weakref.finalize(self, _kill_all, self._alive)  # also at exit

    def run(self, requests: Sequence[dict[str, Any]]) -> list[Outcome]:
        """Scores every request, each within the time limit, in any order; returns outcomes in theirs.

        Args:
            requests: `kind` says what is asked (`worker.py` reads them). What JSON lacks, such as
                fractions and dates, arrives as text.

        Returns:
            One outcome per request, in the order of the requests.
        """
        return list(self._threads.map(self._run_one, requests))

    def check(self, kind: str) -> str | None:
        """Starts a worker and gets it ready for a kind of request; what went wrong, or None.

        Args:
            kind: `math`, `task` or `function`.
        """
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            outcome = worker.prepare(kind)
            return None if outcome.failure is None else outcome.message
        finally:
            self._idle.put(self._keep(worker))

    def close(self) -> None:
        """Kills the workers; the pool can be used again, and starts others."""
        _kill_all(self._alive)

    def _run_one(self, request: dict[str, Any]) -> Outcome:
        worker = self._idle.get()
        try:
            # One that died while idle owes nothing to this completion.
            if worker is not None and worker.process.poll() is not None:
                self._keep(worker)
                worker = None
            worker = worker or self._start()
            # Imports come before the clock of the completion starts.
            outcome = worker.prepare(request["kind"])
            return outcome if outcome.failure else worker.ask(request, self._time_limit_seconds)
        finally:
            self._idle.put(self._keep(worker))

    def _start(self) -> _Worker:
        worker = _Worker(self._setup, self._path)
        self._alive.add(worker)
        return worker

    def _keep(self, worker: _Worker | None) -> _Worker | None:
        """The worker if it can go on; otherwise it is gone for good."""
        if worker is None or worker.usable:
            return worker
        worker.kill()
        # Pipes close only here, in the thread that uses them; `kill` may run in another.
        worker.close_pipes()
        self._alive.discard(worker)
        return None


def _import_path(function: str | None) -> list[str]:
    """Where workers look for modules: where this process does, but not in the working directory.

    A file there that happens to have the name of a module, such as `inspect.py`, would be executed. Python's own
    modules come first, because a script's directory, which stands before them here, may hold such a file too.
    """
    here = os.getcwd()
    asked = {os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    kept = [entry for entry in path if entry != here or entry in asked]
    # A user's own module may lie there, and so may a checkout of this package. Last, it takes no other's place.
    named = function is not None and not function.rpartition(":")[0].endswith(".py")
    kept += [here] if named or str(PACKAGE.parent) == here else []
    library = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    own = {*library, *(os.path.join(directory, "lib-dynload") for directory in library)}
    return sorted(kept, key=lambda entry: entry not in own)  # stable: the others keep their order


def _kill_all(workers: Iterable[_Worker]) -> None:
    for worker in list(workers):
        worker.kill()


class _Worker:
    """One process, in a session of its own so that its children can be killed with it."""

    def __init__(self, setup: dict[str, Any], path: list[str]):
        self.process = subprocess.Popen(
            # With -P, the working directory is not searched for modules. The path is set before anything is imported.
            [sys.executable, "-P", "-c", START, *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A pipe that nobody reads would fill up and block the worker.
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.usable = True
        self._first_line: dict[str, Any] | None = setup
        self._prepared: set[str] = set()
        self._killing, self._killed = threading.Lock(), False

    def prepare(self, kind: str) -> Outcome:
        """Imports what a kind of request needs, outside of any completion's time."""
        if kind in self._prepared:
            return Outcome(0.0)
        outcome = self.ask({"prepare": kind}, START_LIMIT_SECONDS)
        if outcome.failure is None:
            self._prepared.add(kind)
        return outcome

    def ask(self, request: dict[str, Any], limit_seconds: float) -> Outcome:
        """Sends one request and waits for its reply; kills the process when the time is up."""
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(limit_seconds, stop)
        timer.daemon = True
        timer.start()
        line = b""
        try:
            # The setup goes out with the first request, and so falls under its time limit.
            if self._first_line is not None:
                self.process.stdin.write(json.dumps(self._first_line).encode() + b"\n")
                self._first_line = None
            self.process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # the process is gone
            pass
        finally:
            timer.cancel()
            timer.join()  # so that it either came or never will
        if late.is_set():
            self.usable = False
            return Outcome(None, "timed_out", f"no score within {limit_seconds:g} seconds")
        # A process that dies while it writes leaves a line without its end.
        if not line.endswith(b"\n"):
            self.usable = False
            return Outcome(None, "crashed", f"the worker ended with exit code {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            return Outcome(None, "failed", reply["error"])
        return Outcome(reply["value"])

    def kill(self) -> None:
        """Ends the process and whatever it started."""
        self.usable = False
        with self._killing:  # once: later on, the number could be another process's
            if not self._killed:
                self._killed = True
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def close_pipes(self) -> None:
        """Gives the pipes of a killed process back."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
