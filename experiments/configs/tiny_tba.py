"""Trajectory balance (TBA, arXiv 2503.18929) on `tiny`: nested rollouts are kept and trained on again.

Half of the groups are of the present version, and no completion is more than 20 versions old. Neither nesting nor age
is corrected by a weight, because the objective needs none.
Command: nested-reft train tiny_tba
Time: about two minutes on two cores. Greedy accuracy rises from 0.66 to 0.74, that of samples from 0.32 to 0.54.
"""

import dataclasses

from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.training.config import Config, load_config


def get_config() -> Config:
    tiny = load_config("tiny")
    return dataclasses.replace(
        tiny,
        name="tiny_tba",
        loss=TrajectoryBalanceConfig(beta=0.3),
        # The residual is in units of 1 / beta, so the gradient is long; Adam divides its length out, as in the paper.
        optimizer=dataclasses.replace(tiny.optimizer, max_gradient_norm=1e6),
        replay=ReplayConfig(capacity=20_000, recent_share=0.5, prefill=512, max_staleness=20),
    )
