"""SmolLM2-135M-Instruct learns to add up step by step from its own layer-skipped rollouts: the main job.

Method: Nested-ReFT (arXiv 2508.10123). Command: nested-reft train smollm2_step_sum
Time: about ten minutes on two cores.
"""

from nested_reft.bridging import BridgeConfig
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


def step_sum(name: str, terms: int, heldout_size: int) -> TaskSource:
    """Sums of `terms` numbers from 0 to 10."""
    # Parentheses would bring minus signs along, and a partial sum below zero is another task.
    parameters = {
        "min_terms": terms,
        "max_terms": terms,
        "min_digits": 1,
        "max_digits": 1,
        "operators": "+",
        "allow_parentheses": 0,
    }
    return TaskSource(name, "basic_arithmetic", parameters, train_size=1000, heldout_size=heldout_size, seed=1)


def demonstration(*numbers: int) -> tuple[str, str]:
    """A question and its answer, one addition at a time: "3 + 4 = 7, 7 + 2 = 9"."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    return f"What is {' + '.join(map(str, numbers))}?", ", ".join(steps)


def get_config() -> Config:
    return Config(
        name="smollm2_step_sum",
        model=ModelSource("smollm2-135m"),
        data=DataConfig(
            sources=(step_sum("four_terms", terms=4, heldout_size=128),),
            prompts_per_batch=4,
            max_prompt_tokens=280,
            prompt=PromptFormat(
                "What is {expression}?",
                system="Calculate.",
                demonstrations=(
                    demonstration(3, 4, 2, 5),
                    demonstration(8, 1, 6, 7),
                    demonstration(9, 9, 4, 0),
                    demonstration(2, 10, 7, 3),
                ),
            ),
        ),
        rollout=RolloutConfig(
            group_size=8, max_completion_tokens=44, sampling=SamplingConfig(temperature=1.0), weights="bfloat16"
        ),
        # Four runs of neighbours, which were cheap to bridge on sums; `experiments.bridges` measures all layers.
        nesting=NestingConfig(
            choice="fixed",
            layers=(3, 4, 5, 6, 7, 12, 15, 27, 28),
            bridge=BridgeConfig("per_run", ridge=0.03, tokens=4000, refit_every=12),
        ),
        reward=RewardConfig(),
        loss=PolicyGradientConfig(
            advantage="group_std", bias_mitigation="base", level="token", truncate_at=2.0, normalization="token_mean"
        ),
        dynamic_sampling=DynamicSamplingConfig(max_generation_batches=4),
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule="linear", warmup_steps=3),
        # On a processor without bfloat16 products it only costs time: use float32 there.
        train=TrainConfig(steps=32, checkpoint_every=16, compute_dtype="bfloat16"),
        evaluation=EvaluationConfig(every_steps=16, samples_per_prompt=2, pass_k=2),
        curriculum=CurriculumConfig("uniform"),
    )
