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
from nested_reft.types import Scored


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


def digests_of(groups: Scored, loss: float) -> dict[str, int]:
    """Digests of what a step of reinforcement trained on and found, in the order in which one follows from another.

    Args:
        groups: that it trained on.
        loss: of its update.
    """
    rollouts = groups.rollouts
    return {
        "tokens": digest(np.asarray(rollouts.tokens_BGC), np.asarray(rollouts.length_BG)),
        "rewards": digest(np.asarray(groups.reward_BG)),
        "loss": digest(np.array([loss], np.float32)),
    }


def highest(number: int) -> int:
    """The highest of the numbers that processes give; every process calls it at the same place.

    Args:
        number: of this process, from 0 on. With 0 and 1 the result says whether any process has a 1.
    """
    if processes.count() == 1:
        return int(number)
    return int(processes.gather_rows(np.array([number], np.uint32)).max())


def agree(step: str, stop: int, failed: bool, digests: Mapping[str, int]) -> tuple[int, int | None]:
    """Ends a step on all processes.

    Args:
        step: which, in words.
        stop: what this process was asked for, as a number; 0 is to go on, and the highest one wins.
        failed: whether this process could not write a checkpoint.
        digests: of what the step did, in 32 bits each, by name; of the same names on all processes.

    Raises:
        DivergedError: a digest differs between processes.

    Returns:
        The highest `stop`, and the first process that could not write.
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
    return int(rows[:, 0].max()), int(failures[0]) if failures.size else None
