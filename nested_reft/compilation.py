"""Counting compilations: recompilation is a bug, so each run and test counts them."""

from __future__ import annotations

import jax


class CompileCounter:
    """Counts XLA compilations since it was made, and the seconds they took.

    Recompilation is a bug: after the first steps the count must stand still.
    """

    def __init__(self):
        self.count = 0
        self.seconds = 0.0
        # JAX tells listeners about every event, so this one sees the compilations of the whole process.
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        # This event stands for work of XLA; tracing has events of its own, which are not counted.
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
