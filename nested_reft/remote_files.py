"""Files on Google Cloud Storage: whole files come and go, and what is written twice is noticed.

It needs the `gcs` extra, which is imported by the first call. Every request has a time limit, is tried again where that
can help, and fails as `RemoteError`. What is fetched is compared with the store's checksum.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nested_reft.heartbeat import beat

EXTRA = "google-cloud-storage is not installed; run: pip install 'nested_reft[gcs]'"
# A request that gets no byte for so long is given up, and one that fails is tried again for so long.
REQUEST_SECONDS = 60.0
RETRY_SECONDS = 120.0
# Large files are sent in parts of this size, each with a request of its own; the store asks for multiples of 256 KiB.
_PART_BYTES = 16 << 20
_URL = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220})(?:/(.*))?", re.DOTALL)


class RemoteError(OSError):
    """The store cannot be reached, or refuses."""


class ChangedError(RemoteError):
    """A file is not, or no longer, in the version that was to be replaced."""


class MissingError(RemoteError):
    """There is no such file or bucket."""


@dataclass(frozen=True)
class Entry:
    """A file as the store lists it.

    Attributes:
        size: in bytes.
        generation: changes whenever the file is written.
    """

    size: int
    generation: int


def join(url: str, name: str) -> str:
    """The address of a file in a directory.

    Args:
        url: of the directory.
        name: of the file, relative to it.
    """
    return f"{url.rstrip('/')}/{name}"


def split(url: str) -> tuple[str, str]:
    """Bucket, and name in it without slashes at its end.

    Args:
        url: gs://BUCKET/NAME.

    Raises:
        ValueError: it has another form.
    """
    found = _URL.fullmatch(url)
    # `..` and empty parts are allowed to the store, and would lead out of the local copy.
    parts = [] if found is None else (found[2] or "").rstrip("/").split("/")
    if found is None or any(part in (".", "..") for part in parts) or "" in parts[1:]:
        raise ValueError(f"'{url}' is no address of a file; allowed is gs://BUCKET/NAME")
    return found[1], "/".join(parts)


def entry(url: str) -> Entry | None:
    """The file of an address; None where there is none.

    Args:
        url: of the file.
    """
    with _told(url):
        blob = _bucket(url).get_blob(split(url)[1], timeout=REQUEST_SECONDS, retry=_retry())
        return None if blob is None else _entry(blob)


def entries(url: str) -> dict[str, Entry]:
    """All files below an address, by their names relative to it.

    Args:
        url: of a directory.
    """
    bucket, name = split(url)
    prefix = f"{name}/" if name else ""
    with _told(url):
        found = _client().list_blobs(bucket, prefix=prefix, timeout=REQUEST_SECONDS, retry=_retry())
        listed = {blob.name.removeprefix(prefix): _entry(blob) for blob in found}
    # Some tools make files for directories. Names that would lead out of a local copy are nobody's in good faith.
    return {name: entry for name, entry in listed.items() if _is_plain(name)}


def check(url: str) -> None:
    """Asks for one file below an address, so that a wrong bucket or missing rights are known before any work.

    Args:
        url: of a directory; it need not exist.

    Raises:
        RemoteError: the bucket does not exist, or cannot be read.
    """
    bucket, name = split(url)
    with _told(url):
        list(_client().list_blobs(bucket, max_results=1, prefix=name, timeout=REQUEST_SECONDS, retry=_retry()))


def read(url: str) -> tuple[bytes, int] | None:
    """What a small file holds, and its generation; None where there is none.

    Args:
        url: of the file.
    """
    found = entry(url)
    if found is None:
        return None
    with _told(url):
        blob = _bucket(url).blob(split(url)[1], generation=found.generation)
        try:
            return blob.download_as_bytes(timeout=REQUEST_SECONDS, retry=_retry(), checksum="crc32c"), found.generation
        except _kinds().NotFound:  # it was replaced since
            return read(url)


def write(url: str, content: bytes, generation: int | None = None) -> int:
    """Writes a small file.

    Args:
        url: of the file.
        content: of the file.
        generation: what is replaced; 0 replaces nothing, and None whatever there is.

    Returns:
        The generation of what was written.

    Raises:
        ChangedError: the store has another generation, or a file where there was to be none.
    """
    with _told(url):
        blob = _bucket(url).blob(split(url)[1])
        blob.upload_from_string(
            content, if_generation_match=generation, timeout=REQUEST_SECONDS, retry=_retry(), checksum="crc32c"
        )
        return int(blob.generation)


def send(path: Path, url: str, size: int | None = None) -> int:
    """Copies a local file, in place of what has the address.

    Args:
        path: the file; it may grow in the meantime.
        url: where it goes.
        size: how much of its beginning is copied; None is all.

    Returns:
        The generation of the copy.
    """
    return _send(path, url, 0, path.stat().st_size if size is None else size)


def send_end(path: Path, url: str, start: int, size: int, generation: int) -> int:
    """Appends to the copy of a file what the file has more by now.

    The store cannot append. But it can join two files, so only the end travels.

    Args:
        path: the file.
        url: where its beginning is.
        start: how much of it is there.
        size: up to where to copy.
        generation: of what is there.

    Returns:
        The generation of the whole.

    Raises:
        ChangedError: something else is there.
    """
    end = f"{url}.end"
    _send(path, end, start, size - start)
    with _told(url):
        bucket = _bucket(url)
        whole, more = bucket.blob(split(url)[1]), bucket.blob(split(end)[1])
        whole.compose([whole, more], if_generation_match=generation, timeout=REQUEST_SECONDS, retry=_retry())
    remove(end)
    return int(whole.generation)


def fetch(url: str, generation: int, path: Path) -> None:
    """Copies a file of the store; it gets its name only when it is whole.

    Args:
        url: of the file.
        generation: which version of it.
        path: where it goes; directories are made.

    Raises:
        MissingError: it has gone or was replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with _told(url), partial.open("wb") as file:
            blob = _bucket(url).blob(split(url)[1], generation=generation)
            # One stream, because the client compares no checksum of a file that comes in parts.
            blob.download_to_file(_Beating(file), timeout=REQUEST_SECONDS, retry=_retry(), checksum="crc32c")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Removes a file; one that is not there is no error.

    Args:
        url: of the file.
    """
    with contextlib.suppress(MissingError), _told(url):
        _bucket(url).blob(split(url)[1]).delete(timeout=REQUEST_SECONDS, retry=_retry())


def _send(path: Path, url: str, start: int, size: int) -> int:
    with path.open("rb") as file, _told(url):
        blob = _bucket(url).blob(split(url)[1])
        blob.chunk_size = _PART_BYTES
        blob.upload_from_file(
            _Beating(file, start), size=size, timeout=REQUEST_SECONDS, retry=_retry(), checksum="crc32c"
        )
        return int(blob.generation)


class _Beating:
    """A file, or its end, that says for each part that something was done, so that no watchdog takes it for a stall."""

    def __init__(self, file: IO[bytes], start: int = 0):
        self._file, self._start = file, start
        file.seek(start)

    def read(self, size: int = -1) -> bytes:
        """As that of the file."""
        beat()
        return self._file.read(size)

    def write(self, data: bytes) -> int:
        """As that of the file."""
        beat()
        return self._file.write(data)

    def tell(self) -> int:
        """As that of a file that begins here."""
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As that of a file that begins here."""
        return self._file.seek(offset + (self._start if whence == os.SEEK_SET else 0), whence) - self._start

    def flush(self) -> None:
        """As that of the file."""
        self._file.flush()


def _is_plain(name: str) -> bool:
    return bool(name) and not name.endswith("/") and not {"", ".", ".."} & set(name.split("/")) and "\0" not in name


def _entry(blob: Any) -> Entry:
    return Entry(int(blob.size), int(blob.generation))


def _bucket(url: str) -> Any:
    return _client().bucket(split(url)[0])


def _client() -> Any:
    # The address of an emulator is part of the key, since a client keeps the one that it was made with.
    return _client_of(os.environ.get("STORAGE_EMULATOR_HOST"), os.getpid())


@functools.lru_cache(maxsize=4)
def _client_of(_emulator: str | None, _process: int) -> Any:
    try:
        from google.cloud import storage
    except ImportError:
        raise ImportError(f"paths on gs:// need an optional package: {EXTRA}") from None
    from google.auth.exceptions import GoogleAuthError

    try:
        # No request here needs a project, but the client asks for one.
        return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
    except GoogleAuthError as error:
        raise RemoteError(
            "paths on gs:// need credentials; run: gcloud auth application-default login, or give the machine a service"
            f" account ({_line(error)})"
        ) from None


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(RETRY_SECONDS).with_delay(initial=0.5, maximum=20.0)


def _kinds() -> Any:
    from google.api_core import exceptions

    return exceptions


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turns the many kinds of errors of the client into ours, with the address."""
    _client()  # whose own errors have words already
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
    from requests import RequestException

    kinds = _kinds()
    try:
        yield
    except kinds.PreconditionFailed as error:
        raise ChangedError(f"'{url}' was changed in the meantime") from error
    except kinds.NotFound as error:
        raise MissingError(f"'{url}' does not exist") from error
    except DataCorruption as error:
        raise RemoteError(f"'{url}' does not arrive as it was sent (checksum)") from error
    except (kinds.GoogleAPIError, GoogleAuthError, InvalidResponse, RequestException) as error:
        raise RemoteError(f"'{url}' cannot be used: {_line(error)}") from error


def _line(error: Exception) -> str:
    """An error of the client in one line."""
    cause = error.__cause__ if type(error).__name__ == "RetryError" and error.__cause__ is not None else error
    return " ".join(str(cause).split())[:300] or type(cause).__name__
