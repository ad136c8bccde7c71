"""Prints the newest run of a directory that can be continued: the number of its newest checkpoint, and its directory.

    python scripts/tpu/newest_run.py RUNS

It prints nothing where no run has a checkpoint yet, or where there is no directory. `start.sh` and `restart_loop.sh`
use it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nested_reft.checkpoints import newest_checkpoint
from nested_reft.exit_codes import BAD_INPUT

# How `RunDirectory.create` names a run.
RUN = re.compile(r"(?P<config>.+)-(?P<time>[0-9]{8}-[0-9]{6})(-(?P<number>[0-9]+))?")


def newest_run(runs: Path) -> tuple[int, Path] | None:
    """The run that was started last of those with a checkpoint, after the number of its newest checkpoint.

    Args:
        runs: the directory of runs; it need not exist.

    Raises:
        ValueError: it has runs of several configurations, so that the newest may be of another one.
    """
    if not runs.is_dir():
        return None
    found = [(match, path) for path in runs.iterdir() if (match := RUN.fullmatch(path.name))]
    names = sorted({match["config"] for match, _ in found})
    if len(names) > 1:
        raise ValueError(f"'{runs}' has runs of {', '.join(names)}; give each configuration a directory of its own")
    for _, path in sorted(found, key=lambda run: (run[0]["time"], int(run[0]["number"] or 1)), reverse=True):
        number = newest_checkpoint(path / "checkpoints")
        if number is not None and (path / "config.json").is_file():
            return number, path
    return None


def main(arguments: list[str]) -> int:
    """Prints the run, and returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return BAD_INPUT
    runs = arguments[0]
    try:
        # A bucket's address is no path of this machine, where nothing would be found.
        if "://" in runs:
            raise ValueError(f"RUNS is '{runs}'; allowed is a directory that every host sees")
        found = newest_run(Path(runs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if found is not None:
        print(*found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
