"""What the processes of a run agree on once a step: whether to stop, and that they still are one run.

Processes run in lockstep on equal host values. A signal comes to one of them only, and so does the failure of a disk.
So each step ends with one small exchange. It also carries a digest of what the step did, because processes that have
parted would go on side by side, each with other numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from nested_reft import processes


class DivergedError(RuntimeError):
    """The processes of a run hold different values, which they must not."""


def digest(*arrays: np.ndarray) -> int:
    """CRC-32 of the bytes of some arrays.

    Args:
        arrays: on the host.
    """
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).tobytes(), found)
    return found


def any_process(flag: bool) -> bool:
    """Whether a flag is set on any process; every process calls it at the same place.

    Args:
        flag: of this process.
    """
    if processes.count() == 1:
        return flag
    return bool(processes.gather_rows(np.array([flag], np.uint32)).any())


def agree(step: str, stop: bool, failed: bool, digests: Mapping[str, int]) -> tuple[bool, int | None]:
    """Ends a step on all processes.

    Args:
        step: which, in words.
        stop: whether this process was asked to stop.
        failed: whether this process could not write a checkpoint.
        digests: of what the step did, in 32 bits each, by name; of the same names on all processes.

    Raises:
        DivergedError: a digest differs between processes.

    Returns:
        Whether any process was asked to stop, and the first process that could not write.
    """
    if processes.count() == 1:
        return stop, 0 if failed else None
    row = np.array([stop, failed, *digests.values()], np.uint32)
    rows = processes.gather_rows(row)
    for column, name in enumerate(digests, 2):
        other = np.flatnonzero(rows[:, column] != rows[0, column])
        if other.size:
            raise DivergedError(
                f"{step}: process {int(other[0])} has other {name} than process 0. Processes must run the same files on"
                " the same kind of machine; the newest checkpoint may hold what they had in common"
            )
    failures = np.flatnonzero(rows[:, 1])
    return bool(rows[:, 0].any()), int(failures[0]) if failures.size else None
