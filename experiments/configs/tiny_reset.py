"""Numbers of eight digits for a three-layer transformer that begins without a right answer (DR-PO, arXiv 2404.08495).

Only the whole number earns a reward, and after the warm start no sample has it. Rollouts that start inside the answer
find rewards near its end first. `experiments/resets.py` compares this with rollouts from the prompt alone.
Command: nested-reft train tiny_reset
Time: about a minute on two cores.
"""

import dataclasses

from nested_reft.data.sources import TaskSource, exactly
from nested_reft.dataset_reset import ResetConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.training.warm_start import WarmStartConfig


def get_config() -> Config:
    tiny = load_config("tiny")
    assert tiny.model.shape is not None
    source = TaskSource("copy_8_digits", "chain_sum", exactly(terms=1, digits=8), 3000, 128, seed=1)
    return dataclasses.replace(
        tiny,
        name="tiny_reset",
        model=dataclasses.replace(tiny.model, shape=dataclasses.replace(tiny.model.shape, num_layers=3)),
        data=dataclasses.replace(tiny.data, sources=(source,), prompts_per_batch=32),
        rollout=dataclasses.replace(tiny.rollout, max_completion_tokens=9),
        nesting=NestingConfig(),
        train=dataclasses.replace(tiny.train, steps=240),
        # The first rewards are few and much alike, and without the bonus the policy soon answers all questions alike.
        loss=dataclasses.replace(tiny.loss, entropy_coefficient=0.01),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        # Eight digits and a stop token; h is uniform on 1 to 8, and a quarter of the groups starts at the prompt.
        reset=ResetConfig(share=0.75, references="answers"),
        warm_start=WarmStartConfig(steps=26, batch_size=64, learning_rate=3e-3),
    )
