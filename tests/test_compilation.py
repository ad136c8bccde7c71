"""Compile counts, with a cache of compiled programs and without one."""

import os
import subprocess
import sys
from pathlib import Path

from nested_reft.program_cache import KEEP_SECONDS, drop_old_programs

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from nested_reft.compilation import CompileCounter

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
counter = CompileCounter()
double = jax.jit(lambda x: jnp.sin(2 * x) @ x)
for size in (3, 3, 5):
    print(np.asarray(double(np.ones((size, size), np.float32))).tobytes().hex())
print(counter.count, len(hits))
"""


def printed(environment: dict[str, str]) -> list[str]:
    """The lines that the program prints in a process of its own."""
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command, env=environment, cwd=ROOT, text=True, timeout=120, check=True, stdout=subprocess.PIPE
    ).stdout.splitlines()


def test_a_program_from_the_cache_counts_and_computes_the_same(tmp_path):
    """The loop compiles two programs, for two shapes, whether the cache holds them or not."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    first, second = printed(environment), printed(environment)
    assert first[:3] == second[:3]
    assert first[3] == "2 0"  # compiled, none from the cache
    assert second[3] == "2 2"  # counted all the same, both from the cache


def test_old_programs_are_dropped(tmp_path):
    for name, age in (("old-cache", KEEP_SECONDS + 60), ("new-cache", KEEP_SECONDS - 60), ("old-other", 10**8)):
        (tmp_path / name).write_text("")
        written = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (written, written))
    drop_old_programs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new-cache", "old-other"]
