"""Counting compilations: recompilation is a bug, so each run and test counts them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

Heard = Callable[[str, float], None]  # takes the name of an event and its seconds


class CompileCounter:
    """Counts XLA compilations since it was made, and the seconds they took.

    Recompilation is a bug: after the first steps the count must stand still.
    """

    def __init__(self):
        self.count = 0
        self.seconds = 0.0
        listen(self._heard)

    def _heard(self, event: str, seconds: float) -> None:
        # This event stands for work of XLA; tracing has events of its own, which are not counted.
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += seconds

    def close(self) -> None:
        """Stops counting."""
        stop_listening(self._heard)


_listening: list[Heard] = []


def listen(heard: Heard) -> None:
    """Tells a function about every timed event of JAX in this process.

    Args:
        heard: what is told.
    """
    _register_once()
    _listening.append(heard)


def stop_listening(heard: Heard) -> None:
    """Ends that.

    Args:
        heard: what `listen` took.
    """
    _listening.remove(heard)


@functools.cache
def _register_once() -> None:
    # For good, because JAX 0.7 cannot take a listener away.
    jax.monitoring.register_event_duration_secs_listener(_tell)


def _tell(event: str, duration_secs: float, **_: str | int) -> None:
    for heard in tuple(_listening):  # a copy, because another thread may stop listening meanwhile
        heard(event, duration_secs)
