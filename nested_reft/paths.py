"""Paths that users give: each goes through one of these functions, so that `gs://` works or is refused by name.

`Path("gs://bucket/x")` is `gs:/bucket/x`, a local path that nobody meant. What lies on `gs://` is read through a local
copy, which is made once and brought up to date by size and generation.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nested_reft import remote_files
from nested_reft.json_files import write_json
from nested_reft.program_cache import user_cache
from nested_reft.remote_files import Entry

# The second form is what `Path` makes of the first.
_REMOTE = re.compile(r"gs:/{1,2}(?!/)")
# One slash is what `Path` leaves of two. Two letters at least, since one may be a drive.
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/|gs:", re.IGNORECASE)
TOGETHER = 8  # files that travel at a time


def is_remote(path: str | Path) -> bool:
    """Whether a path is one on Google Cloud Storage.

    Args:
        path: as a user gave it.

    Raises:
        ValueError: it is an address of another kind.
    """
    text = str(path)
    if _REMOTE.match(text):
        return True
    if _SCHEME.match(text):
        raise ValueError(f"'{text}' cannot be used; allowed are local paths and gs://BUCKET/NAME")
    return False


def address(path: str | Path) -> str:
    """A remote path as `gs://BUCKET/NAME`, without slashes at its end.

    Args:
        path: one that `is_remote`.

    Raises:
        ValueError: it names no bucket, or would lead out of its directory.
    """
    bucket, name = remote_files.split(_REMOTE.sub("gs://", str(path), count=1))
    return remote_files.join(f"gs://{bucket}", name).rstrip("/")


def check_named(run: str | Path) -> None:
    """Refuses an empty name of a run, which would mean the working directory to `Path`.

    Args:
        run: as a user gave it.

    Raises:
        ValueError: it is empty, as a variable of a shell is that was never set.
    """
    if not str(run).strip():
        raise ValueError(f"the run is '{run}'; allowed is a run directory, or gs://BUCKET/NAME")


def local_only(path: str | Path, what: str) -> Path:
    """A path where `gs://` makes no sense.

    Args:
        path: as a user gave it.
        what: an option or a field, for the message.

    Raises:
        ValueError: it is no local path.
    """
    if is_remote(path):
        raise ValueError(
            f"{what} is '{path}'; allowed is a local path: gs:// serves --runs, --resume, runs, models and data that"
            " are read"
        )
    return Path(path)


def local_path(path: str | Path) -> Path:
    """A local path as it is; of a remote file or directory, the local copy.

    Within a process the store is asked once for each, so that all that reads it reads the same.

    Args:
        path: as a user gave it.

    Raises:
        FileNotFoundError: there is nothing at a remote path.
        RemoteError: the store cannot be reached.
        ImportError: the extra that gs:// needs is not installed.
    """
    return _fetched(address(path), os.getpid()) if is_remote(path) else Path(path)


def copy_of(url: str) -> Path:
    """Where the local copy of a remote file or directory lies.

    Args:
        url: gs://BUCKET/NAME.
    """
    bucket, name = remote_files.split(url)
    return user_cache() / "gs" / bucket / name


@functools.cache
def _fetched(url: str, _process: int) -> Path:
    path, single = copy_of(url), remote_files.entry(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    index = path.with_name(f".{path.name}.fetched.json")
    with locked(path.with_name(f".{path.name}.lock")):
        if single is not None:
            fetch_new(url.rpartition("/")[0], path.parent, {path.name: single}, index)
            return path
        found = remote_files.entries(url)
        if not found:
            raise FileNotFoundError(f"'{url}' does not exist")
        fetch_new(url, path, found, index)
    return path


def fetch_new(url: str, directory: Path, wanted: dict[str, Entry], index: Path) -> None:
    """Brings a local copy up to date: fetches what is new or changed, and removes what is not wanted any more.

    Args:
        url: of the remote directory.
        directory: where its copy is.
        wanted: files by their names within it.
        index: a file beside or within the copy. It says which generation of each file was fetched.

    Raises:
        MissingError: a file has gone since it was listed.
    """
    known = _index(index)

    def is_new(name: str) -> bool:
        path = directory / name
        is_here = path.is_file() and path.stat().st_size == wanted[name].size
        return not is_here or known.get(name) != wanted[name].generation

    def get(name: str) -> None:
        remote_files.fetch(remote_files.join(url, name), wanted[name].generation, directory / name)
        known[name] = wanted[name].generation

    try:
        for name in known.keys() - wanted.keys():
            _remove(directory / name, directory)
            del known[name]
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(get, [name for name in wanted if is_new(name)]))
    finally:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(index, known)


def _remove(path: Path, directory: Path) -> None:
    """Removes a file, and the directories up to `directory` that it leaves empty."""
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == directory:
            return
        try:
            parent.rmdir()
        except OSError:
            return


def _index(path: Path) -> dict[str, int]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # everything is fetched once more
        return {}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A block that one process of this machine at a time is in.

    Args:
        path: a file for the lock; made if it is not there.
    """
    with path.open("ab") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
