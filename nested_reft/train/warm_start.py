"""Supervised warm start: question-answer pairs, with optional layer dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from nested_reft.data.pipeline import PromptStream, batch_prompts
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import make_mesh, shard_batch
from nested_reft.train.optimizer import OptimizerConfig, make_optimizer
from nested_reft.train.setup import Setup
from nested_reft.train.step import create_train_state, make_supervised_update
from nested_reft.types import Prompts, TrainBatch


def warm_start(model: Transformer, setup: Setup, key: jax.Array) -> Transformer:
    """Trains `model` to answer the training questions of all sources, and returns it.

    With layer dropout, each update runs under a plan that skips 0 to `layer_dropout` of the layers:
    drawn anew, uniformly in number and place.

    Args:
        model: its buffers are donated.
        setup: examples, tokenizer and configuration.
        key: PRNG key of the layer dropout.
    """
    config, num_layers = setup.config.warm_start, model.config.num_layers
    optimizer = make_optimizer(OptimizerConfig(config.learning_rate, "cosine"), config.steps)
    update = make_supervised_update(optimizer)
    state = create_train_state(model, optimizer)
    mesh = make_mesh(setup.config.mesh)
    stream = PromptStream(setup.train_examples, setup.config.train.seed)
    most_skipped = int(config.layer_dropout * num_layers)
    bar = tqdm(range(config.steps), desc="warm start", unit="step")
    for step in bar:
        step_key = jax.random.fold_in(key, step)
        count_key, plan_key = jax.random.split(step_key)
        num_skipped = int(jax.random.randint(count_key, (), 0, most_skipped + 1))
        plan = draw_plan(plan_key, NestingConfig(border=0), num_layers, num_skipped=num_skipped)
        sources = [i % len(setup.train_examples) for i in range(config.batch_size)]
        prompts = batch_prompts([stream.next(source) for source in sources], sources, setup.prompt_size)
        state, loss = update(state, shard_batch(_answers_as_completions(prompts, setup), mesh), plan)
        if step % 20 == 0 or step + 1 == config.steps:
            bar.set_postfix_str(f"loss {float(loss):.3f}")
    return state.model


def _answers_as_completions(prompts: Prompts, setup: Setup) -> TrainBatch:
    """A batch whose one completion per prompt is the gold answer and a stop token."""
    tokenizer, size = setup.tokenizer, setup.config.rollout.max_completion_tokens
    tokens_BGC = np.zeros((len(prompts), 1, size), np.int32)
    length_BG = np.zeros((len(prompts), 1), np.int32)
    for row, answer in enumerate(prompts.answers):
        ids = [*tokenizer.encode(answer), tokenizer.stop_ids[0]][:size]
        tokens_BGC[row, 0, : len(ids)], length_BG[row, 0] = ids, len(ids)
    return TrainBatch(
        prompt_BP=jnp.asarray(prompts.tokens_BP),
        prompt_length_B=jnp.asarray(prompts.length_B),
        tokens_BGC=jnp.asarray(tokens_BGC),
        length_BG=jnp.asarray(length_BG),
        forced_BG=jnp.zeros(length_BG.shape, jnp.int32),
        behavior_logprob_BGC=jnp.zeros(tokens_BGC.shape),
        advantage_BG=jnp.zeros(length_BG.shape),
    )
