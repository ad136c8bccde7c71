"""Six sources of graded difficulty for a six-layer transformer, chosen by DUMP (arXiv 2504.09710).

`experiments/dump.py` compares it with other curricula. Command: nested-reft train tiny_dump
"""

import dataclasses

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.sources import difficulty_ladder, exactly
from nested_reft.train.config import Config, load_config

LEVELS = {
    "two_terms": exactly(terms=2, digits=1),
    "three_terms": exactly(terms=3, digits=1),
    "four_terms": exactly(terms=4, digits=1),
    "five_terms": exactly(terms=5, digits=1),
    "six_terms": exactly(terms=6, digits=1),
    "two_terms_two_digits": exactly(terms=2, digits=2),
}


def get_config() -> Config:
    tiny = load_config("tiny")
    return dataclasses.replace(
        tiny,
        name="tiny_dump",
        data=dataclasses.replace(
            tiny.data,
            sources=difficulty_ladder("chain_sum", LEVELS, train_size=2000, heldout_size=64, seed=1),
            max_prompt_tokens=32,
        ),
        loss=dataclasses.replace(tiny.loss, advantage="group_std"),
        curriculum=CurriculumConfig("dump", window=300, temperature=0.1),
    )
