"""The logs of a run: JSON lines and TensorBoard points, on the disk after each step, and checked on resume."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from nested_reft.json_files import json_text, naming

logger = logging.getLogger(__name__)
SHOWN_FAULTS = 5  # of a damaged log
HISTOGRAMS = ("staleness_completions",)  # metrics that are counts of 0, of 1 and so on


class Log:
    """A file of JSON lines that grows, and knows its size and checksum.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path):
        """Args:
        path: appended to where it exists.
        """
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._size, self._checksum = len(content), zlib.crc32(content)
        # Bytes, because the checksum is that of the file; unbuffered, since others read the log of a run that is going
        # on, and a process that is killed must not take lines along.
        self._file = path.open("ab", buffering=0)

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Appends JSON-able values, a line each.

        Raises:
            OSError: names the file.
        """
        data = "".join(json_text(line) + "\n" for line in lines).encode()
        with naming(self.path):
            written = 0
            while written < len(data):  # an unbuffered file may take less than it is given
                written += self._file.write(data[written:])
        self._size, self._checksum = self._size + len(data), zlib.crc32(data, self._checksum)

    def mark(self) -> list[int]:
        """Size and CRC-32 of what was written so far, which is on the disk when this returns."""
        with naming(self.path):
            os.fsync(self._file.fileno())
        return [self._size, self._checksum]

    def close(self) -> None:
        """Closes the file; `write` then raises a ValueError."""
        self._file.close()


def points(metrics: dict[str, Any]) -> tuple[dict[str, float], dict[str, list[int]]]:
    """What a line of metrics gives to draw: its finite numbers, and its histograms, by name.

    Args:
        metrics: JSON-able values by name.
    """
    # TensorBoard shows no number that is not finite, and would warn of each.
    numbers = {
        name: float(value) for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)
    }
    return numbers, {name: metrics[name] for name in HISTOGRAMS if name in metrics}


class Events:
    """TensorBoard points, each on the disk when `write` returns.

    The usual `SummaryWriter` hands points to a thread, and its `flush` does not wait for them.
    """

    def __init__(self, directory: Path, purge_step: int | None):
        """Args:
        directory: gets a file of events.
        purge_step: TensorBoard hides points of earlier files from this step on; None hides none.
        """
        from tensorboardX.event_file_writer import EventsWriter  # half a second that only a training run needs
        from tensorboardX.proto import event_pb2

        self._proto: Any = event_pb2  # made from a .proto file, so its classes have no types
        # Two files of one second would have one name but for the process.
        self._path = directory / "events"
        with naming(self._path):
            self._writer = EventsWriter(str(self._path), f".{os.getpid()}.{time.time_ns() % 10**9:09d}")
            if purge_step is not None:
                start = self._proto.SessionLog(status=self._proto.SessionLog.START)
                self._writer.write_event(self._proto.Event(step=purge_step, wall_time=time.time(), session_log=start))

    def write(self, step: int, values: dict[str, float], histograms: dict[str, list[int]]) -> None:
        """One point of each value and one histogram of each list of counts, by name.

        Args:
            step: of all of them.
            values: by name.
            histograms: how often 0 was seen, and 1, and so on.
        """
        from tensorboardX.summary import histogram_raw, scalar

        summaries = [scalar(name, value) for name, value in values.items()]
        for name, count_A in histograms.items():
            age_A, most = np.arange(len(count_A)), len(count_A) - 1
            moments = sum(count_A), float(age_A @ count_A), float(age_A**2 @ count_A)
            summaries.append(histogram_raw(name, 0, most, *moments, (age_A + 0.5).tolist(), count_A))
        with naming(self._path):
            for summary in summaries:
                self._writer.write_event(self._proto.Event(step=step, wall_time=time.time(), summary=summary))
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def cut(path: Path, mark: list[int]) -> bool:
    """Cuts a log to what it held when a checkpoint was written; False where it does not begin with that.

    Args:
        path: the file; none is an empty one.
        mark: what `Log.mark` returned then.
    """
    size, checksum = mark
    content = path.read_bytes() if path.exists() else b""
    if len(content) < size or zlib.crc32(content[:size]) != checksum:
        return False
    if len(content) > size:
        os.truncate(path, size)
    return True


def mend(path: Path, step: int, first_step: int | None) -> None:
    """Replaces a damaged log by its good lines, and warns of each fault. The damaged file stays beside it.

    Args:
        path: the file; it need not be there.
        step: of the checkpoint; later lines go.
        first_step: of a log with one line for each step, the first of them; None for a log with several.
    """
    kept, faults = good_lines(path.read_bytes() if path.exists() else b"", step, first_step)
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        partial.write_bytes(b"".join(kept))
    if path.exists():
        was = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        path.rename(was)
        faults = [*(faults or ["values in it were changed"]), f"as it was it is '{was.name}' now"]
    os.replace(partial, path)
    more = len(faults) - SHOWN_FAULTS
    shown = faults if more <= 0 else [*faults[: SHOWN_FAULTS - 1], f"{more} more faults", faults[-1]]
    logger.warning("'%s' is not what it was at step %d: %s; its good lines are kept", path, step, "; ".join(shown))


def good_lines(content: bytes, step: int, first_step: int | None) -> tuple[list[bytes], list[str]]:
    """The lines of a log up to a step that can be kept, and in words what is wrong with it.

    Args:
        content: of the file.
        step: the last one whose lines are kept.
        first_step: as in `mend`.
    """
    kept, faults, lines_of_step = list[bytes](), list[str](), Counter[int]()
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        found = _step_of(line)
        if found is None:
            faults.append(f"line {number} is no JSON object with a step")
        elif found > step:
            continue
        elif found < max(lines_of_step, default=0) or (first_step is not None and found in lines_of_step):
            faults.append(f"line {number} is of step {found} again")
        else:
            kept.append(line)
            lines_of_step[found] += 1
    # A step has as many lines as most steps have. Lines get lost more often than they appear, hence the larger of two.
    sizes = Counter(lines_of_step.values())
    usual = max(sizes, key=lambda size: (sizes[size], size), default=1)
    for number in range(1 if first_step is None else first_step, step + 1):
        if lines_of_step[number] != usual:
            faults.append(f"step {number} has {lines_of_step[number]} lines instead of {usual}")
    return kept, faults


def log_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The good lines of a log, and in words what is wrong with each other one; a last line cut short is no fault.

    Args:
        path: the file; a run that is going on may be writing to it.
    """
    lines, faults = list[dict[str, Any]](), list[str]()
    # Bytes are decoded line by line, so that a line that is not UTF-8 can be named.
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            line = json.loads(text.decode())
        # Thousands of brackets are a RecursionError.
        except (ValueError, RecursionError) as error:
            # Without its newline the line is still being written, or was when the run was killed.
            if text.endswith(b"\n"):
                faults.append(f"line {number} of '{path}' is not JSON: {error}")
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            faults.append(f"line {number} of '{path}' has no step")
    return lines, faults


def _step_of(line: bytes) -> int | None:
    """The step of a line; None where it is not a whole line with one."""
    try:
        step = json.loads(line.decode())["step"]
    # A number of thousands of digits is a ValueError, and lines of thousands of brackets a RecursionError.
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int and line.endswith(b"\n") else None
