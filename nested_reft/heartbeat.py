"""Signs of progress within long stages, which the watchdog of a run looks at.

Whoever works through many batches calls `beat` for each. The module knows nothing of runs, so that every room can.
"""

from __future__ import annotations

_beats = 0


def beat() -> None:
    """Says that something was done."""
    global _beats
    # Two threads may count one beat in the same moment. The number still changes, and nothing else is asked.
    _beats += 1


def beats() -> int:
    """How often `beat` was called, roughly; it changes with each."""
    return _beats
