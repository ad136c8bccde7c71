"""Where the original files of published datasets lie, for tests that need them: beside the project, if anywhere."""

import os
from pathlib import Path

import pytest

SHARED_DATA = Path(os.environ.get("NESTED_REFT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def original_files(name: str) -> str:
    """The folder of a dataset's original files; skips the test where there is none."""
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs the original files of {name} in {SHARED_DATA}; NESTED_REFT_DATA names another place")
    return str(SHARED_DATA / name)
