"""Trajectory balance with replay on a learned reward (TBA, arXiv 2503.18929), from `smollm2_hh`.

    nested-reft sft smollm2_hh_sft                                     SFT: a run
    nested-reft export SFT_RUN sft                                     its model, as a directory
    nested-reft reward-model smollm2_hh_reward --model.name sft        RM: a run
    nested-reft train smollm2_tba_hh --model.name sft --reward.model RM_RUN
    beside it --search.backend thread --search.searchers 3 --search.lag 3, where devices are free for searchers

Values of the paper's TL;DR runs (tables 2 to 4, appendix B): 8 prompts by 20 completions, temperature 0.7, 128 tokens,
256 steps, learning rate 3e-6 linear to 0, beta from 1 to 0.05, m = 0.5, completions of the other groups by the softmax
of their rewards, weights for the searchers every 10 steps, 100 completions a prompt, a prefill of 10,000, no clipping
of gradients.
Departures: another model and other data (Pythia-410M to 2.8B on TL;DR there), and nested rollouts. Beta is linear over
the first 32 steps; there it follows a slope for step 128 and jumps to 0.05 at step 32.
Time: not measured; it is meant for an accelerator.
"""

import dataclasses

from nested_reft.dataset_reset import ResetConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.search_config import SearchConfig


def get_config() -> Config:
    base = load_config("smollm2_hh")
    return dataclasses.replace(
        base,
        name="smollm2_tba_hh",
        data=dataclasses.replace(base.data, prompts_per_batch=8),
        rollout=dataclasses.replace(base.rollout, group_size=20),
        loss=TrajectoryBalanceConfig(beta=1.0, beta_final=0.05, beta_decay_steps=32),
        # The residual is in units of 1 / beta, so the gradient is long; Adam divides its length out.
        optimizer=dataclasses.replace(base.optimizer, max_gradient_norm=1e6),
        train=dataclasses.replace(base.train, steps=256, updates_per_batch=1, checkpoint_every=32),
        search=SearchConfig(sync_every=10),
        replay=ReplayConfig(
            capacity=200_000, recent_share=0.5, inverse_temperature=1.0, completions_per_prompt=100, prefill=10_000
        ),
        reset=ResetConfig(),
    )
