"""The processes of one run: how they find each other, and what they tell each other on the host.

Several processes run in lockstep. All of them hold equal host values and issue the same programs in the same order;
only device arrays are split. So there is little to say: texts at the start and the end, a row of numbers each step.
All functions that exchange something are called by every process, in the same order. With one process they cost
nothing.

Texts go through JAX's coordination service, which needs no devices and knows time limits. Rows go through a device
program, as the arrays of a step do.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from nested_reft.exit_codes import BAD_INPUT, FAILED

T = TypeVar("T")

# The slowest preparation that the others wait for: a model is downloaded, or read from a slow disk.
WAIT_SECONDS = 1800.0
_PREFIX = "nested_reft"
# Each exchange has a number. All processes exchange in the same order, so they count alike.
_exchanges = itertools.count()
_in_agreed_action = False
_heartbeat_seconds = 100  # of the service, once this process has joined it
# Kinds of errors that cross over, the special ones first: every process then ends with the same exit code.
_CROSSING = (OSError, ImportError, OverflowError, FloatingPointError, RecursionError, ValueError, RuntimeError)


@dataclass(frozen=True)
class ProcessConfig:
    """Where this process belongs among those of a run.

    Attributes:
        coordinator: HOST:PORT where process 0 can be reached by all; None where there is one process only.
        count: processes of the run.
        index: of this process, from 0.
        local_devices: indices of the devices that it uses; None is all of its machine.
        connect_seconds: how long it waits for the others at the start.
        heartbeat_seconds: a process that was silent for so long counts as dead, and the others end.
    """

    coordinator: str | None = None
    count: int = 1
    index: int = 0
    local_devices: tuple[int, ...] | None = None
    connect_seconds: int = 300
    heartbeat_seconds: int = 100

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"processes is {self.count}; allowed is 1 or more")
        if not 0 <= self.index < self.count:
            raise ValueError(f"process is {self.index}; allowed are 0 to {self.count - 1}, of {self.count} processes")
        if self.count > 1 and self.coordinator is None:
            raise ValueError(f"processes is {self.count} and coordinator is not given; give HOST:PORT of process 0")
        if self.heartbeat_seconds < 1:
            raise ValueError(f"heartbeat-seconds is {self.heartbeat_seconds}; allowed is 1 or more")
        host, _, port = (self.coordinator or "HOST:1").rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"coordinator is '{self.coordinator}'; allowed is HOST:PORT")


def start(config: ProcessConfig) -> None:
    """Joins the processes of a run. It must come before anything asks JAX for its devices.

    Args:
        config: which process this is; with one process nothing happens.

    Raises:
        ConnectionError: process 0 could not be reached within the time limit. Where it can, and another process does
            not come in time, this process ends with a line and code 1: JAX cannot be interrupted while it waits.
    """
    if config.count == 1:
        return
    _configure_jax(config.heartbeat_seconds)
    began = time.monotonic()
    if config.index:
        _check_reachable(config)
    # JAX does not raise when its limit is over. It aborts, with a dump instead of a line, so its limit must come later.
    late = threading.Timer(config.connect_seconds - (time.monotonic() - began), _end_late, (config,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.count,
            config.index,
            config.local_devices,
            # All is given, so no cluster need be asked.
            cluster_detection_method="deactivate",
            initialization_timeout=config.connect_seconds + 60,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    finally:
        late.cancel()


def start_detected(connect_seconds: int = 300, heartbeat_seconds: int = 100) -> None:
    """Joins the processes of a run as its cluster says: Cloud TPU, GKE, Slurm and what else JAX detects.

    Args:
        connect_seconds, heartbeat_seconds: as in `ProcessConfig`.

    Raises:
        ValueError: there is no cluster that JAX detects.
    """
    _configure_jax(heartbeat_seconds)
    try:
        jax.distributed.initialize(initialization_timeout=connect_seconds, heartbeat_timeout_seconds=heartbeat_seconds)
    # What JAX raises where it finds nothing depends on what it looked for.
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--coordinator is 'auto', and no cluster was detected ({reason}); give HOST:PORT") from error


def _configure_jax(heartbeat_seconds: int) -> None:
    """Sets what JAX reads when processes join."""
    global _heartbeat_seconds
    _heartbeat_seconds = heartbeat_seconds
    # JAX's own service would take SIGTERM away from Python, and with it the checkpoint at the end of a step.
    try:
        jax.config.update("jax_enable_preemption_service", False)
    except AttributeError:
        raise ValueError(
            f"several processes need JAX 0.8.1 or newer, which can leave SIGTERM to Python; this is {jax.__version__}"
        ) from None
    # Without it several processes on CPUs cannot exchange arrays. Other devices do not read it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def _check_reachable(config: ProcessConfig) -> None:
    """Waits until process 0 listens."""
    assert config.coordinator is not None
    host, _, port = config.coordinator.rpartition(":")
    end, reason = time.monotonic() + config.connect_seconds, ""
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
            return
        except OSError as error:  # it may start later than this process
            reason = error.strerror or str(error)
        time.sleep(min(0.2, left))
    raise ConnectionError(
        f"process {config.index} could not reach process 0 at coordinator '{config.coordinator}' within"
        f" {config.connect_seconds} s: {reason}"
    )


def _end_late(config: ProcessConfig) -> None:
    """Ends a process that is still waiting, in a thread beside it."""
    print(
        f"error: process {config.index} waited {config.connect_seconds} s at coordinator '{config.coordinator}', and"
        f" not all of the {config.count} processes came",
        file=sys.stderr,
    )
    flush_and_end(FAILED)


def index() -> int:
    """The number of this process, from 0."""
    return _state().process_id if _together() else 0


def count() -> int:
    """How many processes the run has."""
    return _state().num_processes if _together() else 1


def is_writer() -> bool:
    """Whether this process writes logs, summaries and the host's part of checkpoints: the first one does."""
    return index() == 0


def gather_text(text: str, seconds: float = WAIT_SECONDS) -> tuple[str, ...]:
    """A text of each process, by process.

    Args:
        text: of this process.
        seconds: how long to wait for the others.

    Raises:
        TimeoutError: another process did not come here in time.
    """
    if not _together():
        return (text,)
    number, client = next(_exchanges), _state().client
    # The sign in front keeps an empty text from being an empty value, which stores may treat as none.
    client.key_value_set(_place(number, index()), f"={text}")
    texts = tuple(_read(number, process, seconds)[1:] for process in range(count()))
    # Whoever wrote a text of this exchange has read all those of the one before, so ours of that one can go.
    if number:
        client.key_value_delete(_place(number - 1, index()))
    return texts


def broadcast_text(text: str | None, seconds: float = WAIT_SECONDS) -> str:
    """The text of process 0, on all processes.

    Args:
        text: of process 0; the others' is not read.
        seconds: how long to wait for the others.

    Raises:
        TimeoutError: another process did not come here in time.
    """
    # Everybody's text is gathered, so that no process goes on while another has not begun.
    return gather_text((text or "") if is_writer() else "", seconds)[0]


def gather_rows(row: np.ndarray) -> np.ndarray:
    """Rows of numbers of all processes, `[processes, *row]`.

    It is one small device program, for what is said in every step. It waits without a limit.

    Args:
        row: of this process, of one shape and type on all of them; 32 bits per number at most.
    """
    if not _together():
        return row[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row))


def agreed(action: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
    """The result of an action that every process takes; where it fails on one of them, it fails on all.

    Without it the others would wait for a process that has ended.

    Args:
        action: what is done on each process. It must not run device programs that span processes, nor exchange
            anything, because a process that failed before that would leave the others waiting.
        seconds: how long to wait for the slowest.

    Raises:
        Exception: what the action raised on the first process that failed. The other processes raise the same kind of
            error, with the number of that process.
        TimeoutError: another process did not come here in time.
    """
    global _in_agreed_action
    result: Any = None
    mine: Exception | None = None
    _in_agreed_action = True
    try:
        result = action()
    except Exception as error:
        mine = error
    finally:
        _in_agreed_action = False
    kind = next((kind.__name__ for kind in _CROSSING if isinstance(mine, kind)), RuntimeError.__name__)
    failures = gather_text("" if mine is None else f"{kind}\n{mine}", seconds)
    first = next((process for process, failure in enumerate(failures) if failure), None)
    if first is None:
        return result
    if mine is not None and first == index():
        raise mine
    kind, _, text = failures[first].partition("\n")
    raise getattr(builtins, kind)(f"process {first}: {text}") from mine


def by_writer(action: Callable[[], T], seconds: float = WAIT_SECONDS) -> T | None:
    """Takes an action on the writing process alone; where it fails there, it fails on all.

    Args:
        action: as in `agreed`.
        seconds: how long the others wait for it.

    Raises:
        Exception, TimeoutError: as in `agreed`.

    Returns:
        What the action returned; None on the other processes.
    """
    return agreed(lambda: action() if is_writer() else None, seconds)


def shares_work() -> bool:
    """Whether work on the host may be divided among processes here: not with one, nor within an agreed action."""
    return count() > 1 and not _in_agreed_action


def end_together(code: int) -> None:
    """Ends this process, at the same time as the others if they end too.

    The others' connection breaks when process 0 ends. A process that still had to say why it ends would be aborted.

    Where another process was killed, the exchanges with it fail as if this one had made a mistake, with any kind of
    error. So after an error this process waits until the other would be known to be dead, and is aborted then, as all
    the rest are. Whoever starts processes again goes by that.

    Args:
        code: exit code, where nobody is dead.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    is_error = code in (FAILED, BAD_INPUT)
    seconds = _heartbeat_seconds + 30 if is_error else 10
    try:
        # Not an exchange: processes that do not end may be in the middle of one.
        _state().client.wait_at_barrier(f"{_PREFIX}_end", 1000 * seconds)
    except jax.errors.JaxRuntimeError as error:
        # Others that are alive and do not come are in the middle of something.
        if is_error and "DEADLINE_EXCEEDED" not in str(error):
            print("error: another process of the run is gone; start all of them again", file=sys.stderr, flush=True)
            os.abort()
    else:
        # All have come and say goodbye. If process 0 just ended, one that had not yet heard of it would be aborted.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()
    flush_and_end(code)


def flush_and_end(code: int) -> None:
    """Ends this process without waiting for devices or other processes, whose turn will not come.

    JAX would wait for minutes at its end for processes that are in the middle of something else.

    Args:
        code: exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _together() -> bool:
    return jax.distributed.is_initialized()


def _state() -> Any:
    # The service is what `jax.distributed` itself uses; its texts have no public name yet.
    from jax._src.distributed import global_state

    return global_state


def _place(number: int, process: int) -> str:
    return f"{_PREFIX}/{number}/{process}"


def _read(number: int, process: int, seconds: float) -> str:
    try:
        return _state().client.blocking_key_value_get(_place(number, process), int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"process {process} did not answer process {index()} within {seconds:g} s") from error
