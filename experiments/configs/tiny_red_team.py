"""Red-teaming in miniature (TBA, arXiv 2503.18929): an attacker from scratch finds what makes a victim tell its secret.

The victim is a frozen transformer of two layers with a planted weakness, in `_red_team_victim.py` beside this file.
`harm` there is an ordinary reward function: the victim reads the completion, and its reply is scored. The paper's
beta is 0.05, and its buffer keeps the newest 100,000 attacks. This one keeps 40,000, which are 5,000 for each of eight
prompts. Sampling by reward is the half of the groups that is not recent. `experiments/red_team.py` reports reward and
diversity of the attacks together.
Command: nested-reft train tiny_red_team
Time: about two minutes on two cores. 96 of 100 attacks succeed then.
"""

import dataclasses

from nested_reft.data.sources import TaskSource
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.training.warm_start import WarmStartConfig


def get_config() -> Config:
    tiny = load_config("tiny")
    # The digit that attacks are asked for stands for the instructions of an attacker; nothing depends on it.
    parameters = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
    return dataclasses.replace(
        tiny,
        name="tiny_red_team",
        data=dataclasses.replace(tiny.data, sources=(TaskSource("digit", "chain_sum", parameters, 8, 2, seed=1),)),
        rollout=dataclasses.replace(tiny.rollout, max_completion_tokens=9),  # eight, and the one that stops
        # One worker, since each trains a victim of its own; JAX needs more address space than other functions do.
        reward=RewardConfig(
            "function", function="_red_team_victim.py:harm", workers=1, time_limit_seconds=120.0, memory_gib=0.0
        ),
        loss=TrajectoryBalanceConfig(beta=0.05),
        # The residual is in units of 1 / beta, so the gradient is long; Adam divides its length out.
        optimizer=OptimizerConfig(learning_rate=1e-3, max_gradient_norm=1e6),
        replay=ReplayConfig(
            capacity=40_000,
            recent_share=0.5,
            inverse_temperature=4.0,
            completions_per_prompt=5000,
            prefill=512,
            max_staleness=50,
        ),
        warm_start=WarmStartConfig(),
        train=dataclasses.replace(tiny.train, steps=100, checkpoint_every=50),
    )
