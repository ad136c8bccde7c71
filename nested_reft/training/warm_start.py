"""Supervised warm start: demonstrations of question and answer, with optional layer dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from nested_reft.data.written import written_batch
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig, draw_plan, layers_in
from nested_reft.literals import check_whole
from nested_reft.losses.supervised import Supervised
from nested_reft.models.layer_loop import Remat
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.optimizer import OptimizerConfig, make_optimizer
from nested_reft.training.step import LearnerTask
from nested_reft.types import Prompts, TrainBatch

_DEMONSTRATIONS = Supervised(demonstrations=True)  # one object, so that equal tasks share a compiled update


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised training before reinforcement, on question-answer pairs.

    Attributes:
        steps: updates; 0 for none.
        batch_size: pairs per update.
        learning_rate: of AdamW, decaying to zero by a cosine.
        layer_dropout: largest share of layers skipped in an update, drawn uniformly from 0 up.
        micro_batches: parts that a batch is computed in, to save memory; the gradient is the same.
    """

    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    layer_dropout: float = 0.0
    micro_batches: int = 1

    def __post_init__(self):
        check_whole("warm_start.steps", self.steps, 0, 10**8)
        check_whole("warm_start.batch_size", self.batch_size, 1, 10**6)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"warm_start.learning_rate is {self.learning_rate}; allowed is more than 0")
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"warm_start.layer_dropout is {self.layer_dropout}; allowed is 0 <= layer_dropout < 1")
        if self.micro_batches < 1 or self.batch_size % self.micro_batches:
            raise ValueError(
                f"warm_start.micro_batches is {self.micro_batches}; it must divide warm_start.batch_size,"
                f" which is {self.batch_size}"
            )


def warm_start_task(
    config: WarmStartConfig,
    max_completion_tokens: int,
    remat: Remat,
    shared_prefix: int,
    compute_dtype: str = "float32",
) -> LearnerTask:
    """What the learner minimises in a warm start: the cross-entropy of the answers.

    Args:
        config: steps, learning rate and micro-batches.
        max_completion_tokens: C of the demonstrations.
        remat: which activations the backward pass recomputes, to save memory.
        shared_prefix: leading tokens that all training prompts have in common.
        compute_dtype: of the inputs of matrix products.
    """
    return LearnerTask(
        objective=_DEMONSTRATIONS,
        optimizer=make_optimizer(OptimizerConfig(config.learning_rate, "cosine"), config.steps),
        # Demonstrations were not sampled, so the likelihood is that of the model itself.
        temperature=1.0,
        updates_per_batch=1,
        micro_batches=config.micro_batches,
        remat=remat,
        shared_prefix=shared_prefix,
        max_completion_tokens=max_completion_tokens,
        compute_dtype=compute_dtype,
    )


def dropout_plan(key: jax.Array, config: WarmStartConfig, num_layers: int) -> LayerPlan:
    """The layers of one update: 0 to `layer_dropout` of them are skipped, uniformly in number and place.

    All these plans share a program.

    Args:
        key: PRNG key of the update.
        config: the largest share.
        num_layers: L.
    """
    # Number and place are drawn independently.
    count_key, plan_key = jax.random.split(key)
    most = layers_in(config.layer_dropout, num_layers)
    num_skipped = int(jax.random.randint(count_key, (), 0, most + 1))
    # Every layer may be left out here, also those that rollouts always keep.
    plan = draw_plan(plan_key, NestingConfig(border=0), num_layers, num_skipped=num_skipped)
    return plan.with_optional(num_layers, most)


def sources_of(batch_size: int, num_sources: int) -> Int[np.ndarray, " B"]:
    """The source of each demonstration: all sources take turns.

    Args:
        batch_size: demonstrations of the batch.
        num_sources: training sources, 1 or more.
    """
    return np.arange(batch_size) % num_sources


def demonstrations(prompts: Prompts, answers: Sequence[str], tokenizer: Tokenizer, size: int) -> TrainBatch:
    """A batch whose one completion per prompt is an answer and a stop token.

    Args:
        prompts: B prompts.
        answers: what follows each of them.
        tokenizer: turns the answers into tokens.
        size: C; longer answers would be cut, and `training.setup.prepare` refuses them.
    """
    # Every demonstration has the same weight.
    return written_batch(
        prompts, [[answer] for answer in answers], (1.0,), tokenizer.encode, tokenizer.stop_ids[0], size
    )
