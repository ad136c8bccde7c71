"""Other systems, each in an environment of its own under `.peers`, and how they are asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.benchmarks.worker import Spec
from nested_reft.command import HUGE_PAGES, TUNABLES

ROOT = Path(__file__).parents[2]
PEERS_DIRECTORY = ROOT / ".peers"
CREATE_SECONDS = 300
INSTALL_SECONDS = 2400  # llama.cpp is compiled here
WORKER_SECONDS = 1800


@dataclass(frozen=True)
class System:
    """A program that answers specs.

    Attributes:
        title: its name in tables.
        worker: the module that answers, in this package.
        environment: folder under `.peers`; None for the one that runs this.
        requirements: what pip installs there.
    """

    title: str
    worker: str
    environment: str | None = None
    requirements: tuple[str, ...] = ()


TORCH = ("transformers", ("torch==2.13.0", "transformers==5.23.0"))
"""The environment that two peers share, and what it holds."""


class Skipped(Exception):
    """A system cannot be measured; says why in one line."""


def ask(
    system: System, spec: Spec, directory: Path = PEERS_DIRECTORY, seconds: float = WORKER_SECONDS
) -> list[dict[str, Any]]:
    """A system's result for each case of the spec; its environment is made if need be.

    Args:
        system: who is asked.
        spec: for what.
        directory: of environments.
        seconds: the most that the answer may take.

    Raises:
        Skipped: it cannot be installed, fails, or takes too long.
    """
    python = sys.executable if system.environment is None else environment_python(system, directory)
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "answer.json"
        command = [str(python), "-m", f"experiments.benchmarks.{system.worker}", str(answer)]
        run_limited(command, seconds, spec.to_json(), _worker_environment(spec.threads))
        return json.loads(answer.read_text())


def environment_python(system: System, directory: Path = PEERS_DIRECTORY) -> Path:
    """The interpreter of a peer's environment, made first unless it is there with the same requirements.

    Raises:
        Skipped: it cannot be made.
    """
    assert system.environment is not None
    home = directory / system.environment
    python, ready = home / "bin" / "python", home / "ready.json"
    if ready.is_file() and json.loads(ready.read_text()) == list(system.requirements):
        return python
    wanted = " ".join(system.requirements)
    print(f"{system.title}: installing {wanted} into .peers/{system.environment} (once; minutes)", flush=True)
    ready.unlink(missing_ok=True)
    run_limited([sys.executable, "-m", "venv", "--clear", str(home)], CREATE_SECONDS)
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *system.requirements]
    run_limited(install, INSTALL_SECONDS)
    ready.write_text(json.dumps(system.requirements))
    return python


def run_limited(
    command: Sequence[str], seconds: float, text: str = "", environment: dict[str, str] | None = None
) -> None:
    """Runs a command from the repository's root, and ends it with all that it started when time is up.

    Args:
        command: program and arguments.
        seconds: the most that it may take.
        text: its standard input.
        environment: its variables; None gives it those of this process.

    Raises:
        Skipped: it fails or takes longer; the reason is the last line that it printed.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group of its own, so that what it starts can be ended with it
        )
    except OSError as error:
        raise Skipped(f"{Path(command[0]).name} cannot be started: {error.strerror}") from None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is ended too
    try:
        printed, _ = process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Skipped(f"took more than {seconds:g} seconds") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode < 0:
        raise Skipped(f"crashed: {signal.Signals(-process.returncode).name}")
    if process.returncode:
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        raise Skipped(lines[-1][:200] if lines else f"ended with status {process.returncode}")


def _worker_environment(threads: int) -> dict[str, str]:
    """This environment with every library's thread count set and huge pages for all; JAX takes its cores."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        TUNABLES: os.environ.get(TUNABLES, HUGE_PAGES),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
    }
