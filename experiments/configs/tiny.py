"""A six-layer transformer from scratch: supervised warm start with layer dropout, then nested RL.

It learns to repeat numbers (sums of one term), which a model of 220,000 parameters can still improve at by trial; sums
it knows by heart or not at all. It does everything that the main job does, for tests, notebooks and a first look.
Command: nested-reft train tiny
Time: about two minutes on two cores.
"""

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.config import DataConfig
from nested_reft.data.sources import TaskSource
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.models.config import ModelConfig
from nested_reft.models.source import ModelSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.training.config import Config, TrainConfig
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.training.warm_start import WarmStartConfig

ALPHABET = "0123456789+-= "


def get_config() -> Config:
    parameters = {"min_terms": 1, "max_terms": 1, "min_digits": 3, "max_digits": 6}
    return Config(
        name="tiny",
        model=ModelSource(
            "scratch",
            shape=ModelConfig(
                vocab_size=16,  # the alphabet, an end token and one to spare, so that a mesh can split it
                num_layers=6,
                width=64,
                hidden_width=128,
                num_heads=4,
                num_kv_heads=2,
                head_size=16,
                max_positions=64,
            ),
            alphabet=ALPHABET,
        ),
        data=DataConfig(
            sources=(TaskSource("three_to_six_digits", "chain_sum", parameters, 3000, 128, seed=1),),
            prompts_per_batch=16,
            max_prompt_tokens=16,
            prompt=PromptFormat("{expression} =", chat=False),
        ),
        rollout=RolloutConfig(group_size=8, max_completion_tokens=8),
        nesting=NestingConfig(skip_ratio=0.2, border=1),
        reward=RewardConfig(),
        loss=PolicyGradientConfig(
            advantage="group_std", bias_mitigation="base", level="token", truncate_at=2.0, normalization="token_mean"
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="linear", warmup_steps=10),
        train=TrainConfig(steps=300, checkpoint_every=100),
        evaluation=EvaluationConfig(every_steps=25),
        curriculum=CurriculumConfig("uniform"),
        warm_start=WarmStartConfig(steps=200, batch_size=64, learning_rate=2e-3, layer_dropout=0.4),
    )
