"""What a run leaves behind: its directory and its logs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import jax

from nested_reft.json_files import write_json
from nested_reft.models.registry import hub_revision

# These are the packages whose versions can change a result.
PACKAGES = ("nested_reft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


class RunDirectory:
    """The files of one run.

    `config.json`, `versions.json`, `metrics.jsonl` (a line a step), `samples.jsonl` (a line a
    completion), TensorBoard events, `checkpoints/` and, at the end, `summary.json`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._purge_step: int | None = None
        path.mkdir(parents=True, exist_ok=True)
        self._metrics, self._samples = self._open("metrics.jsonl"), self._open("samples.jsonl")

    @cached_property
    def _events(self) -> Any:
        """Made with the first point, so that a run whose checkpoint cannot be restored stays as it was."""
        from tensorboardX import SummaryWriter  # Half a second that only a training run needs.

        return SummaryWriter(str(self.path), purge_step=self._purge_step)

    def _open(self, name: str) -> TextIO:
        # Appending keeps the lines of the run that is continued.
        return (self.path / name).open("a", encoding="utf-8")

    @classmethod
    def create(cls, root: Path, name: str, config: dict[str, Any]) -> RunDirectory:
        """Makes `root/NAME-TIME` and writes configuration and versions into it.

        Args:
            root: made if it is not there.
            name: of the configuration; letters, digits, `_`, `.` and `-`.
            config: the whole configuration as JSON-able values.
        """
        stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
        while True:
            path = root / (f"{name}-{stamp}" if number == 1 else f"{name}-{stamp}-{number}")
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:  # another run of the same second
                number += 1
        run = cls(path)
        # The configuration comes first: a directory without it is not a run.
        write_json(path / "config.json", config)
        # A name on the hub means other weights once its owner has changed them, so the commit is kept.
        revision = hub_revision(config["model"]["name"]) if "model" in config else None
        write_json(path / "versions.json", versions() | {"model_revision": revision})
        return run

    def drop_after(self, step: int) -> None:
        """Drops log lines and TensorBoard points of later steps than the checkpoint that a run resumes from."""
        # TensorBoard keeps its files and is told from which step on it has to hide points.
        self._purge_step = step + 1
        # The files are replaced, and an open one would go on writing to what was replaced.
        for file in (self._metrics, self._samples):
            file.close()
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep_lines_up_to(self.path / name, step)
        self._metrics, self._samples = self._open("metrics.jsonl"), self._open("samples.jsonl")

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends a line, and a TensorBoard point for every number.

        Args:
            step: counted from 1; 0 is before the first.
            metrics: JSON-able values by name.
        """
        self._metrics.write(json.dumps({"step": step} | metrics) + "\n")
        # Each line is on its way to the disk at once, since others read the log of a run that is going on.
        self._metrics.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Appends a line per completion. JSON escapes whatever the model wrote.

        Args:
            step: as in `log_metrics`.
            samples: one dictionary of JSON-able values per completion.
        """
        self._samples.writelines(json.dumps({"step": step} | sample) + "\n" for sample in samples)
        self._samples.flush()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`, whole or not at all."""
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        """Closes the logs."""
        self._metrics.close()
        self._samples.close()
        if "_events" in self.__dict__:  # the cached property: without a point there is no writer, and none is made
            self._events.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` or `samples.jsonl`; a last line that is cut short is left out.

    Args:
        path: the file; a run that is going on may be writing to it.

    Raises:
        ValueError: there is no such file, or a line is not a JSON object with a step.
    """
    if not path.is_file():
        raise ValueError(f"'{path.parent}' is not a run directory: it has no {path.name}")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            # Without its newline the line is still being written, or was when the run was killed.
            if not text.endswith("\n"):
                break
            raise ValueError(f"line {number} of '{path}' is not JSON: {error}") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"line {number} of '{path}' has no step")
        lines.append(line)
    return lines


def versions() -> dict[str, Any]:
    """Versions of what computes the results, the commit, and the devices."""
    found: dict[str, Any] = {"python": platform.python_version(), "commit": _commit()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    # All devices of a run are of one kind, so the first one speaks for them.
    devices = jax.devices()
    return found | {"platform": devices[0].platform, "device": devices[0].device_kind, "devices": len(devices)}


def _keep_lines_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    # The log is replaced whole, so a kill in between loses nothing.
    partial = path.with_name(path.name + ".partial")
    with path.open(encoding="utf-8") as old, partial.open("w", encoding="utf-8") as new:
        for line in old:
            # The last line of a killed run may be cut short.
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                new.write(line)
    os.replace(partial, path)


def _commit() -> str | None:
    """The commit of a source checkout, with a mark if files were changed since."""
    directory = Path(__file__).parent
    try:
        # The full hash and `-dirty` say exactly what ran; a tag would stand in the place of the hash.
        command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
