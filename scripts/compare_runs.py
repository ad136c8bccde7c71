"""Compares two runs bit for bit: python scripts/compare_runs.py RUN OTHER

A change that should change nothing is tried by one short run before it and one after it. `kill_loop.py` compares a run
that was killed with one that was not. Compared are metrics and samples line by line, the arrays of the newest
checkpoints one by one, what the checkpoints hold of the host's state (data position, curriculum, replay and the like),
and the summaries. Times and speeds are left out. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import keystr, tree_flatten_with_path

from nested_reft.checkpoints import Checkpoints, newest_checkpoint
from nested_reft.cli.output import quiet_libraries
from nested_reft.replay import Buffer
from nested_reft.replay_saving import save_store
from nested_reft.replay_store import Store
from nested_reft.run_directory import read_log
from nested_reft.training.config import Config
from nested_reft.training.group_supply import loaded_buffer

LOGS = ("metrics.jsonl", "samples.jsonl")
UNTIMED = ("seconds", "tokens_per_second", "compilations", "searchers_")  # parts of names whose values may differ
# What says where a run was and how long it took, in its summary and in a checkpoint.
ELSEWHERE = ("run_directory", "versions", "nested_speedup", "marks", "config", "identity")


def differing_lines(run: Path, other: Path, name: str) -> list[str]:
    """Each value of a log that differs, as one line of text."""
    lines, others = read_log(run / name), read_log(other / name)
    found = [] if len(lines) == len(others) else [f"{name}: {len(lines)} and {len(others)} lines"]
    for number, (line, other_line) in enumerate(zip(lines, others, strict=False), start=1):
        found += differing_values(line, other_line, f"{name}, line {number}")
    return found


def differing_values(mine: Any, theirs: Any, where: str) -> list[str]:
    """Each value that differs between two trees of plain values and NumPy arrays, as one line of text."""
    one, two = dict(_values(mine, "")), dict(_values(theirs, ""))
    return [
        f"{where}, {name}: {one.get(name, 'nothing')!r:.80} and {two.get(name, 'nothing')!r:.80}"
        for name in sorted(one.keys() | two.keys())
        if not (name.partition(".")[0] in ELSEWHERE or any(word in name for word in UNTIMED))
        and not _equal(one.get(name), two.get(name))
    ]


def _values(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree by their places; an empty branch is a leaf."""
    if isinstance(value, dict | list | tuple) and value:
        branches = value.items() if isinstance(value, dict) else enumerate(value)
        for key, branch in branches:
            yield from _values(branch, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        same_kind = (one.dtype, one.shape) == (two.dtype, two.shape)
        return same_kind and np.array_equal(one, two, equal_nan=one.dtype.kind == "f")
    # Written so that two NaN count as equal.
    return repr(one) == repr(two)


def arrays(run: Path) -> dict[str, Any]:
    """The device arrays of a run's newest checkpoint by name."""
    path = (run / "checkpoints" / str(newest_checkpoint(run / "checkpoints")) / "arrays").resolve()
    with ocp.PyTreeCheckpointer() as reader:
        # Only NumPy arrays can be read where the devices that wrote them are not.
        metadata = reader.metadata(path).item_metadata.tree
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=to_numpy))
    return {keystr(path): np.asarray(leaf) for path, leaf in tree_flatten_with_path(tree)[0]}


def host_values(run: Path) -> dict[str, Any]:
    """What a run's newest checkpoint holds of the host's state; what is kept for replay as if it were written anew."""
    number = newest_checkpoint(run / "checkpoints")
    assert number is not None, f"'{run}' has no checkpoint"
    with closing(Checkpoints(run / "checkpoints", keep=1)) as checkpoints:
        host = checkpoints.restore_host(number, blocks=True)
    buffer = whole_buffer(loaded_buffer(Config.from_json(host["config"]), host["buffer"]))
    return {"number": number, **host, "buffer": buffer}


def whole_buffer(buffer: Buffer | Store) -> Any:
    """What is kept for later updates, as if no checkpoint had written any of it."""
    if isinstance(buffer, Buffer):
        return buffer.to_plain()
    _, plain = save_store(dataclasses.replace(buffer, saved=0, segments=(), removed=()), "whole")
    return plain | {"segments": [block.values for block in plain["segments"]]}


def differences(run: Path, other: Path) -> list[str]:
    """All in which two runs differ, each as one line of text.

    Args:
        run, other: their directories; each has a checkpoint. Summaries are compared where both have one.
    """
    found = [line for name in LOGS for line in differing_lines(run, other, name)]
    mine, theirs = arrays(run), arrays(other)
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            found.append(f"{name}: in one checkpoint only")
        elif not _equal(mine[name], theirs[name]):
            found.append(f"{name}: the arrays differ")
    found += differing_values(host_values(run), host_values(other), "checkpoint")
    summaries = [path / "summary.json" for path in (run, other)]
    if all(path.is_file() for path in summaries):
        mine, theirs = (json.loads(path.read_text()) for path in summaries)
        found += differing_values(mine, theirs, "summary.json")
    return found


def main(run: Path, other: Path) -> int:
    """Prints what differs, and returns the exit code."""
    found = differences(run, other)
    print("\n".join(found) or f"equal: metrics, samples, state and {len(arrays(run))} arrays")
    return int(bool(found))


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
