"""What a run left on the disk, read as far as it can be; what is missing is said in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nested_reft.json_files import read_json_object
from nested_reft.run_logs import log_lines
from nested_reft.untrusted import shown

Line = dict[str, Any]
LOGS = ("metrics.jsonl", "samples.jsonl")
OBJECTS = ("config.json", "versions.json", "summary.json")
SHOWN_FAULTS = 3  # of each log
MOST_STEPS = 2**31
LARGEST = 1e100  # number that is shown; sums of larger ones could overflow


@dataclass(frozen=True)
class RunFiles:
    """The files of one run. All values in them are untrusted: a run directory may come from anybody.

    Attributes:
        path: the directory.
        lines: of `metrics.jsonl`; the last one also has the held-out results at the end of the run.
        samples: of `samples.jsonl`.
        config, versions, summary: of the JSON files; empty where there is none that can be read.
        faults: what is missing or damaged, a sentence each.
    """

    path: Path
    lines: list[Line] = field(default_factory=list)
    samples: list[Line] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.resolve().name

    @property
    def steps(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def sources(self) -> list[str]:
        """The names of its configuration's sources."""
        sources = at(self.config, "data", "sources")
        names = [at(each, "name") for each in sources] if isinstance(sources, list) else []
        return [name for name in names if isinstance(name, str)]


def at(value: Any, *names: str) -> Any:
    """A value within nested objects; None where there is none.

    Args:
        value: of a JSON file that may be damaged.
        names: from the outermost object inwards.
    """
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def finite(value: Any) -> float | None:
    """A number that a figure can show; None for anything else.

    Args:
        value: of a JSON file that may be damaged.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else None


def read_run(path: Path) -> RunFiles:
    """Reads what there is of a run, which may be going on, damaged or without a step.

    Args:
        path: its directory.

    Raises:
        ValueError: it has neither a configuration nor a log of metrics, so it is no run directory.
    """
    if not any((path / name).is_file() for name in ("config.json", "metrics.jsonl")):
        raise ValueError(f"'{path}' is not a run directory: it has no config.json and no metrics.jsonl")
    faults = list[str]()
    logs = {name: _log(path / name, faults) for name in LOGS}
    objects = {name: _object(path / name, faults) for name in OBJECTS}
    lines, config, summary = logs["metrics.jsonl"], objects["config.json"], objects["summary.json"]
    if not any(line["step"] > 0 for line in lines):
        faults.append("No step has been logged yet, so there are no curves.")
    return RunFiles(
        path=path,
        lines=_with_last_heldout(lines, summary),
        samples=_with_source(logs["samples.jsonl"], config),
        config=config,
        versions=objects["versions.json"],
        summary=summary,
        faults=tuple(faults),
    )


def _log(path: Path, faults: list[str]) -> list[Line]:
    if not path.is_file():
        faults.append(f"There is no {path.name}.")
        return []
    try:
        lines, damage = log_lines(path)
        # Larger ones could not be told apart on an axis, nor can they be steps.
        damage += [f"a line of {path.name} is of step {shown(line['step'])}" for line in lines if not _is_step(line)]
        lines = [line for line in lines if _is_step(line)]
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}.")
        return []
    # A whole path would only make the sentence long.
    named = [fault.replace(f"'{path}'", path.name) for fault in damage]
    faults += [f"{fault[:1].upper()}{fault[1:]}. It is left out." for fault in named[:SHOWN_FAULTS]]
    if len(named) > SHOWN_FAULTS:
        faults.append(f"{len(named) - SHOWN_FAULTS} more lines of {path.name} are damaged and left out.")
    return lines


def _is_step(line: Line) -> bool:
    return 0 <= line["step"] < MOST_STEPS


def _object(path: Path, faults: list[str]) -> dict[str, Any]:
    if not path.is_file():
        # A run that goes on has no summary, and the words at the top of its report say that better.
        if path.name != "summary.json":
            faults.append(f"There is no {path.name}.")
        return {}
    try:
        return read_json_object(path)
    except (ValueError, OSError):
        faults.append(f"{path.name} is damaged, so nothing is taken from it.")
        return {}


def _with_last_heldout(lines: Sequence[Line], summary: dict[str, Any]) -> list[Line]:
    """The lines with the held-out results at the end of the run, which stand in its summary alone."""
    after = summary.get("after")
    # The summary of a run that goes on is that of an earlier end.
    if not lines or summary.get("steps") != lines[-1]["step"] or not isinstance(after, dict):
        return list(lines)
    # A run without rollouts has pairs, whose accuracy is no greedy one, or none at all.
    found = {
        name: at(each, "greedy_accuracy" if "greedy_accuracy" in each else "accuracy")
        for name, each in after.items()
        if isinstance(each, dict)
    }
    last = {f"heldout/{name}": accuracy for name, accuracy in found.items() if accuracy is not None}
    return [*lines[:-1], lines[-1] | last]


def _with_source(samples: list[Line], config: dict[str, Any]) -> list[Line]:
    """Samples of earlier versions name no source; where there is but one, it is theirs."""
    sources = RunFiles(Path(), config=config).sources
    return [{"source": sources[0]} | line for line in samples] if len(sources) == 1 else samples
