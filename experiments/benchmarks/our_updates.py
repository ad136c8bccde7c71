"""Our update, as a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.ours import compilations
from experiments.benchmarks.worker import Case, Spec, serve
from nested_reft.losses.presets import grpo
from nested_reft.models.lora import LoraConfig, add_lora
from nested_reft.models.registry import load_model
from nested_reft.models.transformer import Transformer
from nested_reft.training.optimizer import OptimizerConfig, make_optimizer
from nested_reft.training.step import create_train_state, make_update
from nested_reft.types import TrainBatch

LORA = LoraConfig(rank=16, alpha=32.0)


def with_lora(model: Transformer) -> Transformer:
    """The model with adapters on every projection."""
    add_lora(model, LORA, jax.random.key(0))
    return model


VARIANTS: dict[str, Callable[[str], Transformer]] = {
    "float32": lambda directory: load_model(directory, jnp.float32)[0],
    "float32 LoRA": lambda directory: with_lora(load_model(directory, jnp.float32)[0]),
}
"""How the model to train is made of a directory of weights."""


def grpo_update() -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer and the update that are timed."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), total_steps=1000)
    loss = grpo("base", reference_kl_coefficient=0.0)
    return optimizer, make_update(optimizer, loss, temperature=1.0, micro_batches=1, remat=False)


def train_batch(case: Case, vocab_size: int) -> TrainBatch:
    """Full-length completions, half of each group right."""
    shape = (case.prompts, case.group, case.new_tokens)
    tokens_BGC = np.asarray(case.completion_ids(vocab_size), np.int32).reshape(shape)
    return TrainBatch(
        prompt_BP=jnp.asarray(case.prompt_ids(vocab_size), jnp.int32),
        prompt_length_B=jnp.full(case.prompts, case.prompt_tokens, jnp.int32),
        tokens_BGC=jnp.asarray(tokens_BGC),
        length_BG=jnp.full(shape[:2], case.new_tokens, jnp.int32),
        forced_BG=jnp.zeros(shape[:2], jnp.int32),
        behavior_logprob_BGC=jnp.full(shape, -10.0, jnp.float32),
        advantage_BG=jnp.tile(jnp.where(jnp.arange(case.group) % 2, 1.0, -1.0), (case.prompts, 1)),
    )


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    def make_call(case: Case) -> Callable[[], Any]:
        optimizer, update = grpo_update()
        state = create_train_state(VARIANTS[spec.variant](spec.directory), optimizer)
        batch = train_batch(case, spec.vocab_size)

        def call() -> None:
            nonlocal state
            state, metrics, _ = update(state, batch)
            jax.block_until_ready(state)
            assert np.isfinite(float(metrics["loss"]))

        return call

    return make_call


if __name__ == "__main__":
    serve(prepare, compilations())
