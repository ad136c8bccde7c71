"""Our update, as a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.ours import compilations
from experiments.benchmarks.worker import Case, Spec, serve
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.losses.presets import grpo
from nested_reft.models.lora import LoraConfig, add_lora, split_trainable
from nested_reft.models.registry import load_model
from nested_reft.models.transformer import Transformer
from nested_reft.training.optimizer import OptimizerConfig, make_optimizer
from nested_reft.training.step import (
    BaseModel,
    LearnerTask,
    TrainState,
    UpdatePlans,
    initial_train_state,
    make_update,
)
from nested_reft.types import TrainBatch

LORA = LoraConfig(rank=16, alpha=32.0)


def with_lora(model: Transformer) -> Transformer:
    """The model with adapters on every projection."""
    add_lora(model, LORA, jax.random.key(0))
    return model


VARIANTS: dict[str, Callable[[str], Transformer]] = {
    "float32": lambda directory: load_model(directory, jnp.float32)[0],
    "bfloat16 products": lambda directory: load_model(directory, jnp.float32)[0],
    "float32 LoRA": lambda directory: with_lora(load_model(directory, jnp.float32)[0]),
}
"""How the model to train is made of a directory of weights."""


def grpo_task(case: Case, compute_dtype: str = "float32") -> LearnerTask:
    """What the timed update minimises: GRPO without a reference, in one micro-batch.

    Args:
        case: its completions are as long as the task allows.
        compute_dtype: of the inputs of matrix products.
    """
    return LearnerTask(
        objective=PolicyGradient(grpo("base", reference_kl_coefficient=0.0)),
        optimizer=make_optimizer(OptimizerConfig(learning_rate=1e-6), total_steps=1000),
        temperature=1.0,
        updates_per_batch=1,
        micro_batches=1,
        remat="none",
        shared_prefix=0,
        max_completion_tokens=case.new_tokens,
        compute_dtype=compute_dtype,
    )


def initial(model: Transformer, task: LearnerTask) -> tuple[TrainState, BaseModel]:
    """What an update changes of a model and what it reads.

    Args:
        model: its trainable buffers are taken over by the first update.
        task: gives the optimizer.
    """
    graph, trainable, frozen = split_trainable(model)
    return initial_train_state(trainable, task.optimizer), BaseModel(frozen, graph)


def train_batch(case: Case, vocab_size: int) -> TrainBatch:
    """Full-length completions, half of each group right.

    Args:
        case: the shape of the batch.
        vocab_size: V, which token ids stay below.
    """
    shape = (case.prompts, case.group, case.new_tokens)
    tokens_BGC = np.asarray(case.completion_ids(vocab_size), np.int32).reshape(shape)
    return TrainBatch(
        prompt_BP=jnp.asarray(case.prompt_ids(vocab_size), jnp.int32),
        prompt_length_B=jnp.full(case.prompts, case.prompt_tokens, jnp.int32),
        tokens_BGC=jnp.asarray(tokens_BGC),
        length_BG=jnp.full(shape[:2], case.new_tokens, jnp.int32),
        forced_BG=jnp.zeros(shape[:2], jnp.int32),
        counted_BG=jnp.ones(shape[:2], bool),
        signal_BG=jnp.tile(jnp.where(jnp.arange(case.group) % 2, 1.0, -1.0), (case.prompts, 1)),
        # About -log V: random tokens would have been drawn from a nearly uniform policy.
        behavior_logprob_BGC=jnp.full(shape, -10.0, jnp.float32),
    )


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    """What makes the timed call of a case: one whole update.

    The compiled update is called as it is, and not through `Learner`, which would also copy the token weights to
    the host: the plain torch step that it is compared with has no such copy.

    Args:
        spec: names the variant and the weights.
    """

    def make_call(case: Case) -> Callable[[], Any]:
        task = grpo_task(case, "bfloat16" if spec.variant == "bfloat16 products" else "float32")
        update = make_update(task)
        # Each case has a model of its own, since the update takes over its buffers.
        state, base = initial(VARIANTS[spec.variant](spec.directory), task)
        batch = train_batch(case, spec.vocab_size)

        def call() -> None:
            nonlocal state
            state, result = update(state, base, batch, UpdatePlans())
            jax.block_until_ready(state)
            assert np.isfinite(float(result.loss))

        return call

    return make_call


if __name__ == "__main__":
    serve(prepare, compilations())
