"""Where the tests keep compiled programs, since compiling is most of the suite's time.

All workers, later runs and other checkouts use them, and so do the commands that tests start: `conftest.py` puts the
directory into the environment. JAX's key covers the program, its options, the devices and the version of XLA.
`CompileCounter` counts a program that comes from the cache like one that is compiled (`tests/test_compilation.py`), so
compile counts do not depend on earlier runs. `JAX_ENABLE_COMPILATION_CACHE=false` runs the tests without it.
"""

import hashlib
import os
import platform
import re
import time
from pathlib import Path

KEEP_SECONDS = 14 * 24 * 3600  # a program is compiled anew after two weeks, so what no test needs goes away


def cache_directory() -> Path:
    """The directory for this kind of processor: a program is machine code, and the key does not name the processor."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = hashlib.sha256(processor().encode()).hexdigest()[:12]
    return root / "nested_reft" / f"compiled-{kind}"


def processor() -> str:
    """The architecture and, where the system lists them, the instruction sets."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text() if listed.exists() else platform.processor()
    instructions = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) or [text]
    return " ".join([platform.machine(), *sorted(set(instructions))])


def drop_old_programs(directory: Path) -> None:
    """Removes programs that were written long ago; another run may remove the same ones."""
    oldest = time.time() - KEEP_SECONDS
    for path in directory.glob("*-cache"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except FileNotFoundError:
            continue
