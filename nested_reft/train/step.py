"""One update, as a pure function of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from nested_reft.estimators.health import kish, off_policy_health
from nested_reft.estimators.importance import limited_weight
from nested_reft.estimators.kl import self_distillation_kl
from nested_reft.layer_skip import LayerPlan
from nested_reft.losses.config import LossConfig
from nested_reft.losses.policy_gradient import batch_log_weight, policy_gradient_loss
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import completion_logprobs, hidden_logprobs, over_position_blocks
from nested_reft.rollout.sampling import tempered
from nested_reft.types import TrainBatch, Weighted, gradient_mask, valid_mask

Metrics = dict[str, Float[Array, ""]]


@struct.dataclass
class TrainState:
    """All arrays that an update reads or writes.

    Attributes:
        trainable: parameters that change: the adapters under LoRA, else the whole model.
        frozen: parameters that do not; no gradient is computed for them.
        optimizer_state: of the trainable parameters.
        updates: number of updates so far.
        graph: the model's structure, static.
    """

    trainable: nnx.State
    frozen: nnx.State
    optimizer_state: optax.OptState
    updates: Int[Array, ""]
    graph: nnx.GraphDef = struct.field(pytree_node=False)

    @property
    def model(self) -> Transformer:
        """The model with the current parameters; shares their buffers."""
        return nnx.merge(self.graph, self.trainable, self.frozen)

    def checkpoint_arrays(self) -> dict[str, Any]:
        """What a checkpoint holds. Frozen parameters come back with the model."""
        return {"trainable": self.trainable, "optimizer_state": self.optimizer_state, "updates": self.updates}


def create_train_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """Splits the model into what trains and what does not: adapters only, where it has any."""
    has_adapters = any(name.endswith("_lora_in") for name in nnx.state(model.layers))
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam if has_adapters else nnx.Param, ...)
    return TrainState(
        trainable=trainable,
        frozen=frozen,
        optimizer_state=optimizer.init(trainable),
        updates=jnp.zeros((), jnp.int32),
        graph=graph,
    )


def make_update(
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    temperature: float,
    micro_batches: int,
    remat: bool,
    shared_prefix: int = 0,
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics, Float[Array, "B G C"]]]:
    """Compiles `update(state, batch) -> state, metrics, weights h`, zero at tokens that do not count.

    The batch is split along its prompts into `micro_batches` parts that run one after the other.
    Their loss sums and gradients are added up and divided once by the weight of the whole batch,
    so the split changes memory and nothing else. The state's buffers are donated.

    Args:
        optimizer: applied once per call.
        loss: the loss's configuration.
        temperature: that of the rollouts.
        micro_batches: divides the number of prompts.
        remat: recompute activations in the backward pass.
        shared_prefix: leading tokens that all prompts of every batch have in common.
    """

    def update(state: TrainState, batch: TrainBatch):
        """One optimizer step on the batch, in micro-batches whose sums are divided once."""
        plan, batch = batch.plan, dataclasses.replace(batch, plan=None)  # the one part without prompts to split

        def micro_loss(trainable: nnx.State, micro: TrainBatch):
            """The sum to differentiate, and with its weight what is logged."""
            model = nnx.merge(state.graph, trainable, state.frozen)
            valid_BP = valid_mask(micro.prompt_length_B, micro.prompt_BP.shape[1])
            hidden_BGCD = model.completion_hidden(
                micro.prompt_BP, valid_BP, micro.tokens_BGC, None, remat, shared_prefix
            )
            logprob_BGC, entropy_BGC = hidden_logprobs(
                model, hidden_BGCD, micro.tokens_BGC, temperature, differentiable_entropy=loss.entropy_coefficient > 0
            )
            distillation_kl_BGC = None
            if loss.self_distillation_coefficient and plan is not None:
                nested_BGCD = model.completion_hidden(
                    micro.prompt_BP, valid_BP, micro.tokens_BGC, plan, remat, shared_prefix
                )
                distillation_kl_BGC = over_position_blocks(
                    lambda *hidden: self_distillation_kl(*(tempered(model.logits(h), temperature) for h in hidden)),
                    model.config.vocab_size,
                    hidden_BGCD,
                    nested_BGCD,
                )
            total, parts = policy_gradient_loss(logprob_BGC, micro, loss, entropy_BGC, distillation_kl_BGC)
            return total.sum, (total, parts, *jax.lax.stop_gradient((logprob_BGC, entropy_BGC)))

        (total, parts, logprob_BGC, entropy_BGC), gradient = _accumulate(
            micro_loss, state.trainable, batch, micro_batches
        )
        divisor = jnp.where(total.weight == 0, jnp.inf, total.weight)  # nothing to learn from: no gradient
        gradient = jax.tree.map(lambda g: g / divisor, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.trainable)
        mask_BGC = gradient_mask(batch.length_BG, batch.forced_BG, logprob_BGC.shape[-1])
        metrics = {name: part.mean() for name, part in parts.items()}
        metrics |= off_policy_health(logprob_BGC, batch.behavior_logprob_BGC, mask_BGC)
        metrics["ess_weight"] = kish(metrics["weight_mean"], metrics.pop("weight_square_mean"))
        metrics["entropy"] = Weighted((entropy_BGC * mask_BGC).sum(), mask_BGC.sum().astype(jnp.float32)).mean()
        metrics["loss"] = total.mean()
        metrics["gradient_norm"] = optax.global_norm(gradient)
        state = dataclasses.replace(
            state,
            trainable=optax.apply_updates(state.trainable, updates),
            optimizer_state=optimizer_state,
            updates=state.updates + 1,
        )
        log_weight_BGC = batch_log_weight(logprob_BGC, mask_BGC, batch, loss)
        weight_BGC = limited_weight(log_weight_BGC, loss.truncate_at, loss.drop_below, loss.drop_above)
        return state, metrics, weight_BGC * mask_BGC

    return jax.jit(update, donate_argnums=0)


def make_supervised_update(
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, TrainBatch, LayerPlan], tuple[TrainState, Float[Array, ""]]]:
    """Compiles `update(state, batch, plan) -> state, loss`: next-token cross-entropy of the completions.

    With plans that skip layers at random this is layer dropout (LayerSkip, Elhoushi et al., 2024):
    it teaches the sub-networks to answer, so that they make better behavior policies later.
    """

    def update(state: TrainState, batch: TrainBatch, plan: LayerPlan):
        """One optimizer step on the mean over the completions' tokens."""
        mask_BGC = gradient_mask(batch.length_BG, batch.forced_BG, batch.tokens_BGC.shape[-1])

        def cross_entropy(trainable: nnx.State):
            model = nnx.merge(state.graph, trainable, state.frozen)
            logprob_BGC, _ = completion_logprobs(
                model, batch.prompt_BP, batch.prompt_length_B, batch.tokens_BGC, 1.0, plan
            )
            return Weighted(-(logprob_BGC * mask_BGC).sum(), mask_BGC.sum().astype(jnp.float32)).mean()

        loss, gradient = jax.value_and_grad(cross_entropy)(state.trainable)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return dataclasses.replace(
            state, trainable=trainable, optimizer_state=optimizer_state, updates=state.updates + 1
        ), loss

    return jax.jit(update, donate_argnums=0)


def _accumulate(micro_loss: Callable, trainable: nnx.State, batch: TrainBatch, micro_batches: int) -> tuple[Any, Any]:
    """Sums `micro_loss`'s `Weighted` results and gradients over parts of the batch; joins its arrays."""
    value_and_gradient = jax.grad(micro_loss, has_aux=True)
    if micro_batches == 1:
        gradient, aux = value_and_gradient(trainable, batch)
        return aux, gradient

    def body(carry, micro):
        gradient, (total, parts, *arrays) = value_and_gradient(trainable, micro)
        return jax.tree.map(jnp.add, carry, (gradient, total, parts)), arrays

    # Interleaved, so that every part keeps its prompts spread over the devices that share the batch.
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)
    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(lambda t, b: value_and_gradient(t, b), trainable, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][0], shapes[1][1]))
    (gradient, total, parts), arrays = jax.lax.scan(body, zeros, split)
    joined = [jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for x in arrays]
    return (total, parts, *joined), gradient
