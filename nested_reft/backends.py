"""What the program does differently by kind of device, and from which size on: all of it in one place.

A program may be compiled for a device that is not here, so what can be chosen while it compiles is chosen there
(`where_cpu`), and not by the device that traces it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

LONG_ATTENTION = 2**18  # pairs of a query and a key, from which on attention goes by blocks: 512 tokens on themselves
ATTENTION_BLOCKS = 128, 256  # queries and keys
FEW_ROWS = 64  # up to which a CPU's MLP is faster features first; at 128 it is not


def attention_blocks(queries: int, keys: int) -> tuple[int, int] | None:
    """The sizes of the blocks that attention goes by, of queries and of keys; None where it takes all at once.

    On a CPU blocks are about three times as fast at 512 tokens, and little faster at 256, where memory does not matter
    yet. GPUs and TPUs use the same blocks. The kernels that JAX ships for them do not fit: cuDNN's takes no float32 and
    rounds the logarithms of sums by which segments are joined, and the TPU's gives those only without a gradient.

    Args:
        queries: of each row.
        keys: that each query may see, in all segments.
    """
    # A few queries have few scores, however many keys they see.
    is_long = queries >= ATTENTION_BLOCKS[0] and queries * keys >= LONG_ATTENTION
    return ATTENTION_BLOCKS if is_long else None


def cores() -> int:
    """Cores that this process may use; a container may give it fewer than the host has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stored_bfloat16() -> Any:
    """The dtype that stands for bfloat16 in stacks of matrices and in caches; see `models.layer.stored_as`."""
    return jnp.uint16 if _is_cpu() else jnp.bfloat16


def cache_dtype(dtype: Any) -> Any:
    """The dtype of keys and values in the caches of a model that is stored in `dtype`: a CPU has no products of
    bfloat16 keys."""
    return jnp.float32 if _is_cpu() else dtype


def flat_products() -> bool:
    """Whether the rows of a product with bfloat16 must have one axis alone: before JAX 0.9 XLA's CPU backend has no
    other products of bfloat16 in loops."""
    return jax.__version_info__ < (0, 9)


def features_first(rows: int, dtype: Any) -> bool:
    """Whether an MLP is faster with its weights on the left and `[features, rows]` in between; see `layer.add_mlp`.

    The device that traces decides, since a CPU's program would take twice as long to compile with both. What a CPU
    compiles for another device has the CPU's form.

    Args:
        rows: that pass through it together.
        dtype: of the weights.
    """
    return _is_cpu() and rows <= FEW_ROWS and dtype == jnp.float32


def have_slices(devices: Sequence[Any]) -> bool:
    """Whether devices say which slice they are in. GPUs do not, and CPUs of several processes all say slice 0."""
    return getattr(devices[0], "platform", None) != "cpu" and hasattr(devices[0], "slice_index")


def where_cpu(cpu: Callable[..., Any], default: Callable[..., Any], *operands: Any) -> Any:
    """`cpu(*operands)` in programs for a CPU and `default(*operands)` in all others, chosen while they compile."""
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=default)


def memory_limits(devices: Sequence[Any]) -> list[float] | None:
    """Bytes of memory that each device has for itself; None where that is not known, or where they share it.

    Args:
        devices: of one kind.
    """
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    # Some backends report no limit, and a sum over the others would be wrong.
    if devices[0].platform == "cpu" or not all(limits):
        return None
    return [float(limit) for limit in limits if limit]


def machine_memory() -> float | None:
    """Bytes of the machine's memory, where its devices are CPUs and share it; None where that is not known."""
    if _is_cpu() and hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return None


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"
