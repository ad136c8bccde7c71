"""Where compiled programs are kept from one process to the next, since compiling takes longer than many runs.

All commands and tests use them. JAX's key covers the program, its options, the devices and the version of XLA.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import time
from pathlib import Path

NO_CACHE = "--no-compilation-cache"  # the option that turns it off
KEEP_SECONDS = 14 * 24 * 3600  # a program is compiled anew after two weeks, so what nobody needs goes away


def user_cache() -> Path:
    """The package's part of the user's cache directory; `XDG_CACHE_HOME` puts it elsewhere."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nested_reft"


def cache_directory() -> Path:
    """The directory for this kind of processor: a program is machine code, and the key does not name the processor."""
    return user_cache() / f"compiled-{hashlib.sha256(processor().encode()).hexdigest()[:12]}"


def processor() -> str:
    """The architecture and, where the system lists them, the instruction sets."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text() if listed.exists() else platform.processor()
    instructions = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) or [text]
    return " ".join([platform.machine(), *sorted(set(instructions))])


def drop_old_programs(directory: Path) -> None:
    """Removes programs that were written long ago.

    Args:
        directory: where they lie; it need not be there.
    """
    oldest = time.time() - KEEP_SECONDS
    for path in directory.glob("*-cache"):
        # Another process may remove the same ones, and what cannot be removed does no harm.
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
