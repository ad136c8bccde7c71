"""What an update holds at its peak, predicted before it compiles, from the arrays that its backward pass keeps."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nested_reft.models.layer_loop import Remat
from nested_reft.models.lora import split_trainable
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import block_positions, hidden_logprobs
from nested_reft.training.step import BaseModel, LearnerTask


def update_working_bytes(
    model: Transformer, task: LearnerTask, prompts: int, group: int, prompt_tokens: int
) -> dict[str, float]:
    """Bytes that an update takes beside weights, moments and gradients, on all devices together.

    The passes are traced, not compiled. The peak is what the forward pass keeps, plus the largest of three: logits and
    their gradients; one layer's arrays; the optimizer's copies of the gradient, as far as they are larger than what was
    kept. The objective's own arrays have one number for each token and do not count.

    Args:
        model: what trains; its arrays may be shapes only.
        task: micro-batches, rematerialisation, the longest completion and what the objective needs.
        prompts: of a micro-batch.
        group: completions of each.
        prompt_tokens: P.

    Returns:
        What holds memory -> bytes: `activations`, which are kept, and `backward`, which comes on top of them.
    """
    kept = _kept_bytes(model, task, task.remat, prompts, group, prompt_tokens)
    # With nothing recomputed, the arrays of all layers are kept, and each has as many.
    every_layer = kept if task.remat == "none" else _kept_bytes(model, task, "none", prompts, group, prompt_tokens)
    size = task.max_completion_tokens
    positions = block_positions(prompts, group, size, model.config.vocab_size)
    logits = 4.0 * prompts * group * positions * model.config.vocab_size
    # Exponentials of all positions are among what is kept; those of a block are made again.
    kept_logits = logits if positions == size else 0.0
    gradient = _bytes(split_trainable(model)[1])
    # Logits, their exponentials and their gradient. The gradients of the layers come later, in the place of these.
    head = 3 * logits - kept_logits - gradient
    layer = (every_layer - kept_logits) / model.config.num_layers
    activations = kept * (2 if task.needs.self_distillation else 1)
    # The optimizer holds the gradient of the sum, that of the mean and the step, when the activations are gone.
    optimizer = 2 * gradient - activations
    return {"activations": activations, "backward": max(head, layer - kept_logits, optimizer, 0.0)}


def _kept_bytes(
    model: Transformer, task: LearnerTask, remat: Remat, prompts: int, group: int, prompt_tokens: int
) -> float:
    """Of the arrays that the forward pass keeps for the backward pass, the model's own left out."""
    graph, trainable, frozen = split_trainable(model)
    base, needs = BaseModel(frozen, graph), task.needs
    rows = jax.ShapeDtypeStruct((prompts, group, task.max_completion_tokens), jnp.int32)
    prompt = jax.ShapeDtypeStruct((prompts, prompt_tokens), jnp.int32)

    def backward(trainable: nnx.State, prompt_BP: Any, tokens_BGC: Any) -> Any:
        def logprobs(trainable: nnx.State) -> Any:
            model = base.with_parameters(trainable, task.compute_dtype)
            valid_BP = jnp.ones(prompt_BP.shape, bool)
            hidden = model.completion_hidden(prompt_BP, valid_BP, tokens_BGC, None, remat, task.shared_prefix)
            return hidden_logprobs(model, hidden, tokens_BGC, task.temperature, needs.entropy_gradient)

        return jax.vjp(logprobs, trainable)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, trainable, prompt, rows))
    own = {leaf.shape for leaf in jax.tree.leaves((trainable, frozen))}
    return _bytes([leaf for leaf in kept if leaf.shape not in own])


def _bytes(tree: Any) -> float:
    return float(sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))
