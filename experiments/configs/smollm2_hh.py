"""SmolLM2-135M becomes harmless by DR-PO: PPO from inside preferred answers (arXiv 2404.08495).

2,012 training pairs of HH harmless-base and 300 held-out ones, of those that are short enough. Three configurations for
six commands, in this order:

    nested-reft sft smollm2_hh_sft                                     SFT: a run
    nested-reft export SFT_RUN sft                                     its model, as a directory
    nested-reft reward-model smollm2_hh_reward --model.name sft        RM: a run
    nested-reft train smollm2_hh --model.name sft --reward.model RM_RUN                   DR-PO
    nested-reft train smollm2_hh --model.name sft --reward.model RM_RUN --reset.share 0   PPO, at equal updates
    nested-reft dpo smollm2_hh_reward --model.name sft --loss.beta 0.05 --optimizer.learning-rate 1e-5    DPO

Without network, --data.sources.0.folder names the folder with test.jsonl.gz.

The paper (table 5; its code where the two differ) trains Pythia-2.8B on TL;DR: batch 512, 4 epochs, learning rate 3e-6
linear to 0, gamma 1, lambda 0.95, clip 0.2, value clip 0.2, value coefficient 0.1, KL coefficient 0.05 fixed,
temperature 0.7, beta of resets 1, -1 for answers that were cut off, rewards relative to the references' mean. For HH it
gives neither numbers nor the source of the resets; here they are the preferred answers. Its figures: GPT-4 win rate
70.2 for DR-PO, 62.3 for PPO, 52.6 for DPO, 31.6 for SFT, at KL 16.8, 16.3, 37.3.
Departures: batch 64; all weights train, where the paper has LoRA of rank 1024; the critic is a head on the policy's
trunk; rewards are not whitened; rollouts are nested, and their weights truncated. `accuracy` is the share of answers
with a learned reward above that of the average preferred answer, since nothing else checks them.
Time: minutes a step on two cores; not run to its end here.
"""

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.config import DataConfig
from nested_reft.data.sources import DatasetSource
from nested_reft.dataset_reset import ResetConfig
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses import presets
from nested_reft.models.source import ModelSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.training.config import Config, TrainConfig
from nested_reft.training.optimizer import OptimizerConfig


def get_config() -> Config:
    return Config(
        name="smollm2_hh",
        model=ModelSource("smollm2-135m"),
        data=DataConfig(
            sources=(DatasetSource("hh_harmless", "hh_harmless_test", None, 300, seed=0),),
            prompts_per_batch=64,
            max_prompt_tokens=256,
            # The dialogue up to its last reply is one message of a user.
            prompt=PromptFormat("{question}"),
            too_long="drop",
        ),
        rollout=RolloutConfig(group_size=1, max_completion_tokens=128, sampling=SamplingConfig(temperature=0.7)),
        nesting=NestingConfig(skip_ratio=0.05),
        reward=RewardConfig(checker="model"),
        loss=presets.token_tis(presets.ppo("base", kl_coefficient=0.05)),
        optimizer=OptimizerConfig(learning_rate=3e-6, schedule="linear"),
        train=TrainConfig(steps=120, updates_per_batch=4, micro_batches=8, checkpoint_every=10),
        evaluation=EvaluationConfig(every_steps=20, samples_per_prompt=0, batch_size=16),
        curriculum=CurriculumConfig("uniform"),
        # References that cannot serve are those longer than a completion.
        reset=ResetConfig(share=1.0),
    )
