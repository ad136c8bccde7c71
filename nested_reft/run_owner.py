"""Who owns a run: one process at a time writes to it, wherever it lies.

A run in a directory has the system's lock (`RunLock`). Where the file system has no locks, a file says who is at work
(`OwnerFile`). A run on `gs://` has such a file at its address (`RemoteOwner`). An owner shows again and again that it
is there. One that was killed is known to be gone on its own machine. Elsewhere it counts as gone when nothing is heard
of it for long enough.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from nested_reft import remote_files
from nested_reft.json_files import naming
from nested_reft.remote_files import ChangedError, join

logger = logging.getLogger(__name__)

IN_USE = "in_use.json"  # in a directory whose file system has no locks: who works there
OWNER = "owner.json"  # at the address of a run: who owns it
# The owner shows that it is there as often as the first says, and counts as gone after the second.
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
_LOOK_SECONDS = 0.2
_held: set[str] = set()  # owners of this process


class RunLock:
    """The right to write into a run directory. The system takes it away when the process ends, however it ends.

    Attributes:
        descriptor: of the directory, as it was when it was locked.
    """

    def __init__(self, path: Path):
        """Args:
        path: the directory.

        Raises:
            ValueError: another process works on this run.
        """
        self.descriptor, self._owner = os.open(path, os.O_RDONLY), None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            raise ValueError(
                f"run '{path}' is in use by another process; wait until it has ended, or stop it"
            ) from None
        except OSError:  # some network file systems have no locks
            try:
                self._owner = OwnerFile(path)
            except BaseException:
                os.close(self.descriptor)
                raise

    def check(self) -> None:
        """Stops a run that another process has taken over.

        Raises:
            OSError: it has.
        """
        if self._owner is not None:
            self._owner.check()

    def close(self) -> None:
        """Lets others work on the run."""
        if self._owner is not None:
            self._owner.release()
        os.close(self.descriptor)


class OwnerFile:
    """A file that says who works on a run, in place of a lock.

    The owner writes it again and again. Where it was killed, the next one on the same machine knows that its process is
    gone. On another machine it waits as long as `STALE_SECONDS` for a sign of it.
    """

    def __init__(self, run: Path):
        """Args:
        run: the directory.

        Raises:
            ValueError: another process works on this run.
        """
        self._id, self._run, self._path = secrets.token_hex(8), run, run / IN_USE
        self._beats, self._is_lost = 0, False
        while not self._made():
            owner = _read_file(self._path)
            if owner is None:
                continue  # it has just gone
            if not has_ended(owner) and not self._is_silent(owner):
                raise _in_use(self._run, owner)
            self._remove(owner)
        _held.add(self._id)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self.beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See `RunLock.check`."""
        if self._is_lost:
            raise OSError(
                f"run '{self._run}' was taken over: for {STALE_SECONDS:g} s no other process could see that"
                " this one is at work"
            )

    def release(self) -> None:
        """Removes the file."""
        self._stopped.set()
        self._thread.join()
        _held.discard(self._id)
        with contextlib.suppress(OSError):
            if (_read_file(self._path) or {}).get("id") == self._id:
                self._path.unlink()

    def _made(self) -> bool:
        """Whether there was no such file; then it is this owner's now."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with naming(self._path), os.fdopen(descriptor, "w") as file:
            file.write(self._content())
        return True

    def _is_silent(self, owner: dict[str, Any]) -> bool:
        """Whether nothing is heard of an owner for long enough. Clocks of two hosts differ, so none are compared."""
        seconds = STALE_SECONDS
        logger.warning(
            "run '%s' says that it is in use by %s; waiting up to %g s for a sign of it",
            *(self._run, in_words(owner), seconds),
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            now = _read_file(self._path)
            if now != owner:
                return now is None
        logger.warning("run '%s' was not left in order by %s; it is taken over", self._run, in_words(owner))
        return True

    def _remove(self, owner: dict[str, Any]) -> None:
        """Removes the file of an owner that is gone."""
        aside = self._path.with_name(f"in_use_{self._id}.jsonl.partial")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            found = _read_file(aside)
            if found != owner:  # another process was faster, and this is its file
                aside.rename(self._path)
                raise _in_use(self._run, found or {})
            aside.unlink()

    def beat(self) -> None:
        """Shows that the owner is there, until it is done or has lost the run."""
        heard = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                owner = _read_file(self._path)
                if owner is None or owner.get("id") != self._id:
                    self._is_lost = True
                    return
                self._beats += 1
                # Whoever reads it meanwhile finds a whole one.
                unfinished = self._path.with_name(f"in_use_{self._id}.jsonl.partial")
                unfinished.write_text(self._content())
                unfinished.replace(self._path)
                heard = time.monotonic()
            except OSError:  # of a network, perhaps for a moment
                self._is_lost = time.monotonic() - heard > STALE_SECONDS

    def _content(self) -> str:
        return json.dumps(this_process(self._id) | {"beats": self._beats})


class RemoteOwner:
    """The right to write to a remote run, which one process has at a time.

    Attributes:
        id: of this owner; another process, and the same one later, have another.
        previous: the owner before; None for a new run.
    """

    def __init__(self, url: str):
        """Args:
        url: of the run.
        """
        self.id, self.previous = secrets.token_hex(8), None
        self._url, self._generation = join(url, OWNER), 0
        self._run = url

    def take(self, is_new: bool) -> None:
        """Becomes the owner, once the one before has said that it is done or has not been heard of for long enough.

        Args:
            is_new: there must be no owner before.

        Raises:
            FileExistsError: there is one.
            ValueError: it is still at work.
        """
        before, generation = ({}, 0) if is_new else self._last_owner()
        try:
            self._write(generation)
        except ChangedError:
            now, _ = read_owner(self._url)
            if is_new:
                raise FileExistsError(f"there is a run at '{self._run}' already") from None
            raise _in_use(self._run, now) from None
        self.previous = before.get("id")
        _held.add(self.id)

    def beat(self) -> None:
        """Shows that the owner is there.

        Raises:
            ChangedError: another process has taken over.
        """
        self._write(self._generation)

    def release(self) -> None:
        """Says that the owner is done, so that nobody has to wait. Where that fails, others wait."""
        _held.discard(self.id)
        with contextlib.suppress(OSError):
            self._write(self._generation, released=True)

    def _last_owner(self) -> tuple[dict[str, Any], int]:
        """Who owned the run, and the generation of that; it is at work no more."""
        owner, generation = read_owner(self._url)
        began = time.monotonic()
        while generation and not owner.get("released") and not has_ended(owner):
            if time.monotonic() - began >= STALE_SECONDS:
                logger.warning("'%s' was not left in order by %s; it is taken over", self._run, in_words(owner))
                break
            if time.monotonic() - began < _LOOK_SECONDS:
                logger.warning(
                    "'%s' is owned by %s; waiting up to %g s for a sign of it",
                    self._run,
                    in_words(owner),
                    STALE_SECONDS,
                )
            time.sleep(_LOOK_SECONDS)
            now, found = read_owner(self._url)
            # No clocks are compared, because those of two machines may differ.
            if found != generation and now.get("id") == owner.get("id") and not now.get("released"):
                raise _in_use(self._run, now)
            if now.get("id") != owner.get("id"):  # yet another process was faster
                began = time.monotonic()
            owner, generation = now, found
        return owner, generation

    def _write(self, generation: int, released: bool = False) -> None:
        value = this_process(self.id)
        content = json.dumps(value | {"released": released, "time": time.time()}).encode()
        try:
            self._generation = remote_files.write(self._url, content, generation)
        except ChangedError:
            # A request whose answer got lost was tried again, and then found what it had written itself.
            owner, found = read_owner(self._url)
            if owner.get("id") != self.id:
                raise
            self._generation = found


def this_process(id: str) -> dict[str, Any]:
    """What an owner says of itself.

    Args:
        id: of the owner.
    """
    return {"id": id, "host": socket.gethostname(), "pid": os.getpid(), "place": _place()}


def in_words(owner: dict[str, Any]) -> str:
    """An owner, for messages."""
    return f"process {owner.get('pid', 'unknown')} on host '{owner.get('host', 'unknown')}'"


def _place() -> str:
    """Where numbers of processes mean the same: a start of the system, and a container in it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def has_ended(owner: dict[str, Any]) -> bool:
    """Whether an owner was a process of this place and is there no more."""
    pid = owner.get("pid")
    if not _place() or owner.get("place") != _place() or not isinstance(pid, int):
        return False
    if pid == os.getpid():
        return owner.get("id") not in _held
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _in_use(run: Path | str, owner: dict[str, Any]) -> ValueError:
    """The refusal of a run that another process works on."""
    return ValueError(
        f"run '{run}' is in use by {in_words(owner)}; wait until it has ended, or stop it. One that was killed"
        f" counts as gone after {STALE_SECONDS:g} s"
    )


def read_owner(url: str) -> tuple[dict[str, Any], int]:
    """What the file of a remote owner holds, and its generation, 0 without one.

    Args:
        url: of the file, `OWNER` in the run's directory.
    """
    found = remote_files.read(url)
    if found is None:
        return {}, 0
    try:
        value = json.loads(found[0])
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}, found[1]


def _read_file(path: Path) -> dict[str, Any] | None:
    """What the file of an owner holds; None where there is no file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # it has just been made, or is somebody else's
        return {}
    return found if isinstance(found, dict) else {}
