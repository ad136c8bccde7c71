"""Six sources of graded difficulty for a three-layer transformer, chosen by DUMP (arXiv 2504.09710).

The warm start leaves sampled accuracies from about 0.3 down to nothing; all layers act in
the rollouts, so that only the curriculum decides. `experiments/dump.py` compares it with others.
Command: nested-reft train tiny_dump
Time: about two minutes on one core, beside other work.
"""

import dataclasses

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.sources import difficulty_ladder, exactly
from nested_reft.layer_skip import NestingConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.training.warm_start import WarmStartConfig

LEVELS = {f"copy_{digits}_digits": exactly(terms=1, digits=digits) for digits in range(3, 9)}


def get_config() -> Config:
    tiny = load_config("tiny")
    assert tiny.model.shape is not None
    return dataclasses.replace(
        tiny,
        name="tiny_dump",
        model=dataclasses.replace(tiny.model, shape=dataclasses.replace(tiny.model.shape, num_layers=3)),
        data=dataclasses.replace(
            tiny.data,
            sources=difficulty_ladder("chain_sum", LEVELS, train_size=2000, heldout_size=64, seed=1),
            max_prompt_tokens=16,
        ),
        rollout=dataclasses.replace(tiny.rollout, max_completion_tokens=9),
        nesting=NestingConfig(),
        loss=dataclasses.replace(tiny.loss, advantage="group_std"),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        evaluation=dataclasses.replace(tiny.evaluation, batch_size=64),
        curriculum=CurriculumConfig("dump", window=300, temperature=0.1),
        warm_start=WarmStartConfig(steps=90, batch_size=64, learning_rate=3e-3),
    )
