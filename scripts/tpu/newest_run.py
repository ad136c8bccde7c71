"""Prints the newest run of a directory that can be continued: the number of its newest checkpoint, and its address.

    python scripts/tpu/newest_run.py RUNS

RUNS may be on `gs://`. It prints nothing where no run has a checkpoint yet, or where there is no directory. `start.sh`
and `restart_loop.sh` use it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nested_reft.checkpoints import SEAL, newest_checkpoint
from nested_reft.exit_codes import BAD_INPUT, FAILED
from nested_reft.paths import address, is_remote
from nested_reft.remote_files import RemoteError, entries, join

# How `RunDirectory.create` names a run.
RUN = re.compile(r"(?P<config>.+)-(?P<time>[0-9]{8}-[0-9]{6})(-(?P<number>[0-9]+))?")
# A remote checkpoint is whole once it has its seal.
SEALED = re.compile(rf"(?P<run>[^/]+)/checkpoints/(?P<number>[0-9]+)/{re.escape(SEAL)}")


def newest_run(runs: str) -> tuple[int, str] | None:
    """The run that was started last of those with a checkpoint, after the number of its newest checkpoint.

    Args:
        runs: the directory of runs, or its address on `gs://`; it need not exist.

    Raises:
        ValueError: it has runs of several configurations, so that the newest may be of another one.
        RemoteError: the store cannot be reached.
    """
    checkpoints = _remote_runs(address(runs)) if is_remote(runs) else _local_runs(Path(runs))
    found = [(match, name) for name in checkpoints if (match := RUN.fullmatch(name))]
    names = sorted({match["config"] for match, _ in found})
    if len(names) > 1:
        raise ValueError(f"'{runs}' has runs of {', '.join(names)}; give each configuration a directory of its own")
    for _, name in sorted(found, key=lambda run: (run[0]["time"], int(run[0]["number"] or 1)), reverse=True):
        number = checkpoints[name]
        if number is not None:
            return number, join(address(runs), name) if is_remote(runs) else str(Path(runs) / name)
    return None


def _local_runs(runs: Path) -> dict[str, int | None]:
    """The newest checkpoint of each run that can be continued, None of the others."""
    paths = list(runs.iterdir()) if runs.is_dir() else []
    return {
        path.name: newest_checkpoint(path / "checkpoints") if (path / "config.json").is_file() else None
        for path in paths
    }


def _remote_runs(url: str) -> dict[str, int | None]:
    files = entries(url)
    sealed = [match for name in files if (match := SEALED.fullmatch(name))]
    newest: dict[str, int | None] = {name.split("/")[0]: None for name in files}
    for run in newest:
        numbers = [int(match["number"]) for match in sealed if match["run"] == run]
        newest[run] = max(numbers, default=None) if f"{run}/config.json" in files else None
    return newest


def main(arguments: list[str]) -> int:
    """Prints the run, and returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return BAD_INPUT
    try:
        found = newest_run(arguments[0])
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except RemoteError as error:  # which may pass
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    if found is not None:
        print(*found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
