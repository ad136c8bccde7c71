"""Qwen2.5-Math-1.5B-Instruct on GSM8K: nested rollouts (10 % of the layers, uniform), DAPO, LoRA.

Method: Nested-ReFT (arXiv 2508.10123) with DAPO's loss and sampling (arXiv 2503.14476). The data comes from its
official place, the model from the Hugging Face hub; meant for one accelerator or more, `--mesh.data` and
`--mesh.tensor` spread it. Command: nested-reft train qwen_math_gsm8k
Time: not measured; it is meant for an accelerator.
"""

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.config import DataConfig
from nested_reft.data.sources import DatasetSource
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.presets import dapo
from nested_reft.models.lora import LoraConfig
from nested_reft.models.source import ModelSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.training.config import Config, TrainConfig
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.training.presets import with_dapo

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def get_config() -> Config:
    config = Config(
        name="qwen_math_gsm8k",
        model=ModelSource("qwen2.5-math-1.5b-instruct", dtype="bfloat16"),
        data=DataConfig(
            sources=(DatasetSource("gsm8k", "gsm8k", None, 256, seed=0),),
            prompts_per_batch=32,
            max_prompt_tokens=320,
            prompt=PromptFormat("{question}", system=SYSTEM),
            too_long="drop",
        ),
        rollout=RolloutConfig(group_size=8, max_completion_tokens=768, sampling=SamplingConfig(temperature=1.0)),
        nesting=NestingConfig(skip_ratio=0.1, border=1),
        reward=RewardConfig(checker="math", accept_unevaluated=False, workers=8),
        loss=dapo("base"),
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=10),
        train=TrainConfig(steps=200, micro_batches=8, remat="full", checkpoint_every=20),
        evaluation=EvaluationConfig(every_steps=20, samples_per_prompt=4, batch_size=32),
        curriculum=CurriculumConfig("uniform"),
        lora=LoraConfig(rank=16),
    )
    return with_dapo(config, cache_tokens=192)
