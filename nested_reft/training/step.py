"""One update, as a pure function of state and batch: the same for every objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from nested_reft.estimators.health import Health, off_policy_health
from nested_reft.estimators.kl import self_distillation_kl
from nested_reft.estimators.rejection import keeping_bounds
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses.objective import LossOutput, Needs, Objective, TargetPass
from nested_reft.models.layer_loop import Remat
from nested_reft.models.placement import keep_split
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import hidden_logprobs, over_position_blocks
from nested_reft.rollout.sampling import tempered
from nested_reft.types import TrainBatch, Weighted, valid_mask


@dataclass(frozen=True)
class LearnerTask:
    """What the learner is asked to minimise in one phase, and how.

    Attributes:
        objective: the loss.
        optimizer: applied once per update.
        temperature: at which log-probabilities are taken; that of the rollouts, or 1 for demonstrations.
        updates_per_batch: updates that each batch gets in all. From the second on the target has moved, and the
            log-probabilities of the full model at rollout time are scored first.
        micro_batches: parts that an update is computed in.
        remat: which activations the backward pass recomputes.
        shared_prefix: leading tokens that all prompts of every batch have in common.
        max_completion_tokens: C, the longest completion of a batch.
        compute_dtype: of the inputs of matrix products in every pass over a batch; they are summed in float32.
        mini_batches: disjoint parts of a batch that get an update each.
        full_support: whether rollouts were drawn from whole distributions. Where top-k or top-p cut them, ratios to the
            behavior policy would tell of what was cut off, so nothing is measured by them.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    temperature: float
    updates_per_batch: int
    micro_batches: int
    remat: Remat
    shared_prefix: int
    max_completion_tokens: int
    compute_dtype: str = "float32"
    mini_batches: int = 1
    full_support: bool = True

    @property
    def needs(self) -> Needs:
        """What the objective reads beside the target's own log-probabilities."""
        return self.objective.needs(self.updates_per_batch)


@struct.dataclass
class TrainState:
    """The arrays that an update changes; its buffers are donated to the next state.

    Attributes:
        trainable: parameters that change: the adapters under LoRA, else the whole model.
        optimizer_state: of the trainable parameters.
        updates: number of updates so far.
    """

    trainable: nnx.State
    optimizer_state: optax.OptState
    updates: Int[Array, ""]


@struct.dataclass
class BaseModel:
    """What an update reads of the model and never changes.

    Attributes:
        frozen: parameters that do not train; no gradient is computed for them.
        graph: the model's structure, static.
    """

    frozen: nnx.State
    graph: nnx.GraphDef = struct.field(pytree_node=False)

    def with_parameters(self, trainable: nnx.State, compute_dtype: str = "float32") -> Transformer:
        """The model with these parameters; shares their buffers.

        Args:
            trainable: the parameters that change.
            compute_dtype: "bfloat16" rounds float32 matrices in each product that reads them.
        """
        model = nnx.merge(self.graph, trainable, self.frozen)
        # A matrix that is stored in fewer bits is never widened.
        model.compute_dtype = jnp.bfloat16 if compute_dtype == "bfloat16" else None
        return model


@struct.dataclass
class UpdatePlans:
    """The layers that an update's passes run.

    Attributes:
        target: of the pass that is trained; None is the full model. With plans that skip layers at
            random this is layer dropout (LayerSkip, Elhoushi et al., 2024).
        nested: of the nested pass that self-distillation compares with; None without it.
    """

    target: LayerPlan | None = None
    nested: LayerPlan | None = None


@struct.dataclass
class UpdateResult:
    """What an update found, still on the devices.

    Attributes:
        rejected: whether a mask left no token any weight, so that the state did not change.
        nonfinite: whether the loss or the norm of its gradient was not finite, so that the state did not change.
        loss: the mean that was minimised.
        gradient_norm: global norm of its gradient, before clipping.
        parts: the objective's parts by name, each divided by its own weight.
        health: how far off-policy the completions were; None for demonstrations and truncated sampling.
        entropy: mean entropy of the target's next-token distributions, in nats; None for demonstrations.
        weight_BGC: the weight of each token's gradient, zero at tokens that do not count.
        bounds: of masks that would keep most of the completions, as `keeping_bounds` says; None where health is.
    """

    rejected: Bool[Array, ""]
    nonfinite: Bool[Array, ""]
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    health: Health | None
    entropy: Float[Array, ""] | None
    weight_BGC: Float[Array, "B G C"]
    bounds: dict[str, Float[Array, "4"]] | None


UpdateFunction = Callable[[TrainState, BaseModel, TrainBatch, UpdatePlans], tuple[TrainState, UpdateResult]]


# Runs of equal tasks in one process share the compiled program: resumed ones, seeds, tests.
@functools.lru_cache(maxsize=8)
def make_update(task: LearnerTask) -> UpdateFunction:
    """Compiles `update(state, base, batch, plans) -> state, result`.

    The batch is split along its prompts into micro-batches that run one after the other. Their loss
    sums and gradients are added up and divided once by the weight of the whole batch, so the split
    changes memory and nothing else. The state's buffers are donated.

    An update whose loss or gradient is not finite changes nothing: parameters, optimizer state and the number of
    updates stay as they are, bit for bit. So it is with one whose tokens were all rejected.

    Args:
        task: objective, optimizer, temperature and the split.

    Returns:
        The compiled function. It takes the buffers of its `state`; its result is of the parameters before the step.
    """
    needs = task.needs

    def update(state: TrainState, base: BaseModel, batch: TrainBatch, plans: UpdatePlans):
        """One optimizer step on the batch, in micro-batches whose sums are divided once."""

        def micro_loss(trainable: nnx.State, micro: TrainBatch):
            """The sums to differentiate, and what is kept of the pass."""
            target = _target_pass(base.with_parameters(trainable, task.compute_dtype), micro, plans, task)
            output = task.objective.loss(target, micro)
            # The sums are differentiated, and the division comes after all micro-batches have been added.
            sums = tuple(part.sum for part in output.sums)
            return sums, (output, *jax.lax.stop_gradient((target.logprob_BGC, target.entropy_BGC)))

        (output, logprob_BGC, entropy_BGC), gradients = _accumulate(
            micro_loss, state.trainable, batch, task.micro_batches
        )
        gradients = [keep_split(gradient) for gradient in gradients]
        # W has no gradient, so the gradient of a mean is that of its sum, divided by W.
        means = [_divided(gradient, part.weight) for gradient, part in zip(gradients, output.sums, strict=True)]
        gradient = functools.reduce(partial(jax.tree.map, jnp.add), means)
        updates, optimizer_state = task.optimizer.update(gradient, state.optimizer_state, state.trainable)
        mask_BGC = batch.mask_BGC
        health, entropy, bounds = None, None, None
        if needs.off_policy:
            entropy = Weighted((entropy_BGC * mask_BGC).sum(), mask_BGC.sum().astype(jnp.float32)).mean()
        if needs.off_policy and task.full_support:
            assert batch.behavior_logprob_BGC is not None
            # Health is of the whole batch: effective sample sizes of micro-batches could not be added up.
            health = off_policy_health(logprob_BGC, batch.behavior_logprob_BGC, mask_BGC)
            # It sorts, which took 6 ms of a CPU for 64 completions of 512 tokens: 0.06 % of an update of `tiny`.
            bounds = keeping_bounds(logprob_BGC, batch.behavior_logprob_BGC, mask_BGC)
        if not task.full_support:
            # It weighs by the ratio to the behavior policy.
            output.parts.pop("completion_kl", None)
        rejected = ~jnp.any(output.weight_BGC != 0) if needs.may_reject else jnp.asarray(False)
        # The optimizer clips its own copy, so this norm still shows what would have been too large.
        loss, gradient_norm = output.mean(), optax.global_norm(gradient)
        # One value that is not finite makes the norm so, and one step along it would spoil the model for good.
        nonfinite = ~(jnp.isfinite(loss) & jnp.isfinite(gradient_norm))
        result = UpdateResult(
            rejected=rejected,
            nonfinite=nonfinite,
            loss=loss,
            gradient_norm=gradient_norm,
            parts=task.objective.metrics({name: part.mean() for name, part in output.parts.items()}),
            health=health,
            entropy=entropy,
            weight_BGC=output.weight_BGC,
            bounds=bounds,
        )
        trainable: Any = optax.apply_updates(state.trainable, updates)
        new = TrainState(trainable, optimizer_state, state.updates + 1)
        # A gradient of zero would still move the parameters by the momentum of earlier updates, and penalties would
        # pull them. Elementwise, this choice is part of the optimizer's own pass over the arrays.
        left_out = rejected | nonfinite
        new = jax.tree.map(lambda before, after: jnp.where(left_out, before, after), state, new)
        return keep_split(new), result

    # Parameters and moments are updated in place, which saves a second copy of both.
    return jax.jit(update, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_loss(task: LearnerTask) -> Callable[[nnx.State, BaseModel, TrainBatch], LossOutput]:
    """Compiles the loss of a batch without a gradient: what held-out data are measured by.

    Args:
        task: objective and temperature; the batch runs whole.

    Returns:
        A function of trainable parameters, the rest of the model, and a batch.
    """

    def loss(trainable: nnx.State, base: BaseModel, batch: TrainBatch) -> LossOutput:
        model = base.with_parameters(trainable, task.compute_dtype)
        return task.objective.loss(_target_pass(model, batch, UpdatePlans(), task), batch)

    return jax.jit(loss)


def _target_pass(model: Transformer, micro: TrainBatch, plans: UpdatePlans, task: LearnerTask) -> TargetPass:
    """Log-probabilities and entropies of the completions, the prompts run once per group."""
    needs, temperature = task.needs, task.temperature
    valid_BP = valid_mask(micro.prompt_length_B, micro.prompt_BP.shape[1])
    # The prompt of a packed row is what all prompts share, so it has no tokens of its own to run apart from that.
    shared_prefix = task.shared_prefix if micro.segment_BGC is None else 0

    def hidden(plan: LayerPlan | None) -> Array:
        return model.completion_hidden(
            micro.prompt_BP, valid_BP, micro.tokens_BGC, plan, task.remat, shared_prefix, micro.segment_BGC
        )

    # Hidden states are kept and logits are not: those are larger by the factor V / D, and come in blocks.
    hidden_BGCD = hidden(plans.target)
    logprob_BGC, entropy_BGC = hidden_logprobs(
        model, hidden_BGCD, micro.tokens_BGC, temperature, differentiable_entropy=needs.entropy_gradient
    )
    distillation_kl_BGC = None
    if needs.self_distillation and plans.nested is not None:
        # Both distributions are needed whole here, so they are made block by block too.
        distillation_kl_BGC = over_position_blocks(
            lambda *hidden: self_distillation_kl(*(tempered(model.logits(h), temperature) for h in hidden)),
            model.config.vocab_size,
            hidden_BGCD,
            hidden(plans.nested),
        )
    value_BGC = model.values(hidden_BGCD) if needs.values else None
    return TargetPass(logprob_BGC, entropy_BGC, distillation_kl_BGC, value_BGC)


def _divided(gradient: nnx.State, weight: Array) -> nnx.State:
    """The gradient of a mean from that of its sum; zero where nothing was summed."""
    divisor = jnp.where(weight == 0, jnp.inf, weight)
    return jax.tree.map(lambda g: g / divisor, gradient)


def _accumulate(
    micro_loss: Callable, trainable: nnx.State, batch: TrainBatch, micro_batches: int
) -> tuple[Any, list[nnx.State]]:
    """Sums `micro_loss`'s `Weighted` results and the gradient of each of its sums over parts of the batch; joins its
    arrays."""

    def gradients_and_rest(trainable: nnx.State, micro: TrainBatch) -> tuple[list[nnx.State], Any]:
        sums, backward, rest = jax.vjp(lambda trainable: micro_loss(trainable, micro), trainable, has_aux=True)
        # Each sum takes a backward pass of its own: what it is divided by is not known before the last part.
        rows = np.eye(len(sums), dtype=np.float32)
        return [backward(tuple(row))[0] for row in rows], rest

    # A scan over one part would only cost compile time.
    if micro_batches == 1:
        gradients, aux = gradients_and_rest(trainable, batch)
        return aux, gradients

    def sums_and_arrays(micro: TrainBatch) -> tuple[Any, Any]:
        gradients, (output, *arrays) = gradients_and_rest(trainable, micro)
        # Sums are added up in the carry, while arrays of single tokens are stacked.
        return (gradients, output.total, output.parts, output.penalty), (output.weight_BGC, *arrays)

    def body(carry, micro):
        sums, arrays = sums_and_arrays(micro)
        return jax.tree.map(jnp.add, carry, sums), arrays

    # Interleaved, so that every part keeps its prompts spread over the devices that share the batch.
    split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)
    first = jax.tree.map(lambda x: x[0], split)
    # The carry starts at zeros, whose shapes follow from one part without computing it.
    shapes = jax.eval_shape(lambda part: sums_and_arrays(part)[0], first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (gradients, total, parts, penalty), arrays = jax.lax.scan(body, zeros, split)
    # The inverse of the interleaving above puts the rows back into their order.
    weight_BGC, *joined = (jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for x in arrays)
    return (LossOutput(total, parts, weight_BGC, penalty), *joined), gradients


def initial_train_state(trainable: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update.

    Args:
        trainable: parameters that change; they keep their buffers until that update takes them.
        optimizer: makes moments of the same shapes and placement.
    """
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
