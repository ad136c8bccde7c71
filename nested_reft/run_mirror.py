"""Runs on `gs://`: a run works in a local copy, and what it has finished is copied to its remote directory.

A checkpoint is copied before its seal, and the logs before it too. A remote checkpoint with a seal is therefore whole
and can be continued, whenever its process or machine went away. One process at a time owns a remote run
(`run_owner.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbax.checkpoint import multihost

from nested_reft import paths, processes, remote_files, run_owner
from nested_reft.checkpoints import SEAL, CheckpointError, checkpoint_numbers, damage_of
from nested_reft.json_files import write_json
from nested_reft.remote_files import ChangedError, Entry, MissingError, RemoteError, join
from nested_reft.run_owner import IN_USE, OWNER, RemoteOwner, read_owner

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2  # how often a wait looks
MARK = "remote.json"  # in a local copy: the address of the run, and which owner wrote here last
_INDEX = ".fetched.json"
_CHECKPOINTS, _BLOCKS, _PARTS = "checkpoints", "../blocks/", "parts"
_TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax ends the names of directories so while it writes them
_IN_CHECKPOINT = re.compile(rf"{_CHECKPOINTS}/(0|[1-9][0-9]{{0,17}})/(.+)")
# What a local copy has for itself, and what is half written. W&B's files are both, and come and go as W&B likes.
_NOT_COPIED = re.compile(
    rf"{_CHECKPOINTS}/.*|wandb/.*|{re.escape(MARK)}|{re.escape(_INDEX)}|{re.escape(IN_USE)}|.*\.partial|.*orbax-checkpoint-tmp.*"
)
# Files that grow, so that only their ends are copied.
_GROWING = re.compile(r"\w+\.jsonl|events/.*")


def address_of(run: Path) -> str:
    """What the user calls a run: its remote address, or its path where it has none.

    Args:
        run: its local directory.
    """
    mark = _mark(run)
    return str(run) if mark is None else mark["url"]


def local_run(source: str | Path) -> Path:
    """A local directory as it is; of a run on `gs://`, a local copy of all but its older checkpoints.

    A copy is brought up to date with each call, but for one in which the run itself works or worked last. Other remote
    directories, such as models, are copied whole.

    Args:
        source: a run or a model, as a user gave it.

    Raises:
        ValueError: it is empty.
        FileNotFoundError: there is nothing at a remote address.
        RemoteError: the store cannot be reached.
        ImportError: the extra that gs:// needs is not installed.
    """
    paths.check_named(source)
    if not paths.is_remote(source):
        return Path(source)
    url = paths.address(source)
    if remote_files.entry(join(url, "versions.json")) is None and remote_files.entry(join(url, OWNER)) is None:
        return paths.local_path(url)
    path = paths.copy_of(url)
    _bring_up_to_date(path, url)
    return path


def begin_copy(path: Path, url: str) -> None:
    """Marks the local directory of a run that does not exist yet as the copy of an address.

    Args:
        path: the directory, empty.
        url: where the run is to be.
    """
    write_json(path / MARK, {"url": url, "writer": None, "new": True})


def mark_copy(path: Path, url: str) -> None:
    """Marks the local directory of a process that writes no logs as a copy, unless it is marked.

    Args:
        path: the directory; made if it is not there.
        url: of the run.
    """
    path.mkdir(parents=True, exist_ok=True)
    if _mark(path) is None:
        write_json(path / MARK, {"url": url, "writer": None})


def open_mirror(path: Path) -> RunMirror | None:
    """What copies a run to its address; None for a run that has none.

    Args:
        path: its local directory.

    Raises:
        ValueError: another process owns the remote run.
        FileExistsError: there is a run at the address of a new one.
        RemoteError: the store cannot be reached.
    """
    return None if _mark(path) is None else RunMirror(path)


def exchange_parts(run: Path) -> PartExchange | None:
    """What brings the parts of checkpoints together; None where the processes share the run's directory.

    All processes of a run call it together.

    Args:
        run: the local directory of the run for this process.

    Raises:
        ValueError: the run is a local one, and some process does not see its directory.
    """
    if processes.count() == 1:
        return None
    mark = _mark(run) if processes.is_writer() else None
    about = json.loads(processes.broadcast_text(json.dumps(mark or {"local": str(run)})))
    here = _mark(run) or {}
    shares = run.is_dir() if "local" in about else here.get("writer") == about["writer"]
    sharing = processes.gather_text("yes" if shares else "")
    if all(sharing):
        return None
    if "local" in about:
        raise ValueError(
            f"the run directory '{run}' is not there for process {sharing.index('')}; several processes need one that"
            " all of them share, or a run on gs://"
        )
    return PartExchange(join(about["url"], f"{_PARTS}/{about['writer']}"), shares)


class PartExchange:
    """Lets checkpoints come together whose processes are on machines without a shared directory.

    Orbax lets each process write its own files, and process 0 makes one checkpoint of them. Between the two, the other
    processes send their files to the store and process 0 fetches them.
    """

    def __init__(self, url: str, shares: bool):
        """Args:
        url: where the parts go.
        shares: whether this process shares the directory of process 0.
        """
        self._url, self._shares = url, shares
        self._directory, self._number, self._together = Path(), 0, -1
        self._wait: Any = multihost.get_barrier_sync_fn()

    def begin(self, directory: Path, number: int) -> None:
        """See `checkpoints.Exchange`."""
        self._directory, self._number = directory / f"{number}{_TEMPORARY}", number
        if not self._shares:
            # Orbax lets process 0 make the directories, and the others wait until they see them.
            (self._directory / f"arrays{_TEMPORARY}" / "array_metadatas").mkdir(parents=True, exist_ok=True)

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """See `checkpoints.Exchange`."""
        url, is_written = join(self._url, str(self._number)), "_async_write_complete" in key
        if is_written and not self._shares:
            name = f"process_{processes.index()}"
            found = [path for path in self._directory.rglob("*") if path.is_file()]
            mine = [path for path in found if any(part.endswith(name) for part in path.parts)]
            self._each(lambda path: remote_files.send(path, join(url, str(path.relative_to(self._directory)))), mine)
        self._wait(key=key, timeout_ms=timeout_ms)
        if is_written and processes.is_writer():
            parts = remote_files.entries(url)
            self._each(
                lambda name: remote_files.fetch(join(url, name), parts[name].generation, self._directory / name), parts
            )
            self._each(lambda name: remote_files.remove(join(url, name)), parts)
            self._together = self._number
        if "_async_commit_complete" in key and not self._shares:
            shutil.rmtree(self._directory, ignore_errors=True)

    def is_together(self, number: int) -> bool:
        """See `checkpoints.Exchange`."""
        return self._together == number

    def _each(self, do: Callable[[Any], Any], items: Iterable[Any]) -> None:
        with ThreadPoolExecutor(paths.TOGETHER) as pool:
            list(pool.map(do, items))


@dataclass(frozen=True)
class _Sent:
    """A file as it was when it was copied, and the generation of the copy."""

    inode: int
    size: int
    changed: int
    generation: int


class RunMirror:
    """Copies what a run has finished to its address, in threads of its own.

    Attributes:
        url: the address.
    """

    def __init__(self, path: Path):
        """Args:
        path: the local directory of the run, with its mark.

        Raises:
            ValueError: another process owns the remote run.
            FileExistsError: there is a run at the address of a new one.
            RemoteError: the store cannot be reached.
        """
        mark = _mark(path)
        assert mark is not None
        self.url: str = mark["url"]
        self._path, self._owner = path, RemoteOwner(self.url)
        self._owner.take(is_new=bool(mark.get("new")))
        try:
            # A copy that another process has gone on from elsewhere is fetched anew.
            # Where nobody has owned it, nobody else has gone on from it either.
            _bring_up_to_date(path, self.url, self._owner.previous or mark["writer"])
            write_json(path / MARK, {"url": self.url, "writer": self._owner.id})
            self._numbers, self._seals = self._remote_checkpoints()
        except BaseException:
            self._owner.release()
            raise
        self._sent: dict[str, _Sent] = {}
        self._condition = threading.Condition()
        self._asked = self._copied = 0
        self._number: int | None = None
        self._closing, self._told, self._failure = False, False, None
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._work, self._beat)]
        for thread in self._threads:
            thread.start()

    @property
    def newest(self) -> int | None:
        """Number of the newest checkpoint that is at the address; None without one."""
        return max(list(self._seals), default=None)  # the list is made at once, and another thread may write

    def copy(self, number: int | None = None) -> None:
        """Starts copying what is new.

        Args:
            number: of a checkpoint that is being written, to be waited for.
        """
        with self._condition:
            self._asked, self._number = self._asked + 1, number if number is not None else self._number
            self._condition.notify_all()

    def check(self) -> None:
        """Looks whether copying has failed; does not wait for it.

        Raises:
            CheckpointError: it has.
        """
        if self._failure is not None:
            self._told = True
            raise CheckpointError(
                f"the run could not be copied to '{self.url}': {self._failure}. It is whole in '{self._path}'"
            )

    def wait(self) -> None:
        """Waits until everything that was asked for is copied.

        Raises:
            CheckpointError: it could not be.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._copied == self._asked or self._failure is not None)
        self.check()

    def close(self) -> None:
        """Copies what is left, and gives the run free.

        Raises:
            CheckpointError: it could not be copied, and `check` has not said so yet.
        """
        try:
            with self._condition:
                # A run that changed nothing leaves the remote one as it was.
                self._asked += self._asked > 0
                self._closing = True
                self._condition.notify_all()
            self._threads[0].join()
        finally:
            self._stopped.set()
            self._threads[1].join()
            self._owner.release()
        if not self._told:
            self.check()

    def _work(self) -> None:
        """Copies whenever it is asked to, until the end or the first failure."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closing or self._copied != self._asked)
                asked = self._asked
            if asked == self._copied or self._failure is not None:
                return
            try:
                self._wait_for_checkpoint()
                self._copy()
            except Exception as error:  # whatever it is, the run must hear of it
                self._fail(str(error) or type(error).__name__)
                return
            with self._condition:
                self._copied = asked
                self._condition.notify_all()

    def _beat(self) -> None:
        heard = time.monotonic()
        while not self._stopped.wait(run_owner.BEAT_SECONDS):
            try:
                self._owner.beat()
                heard = time.monotonic()
            except ChangedError:
                self._fail("another process has taken it over")
                return
            except OSError as error:
                if time.monotonic() - heard > run_owner.STALE_SECONDS:
                    self._fail(str(error))
                    return

    def _fail(self, reason: str) -> None:
        with self._condition:
            self._failure = self._failure or reason
            self._condition.notify_all()

    def _wait_for_checkpoint(self) -> None:
        """A checkpoint gets its name when it is whole. One that fails is said by whoever writes it, who then closes."""
        while self._number is not None and not self._closing and self._failure is None:
            if (self._path / _CHECKPOINTS / str(self._number) / SEAL).is_file():
                return
            time.sleep(_LOOK_SECONDS)

    def _copy(self) -> None:
        if self._failure is not None:  # another process may own the run by now
            raise RemoteError(self._failure)
        here, directory = {}, self._path / _CHECKPOINTS
        for number in checkpoint_numbers(directory):
            with contextlib.suppress(FileNotFoundError):
                here[number] = (directory / str(number) / SEAL).read_bytes()
        new = {number: seal for number, seal in here.items() if self._seals.get(number) != seal}
        self._drop_parts()
        # What the run has set aside, what was copied by halves, and what has another content by now.
        for number in self._numbers - (here.keys() - new.keys()):
            if number in new or number not in self._seals or (here and number > max(here)):
                self._drop(number)
        parts = [part for number, seal in new.items() for part in self._parts(number, seal)]
        with ThreadPoolExecutor(paths.TOGETHER) as pool:
            self._numbers |= new.keys()
            list(pool.map(lambda name: remote_files.send(self._path / name, join(self.url, name)), parts))
        self._copy_files()
        for number in sorted(new):
            remote_files.write(join(self.url, f"{_CHECKPOINTS}/{number}/{SEAL}"), new[number])
            self._seals[number] = new[number]
        for number in sorted(self._seals, reverse=True)[self._keep() :]:
            self._drop(number)
        self._drop_blocks()

    def _parts(self, number: int, seal: bytes) -> list[str]:
        """The files of a checkpoint but for its seal, and those of its blocks that are not there yet."""
        directory = self._path / _CHECKPOINTS / str(number)
        files = [path for path in directory.rglob("*") if path.is_file() and path.name != SEAL]
        there = [block for other in self._seals.values() for block in _blocks(other).items()]
        blocks = [name for name, entry in _blocks(seal).items() if (name, entry) not in there]
        return [str(path.relative_to(self._path)) for path in files] + blocks

    def _copy_files(self) -> None:
        """Copies everything beside the checkpoints that has changed."""
        for path in sorted(self._path.rglob("*")):
            name = str(path.relative_to(self._path))
            if _NOT_COPIED.fullmatch(name) or not path.is_file():
                continue
            stat, before = path.stat(), self._sent.get(name)
            if before is not None and (before.inode, before.size, before.changed) == (
                stat.st_ino,
                stat.st_size,
                stat.st_mtime_ns,
            ):
                continue
            url, size = join(self.url, name), stat.st_size
            has_grown = before is not None and before.inode == stat.st_ino and size > before.size > 0
            generation = None
            if before is not None and has_grown and _GROWING.fullmatch(name):
                with contextlib.suppress(ChangedError):  # a join whose answer got lost was tried again
                    generation = remote_files.send_end(path, url, before.size, size, before.generation)
            if generation is None:
                generation = remote_files.send(path, url, size)
            self._sent[name] = _Sent(stat.st_ino, size, stat.st_mtime_ns, generation)

    def _drop(self, number: int) -> None:
        """Removes a remote checkpoint, its seal first, so that nobody takes it for whole."""
        url = join(self.url, f"{_CHECKPOINTS}/{number}")
        remote_files.remove(join(url, SEAL))
        self._seals.pop(number, None)
        with ThreadPoolExecutor(paths.TOGETHER) as pool:
            list(pool.map(lambda name: remote_files.remove(join(url, name)), remote_files.entries(url)))
        self._numbers.discard(number)

    def _drop_parts(self) -> None:
        """Removes what owners before have left of checkpoints that did not come together."""
        if self._sent:  # which is done once
            return
        url = join(self.url, _PARTS)
        for name in remote_files.entries(url):
            if not name.startswith(f"{self._owner.id}/"):
                remote_files.remove(join(url, name))

    def _drop_blocks(self) -> None:
        """Removes the blocks that no remote checkpoint has any more."""
        needed = {name for seal in self._seals.values() for name in _blocks(seal)}
        url = join(self.url, f"{_CHECKPOINTS}/blocks")
        if not needed and not (self._path / _CHECKPOINTS / "blocks").is_dir():
            return  # a run without replay has none
        for name in remote_files.entries(url):
            if f"{_CHECKPOINTS}/blocks/{name}" not in needed:
                remote_files.remove(join(url, name))

    def _keep(self) -> int:
        """How many checkpoints stay, as for the local ones."""
        config = json.loads((self._path / "config.json").read_text(encoding="utf-8"))
        return int(config["train"]["keep_checkpoints"])

    def _remote_checkpoints(self) -> tuple[set[int], dict[int, bytes]]:
        """The numbers that have files at the address, and the seals of those that have one."""
        found = [_IN_CHECKPOINT.fullmatch(name) for name in remote_files.entries(self.url)]
        numbers = {int(match[1]) for match in found if match is not None}
        sealed = {int(match[1]) for match in found if match is not None and match[2] == SEAL}
        seals = {number: remote_files.read(join(self.url, f"{_CHECKPOINTS}/{number}/{SEAL}")) for number in sealed}
        return numbers, {number: seal[0] for number, seal in seals.items() if seal is not None}


def _bring_up_to_date(path: Path, url: str, owner: str | None = None) -> None:
    """Makes a local directory the copy of a remote run, unless its last owner wrote here and may be ahead of it.

    Args:
        path: the directory.
        url: of the run.
        owner: who owned the remote run last; None asks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with paths.locked(path.with_name(f".{path.name}.lock")):
        mark = _mark(path)
        if mark is not None and mark.get("new"):
            return
        writer = None if mark is None else mark["writer"]
        if writer is not None:
            if writer == (owner or read_owner(join(url, OWNER))[0].get("id")):
                return
            # The run went on elsewhere, and what is here is not part of it any more.
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / MARK, {"url": url, "writer": None})
        for attempt in range(3):
            try:
                _fetch(path, url)
                return
            except MissingError:  # a run that goes on has removed a checkpoint in the meantime
                if attempt == 2:
                    raise


def _fetch(path: Path, url: str) -> None:
    """Fetches all of a run but its checkpoints, and of these the newest that is whole."""
    listed = remote_files.entries(url)
    if not listed:
        raise FileNotFoundError(f"'{url}' does not exist")
    wanted = {name: entry for name, entry in listed.items() if not _NOT_COPIED.fullmatch(name) and not _is_own(name)}
    for number in _sealed(listed):
        directory = f"{_CHECKPOINTS}/{number}"
        seal = remote_files.read(join(url, f"{directory}/{SEAL}"))
        if seal is None:
            raise MissingError(f"'{join(url, directory)}' has gone")
        wanted |= {name: entry for name, entry in listed.items() if name.startswith(f"{directory}/")}
        # One that is missing shows as damage below.
        wanted |= {name: listed[name] for name in _blocks(seal[0]) if name in listed}
        paths.fetch_new(url, path, wanted, path / _INDEX)
        # What is damaged stays, so that the run says so when it passes it over.
        if not damage_of(path / directory):
            return
    paths.fetch_new(url, path, wanted, path / _INDEX)


def _is_own(name: str) -> bool:
    """Whether a remote file is none of the run's."""
    return name == OWNER or name.endswith(".end") or name.startswith(f"{_PARTS}/")


def _sealed(listed: dict[str, Entry]) -> list[int]:
    found = [_IN_CHECKPOINT.fullmatch(name) for name in listed]
    return sorted((int(match[1]) for match in found if match is not None and match[2] == SEAL), reverse=True)


def _blocks(seal: bytes) -> dict[str, tuple[int, ...]]:
    """Size and checksum of each block that a seal names, by its name in the run; none where it cannot be read."""
    try:
        return {
            f"{_CHECKPOINTS}/{name.removeprefix('../')}": tuple(entry)
            for name, entry in json.loads(seal).items()
            if name.startswith(_BLOCKS)
        }
    except (ValueError, TypeError, AttributeError):
        return {}


def _mark(path: Path) -> dict[str, Any] | None:
    """What the mark of a local copy says; None for a directory that is none."""
    file = path / MARK
    if not file.is_file():
        return None
    try:
        mark = json.loads(file.read_text(encoding="utf-8"))
        return {"url": paths.address(mark["url"]), "writer": mark["writer"], "new": mark.get("new", False)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{file}' cannot be read: {error!r}; without it the run is a local one") from None
