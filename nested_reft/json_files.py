"""JSON files: written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_writable(path: Path) -> None:
    """Refuses a file that could not be written, before the work whose result it is to hold."""
    trial = path.with_name(f"{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError
        trial.touch()
        trial.unlink()
    except (OSError, ValueError):
        raise ValueError(f"cannot write '{path}': name a file in a directory that exists and can be written") from None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file, so that `path` is never half written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds a JSON {type(value).__name__}; it must hold an object")
    return value
