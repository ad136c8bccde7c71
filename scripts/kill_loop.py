"""Kills small runs at named and at random moments, continues each, and compares its end with a run that nobody killed.

    python scripts/kill_loop.py                                          # 20 kills, about 25 processes; then the table
    python scripts/kill_loop.py --kills 3 --seed 1
    python scripts/kill_loop.py --signals SIGTERM                        # pre-emption: exit code 75, with a checkpoint
    python scripts/kill_loop.py --moments random --signals SIGINT SIGINT # a second one shortly after the first
    python scripts/kill_loop.py --processes 2                            # one of two processes that are one run

A run has nesting, DUMP, resets and either dynamic sampling or replay, which exclude each other. It is killed several
times; each time it is continued as a user would, by `train --resume`, or begun again where it had no checkpoint yet. At
last it comes to its end. Then metrics, samples, parameters, optimizer, the host's state and the summary must be those
of the undisturbed run, bit for bit (`compare_runs.py`).

A named moment is the n-th call of one function in a process, and up to a tenth of a second more. A random moment is any
time of half a run. The exit code is 1 where a run ends otherwise, or where a process does not say how to continue.
Where several processes are one run, they take turns in being killed, and the others must end by themselves.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nested_reft.checkpoints import newest_checkpoint  # noqa: E402
from nested_reft.command import environment_of  # noqa: E402
from nested_reft.exit_codes import DONE, INTERRUPTED, PREEMPTED  # noqa: E402
from nested_reft.program_cache import cache_directory  # noqa: E402
from nested_reft.reports.tables import table  # noqa: E402
from scripts.compare_runs import differences  # noqa: E402

# The function whose call is the moment, and the largest n. There is a checkpoint every two steps, so a process that
# continues is killed before it has come far, and the run lasts for several kills.
MOMENTS = {
    "start": ("nested_reft.training.trainer.Trainer.open", 1),
    "warm start": ("nested_reft.training.phases.WarmStart.step", 4),
    "rollout": ("nested_reft.training.searcher.Searcher.search", 2),
    "update": ("nested_reft.training.learner.Learner.batch", 2),
    "log write": ("nested_reft.run_directory.RunDirectory.log_metrics", 2),
    "buffer write": ("nested_reft.checkpoints.write_block", 1),
    "checkpoint write": ("nested_reft.checkpoints.Checkpoints.save", 1),
    "checkpoint seal": ("nested_reft.checkpoints.write_json", 1),
    "summary": ("nested_reft.training.reinforcement.run_summary", 1),
}
RANDOM = "random"
# These happen in the first of several processes only.
OF_THE_WRITER = ("log write", "buffer write", "checkpoint seal")
# The command says so to JAX before it imports it; here JAX has been imported by then.
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(cache_directory()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
LONGEST_WAIT = 0.1  # seconds from the call to the signal
HEARTBEAT_SECONDS = 20  # of several processes; the usual 100 would only make the loop wait
SHORT = [
    *("--data.prompts-per-batch", "4", "--rollout.group-size", "4", "--evaluation.samples-per-prompt", "0"),
    *("--warm-start.steps", "6", "--warm-start.batch-size", "16", "--optimizer.warmup-steps", "0"),
    *("--train.steps", "6", "--train.checkpoint-every", "2", "--evaluation.every-steps", "3"),
    *("--reset.share", "0.5", "--dynamic-sampling.max-generation-batches", "2"),
    *itertools.chain(*((f"--data.sources.{i}.train-size", "40") for i in range(6))),
    *itertools.chain(*((f"--data.sources.{i}.heldout-size", "4") for i in range(6))),
]
# The arguments of each kind of run. Later ones win.
RUNS = {
    "dynamic sampling": ["tiny_combined", *SHORT, "--reset.references", "answers"],
    "replay": [
        *("tiny_combined", *SHORT, "--dynamic-sampling.max-generation-batches", "1", "--reset.references", "replay"),
        *("--replay.capacity", "64", "--replay.recent-share", "0.5", "--replay.prefill", "16"),
    ],
}
# Which kind of run is killed when, one line for each run. Twenty kills take them all; a run writes its buffer into a
# file of its own only for replay.
SCHEDULE = [
    ("replay", ["warm start", "rollout", "buffer write", "checkpoint seal", RANDOM]),
    ("dynamic sampling", ["start", "update", "checkpoint write", "log write", RANDOM]),
    ("replay", ["start", "checkpoint write", "update", "buffer write", "summary"]),
    ("dynamic sampling", ["warm start", "checkpoint seal", "rollout", RANDOM, RANDOM]),
]
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: PREEMPTED}  # every other signal is a person's
# What a run says that has no checkpoint to continue from; one that has not begun says only that it was stopped.
NO_CHECKPOINT = ("before its first checkpoint", "interrupted", "pre-empted")


@dataclass(frozen=True)
class Kill:
    """One process and how it ended.

    Attributes:
        moment: its name.
        code: the exit code; of several processes, that of the killed one.
        checkpoint: the newest one afterwards; None without any.
        verdict: `killed`; `not reached` where the run ended before the moment; otherwise what was wrong.
        said: the last line that it printed.
    """

    moment: str
    code: int
    checkpoint: int | None
    verdict: str
    said: str


@dataclass(frozen=True)
class Killed:
    """One run, its kills, and in what it differs from the undisturbed one."""

    kind: str
    kills: list[Kill]
    found: list[str] = field(default_factory=list)


class KillLoop:
    """Runs in a directory of their own, and the undisturbed run of each kind."""

    def __init__(self, directory: Path, signals: list[signal.Signals], draw: random.Random, processes: int = 1):
        """Args:
        directory: where everything is written.
        signals: sent one shortly after the other.
        draw: decides what is random.
        processes: which are one run.
        """
        self._directory, self._signals, self._draw, self._processes = directory, signals, draw, processes
        self._kills = 0
        self._undisturbed: dict[str, tuple[Path, float]] = {}

    def undisturbed(self, kind: str) -> tuple[Path, float]:
        """The run of a kind that nobody kills, made once, and the seconds that it takes."""
        if kind not in self._undisturbed:
            started, runs = time.monotonic(), self._directory / f"undisturbed {kind}"
            run = self._finish(self._command(kind, runs), runs)
            self._undisturbed[kind] = run, time.monotonic() - started
        return self._undisturbed[kind]

    def killed(self, kind: str, moments: list[str]) -> Killed:
        """A run that is killed at each of these moments, and then comes to its end.

        Args:
            kind: of the run, one of `RUNS`.
            moments: of its processes, one after the other.
        """
        expected, seconds = self.undisturbed(kind)
        runs = Path(tempfile.mkdtemp(dir=self._directory))
        kills = []
        for moment in moments:
            kills.append(self._kill(kind, runs, moment, seconds))
            print(f"  {kind}: {kills[-1]}", flush=True)
        return Killed(kind, kills, differences(self._finish(self._command(kind, runs), runs), expected))

    def _kill(self, kind: str, runs: Path, moment: str, seconds: float) -> Kill:
        call, wait, after = [], self._draw.uniform(0, LONGEST_WAIT), None
        if moment == RANDOM:
            # One that goes on has less to do than a whole run, and is to be killed before it ends.
            after = self._draw.uniform(0, seconds / 2)
        else:
            function, most = MOMENTS[moment]
            call = [function, str(self._draw.randint(1, most)), str(wait), *(number.name for number in self._signals)]
        victim = 0 if moment in OF_THE_WRITER else self._kills % self._processes
        self._kills += 1
        together = self._start_all(self._command(kind, runs), victim, call)
        process = together.pop(victim)
        if after is not None:
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                for number in self._signals:
                    process.send_signal(number)
                    time.sleep(wait if len(self._signals) > 1 else 0)
        output = process.communicate(timeout=600)[0]
        others = [(other.communicate(timeout=600)[0], other.returncode) for other in together]
        lines = [line for line in output.splitlines() if line.strip()]
        path = _newest_run(runs)
        newest = None if path is None else newest_checkpoint(path / "checkpoints")
        verdict = verdict_of(self._signals, process.returncode, newest, output)
        for said, code in others:
            if verdict in ("killed", "not reached"):
                verdict = verdict_of_other(verdict, process.returncode, code, said)
        return Kill(moment, process.returncode, newest, verdict, lines[-1][:100] if lines else "")

    def _finish(self, command: list[str], runs: Path) -> Path:
        """The run that this command brings to its end, in the folder `runs`."""
        together = self._start_all(command)
        outputs = [process.communicate(timeout=1200)[0] for process in together]
        path = _newest_run(runs)
        for process, output in zip(together, outputs, strict=True):
            if process.returncode != DONE or path is None:
                raise SystemExit(f"a run that nobody killed ended with {process.returncode}: {output[-2000:]}")
        assert path is not None
        return path

    def _command(self, kind: str, runs: Path) -> list[str]:
        """What a user types: continue the run, or begin it again where it has no checkpoint."""
        path = _newest_run(runs)
        if path is None or newest_checkpoint(path / "checkpoints") is None:
            return ["train", *RUNS[kind], "--runs", str(runs), "--mesh.data", str(self._processes)]
        return ["train", "--resume", str(path)]

    def _start_all(
        self, command: list[str], victim: int = 0, call: list[str] | None = None
    ) -> list[subprocess.Popen[str]]:
        """The processes of a run, of one device each where there are several; one of them gets a call that ends it."""
        if self._processes == 1:
            return [_start(call or [], command)]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{found.getsockname()[1]}"
        place = ["--coordinator", address, "--processes", str(self._processes)]
        place += ["--heartbeat-seconds", str(HEARTBEAT_SECONDS)]
        return [
            _start(call or [] if index == victim else [], [*command, *place, "--process", str(index)], devices=1)
            for index in range(self._processes)
        ]


def _newest_run(runs: Path) -> Path | None:
    """The newest run with a checkpoint, else the newest one; None without any. One that was begun again is another."""
    found = sorted(path.parent for path in runs.glob("*/config.json"))
    with_checkpoint = [path for path in found if newest_checkpoint(path / "checkpoints") is not None]
    return next(reversed(with_checkpoint or found), None)


def _start(call: list[str], command: list[str], devices: int | None = None) -> subprocess.Popen[str]:
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ if devices is None else environment_of(devices)
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), "--as-child", *call, "--", *command],
        env=CACHE | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def verdict_of(signals: list[signal.Signals], code: int, checkpoint: int | None, output: str) -> str:
    """Whether a process ended as it should: `killed`, `not reached`, `crashed`, or `silent` on how to continue.

    Args:
        signals: what it was sent.
        code: its exit code.
        checkpoint: its newest one; None without any.
        output: what it printed.
    """
    if code == DONE:
        return "not reached"
    # Before Python has begun, the system ends the process by any signal.
    if code == -signals[0] and (signals[0] == signal.SIGKILL or not output):
        return "killed"
    # A person's signal counts for more than a pre-emption.
    expected = {CODES.get(number, INTERRUPTED) for number in signals}
    if code != max(expected) or "Traceback" in output:
        return "crashed"
    # A run that was in its summary finished it.
    words = NO_CHECKPOINT if checkpoint is None else ("to continue", "report: ")
    return "killed" if any(word in output for word in words) else "silent"


def verdict_of_other(verdict: str, victim: int, code: int, output: str) -> str:
    """Whether a process ended as it should that belongs to the same run as one that was killed.

    Args:
        verdict: on the killed one, `killed` or `not reached`.
        victim: its exit code.
        code: the exit code of the other.
        output: what it printed.
    """
    # A signal that asks, asks all of them. A process that is gone is noticed by JAX, which aborts the others, or they
    # were still waiting for it at the start.
    if code == victim != -signal.SIGKILL:
        return verdict
    waited = code != DONE and "at coordinator" in output
    return verdict if victim < 0 and (code == -signal.SIGABRT or waited) else "crashed"


def child(call: list[str], command: list[str]) -> None:
    """The process that is killed: the command line, with one function that ends it.

    Args:
        call: dotted name of the function, the number of its call, seconds to wait and signals; or nothing.
        command: arguments of `nested-reft`.
    """
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if call:
        arm(call[0], int(call[1]), float(call[2]), [signal.Signals[name] for name in call[3:]])
    from nested_reft import command as program

    sys.argv = ["kill_loop", *command]
    program.main()


def owner_of(function: str) -> tuple[Any, str]:
    """The module or class that has a function, and the function's name in it.

    Args:
        function: its dotted name.
    """
    *parts, name = function.split(".")
    if parts[-1].islower():
        return importlib.import_module(".".join(parts)), name
    return getattr(importlib.import_module(".".join(parts[:-1])), parts[-1]), name


def arm(function: str, number: int, wait: float, signals: list[signal.Signals]) -> None:
    """Makes a call of a function send signals to this process, from another thread while the call goes on.

    Args:
        function: its dotted name.
        number: of the call, counted from 1.
        wait: seconds until each signal.
        signals: what is sent.
    """
    owner, name = owner_of(function)
    called, calls = getattr(owner, name), itertools.count(1)

    def send() -> None:
        for each in signals:
            time.sleep(wait)
            os.kill(os.getpid(), each)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            threading.Thread(target=send, daemon=True).start()
        return called(*arguments, **named)

    setattr(owner, name, wrapped)


def report(runs: list[Killed], signals: list[signal.Signals]) -> str:
    """The table of all kills, and the sentence that sums them up."""
    rows = []
    for number, run in enumerate(runs, start=1):
        end = "equal" if not run.found else f"{len(run.found)} differences"
        for kill in run.kills:
            checkpoint = "none: begun again" if kill.checkpoint is None else str(kill.checkpoint)
            rows.append([str(len(rows) + 1), str(number), run.kind, kill.moment, kill.verdict, checkpoint, end])
    counts = collections.Counter(kill.verdict for run in runs for kill in run.kills)
    equal = sum(not run.found for run in runs)
    kinds = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return "\n".join(
        [
            table(["kill", "run", "with", "moment", "process", "newest checkpoint", "end of the run"], rows),
            *(line for run in runs for line in run.found[:10]),
            f"{'+'.join(number.name for number in signals)}: {sum(counts.values())} moments, {kinds};"
            f" {equal} of {len(runs)} runs end like the one that nobody killed, bit for bit",
        ]
    )


def schedule(kills: int, moments: list[str] | None) -> list[tuple[str, list[str]]]:
    """So many kills of `SCHEDULE`, over and over; with `moments`, only of these."""
    found: list[tuple[str, list[str]]] = []
    for kind, planned in itertools.cycle(SCHEDULE):
        left = kills - sum(len(chosen) for _, chosen in found)
        if left <= 0:
            return found
        possible = [moment for moment in moments or planned if kind == "replay" or moment != "buffer write"]
        # Without a kill, a run would only repeat the undisturbed one.
        if possible:
            found.append((kind, possible[:left]))
    raise AssertionError("a cycle has no end")


def main() -> int:
    """Kills, continues, compares and prints; the exit code is 1 where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["SIGKILL"], choices=[each.name for each in signal.Signals])
    parser.add_argument("--processes", type=int, default=1, help="that are one run; one of them is killed")
    parser.add_argument("--moments", nargs="+", choices=[*MOMENTS, RANDOM], help="instead of those of the schedule")
    known = parser.parse_args()
    signals = [signal.Signals[name] for name in known.signals]
    with tempfile.TemporaryDirectory() as directory:
        loop = KillLoop(Path(directory), signals, random.Random(known.seed), known.processes)
        runs = [loop.killed(kind, moments) for kind, moments in schedule(known.kills, known.moments)]
    print(report(runs, signals))
    verdicts = [kill.verdict for run in runs for kill in run.kills]
    # A loop that killed nothing shows nothing.
    good = "killed" in verdicts and {"killed", "not reached"}.issuperset(verdicts)
    return int(not good or any(run.found for run in runs))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-child"]:
        end = sys.argv.index("--")
        child(sys.argv[2:end], sys.argv[end + 1 :])
    sys.exit(main())
