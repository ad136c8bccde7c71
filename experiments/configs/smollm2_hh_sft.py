"""SmolLM2-135M imitates the preferred answers of HH harmless-base: where DR-PO begins (arXiv 2404.08495).

Command: nested-reft sft smollm2_hh_sft
The paper: batch 64, learning rate 3e-6, one epoch.
Departures: a learning rate of 1e-5, since there are fewer answers.
Time: a minute or more a step on two cores; not run to its end here.
"""

import dataclasses

from nested_reft.evaluation import EvaluationConfig
from nested_reft.training.config import Config, TrainConfig, load_config
from nested_reft.training.offline import as_offline
from nested_reft.training.optimizer import OptimizerConfig


def get_config() -> Config:
    config = as_offline(load_config("smollm2_hh"), "sft")
    return dataclasses.replace(
        config,
        name="smollm2_hh_sft",
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="linear", warmup_steps=2),
        train=TrainConfig(steps=26, micro_batches=8, checkpoint_every=5),
        evaluation=EvaluationConfig(every_steps=26, samples_per_prompt=0),
    )
