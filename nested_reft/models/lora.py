"""Low-rank adapters (LoRA; Hu et al., 2021) on the stacked projections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from nested_reft.models.heads import HeadParam
from nested_reft.models.parameters import Parameters
from nested_reft.models.transformer import Transformer

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Which projections get an adapter.

    Attributes:
        rank: r; 0 trains the whole model instead.
        alpha: the adapter's output is scaled by alpha / r.
        targets: projections that get one.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; allowed is 0 (train the whole model) or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha is {self.alpha}; allowed is more than 0")
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets:
            raise ValueError(f"lora.targets is {self.targets}; allowed are some of {', '.join(PROJECTIONS)}")


def add_lora(model: Transformer, config: LoraConfig, key: jax.Array) -> None:
    """Adds an adapter W + (alpha / r) B A to each target, A normal(1 / sqrt(fan in)), B zero.

    The model computes the same function until the first update. A is `[L, r, in]`, B `[L, out, r]`,
    both float32 whatever the model is stored in, so that small updates do not round away.

    Args:
        model: changed in place.
        config: `rank` must be 1 or more.
        key: PRNG key of all adapters.
    """
    model.lora_scale = config.alpha / config.rank
    for name in config.targets:
        num_layers, size_out, size_in = getattr(model.layers, name)[...].shape
        # The key depends on the projection's place in `PROJECTIONS`: its A is the same whichever other ones are
        # targets.
        name_key = jax.random.fold_in(key, PROJECTIONS.index(name))
        a = jax.random.normal(name_key, (num_layers, config.rank, size_in)) / math.sqrt(size_in)
        setattr(model.layers, f"{name}_lora_in", nnx.LoRAParam(a))
        # With B zero the adapter adds nothing until the first update; A must not be zero too, or no gradient would
        # flow.
        b = jnp.zeros((num_layers, size_out, config.rank))
        setattr(model.layers, f"{name}_lora_out", nnx.LoRAParam(b))


def merge_lora(model: Transformer) -> Parameters:
    """The model's parameters with every adapter added into its projection; the model is untouched.

    Args:
        model: with or without adapters.

    Returns:
        Parameters by name, each in the dtype of the model's own.
    """
    parameters = model.parameters()
    for name in PROJECTIONS:
        if hasattr(model.layers, f"{name}_lora_in"):
            a = getattr(model.layers, f"{name}_lora_in")[...].astype(jnp.float32)
            b = getattr(model.layers, f"{name}_lora_out")[...].astype(jnp.float32)
            weight = parameters[f"layers/{name}"]
            # Weights of every layer are merged in one product: l layers, r the rank.
            delta = model.lora_scale * jnp.einsum("lor,lri->loi", b, a)
            # The sum is rounded once, at its end; a small delta could vanish in bfloat16 before.
            parameters[f"layers/{name}"] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
    return parameters


def split_trainable(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model's structure, the parameters that train, and those that do not; `nnx.merge` joins them again.

    Adapters alone train where there are any, else the whole model does; a head trains either way.
    """
    has_adapters = any(name.endswith("_lora_in") for name in nnx.state(model.layers))
    trains = nnx.Any(nnx.LoRAParam, HeadParam) if has_adapters else nnx.Param
    graph, trainable, frozen = nnx.split(model, trains, ...)
    return graph, trainable, frozen
