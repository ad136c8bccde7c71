"""Trajectory balance with replay (TBA, arXiv 2503.18929) on GSM8K, from `qwen_math_gsm8k`.

Searches and updates take turns here. The paper runs three searchers beside the learner: add --search.backend thread
--search.searchers 3 --search.lag 3 where devices are free for them.

Values of the paper's GSM8K runs (tables 2 to 4, appendix B): 7 prompts by 20 of 24 completions, temperature 0.7, 512
tokens, 1000 steps, learning rate 1e-5 with 50 steps of warm-up, beta 0.012 to 0.004 by step 500, m = 0.95, uniform
otherwise, 100 completions a prompt, a prefill of 500, no clipping of gradients.
Departures: another model (RhoMath-1B there), LoRA, and nested rollouts; the learning rate decays from the start (it is
constant to step 450 there); every step samples with new weights (every second one there); the store has the newest
20,000 completions.
Command: nested-reft train qwen_tba_gsm8k
Time: not measured; it is meant for an accelerator.
"""

import dataclasses

from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.optimizer import OptimizerConfig


def get_config() -> Config:
    base = load_config("qwen_math_gsm8k")
    return dataclasses.replace(
        base,
        name="qwen_tba_gsm8k",
        data=dataclasses.replace(base.data, prompts_per_batch=7),
        rollout=RolloutConfig(group_size=24, max_completion_tokens=512, sampling=SamplingConfig(temperature=0.7)),
        reward=RewardConfig(checker="math", accept_unevaluated=False, workers=8),
        loss=TrajectoryBalanceConfig(beta=0.012, beta_final=0.004, beta_decay_steps=500),
        # The residual is in units of 1 / beta, so the gradient is long; Adam divides its length out.
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="linear", warmup_steps=50, max_gradient_norm=1e6),
        train=dataclasses.replace(base.train, steps=1000, micro_batches=7, checkpoint_every=100),
        dynamic_sampling=DynamicSamplingConfig(),
        replay=ReplayConfig(capacity=20_000, recent_share=0.95, group_size=20, completions_per_prompt=100, prefill=500),
    )
