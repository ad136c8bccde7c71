"""Six sources of graded difficulty for a three-layer transformer, chosen by DUMP (arXiv 2504.09710).

The warm start leaves sampled accuracies from about a third down to almost nothing; all layers act in
the rollouts, so that only the curriculum decides. `experiments/dump.py` compares it with others.
Command: nested-reft train tiny_dump
"""

import dataclasses

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.sources import difficulty_ladder, exactly
from nested_reft.layer_skip import NestingConfig
from nested_reft.train.config import Config, WarmStartConfig, load_config
from nested_reft.train.optimizer import OptimizerConfig

LEVELS = {
    "two_terms": exactly(terms=2, digits=1),
    "three_terms": exactly(terms=3, digits=1),
    "four_terms": exactly(terms=4, digits=1),
    "six_terms": exactly(terms=6, digits=1),
    "two_terms_two_digits": exactly(terms=2, digits=2),
    "three_terms_two_digits": exactly(terms=3, digits=2),
}


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
            max_prompt_tokens=32,
        ),
        rollout=dataclasses.replace(tiny.rollout, max_completion_tokens=5),
        nesting=NestingConfig(),
        loss=dataclasses.replace(tiny.loss, advantage="group_std"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=dataclasses.replace(tiny.evaluation, batch_size=64),
        curriculum=CurriculumConfig("dump", window=300, temperature=0.1),
        warm_start=WarmStartConfig(steps=400, batch_size=64, learning_rate=3e-3),
    )
