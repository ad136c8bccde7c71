"""Interrupts a `tiny` run at random moments and says how each of them ended.

Every run must end with exit code 130 and a checkpoint or, before the first one, a line that says so. A run
that had finished before the signal came ends with 0.

    python scripts/interrupts.py --runs 50
    python scripts/interrupts.py --runs 10 --signals SIGINT SIGINT   # a second one shortly after
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a run says that has no checkpoint to continue from; one that has not begun only says the second.
NO_CHECKPOINT = ("before its first checkpoint", "interrupted")
# Short, with all that a run has: a warm start, steps, checkpoints, a summary.
SMALL = [
    *("--data.prompts-per-batch", "4", "--rollout.group-size", "4", "--evaluation.samples-per-prompt", "0"),
    *("--data.sources.0.train-size", "40", "--data.sources.0.heldout-size", "8", "--warm-start.steps", "30"),
    *("--train.steps", "30", "--train.checkpoint-every", "3", "--optimizer.warmup-steps", "3"),
]


@dataclass(frozen=True)
class Ending:
    """How one run ended: seconds until the signal, its exit code, its newest checkpoint, its last line, a verdict."""

    after: float
    code: int
    checkpoint: int | None
    last_line: str
    verdict: str


def main() -> int:
    """Runs, interrupts, prints a line each and the sum; the exit code is 1 if a run did not end well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["SIGINT"], help="sent one shortly after the other")
    parser.add_argument(
        "--longest", type=float, help="seconds until the latest signal; measured by a whole run if absent"
    )
    known = parser.parse_args()
    draw, numbers = random.Random(known.seed), [signal.Signals[name] for name in known.signals]
    longest = known.longest or _seconds_of_a_whole_run()
    print(f"signals {' '.join(known.signals)} within {longest:.0f} s")
    endings = []
    for index in range(known.runs):
        ending = interrupted(draw.uniform(0, longest), numbers, draw)
        endings.append(ending)
        print(
            f"{index + 1:3} after {ending.after:6.2f} s: exit {ending.code:4}, checkpoint {ending.checkpoint},"
            f" {ending.verdict}: {ending.last_line[:100]}",
            flush=True,
        )
    print(dict(collections.Counter(ending.verdict for ending in endings)))
    return int(any(ending.verdict in ("crashed", "lost", "silent") for ending in endings))


def interrupted(after: float, numbers: list[signal.Signals], draw: random.Random) -> Ending:
    """One run that gets the signals.

    Args:
        after: seconds until the first of them.
        numbers: the signals.
        draw: how long later the others come.
    """
    with tempfile.TemporaryDirectory() as directory:
        process = _start(Path(directory))
        time.sleep(after)
        had_finished = process.poll() is not None
        for number in numbers:
            process.send_signal(number)
            time.sleep(draw.uniform(0, 0.5) if len(numbers) > 1 else 0)
        output = process.communicate(timeout=600)[0]
        runs = Path(directory) / "runs"
        found = [int(path.name) for path in runs.glob("*/checkpoints/*") if path.name.isdecimal()]
        lines = [line for line in output.splitlines() if line.strip()]
        newest = max(found, default=None)
        verdict = "had finished" if had_finished else _verdict(process.returncode, newest, output)
        return Ending(after, process.returncode, newest, lines[-1] if lines else "", verdict)


def _verdict(code: int, checkpoint: int | None, output: str) -> str:
    if code == 0:
        return "lost"
    if code != 130 or "Traceback" in output:
        return "crashed"
    if checkpoint is None:
        return "stopped" if any(words in output for words in NO_CHECKPOINT) else "silent"
    # A run that was in its summary finished it.
    return "stopped" if "to continue: " in output or "report: " in output else "silent"


def _start(directory: Path) -> subprocess.Popen[str]:
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nested_reft.command", "train", "tiny", *SMALL]
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _seconds_of_a_whole_run() -> float:
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        process = _start(Path(directory))
        process.communicate()
        if process.returncode:
            raise SystemExit(f"a run without interrupts ended with {process.returncode}")
        return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
