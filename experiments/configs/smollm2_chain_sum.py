"""SmolLM2-135M-Instruct learns sums of two numbers from its own layer-skipped rollouts.

Method: Nested-ReFT (arXiv 2508.10123). Command: nested-reft train smollm2_chain_sum
Time: about ten minutes on two cores.
"""

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.config import DataConfig
from nested_reft.data.sources import TaskSource
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.models.source import ModelSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.training.config import Config, TrainConfig
from nested_reft.training.optimizer import OptimizerConfig


def chain_sum(name: str, terms: int, digits: int, train_size: int, heldout_size: int) -> TaskSource:
    """Sums and differences of `terms` numbers of `digits` digits."""
    parameters = {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}
    return TaskSource(name, "chain_sum", parameters, train_size, heldout_size, seed=1)


def get_config() -> Config:
    return Config(
        name="smollm2_chain_sum",
        model=ModelSource("smollm2-135m"),
        data=DataConfig(
            sources=(
                chain_sum("two_terms_one_digit", terms=2, digits=1, train_size=150, heldout_size=50),
                chain_sum("three_terms_two_digits", terms=3, digits=2, train_size=2000, heldout_size=32),
            ),
            prompts_per_batch=8,
            max_prompt_tokens=96,
            prompt=PromptFormat(
                "What is {expression}?",
                system="Calculate.",
                demonstrations=(("What is 3 - 8?", "3 - 8 = -5"),),
            ),
        ),
        rollout=RolloutConfig(group_size=8, max_completion_tokens=16, sampling=SamplingConfig(temperature=1.0)),
        nesting=NestingConfig(
            skip_ratio=0.034,
            choice="measured",
            divergence_file="smollm2_chain_sum_layers.json",
            divergence_temperature=0.03,
        ),
        reward=RewardConfig(),
        loss=PolicyGradientConfig(
            advantage="group_std", bias_mitigation="base", level="token", truncate_at=2.0, normalization="token_mean"
        ),
        dynamic_sampling=DynamicSamplingConfig(max_generation_batches=4),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="linear", warmup_steps=3),
        train=TrainConfig(steps=40, checkpoint_every=20),
        evaluation=EvaluationConfig(every_steps=10, samples_per_prompt=4),
        curriculum=CurriculumConfig("easy_to_hard", promote_at=0.97, window=512),
    )
