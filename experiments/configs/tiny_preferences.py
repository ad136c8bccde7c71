"""A synthetic preference task with a hidden gold rule: reward model, then DR-PO against it (arXiv 2404.08495).

Gold likes sevens up to three of them; the reward model, which hardly saw more, likes all of them. So its reward can be
over-optimised, and the gold reward shows it. `experiments/drpo.py` compares shares of resets.
Command: nested-reft reward-model tiny_preferences
    then nested-reft train tiny_preferences --reward.model RUN, with RUN the directory that the first one names
    beside it nested-reft dpo tiny_preferences and nested-reft sft tiny_preferences
Time: about two minutes on two cores for both.
"""

import dataclasses

from nested_reft.data.sources import JsonlSource
from nested_reft.dataset_reset import ResetConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses import presets
from nested_reft.prompt_format import PromptFormat
from nested_reft.rewards.reward import RewardConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.training.warm_start import WarmStartConfig


def get_config() -> Config:
    tiny = load_config("tiny")
    assert tiny.model.shape is not None
    # The held-out size is a number of pairs; all pairs of their prompts leave the training part.
    source = JsonlSource(
        "sevens",
        "tiny_preferences.jsonl",
        None,
        128,
        seed=0,
        question_field="prompt",
        answer_field="chosen",
        prompt=PromptFormat("{question}", chat=False),
    )
    return dataclasses.replace(
        tiny,
        name="tiny_preferences",
        model=dataclasses.replace(tiny.model, shape=dataclasses.replace(tiny.model.shape, num_layers=3)),
        data=dataclasses.replace(tiny.data, sources=(source,), prompts_per_batch=32, max_prompt_tokens=8),
        rollout=dataclasses.replace(tiny.rollout, group_size=4, max_completion_tokens=16),
        nesting=NestingConfig(),
        # The function is the gold rule: it is logged beside the learned reward, and has no weight.
        reward=RewardConfig(checker="function", function="_tiny_preferences.py:gold", function_weight=0.0),
        loss=presets.ppo("base", kl_coefficient=0.01),
        train=dataclasses.replace(tiny.train, steps=120),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear"),
        # PPO compares with no group, so each completion has a start of its own, as in the paper.
        reset=ResetConfig(share=0.5, references="answers", per="completion"),
        warm_start=WarmStartConfig(steps=150, batch_size=64, learning_rate=3e-3),
    )
