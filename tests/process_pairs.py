"""Runs the same lines of Python in several processes that belong together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from nested_reft.command import environment_of

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 240

_START = """
import jax, sys
from nested_reft import processes
processes.start(processes.ProcessConfig("127.0.0.1:{port}", {count}, int(sys.argv[1]), heartbeat_seconds=60))
"""


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_together(code: str, devices: int = 4, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Runs `code` in every process after they have joined, and ends those that take too long.

    Args:
        code: Python; `processes` and `jax` are imported.
        devices: virtual CPU devices of each process.
        count: of processes.

    Returns:
        Exit code and output of each; lines that JAX's own services write are left out.
    """
    start = _START.format(count=count, port=free_port())
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", start + textwrap.dedent(code), str(index)],
            env=environment_of(devices) | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        return [_finished(process) for process in running]
    finally:
        for process in running:
            process.kill()


def _finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    out = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
