"""What a run leaves behind: its directory and its logs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from nested_reft.checkpoints import newest_checkpoint
from nested_reft.json_files import write_json
from nested_reft.models.registry import hub_revision
from nested_reft.paths import address, copy_of, is_remote, local_only
from nested_reft.remote_files import join
from nested_reft.run_logs import Events, Log, cut, log_lines, mend, points
from nested_reft.run_mirror import PartExchange, address_of, begin_copy, exchange_parts, mark_copy, open_mirror
from nested_reft.run_owner import RunLock
from nested_reft.wandb_log import WandbLog, wandb_log

# The step of the first line, of a log with one line for each step; None of the other.
LOGS = {"metrics.jsonl": 0, "samples.jsonl": None}
# What a killed process leaves of a file that it was about to replace.
PARTIAL = re.compile(r"\w+\.jsonl\.partial|\w+\.json\.[0-9]+\.partial")
# These are the packages whose versions can change a result.
PACKAGES = ("nested_reft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


class RunDirectory:
    """The files of one run.

    `config.json`, `versions.json`, `metrics.jsonl` (a line a step), `samples.jsonl` (a line a
    completion), TensorBoard events, `checkpoints/` and, at the end, `summary.json`; with `train.wandb_project` also
    `wandb.json` and `wandb/`. The logs are opened with the first line, so that a run that cannot be continued stays as
    it was.

    The directory of a run on `gs://` is its local copy, from which `copy` brings it there.
    """

    def __init__(self, path: Path):
        """Args:
        path: made if it is not there.

        Raises:
            ValueError: another process works on this run.
            RemoteError: it is the copy of a run on `gs://`, which cannot be reached.
        """
        self.path = path
        self._purge_step: int | None = None
        self._has_ended = False
        path.mkdir(parents=True, exist_ok=True)
        self._lock: RunLock | None = RunLock(path)
        try:
            self._mirror = open_mirror(path)
        except BaseException:
            self._lock.close()
            raise

    @cached_property
    def _metrics(self) -> Log:
        return Log(self.path / "metrics.jsonl")

    @cached_property
    def _samples(self) -> Log:
        return Log(self.path / "samples.jsonl")

    @cached_property
    def _events(self) -> Events:
        return Events(self.path, self._purge_step)

    @cached_property
    def _wandb(self) -> WandbLog | None:
        return wandb_log(self.path)

    @property
    def address(self) -> str:
        """What the user calls the run: its path, or gs://BUCKET/NAME."""
        return address_of(self.path)

    def newest_checkpoint(self) -> int | None:
        """Number of the newest checkpoint that is where the run belongs; None without one."""
        return newest_checkpoint(self.path / "checkpoints") if self._mirror is None else self._mirror.newest

    def copy(self, number: int | None = None) -> None:
        """Starts copying what is new to `gs://`, where the run belongs there.

        Args:
            number: of a checkpoint that is being written, to be copied too.
        """
        if self._mirror is not None:
            self._mirror.copy(number)

    def exchange(self) -> PartExchange | None:
        """What brings the parts of a checkpoint together; None where all processes share the directory.

        All processes call it together.

        Raises:
            ValueError: the run is a local one, and some process does not see its directory.
        """
        return exchange_parts(self.path)

    def check_copied(self) -> None:
        """Looks whether copying has failed; does not wait for it.

        Raises:
            CheckpointError: it has.
        """
        if self._mirror is not None:
            self._mirror.check()

    def wait_copied(self) -> None:
        """Waits for all that `copy` was called for.

        Raises:
            CheckpointError: it could not be copied.
        """
        if self._mirror is not None:
            self._mirror.wait()

    @classmethod
    def create(cls, root: str | Path, name: str, config: dict[str, Any]) -> RunDirectory:
        """Makes `root/NAME-TIME` and writes configuration and versions into it.

        Args:
            root: made if it is not there; it may be on `gs://`.
            name: of the configuration; letters, digits, `_`, `.` and `-`.
            config: the whole configuration as JSON-able values.
        """
        stamp, number, run = time.strftime("%Y%m%d-%H%M%S"), 1, None
        while run is None:
            # More than one run may begin in a second, here or on other machines.
            with contextlib.suppress(FileExistsError):
                run = cls._new(root, f"{name}-{stamp}" if number == 1 else f"{name}-{stamp}-{number}")
            number += 1
        path = run.path
        # The configuration comes first: a directory without it is not a run.
        write_json(path / "config.json", config)
        # A name on the hub means other weights once its owner has changed them, so the commit is kept.
        revision = hub_revision(config["model"]["name"]) if "model" in config else None
        write_json(path / "versions.json", versions() | {"model_revision": revision})
        run.marks()  # opens the logs: a run that has no lines yet has empty ones
        run.copy()
        return run

    @classmethod
    def _new(cls, root: str | Path, name: str) -> RunDirectory:
        """An empty directory for a run.

        Raises:
            FileExistsError: there is one of this name.
        """
        url = join(address(root), name) if is_remote(root) else None
        path = Path(root) / name if url is None else copy_of(url)
        path.mkdir(parents=True)
        if url is None:
            return cls(path)
        try:
            begin_copy(path, url)
            return cls(path)
        except BaseException:
            shutil.rmtree(path)
            raise

    def marks(self) -> dict[str, list[int]]:
        """Where the logs end: size and CRC-32 of each, by the name of its file. A checkpoint holds them.

        Raises:
            FileNotFoundError: the directory was moved or removed.
        """
        self.check_in_place()
        return {log.path.name: log.mark() for log in (self._metrics, self._samples)}

    def check_in_place(self) -> None:
        """Stops a run whose directory was moved or removed: what it goes on to write would lie in two places.

        Raises:
            FileNotFoundError: it was.
            OSError: another process has taken the run over, where there are no locks.
        """
        if self._lock is None:
            return
        self._lock.check()
        held = os.fstat(self._lock.descriptor)
        if not self.path.is_dir() or not os.path.samestat(held, self.path.stat()):
            raise FileNotFoundError(f"the run directory '{self.path}' was moved or removed while the run went on")

    def check_logs(self) -> None:
        """Refuses logs that could not be continued, and what would be in the summary's way, before anything is changed.

        Raises:
            ValueError: one is no file, or cannot be read and written.
        """
        summary = self.path / "summary.json"
        if summary.is_dir():
            raise ValueError(f"'{summary}' is a directory; move it away, or the run could not write its summary there")
        for name in LOGS:
            path = self.path / name
            if path.exists() and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
                raise ValueError(f"'{path}' is not a file that can be read and written; move it away to go on without")

    def continue_from(self, step: int, marks: dict[str, list[int]]) -> None:
        """Drops log lines and TensorBoard points of later steps than the checkpoint that a run resumes from.

        A log that is not what it was when the checkpoint was written keeps its good lines. What is wrong with it is
        said line by line, and it stays beside the new one as it was.

        Args:
            step: of the checkpoint; -1 before the phase that logs.
            marks: what `marks` returned when the checkpoint was written.
        """
        # Only one process at a time works on a run, so nobody is writing these.
        for path in self.path.glob("*.partial"):
            if PARTIAL.fullmatch(path.name) and path.is_file():
                path.unlink()
        # TensorBoard keeps its files and is told from which step on it has to hide points.
        self._purge_step = step + 1
        for name, first_step in LOGS.items():
            path = self.path / name
            if not cut(path, marks[name]):
                mend(path, step, first_step)

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends a line, a TensorBoard point for every number, and a histogram of the ages; W&B gets these as well.

        Args:
            step: counted from 1; 0 is before the first.
            metrics: JSON-able values by name; a number that is not finite becomes null.

        Raises:
            FileNotFoundError: the directory was moved or removed.
        """
        self.check_in_place()
        self._metrics.write([{"step": step} | metrics])
        self._events.write(step, *points(metrics))
        if self._wandb is not None:
            self._wandb.write(step, metrics)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Appends a line per completion. JSON escapes whatever the model wrote.

        Args:
            step: as in `log_metrics`.
            samples: one dictionary of JSON-able values per completion.
        """
        self._samples.write([{"step": step} | sample for sample in samples])

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`, whole or not at all."""
        write_json(self.path / "summary.json", summary)
        self._has_ended = True
        self.copy()

    def close(self) -> None:
        """Closes the logs, and lets other processes work on the run.

        Raises:
            CheckpointError: the run belongs on `gs://`, and could not be copied there.
        """
        # These are cached properties: what was not opened is not opened for closing.
        for name in ("_metrics", "_samples", "_events"):
            if name in self.__dict__:
                self.__dict__[name].close()
        mirror, self._mirror = self._mirror, None
        try:
            if mirror is not None:
                mirror.close()
        finally:
            live = self.__dict__.pop("_wandb", None)
            if live is not None:
                live.close(self._has_ended)
            if self._lock is not None:
                self._lock.close()
                self._lock = None


class SilentRunDirectory(RunDirectory):
    """The directory of a run for a process that writes nothing into it, since another one does."""

    def __init__(self, path: Path):
        """Args:
        path: which the writing process has made, or what its remote address is here.
        """
        self.path, self._lock, self._mirror = path, None, None

    @classmethod
    def at(cls, address: str) -> SilentRunDirectory:
        """That of a run, as its address is broadcast by the writing process.

        Args:
            address: what `RunDirectory.address` is there.
        """
        path = local_only(address, "the run") if not is_remote(address) else copy_of(address)
        if is_remote(address):
            mark_copy(path, address)
        return cls(path)

    def marks(self) -> dict[str, list[int]]:
        """It is empty, because the writing process has the marks."""
        return {}

    def check_logs(self) -> None:
        """It does nothing here."""

    def continue_from(self, step: int, marks: dict[str, list[int]]) -> None:
        """It does nothing here."""

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """It does nothing here."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """It does nothing here."""

    def write_summary(self, summary: dict[str, Any]) -> None:
        """It does nothing here."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` or `samples.jsonl`; a last line that is cut short is left out.

    Args:
        path: the file; a run that is going on may be writing to it.

    Raises:
        ValueError: there is no such file, or a line is not a JSON object with a step.
    """
    if not path.is_file():
        raise ValueError(f"'{path.parent}' is not a run directory: it has no {path.name}")
    lines, faults = log_lines(path)
    if faults:
        raise ValueError(faults[0])
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
