"""Telling weights apart without keeping them."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt

from nested_reft.models.lora import merge_lora
from nested_reft.models.parameters import Parameters
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import to_host


def fingerprint(model: Transformer) -> str:
    """A short text that two models share if their weights are the same in bfloat16, and else almost surely not.

    It depends neither on how the weights are divided among devices nor on whether a source was loaded as float32 or
    bfloat16. Adapters count with what they add, so those that have not learnt yet do not. Bridges and heads are no part
    of it. Random initial weights may differ in their last bits between a CPU and an accelerator. Several processes call
    it together.

    Args:
        model: with or without adapters.
    """
    outs = [value[...] for name, value in nnx.state(model.layers).items() if str(name).endswith("_lora_out")]
    # Merging makes a second copy of the weights, which adapters of zeros do not need.
    has_learnt = any(bool(jnp.any(out != 0)) for out in outs)
    parameters = merge_lora(model) if has_learnt else model.parameters()
    found = to_host(_sums(parameters))
    sums = {name: (parameters[name].shape, int(value)) for name, value in found.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _sums(parameters: Parameters) -> dict[str, UInt[Array, ""]]:
    return {name: _sum_of_bits(value) for name, value in parameters.items()}


def _sum_of_bits(value: Float[Array, "..."]) -> UInt[Array, ""]:
    """The sum, modulo 2^32, of a hash of each entry's bits and place; integers add up alike in any order."""
    mixed = jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    # The place is added axis by axis, because a flat view of a divided array would move it.
    for axis in range(value.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, value.shape, axis)
        mixed = _mix(mixed + place * jnp.uint32(0x9E3779B9) + jnp.uint32(axis + 1))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(bits: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Spreads every bit over the whole word, as the last steps of the hash MurmurHash3 do."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
