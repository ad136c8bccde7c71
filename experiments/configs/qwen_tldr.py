"""Summaries of Reddit posts by DR-PO at the paper's size: Qwen2.5-3B on TL;DR (arXiv 2404.08495).

`tldr_train.jsonl` and `tldr_valid.jsonl` have a `prompt` that ends in "TL;DR:" and a person's summary as `completion`
(on the hub: trl-lib/tldr). `tldr_pairs.jsonl` has `prompt`, `chosen` and `rejected` (trl-lib/tldr-preference). The
commands, in this order:

    ONCE="--data.prompts-per-batch 64 --train.updates-per-batch 1 --train.micro-batches 16"
    ONCE="$ONCE --rollout.max-completion-tokens 128"
    PAIRS="--data.sources.0.file tldr_pairs.jsonl --data.sources.0.heldout-file None"
    PAIRS="$PAIRS --data.sources.0.answer-field chosen"
    nested-reft sft qwen_tldr $ONCE --train.steps 1828                                    SFT: a run
    nested-reft export SFT_RUN sft                                                        its model, as a directory
    nested-reft reward-model qwen_tldr $ONCE $PAIRS --train.steps 1450 --model.name sft   RM: a run
    nested-reft train qwen_tldr --model.name sft --reward.model RM_RUN                    DR-PO
    nested-reft train qwen_tldr --model.name sft --reward.model RM_RUN --reset.share 0    PPO, at equal updates

The paper (table 5; its code where the two differ): Pythia-2.8B-deduped; batch 512, 4 passes of one mini-batch, learning
rate 3e-6 linear to 0, a million episodes, gamma 1, lambda 0.95, clip 0.2, value clip 0.2, value coefficient 0.1, KL
coefficient 0.05 fixed, LoRA of rank 1024 and alpha 2048, context 512, 53 new tokens, temperature 0.7, beta of resets 1,
into the summaries that people wrote. SFT and RM: batch 64, learning rate 3e-6, one epoch.
Its figures on 600 test posts, three seeds: GPT-4 win rate against the person's summary 70.2 +- 1.7 for DR-PO, 62.3 +-
2.5 for PPO, 52.6 for DPO, 31.6 for SFT; learned reward 1.52 for DR-PO and 1.17 for PPO, at KL 16.84 and 16.32; accuracy
of the RM 66.2 %. Win rate by the share of resets 0, 0.25, 0.5, 0.75, 1 (one seed): 60.7, 61.7, 66.5, 64.3, 68.5.
Departures: another model, since GPT-NeoX is none of the supported families; the policy ends its summaries itself, and
longer references serve no reset; the critic is a head on the policy's trunk; rewards are not whitened; rollouts are
nested, and their weights truncated.
Time: not measured; it is meant for accelerators (the paper had four A6000 a run), and `--mesh.data` spreads it.
"""

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.config import DataConfig
from nested_reft.data.sources import JsonlSource
from nested_reft.dataset_reset import ResetConfig
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses import presets
from nested_reft.models.lora import LoraConfig
from nested_reft.models.source import ModelSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.training.config import Config, TrainConfig
from nested_reft.training.optimizer import OptimizerConfig


def get_config() -> Config:
    posts = JsonlSource(
        "tldr",
        "tldr_train.jsonl",
        None,
        600,
        seed=0,
        heldout_file="tldr_valid.jsonl",
        question_field="prompt",
        answer_field="completion",
    )
    return Config(
        name="qwen_tldr",
        model=ModelSource("qwen2.5-3b", dtype="bfloat16"),
        data=DataConfig(
            sources=(posts,),
            prompts_per_batch=512,
            max_prompt_tokens=512,
            prompt=PromptFormat("{question}", chat=False),
            too_long="drop",
        ),
        rollout=RolloutConfig(group_size=1, max_completion_tokens=53, sampling=SamplingConfig(temperature=0.7)),
        nesting=NestingConfig(skip_ratio=0.05),
        reward=RewardConfig(checker="model"),
        loss=presets.token_tis(presets.ppo("base", kl_coefficient=0.05)),
        optimizer=OptimizerConfig(learning_rate=3e-6, schedule="linear"),
        # 1953 batches of 512 are a million episodes.
        train=TrainConfig(steps=1953, updates_per_batch=4, micro_batches=32, remat="full", checkpoint_every=50),
        evaluation=EvaluationConfig(every_steps=100, samples_per_prompt=0, batch_size=64),
        curriculum=CurriculumConfig("uniform"),
        reset=ResetConfig(share=1.0, references="answers"),
        lora=LoraConfig(rank=1024, alpha=2048.0),
    )
