"""One process at a time works on a run directory, also where its file system has no locks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from nested_reft import run_mirror
from nested_reft.run_mirror import IN_USE, has_ended, in_words, this_process

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2


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
    gone. On another machine it waits as long as `run_mirror.STALE_SECONDS` for a sign of it.
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
            owner = _read(self._path)
            if owner is None:
                continue  # it has just gone
            if not has_ended(owner) and not self._is_silent(owner):
                raise self._in_use(owner)
            self._remove(owner)
        run_mirror.held.add(self._id)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self.beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See `RunLock.check`."""
        if self._is_lost:
            raise OSError(
                f"run '{self._run}' was taken over: for {run_mirror.STALE_SECONDS:g} s no other process could see that"
                " this one is at work"
            )

    def release(self) -> None:
        """Removes the file."""
        self._stopped.set()
        self._thread.join()
        run_mirror.held.discard(self._id)
        with contextlib.suppress(OSError):
            if (_read(self._path) or {}).get("id") == self._id:
                self._path.unlink()

    def _made(self) -> bool:
        """Whether there was no such file; then it is this owner's now."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(self._content())
        return True

    def _is_silent(self, owner: dict[str, Any]) -> bool:
        """Whether nothing is heard of an owner for long enough. Clocks of two hosts differ, so none are compared."""
        seconds = run_mirror.STALE_SECONDS
        logger.warning(
            "run '%s' says that it is in use by %s; waiting up to %g s for a sign of it",
            *(self._run, in_words(owner), seconds),
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            now = _read(self._path)
            if now != owner:
                return now is None
        logger.warning("run '%s' was not left in order by %s; it is taken over", self._run, in_words(owner))
        return True

    def _remove(self, owner: dict[str, Any]) -> None:
        """Removes the file of an owner that is gone."""
        aside = self._path.with_name(f"in_use_{self._id}.jsonl.partial")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            found = _read(aside)
            if found != owner:  # another process was faster, and this is its file
                aside.rename(self._path)
                raise self._in_use(found or {})
            aside.unlink()

    def beat(self) -> None:
        """Shows that the owner is there, until it is done or has lost the run."""
        heard = time.monotonic()
        while not self._stopped.wait(run_mirror.BEAT_SECONDS):
            try:
                owner = _read(self._path)
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
                self._is_lost = time.monotonic() - heard > run_mirror.STALE_SECONDS

    def _content(self) -> str:
        return json.dumps(this_process(self._id) | {"beats": self._beats})

    def _in_use(self, owner: dict[str, Any]) -> ValueError:
        return ValueError(
            f"run '{self._run}' is in use by {in_words(owner)}; wait until it has ended, or stop it. One that was"
            f" killed counts as gone after {run_mirror.STALE_SECONDS:g} s"
        )


def _read(path: Path) -> dict[str, Any] | None:
    """What the file of an owner holds; None where there is no file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # it has just been made, or is somebody else's
        return {}
    return found if isinstance(found, dict) else {}
