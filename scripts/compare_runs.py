"""Compares two runs bit for bit: python scripts/compare_runs.py RUN OTHER

A change that should change nothing is tried by one short run before it and one after it. Metrics and samples
are compared line by line, and the arrays of the newest checkpoints one by one. Times and speeds are left out.
The exit code is 1 where anything differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import keystr, tree_flatten_with_path

from nested_reft.checkpoints import newest_checkpoint
from nested_reft.run_directory import read_log

UNTIMED = ("seconds", "tokens_per_second", "compilations", "searchers_")  # parts of names whose values may differ


def differing_lines(run: Path, other: Path, name: str) -> list[str]:
    """Each value of a log that differs, as one line of text."""
    lines, others = read_log(run / name), read_log(other / name)
    found = [] if len(lines) == len(others) else [f"{name}: {len(lines)} and {len(others)} lines"]
    for number, (line, other_line) in enumerate(zip(lines, others, strict=False), start=1):
        for key in sorted(line.keys() | other_line.keys()):
            values = line.get(key), other_line.get(key)
            # Written so that two NaN count as equal.
            if values[0] != values[1] and repr(values[0]) != repr(values[1]) and not any(u in key for u in UNTIMED):
                found.append(f"{name}, line {number}, {key}: {values[0]!r:.80} and {values[1]!r:.80}")
    return found


def arrays(run: Path) -> dict[str, Any]:
    """The device arrays of a run's newest checkpoint by name."""
    number = newest_checkpoint(run / "checkpoints")
    tree = ocp.PyTreeCheckpointer().restore((run / "checkpoints" / str(number) / "arrays").resolve())
    return {keystr(path): np.asarray(leaf) for path, leaf in tree_flatten_with_path(tree)[0]}


def main(run: Path, other: Path) -> int:
    """Prints what differs, and returns the exit code."""
    found = [line for name in ("metrics.jsonl", "samples.jsonl") for line in differing_lines(run, other, name)]
    mine, theirs = arrays(run), arrays(other)
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            found.append(f"{name}: in one checkpoint only")
        elif not np.array_equal(mine[name], theirs[name], equal_nan=mine[name].dtype.kind == "f"):
            found.append(f"{name}: the arrays differ")
    print("\n".join(found) or f"equal: metrics, samples and {len(mine)} arrays")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
