"""JSON files: written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nested_reft.untrusted import BadFile


def check_writable(path: Path) -> None:
    """Refuses a file that could not be written, before the work whose result it is to hold.

    Args:
        path: where `write_json` is to write later; an existing file stays as it is.

    Raises:
        ValueError: the directory is not there or cannot be written, or `path` is one.
    """
    try:
        # The rename at the end would fail on a directory, which the trial alone would not show.
        if path.is_dir():
            raise IsADirectoryError
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError
            return
        # A file of a name that nobody has shows it, so nothing of the user's is touched.
        with tempfile.NamedTemporaryFile(dir=path.resolve().parent):
            pass
    # A name with a NUL character raises ValueError.
    except (OSError, ValueError):
        raise ValueError(f"cannot write '{path}': name a file in a directory that exists and can be written") from None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file, so that `path` is never half written.

    Args:
        path: replaced where it exists; its directory must be there. A link stays one, and a device or a pipe is
            written to.
        value: JSON-able; a float that is not finite becomes null.
    """
    text = json_text(value, indent=2) + "\n"
    if _is_special(path):
        with naming(path):
            path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    # The number keeps a user's own `.partial` file as it is.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with naming(path):
        partial.write_text(text, encoding="utf-8")
    # A rename within one directory happens whole or not at all.
    os.replace(partial, path)


def check_can_write(path: Path, what: str, remedy: str) -> None:
    """Refuses a directory that cannot be written, by a file of a name that nobody has.

    Args:
        path: the directory; where it is not there, the nearest one above it decides.
        what: the option or the kind of directory, which begins the message.
        remedy: what the user can do beside granting the right.

    Raises:
        ValueError: it cannot be written.
        OSError: its device is full or broken.
    """
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=nearest):
            pass
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        where = "" if nearest == path.absolute() else f" in '{nearest}'"
        raise ValueError(
            f"{what} '{path}' cannot be written{where}: {error.strerror}; mount it writable or give this user the right"
            f" to write there, or {remedy}"
        ) from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an error of the system, which a write leaves out.

    Args:
        path: what is written in the block.

    Raises:
        OSError: as the block raised it, with a file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which a rename would replace by a file."""
    return path.exists() and not path.is_file() and not path.is_dir()


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """`(field, value in a, value in b)` wherever two configurations as JSON differ.

    Args:
        a, b: two `to_json` values, or the same part of both.
        prefix: where that part stands, with its dot; empty for whole configurations.

    Returns:
        The differences in the order of their fields; None stands for a field that one of them lacks.
    """
    found = []
    # The union of keys has no order of its own, so the result is sorted at the end.
    for name in a.keys() | b.keys():
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append((prefix + name, left, right))
    return sorted(found, key=lambda difference: difference[0])


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities, which JSON does not have, become null.

    Args:
        value: JSON-able.
        indent: spaces for each level; None writes one line.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file.

    Raises:
        BadFile: the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFile(f"'{path}' is not valid JSON ({error}); fetch it again") from error
    except RecursionError as error:
        raise BadFile(f"'{path}' is not read: its JSON is nested too deep; fetch it again") from error
    if not isinstance(value, dict):
        raise BadFile(f"'{path}' holds a JSON {type(value).__name__}; it must hold an object")
    return value
