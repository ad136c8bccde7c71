"""The machine's ceilings, measured: matrix products at given shapes, and memory bandwidth."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.floors import Ceilings, CeilingsAt
from experiments.benchmarks.worker import measure
from nested_reft.models.config import ModelConfig
from nested_reft.rollout.sampling import SamplingConfig, row_keys, row_uniforms, sample_token

INSIDE = 2e10  # operations within one timed call, so that starting it does not count
REPEATS = 5


def ceilings_of(config: ModelConfig, dtype: Any) -> CeilingsAt:
    """`ceilings(rows)` of products with this model's matrices, each measured when it is first asked for.

    Matrices of int8 multiply in bfloat16 (`low_precision`).

    Args:
        config: the model's shape.
        dtype: of the stored weights.
    """
    bandwidth = memory_bandwidth()
    product_dtype = jnp.bfloat16 if dtype == jnp.int8 else dtype

    @functools.cache
    def at(rows: int) -> Ceilings:
        flops = product_flops(rows, config.width, config.hidden_width, product_dtype)
        return Ceilings(flops, bandwidth, jnp.dtype(dtype).itemsize)

    return at


def product_flops(rows: int, inner: int, outer: int, dtype: Any) -> float:
    """Operations per second of rows times matrices `[outer, inner]` and `[inner, outer]`, accumulated in float32.

    The better of weights on the right and on the left. They stay in cache, so this is the rate of arithmetic,
    whatever memory does.

    Args:
        rows: vectors at once.
        inner, outer: sizes of both matrices.
        dtype: of matrices and rows.
    """
    # The scale keeps the repeated product finite: slow special values would spoil the clock.
    up = jnp.ones((outer, inner), dtype)
    down = jnp.ones((inner, outer), dtype) / (inner * outer)
    times = max(1, round(INSIDE / (4 * rows * inner * outer)))

    def right(x, weight):
        return jnp.einsum("ni,oi->no", x.astype(dtype), weight, preferred_element_type=jnp.float32)

    def left(x, weight):
        y = jnp.einsum("oi,in->on", weight, x.astype(dtype), preferred_element_type=jnp.float32)
        # The barrier keeps this layout, which the compiler might otherwise exchange for that of `right`.
        return jax.lax.optimization_barrier(y)

    def seconds(product, shape):
        call = jax.jit(lambda x, up, down: jax.lax.fori_loop(0, times, lambda _, x: product(product(x, up), down), x))
        return _seconds(call, jnp.ones(shape, jnp.float32), up, down)

    return times * 4 * rows * inner * outer / min(seconds(right, (rows, inner)), seconds(left, (inner, rows)))


def memory_bandwidth(size: int = 2**26) -> float:
    """Bytes per second read: one vector times a float32 matrix that no cache holds."""
    matrix = jnp.ones((size // 2048, 2048), jnp.float32)
    call = jax.jit(lambda matrix, x: matrix @ x)
    return 4 * size / _seconds(call, matrix, jnp.ones(2048, jnp.float32))


def copy_bandwidth(size: int) -> float:
    """Bytes per second read and written: so many float32 numbers, each plus one."""
    return 2 * 4 * size / _seconds(jax.jit(lambda x: x + 1), jnp.ones(size, jnp.float32))


def matrix_rate(size: int, dtype: Any, times: int = 8) -> float:
    """Operations per second of square products, one after the other, whose results are stored in `dtype` too.

    `product_flops` keeps its sums in float32 and its matrices small, which suits caches of a CPU. An accelerator would
    spend much of that call on moving the sums.

    Args:
        size: of the matrices' sides.
        dtype: of all of them.
        times: products within one call.
    """

    def repeated(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: (x @ weight).astype(dtype), x)

    # Equal numbers would flatter a GPU, which runs faster where few bits change. This scale keeps the products finite.
    x, weight = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    return times * 2 * size**3 / _seconds(jax.jit(repeated), x, weight / jnp.sqrt(size).astype(dtype))


def sampling_seconds(rows: int, vocab_size: int) -> float:
    """Seconds of one draw from `rows` rows of logits, log-probabilities included."""
    logits = jax.random.normal(jax.random.key(0), (rows, vocab_size))
    draw = jax.jit(lambda keys, logits: sample_token(row_uniforms(keys, 0), logits, SamplingConfig()))
    return _seconds(draw, row_keys(jax.random.key(1), jnp.arange(rows), 1)[:, 0], logits)


def _seconds(call: Any, *arguments: Any) -> float:
    return measure(lambda: jax.block_until_ready(call(*arguments)), REPEATS)["seconds"]
