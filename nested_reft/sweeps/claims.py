"""Who computes what: several processes may work on one folder, and each run is computed by one of them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCKS = "locks"  # the folder of the files that are locked; they stay, and are empty


@contextmanager
def claimed(file: Path, wait: bool = False) -> Iterator[bool]:
    """The right to make a file, for as long as the block lasts; whether this process has it.

    The system takes it away when the process ends, however it ends.

    Args:
        file: what is to be made; its folder must be there.
        wait: for whoever has the right at present.
    """
    folder = file.parent / LOCKS
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / file.name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        except OSError:  # some network file systems have no locks; a run that is computed twice does no harm
            mine = True
        yield mine
    finally:
        os.close(descriptor)
