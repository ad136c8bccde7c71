"""The one loop over layers: residual streams through the steps of a plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nested_reft.backends import where_cpu
from nested_reft.layer_plan import LayerPlan, Part, cache_slots, cached_steps
from nested_reft.models.blocked_attention import SAVED
from nested_reft.models.bridges import add_bridge
from nested_reft.models.config import ModelConfig
from nested_reft.models.layer import add_mlp, as_operand
from nested_reft.models.parameters import Parameters, axes_of
from nested_reft.sharding import constrain, constrain_used, shares

Streams = tuple[Array, ...]
Carry = tuple[Streams, Any]
Attention = Callable[[Streams, Any, Parameters, Array], tuple[Streams, Any, Any]]

Remat = Literal["none", "dots", "full"]
"""What the backward pass computes again in each layer: nothing, all but products with weights and the output of long
attention, or everything after the layer's input."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model as the loop reads them.

    Attributes:
        config: of the model.
        stack: parameters of all layers by name, each with a leading axis `L`.
        bridges: the same of their bridges; None without.
        lora_scale: one number for all layers.
        unrolled: layers per iteration of the compiled loop.
        compute_dtype: of the inputs of matrix products; None takes that of the matrices.
    """

    config: ModelConfig
    stack: Parameters
    bridges: Parameters | None
    lora_scale: float
    unrolled: int
    compute_dtype: Any = None

    def at(self, index: Int[Array, ""]) -> Parameters:
        """One layer as the functions of `models.layer` take it."""
        return self.ready(entry(self.stack, index))

    def ready(self, layer: Parameters) -> Parameters:
        """One layer's entry of the stack as the functions of `models.layer` take it."""
        # These are the same for all layers, so they are no part of what is sliced.
        return _as_used("layers", layer) | {"lora_scale": self.lora_scale, "compute_dtype": self.compute_dtype}


def _as_used(stack: str, arrays: Parameters) -> Parameters:
    """An entry of a stack whose matrices are whole in their width, whichever way they are stored."""
    return {name: constrain_used(value, axes_of(f"{stack}/{name}")[1:]) for name, value in arrays.items()}


@dataclass(frozen=True)
class LayerLoop:
    """One forward pass through some layers.

    Attributes:
        layers: of the model.
        attention: `(streams, state, layer parameters, slot) -> (streams, state, keys and values or None)`: what the
            pass does in the attention of a layer. `state` is what it carries from layer to layer beside the streams.
        is_first: for each stream, True at the first positions of sequences; None where it has none.
        remat: what the backward pass recomputes in each step.
        mlp_waits: read a layer's MLP only when its attention begins; see `_known_after`.
        slots_by_layer: number slots by layer, as full-model caches are, and not by place among the steps with caches.
    """

    layers: Layers
    attention: Attention
    is_first: tuple[Array | None, ...] = (None,)
    remat: Remat = "none"
    mlp_waits: bool = False
    slots_by_layer: bool = False

    def run(self, streams: Streams, state: Any, plan: LayerPlan | None) -> tuple[Streams, Any, Any]:
        """The streams and the state after the last step, and what attention returned, stacked over its steps.

        Args:
            streams: before the first step.
            state: as `attention` takes it.
            plan: None is the full model.
        """
        return self._all_layers((streams, state)) if plan is None else self._steps((streams, state), plan)

    def _all_layers(self, carry: Carry) -> tuple[Streams, Any, Any]:
        """The stack itself is scanned, so that its gradient comes out layer by layer; the arithmetic is the same."""
        layers = self.layers

        def step(carry: Carry, xs: Any) -> tuple[Carry, Any]:
            layer, slot = xs
            layer = layers.ready(layer)
            streams, state, new = self.attention(*carry, layer, slot)
            return (self._mlp(streams, layer), state), new

        return self._scanned(step, carry, (layers.stack, jnp.arange(layers.config.num_layers)))

    def _steps(self, carry: Carry, plan: LayerPlan) -> tuple[Streams, Any, Any]:
        # Only kinds that occur are compiled, so a plan of whole layers has no choice to make.
        kinds = {
            Part.SKIP: self._skip,
            Part.KEEP: self._keep,
            Part.BRIDGE: self._bridge,
            Part.NO_ATTENTION: self._no_attention,
            Part.NO_MLP: self._no_mlp,
        }
        branches = [kinds[part] for part in plan.shape.parts]
        if len(branches) == 1:
            branch_S = jnp.zeros_like(plan.part_S)
        else:
            branch_S = sum(number * (plan.part_S == part) for number, part in enumerate(plan.shape.parts))

        def step(carry: Carry, xs: Any) -> tuple[Carry, Any]:
            branch, index, slot = xs
            if len(branches) == 1:
                return branches[0](carry, index, slot)
            return jax.lax.switch(branch, branches, carry, index, slot)

        slot_S = plan.layer_S if self.slots_by_layer else cache_slots(plan)
        streams, state, new = self._scanned(step, carry, (branch_S, plan.layer_S, slot_S))
        if plan.shape.cached < plan.shape.steps:
            cached_A = cached_steps(plan)
            new = jax.tree.map(lambda rows: rows[cached_A], new)
        return streams, state, new

    def _skip(self, carry: Carry, index: Array, slot: Array) -> tuple[Carry, Any]:
        return carry, self._nothing_new(carry)

    def _keep(self, carry: Carry, index: Array, slot: Array) -> tuple[Carry, Any]:
        layer = self.layers.at(index)
        streams, state, new = self.attention(*carry, layer, slot)
        if self.mlp_waits:
            layer = self.layers.at(_known_after(as_operand(new.value), index))
        return (self._mlp(streams, layer), state), new

    def _no_mlp(self, carry: Carry, index: Array, slot: Array) -> tuple[Carry, Any]:
        streams, state, new = self.attention(*carry, self.layers.at(index), slot)
        return (streams, state), new

    def _no_attention(self, carry: Carry, index: Array, slot: Array) -> tuple[Carry, Any]:
        streams, state = carry
        if self.mlp_waits:
            index = _known_after(streams[0], index)
        return (self._mlp(streams, self.layers.at(index)), state), self._nothing_new(carry)

    def _bridge(self, carry: Carry, index: Array, slot: Array) -> tuple[Carry, Any]:
        if self.layers.bridges is None:
            raise ValueError("the plan bridges layers, and the model has no bridges; set nesting.bridge.kind")
        (streams, state), bridge = carry, entry(self.layers.bridges, index)
        bridge = _as_used("bridges", bridge)
        streams = tuple(add_bridge(bridge, x, first) for x, first in zip(streams, self.is_first, strict=True))
        return (streams, state), self._nothing_new(carry)

    def _mlp(self, streams: Streams, layer: Parameters) -> Streams:
        """The streams after the MLP. Streams with the same number of prompts are joined: larger products are faster,
        and a weight then has one gradient and not two to add.
        """
        config, prompts = self.layers.config, [len(x) for x in streams]
        if len(set(prompts)) == len(prompts):
            return tuple(add_mlp(config, layer, x) for x in streams)
        # Only a prefix that all prompts share stands alone. Rows lie side by side within a prompt, because devices
        # share prompts.
        joined = [x for x in streams if len(x) == prompts[-1]]
        rows = [x.reshape(len(x), -1, config.width) for x in joined]
        ends = list(itertools.accumulate(x.shape[1] for x in rows))
        parts = iter(jnp.split(add_mlp(config, layer, jnp.concatenate(rows, axis=1)), ends[:-1], axis=1))
        return tuple(
            next(parts).reshape(x.shape) if len(x) == prompts[-1] else add_mlp(config, layer, x) for x in streams
        )

    def _nothing_new(self, carry: Carry) -> Any:
        """Zeros in place of keys and values: all kinds of steps must return the same shapes."""
        zero = jnp.zeros((), jnp.int32)
        like = jax.eval_shape(lambda: self.attention(carry[0], carry[1], self.layers.at(zero), zero)[2])
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    def _scanned(self, step: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, xs: Any) -> tuple:
        def split_step(carry: Carry, xs: Any) -> tuple[Carry, Any]:
            (streams, state), new = step(carry, xs)
            return (tuple(constrain(x, "batch") for x in streams), state), new

        body = _rematerialised(split_step, self.remat)
        (streams, state), new = jax.lax.scan(body, carry, xs, unroll=self.layers.unrolled)
        return streams, state, new


def _rematerialised(step: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    # Products with a batch axis are those of plain attention, whose scores would take the most memory of all.
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
    )
    return jax.checkpoint(step, policy=dots if remat == "dots" else None)


def entry(stacks: Any, index: Int[Array, ""]) -> Any:
    """Entry `index` of every stack in a pytree.

    Args:
        stacks: arrays with a common leading axis.
        index: of the entry.
    """
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks)


def _known_after(value: Float[Array, "..."], index: Int[Array, ""]) -> Int[Array, ""]:
    """`index`, on a CPU known only once `value` is.

    XLA's CPU backend copies a layer's weights out of the stack before it uses them, as soon as it knows the layer.
    Those of the MLP would go first, on all cores, and then attention, on one. With an index that waits for the
    values that attention reads, both run at once. Nothing exceeds infinity, which XLA does not know.

    Several devices would have to exchange the value, and each already works on an attention of its own.
    """
    if shares("row") > 1:
        return index
    return where_cpu(
        lambda value, index: index + (value.ravel()[0] > jnp.inf), lambda value, index: index, value, index
    )
