"""A reward model on 2,312 pairs of HH harmless-base: SmolLM2-135M with a scalar head (arXiv 2404.08495).

Command: nested-reft reward-model smollm2_hh_reward, with --model.name DIRECTORY for a model after SFT
The paper: batch 64, learning rate 3e-6, one epoch, from the model after SFT; held-out accuracy 66.2 % on TL;DR.
Departures: batch 16 and a learning rate of 3e-5, since there are a hundred times fewer pairs. Pairs with a prompt of
more than 128 tokens or an answer of more than 64 are left out, which leaves two of five.
Time: half a minute a step on one quiet core. With 500 held-out prompts: 0.637 of the held-out pairs ordered right
(experiments/results/reward_model.md).
"""

import dataclasses

from nested_reft.evaluation import EvaluationConfig
from nested_reft.training.config import Config, TrainConfig, load_config
from nested_reft.training.offline import as_offline
from nested_reft.training.optimizer import OptimizerConfig


def get_config() -> Config:
    config = as_offline(load_config("smollm2_hh"), "bradley_terry")
    return dataclasses.replace(
        config,
        name="smollm2_hh_reward",
        data=dataclasses.replace(config.data, prompts_per_batch=16, max_prompt_tokens=128),
        rollout=dataclasses.replace(config.rollout, max_completion_tokens=64),
        optimizer=OptimizerConfig(learning_rate=3e-5, schedule="linear", warmup_steps=5),
        train=TrainConfig(steps=50, micro_batches=2, checkpoint_every=10),
        evaluation=EvaluationConfig(every_steps=50, samples_per_prompt=0),
    )
