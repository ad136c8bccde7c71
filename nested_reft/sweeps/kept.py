"""Results of runs, kept as JSON: a run that is kept for its configuration is never computed again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nested_reft.json_files import differences, read_json_object, write_json
from nested_reft.sweeps.claims import claimed
from nested_reft.training.config import Config
from nested_reft.untrusted import BadFile, printable

Result = dict[str, Any]
LOOK_SECONDS = 1.0  # between looks at what other processes compute


@dataclass(frozen=True)
class Wanted:
    """A run that is asked for.

    Attributes:
        config: of the run; a result of another one is not used.
        file: where its result is or goes.
        labels: what its result is called in tables, such as its variant and its seed; they are added to the result.
    """

    config: Config
    file: Path
    labels: dict[str, Any]


def finished(
    file: Path, config: Config, is_whole: Callable[[Result], bool] = bool, is_quiet: bool = False
) -> Result | None:
    """The kept result of a run; one of another configuration is not used.

    Args:
        file: where the result would be.
        config: of the run that is asked for.
        is_whole: whether a result has all that it needs.
        is_quiet: whether nothing is said of a result that cannot be used.

    Returns:
        The result, or None where the run has to be computed.
    """
    try:
        found = read_json_object(file)
        stored = found["config"] if found else {}
        problem = "is of another configuration" if found and stored != config.to_json() else None
    except (BadFile, KeyError):
        found, stored, problem = {}, {}, "cannot be read"
    if found and problem is None and not is_whole(found):
        problem = "is damaged"
    if problem is None:
        return found or None
    if not is_quiet:
        changed = differences(stored, config.to_json()) if isinstance(stored, dict) and stored else []
        listed = "; ".join(f"{name} was {was!r} and is {now!r}" for name, was, now in changed[:3])
        words = f"'{file}' {problem}{f' ({listed})' if listed else ''} and is computed again"
        print(printable(words), file=sys.stderr)
    return None


def kept_runs(
    wanted: Sequence[Wanted],
    compute: Callable[[Wanted], Result | None],
    told: Callable[[Result], str],
    stop: Callable[[], None] = lambda: None,
    only_kept: bool = False,
    is_whole: Callable[[Result], bool] = bool,
) -> list[Result | None]:
    """The result of every run: the kept one, or else a new one, which is kept. A bar shows the time that is left.

    Several processes may share the work on one folder: a run that another one computes is left to it, and waited for.

    Args:
        wanted: the runs.
        compute: makes the result of a run; None where it could not.
        told: what is printed of a new result, behind the name of its configuration.
        stop: called before each run; it raises where the work is to end.
        only_kept: compute nothing.
        is_whole: whether a kept result has all that it needs; else it is computed again.

    Returns:
        Results in the order of the runs, with their labels; None for those that were not computed.
    """
    found = [finished(each.file, each.config, is_whole) for each in wanted]
    left = [] if only_kept else [index for index, result in enumerate(found) if result is None]
    if left:
        kept = len(wanted) - len(left)
        with tqdm(total=len(wanted), initial=kept, unit="run", desc="runs", disable=len(wanted) == 1) as bar:
            while left:
                later = list[int]()
                for index in left:
                    stop()
                    each = wanted[index]
                    bar.set_postfix_str(printable(each.config.name))
                    each.file.parent.mkdir(parents=True, exist_ok=True)
                    with claimed(each.file) as mine:
                        if not mine:
                            later.append(index)
                            continue
                        # Another process may have it.
                        found[index] = finished(each.file, each.config, is_whole, is_quiet=True)
                        if found[index] is None:
                            found[index] = _computed(each, compute, told)
                    bar.update()
                if len(later) == len(left):
                    time.sleep(LOOK_SECONDS)
                left = later
    return [None if result is None else result | each.labels for result, each in zip(found, wanted, strict=True)]


def _computed(each: Wanted, compute: Callable[[Wanted], Result | None], told: Callable[[Result], str]) -> Result | None:
    result = compute(each)
    if result is not None:
        result = result if "config" in result else {"config": each.config.to_json()} | result
        write_json(each.file, result)
        tqdm.write(printable(f"{each.config.name}: {told(result)}"))
    return result
