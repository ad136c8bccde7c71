"""Harmless and helpful answers by DR-PO at the paper's largest size: Qwen2.5-7B on HH (arXiv 2404.08495).

`hh_train.jsonl` and `hh_test.jsonl` are the unpacked files of github.com/anthropics/hh-rlhf: each row has two whole
dialogues, `chosen` and `rejected`, which are read as a prompt and its two last replies. The preferred replies serve
SFT, the reward model and the resets. The commands, in this order:

    ONCE="--data.prompts-per-batch 64 --train.updates-per-batch 1 --train.micro-batches 16"
    nested-reft sft qwen_hh $ONCE --train.steps 2512                                   SFT: a run
    nested-reft export SFT_RUN sft                                                     its model, as a directory
    nested-reft reward-model qwen_hh $ONCE --train.steps 2512 --model.name sft         RM: a run
    nested-reft train qwen_hh --model.name sft --reward.model RM_RUN                   DR-PO
    nested-reft train qwen_hh --model.name sft --reward.model RM_RUN --reset.share 0   PPO, at equal updates

The paper trains Pythia of 125M, 1B and 6.9B on HH. A figure shows DR-PO above PPO at each size. For HH it gives no
numbers, no hyper-parameters and no source of the resets, so the values are those of TL;DR (`qwen_tldr`).
Departures: as in `qwen_tldr`; the resets lead into the preferred replies, and answers have up to 128 tokens.
Time: not measured; it is meant for accelerators, and `--mesh.data` and `--mesh.tensor` spread it.
"""

import dataclasses

from nested_reft.data.sources import JsonlSource
from nested_reft.models.source import ModelSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.training.config import Config, load_config


def get_config() -> Config:
    base = load_config("qwen_tldr")
    dialogues = JsonlSource(
        "hh",
        "hh_train.jsonl",
        None,
        600,
        seed=0,
        heldout_file="hh_test.jsonl",
        question_field="prompt",
        answer_field="chosen",
    )
    return dataclasses.replace(
        base,
        name="qwen_hh",
        model=ModelSource("qwen2.5-7b", dtype="bfloat16"),
        data=dataclasses.replace(
            base.data, sources=(dialogues,), prompt=PromptFormat("{question}\n\nAssistant:", chat=False)
        ),
        rollout=dataclasses.replace(base.rollout, max_completion_tokens=128),
    )
