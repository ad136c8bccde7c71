"""SmolLM2-135M-Instruct on sums of six difficulties, chosen by DUMP (arXiv 2504.09710), rollouts nested.

The model, prompts and layer plans of `smollm2_chain_sum`; the curriculum finds its own way from one-digit
sums to longer ones. Command: nested-reft train smollm2_dump
Time: not measured.
"""

import dataclasses

from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.sources import TaskSource, difficulty_ladder, exactly
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.training.config import Config, load_config

LEVELS = {
    "three_terms_one_digit": exactly(terms=3, digits=1),
    "two_terms_two_digits": exactly(terms=2, digits=2),
    "four_terms_one_digit": exactly(terms=4, digits=1),
    "three_terms_two_digits": exactly(terms=3, digits=2),
    "two_terms_three_digits": exactly(terms=2, digits=3),
}


def get_config() -> Config:
    base = load_config("smollm2_chain_sum")
    # Only 200 sums of two one-digit numbers exist.
    easiest = TaskSource("two_terms_one_digit", "chain_sum", exactly(terms=2, digits=1), 136, 64, seed=1)
    harder = difficulty_ladder("chain_sum", LEVELS, train_size=1000, heldout_size=32, seed=1)
    return dataclasses.replace(
        base,
        name="smollm2_dump",
        dynamic_sampling=DynamicSamplingConfig(),  # the curriculum alone decides
        data=dataclasses.replace(base.data, sources=(easiest, *harder)),
        train=dataclasses.replace(base.train, steps=60, checkpoint_every=20),
        curriculum=CurriculumConfig("dump", window=300, temperature=0.1),
    )
