"""What a reward may be, and what is raised where no completion has one."""

from __future__ import annotations

# Its square is finite in float32, with room for a sum over a batch: standard deviations are made of squares.
LARGEST_REWARD = 1e16


class RewardError(RuntimeError):
    """No completion of a step could be scored, or a reward is too large: training would learn nothing."""
