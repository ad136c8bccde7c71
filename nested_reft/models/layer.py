"""One decoder layer's arithmetic: projections and rotary angles of attention, SwiGLU, norms.

Matrix products take the dtype of the matrices, or a compute dtype, and accumulate in float32; the
residual stream, norms and softmax are float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Num

from nested_reft.backends import features_first, flat_products, where_cpu
from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import Parameters
from nested_reft.sharding import constrain


@struct.dataclass
class KeyValues:
    """Keys and values of one attention segment.

    Shapes `[B, J, P, K]` for a prompt, `[B, G, J, C, K]` for completions; with a further
    leading axis `S` when they hold all kept layers. Keys are already rotated.
    """

    key: Array
    value: Array


def project_qkv(
    config: ModelConfig, layer: Parameters, x_BGTD: Float[Array, "B G T D"], rotation: tuple[Array, Array]
) -> tuple[Float[Array, "B G T H K"], KeyValues]:
    """Rotated queries, and rotated keys and values `[B, G, J, T, K]`, of one layer.

    Args:
        config: the model.
        layer: parameters of this layer, by name.
        x_BGTD: residual stream before the layer.
        rotation: cosine and sine of `rope`, at the positions of these tokens.

    Returns:
        Queries, and keys and values with the axis of heads before that of tokens.
    """
    normed = rms_norm(x_BGTD, layer["attention_norm"], config.norm_epsilon)

    def heads(name: str) -> Array:
        # Without the barrier a TPU's compiler moves the split into heads to the weights, and transposes them each step.
        flat = jax.lax.optimization_barrier(linear(layer, name, normed))
        # No -1: a completion of one token has none to run.
        split = flat.reshape(*flat.shape[:-1], flat.shape[-1] // config.head_size, config.head_size)
        # Devices share heads. Left to itself, the compiler may split the halves that `rotate` exchanges.
        return constrain(split, "batch", "", "", "heads" if name == "query" else "kv_heads")

    query, key, value = heads("query"), heads("key"), heads("value")
    if config.qk_norm:
        query = rms_norm(query, layer["query_norm"], config.norm_epsilon)
        key = rms_norm(key, layer["key_norm"], config.norm_epsilon)
    # Keys are rotated before they are cached, so a later step need not know their positions.
    query, key = rotate(query, rotation), rotate(key, rotation)
    return query, KeyValues(jnp.swapaxes(key, 2, 3), jnp.swapaxes(value, 2, 3))


def add_attention(
    layer: Parameters, x: Float[Array, "B G T D"], attended: Float[Array, "B G T I"]
) -> Float[Array, "B G T D"]:
    """The residual stream with attention's output, projected, added.

    Args:
        layer: parameters of this layer, by name.
        x: residual stream before the layer.
        attended: what `attention.attend` returned for it.
    """
    return constrain(x + linear(layer, "output", attended), "batch")


def add_mlp(config: ModelConfig, layer: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """`x + W_down (silu(W_gate n) * W_up n)`, n the normed `x`: the SwiGLU block (Shazeer, 2020).

    A CPU's products of few rows in float32 are faster with the weights on the left, which it need not repack there,
    and with `[features, rows]` in between.

    Args:
        config: the model.
        layer: parameters of this layer, by name.
        x: residual stream after attention.

    Returns:
        The residual stream with the block's output added.
    """
    normed = rms_norm(x, layer["mlp_norm"], config.norm_epsilon)
    # The number of rows is static, so the choice below is made when the program compiles.
    rows_ND = normed.reshape(-1, normed.shape[-1])
    if layer.get("compute_dtype") is not None or not features_first(len(rows_ND), layer["down"].dtype):
        return x + linear(layer, "down", jax.nn.silu(linear(layer, "gate", normed)) * linear(layer, "up", normed))
    gate_FN, up_FN = (_linear_features_first(layer, name, rows_ND.T) for name in ("gate", "up"))
    return x + _linear_features_first(layer, "down", jax.nn.silu(gate_FN) * up_FN).T.reshape(x.shape)


def linear(layer: Parameters, name: str, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
    """`W x (* scale) (+ bias) (+ alpha / r * B A x)` of each row: a projection, int8 scale, bias and adapter if any.

    Args:
        layer: parameters of one layer; what belongs to the projection is found by its name.
        name: one of the seven projections, such as `query`.
        x: input rows.

    Returns:
        Output rows in float32.
    """
    y: Array = matmul(x, as_operand(layer[name]), layer.get("compute_dtype"))
    # One scale per output channel is a factor of the whole sum, so it may follow the product. The bias is not
    # quantized and comes after it.
    if f"{name}_scale" in layer:
        y = y * layer[f"{name}_scale"]
    if f"{name}_bias" in layer:
        y = y + layer[f"{name}_bias"].astype(jnp.float32)
    if f"{name}_lora_in" in layer:
        low_rank = matmul(x, layer[f"{name}_lora_in"])
        y = y + layer["lora_scale"] * matmul(low_rank, layer[f"{name}_lora_out"])
    return y


def _linear_features_first(layer: Parameters, name: str, x_IN: Float[Array, "I N"]) -> Float[Array, "O N"]:
    """What `linear` does, of float32 columns. The barrier keeps XLA from turning the product around again."""
    y_ON = jax.lax.optimization_barrier(layer[name] @ x_IN)
    if f"{name}_lora_in" in layer:
        y_ON = y_ON + layer["lora_scale"] * (layer[f"{name}_lora_out"] @ (layer[f"{name}_lora_in"] @ x_IN))
    return y_ON


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "*rows I"], weight_OI: Float[Array, "O I"], dtype: Any = None) -> Float[Array, "*rows O"]:
    """`x @ W^T`, inputs rounded to a dtype, accumulated in float32.

    Its gradient is written out for two reasons. Cotangents are rounded too, where autodiff would widen bfloat16
    matrices to float32. And rows are flattened first: for `[B, G, T]` rows XLA lets the products read
    transposed copies, into which it fuses whatever made the rows; on a CPU that took a third of an update.

    Args:
        x: rows, in float32.
        weight_OI: W, in the dtype that it is stored in.
        dtype: of both inputs; None is that of W.
    """
    return _rows_times_matrix(x, weight_OI, dtype)


def _rows_times_matrix(x: Array, weight_OI: Array, dtype: Any) -> Array:
    weight_OI = weight_OI.astype(dtype or weight_OI.dtype)
    rows = x.reshape(-1, x.shape[-1]) if flat_products() else x
    contracted = ((rows.ndim - 1,), (1,)), ((), ())
    y = jax.lax.dot_general(rows.astype(weight_OI.dtype), weight_OI, contracted, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], y.shape[-1]) if flat_products() else y


def _matmul_forward(x: Array, weight_OI: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    # With a compute dtype what is kept is not rounded: a CPU cannot slice stacks of bfloat16, and XLA would widen them
    # whole. Beside matrices that are stored in bfloat16 anyway, rounded rows take half of the memory.
    kept = x if dtype else x.astype(weight_OI.dtype)
    # The product itself, and not `matmul`: a policy of rematerialisation looks for products.
    return _rows_times_matrix(x, weight_OI, dtype), (kept, weight_OI)


def _matmul_backward(dtype: Any, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weight_OI = residuals
    dtype = dtype or weight_OI.dtype
    x_NI = x.reshape(-1, x.shape[-1]).astype(dtype)
    cotangent_NO = cotangent.reshape(-1, cotangent.shape[-1]).astype(dtype)
    dx_NI = jnp.einsum("no,oi->ni", cotangent_NO, weight_OI.astype(dtype), preferred_element_type=jnp.float32)
    dweight_OI = _sum_of_outer_products(cotangent_NO, x_NI)
    # JAX asks for a cotangent of the argument's own dtype.
    return dx_NI.reshape(x.shape), dweight_OI.astype(weight_OI.dtype)


def _sum_of_outer_products(y_NO: Float[Array, "N O"], x_NI: Float[Array, "N I"]) -> Float[Array, "O I"]:
    """`sum_n y_n x_n^T` in float32."""

    def product(y: Array, x: Array, axis: int) -> Array:
        return jax.lax.dot_general(y, x, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def row_by_row(y_NO: Array, x_NI: Array) -> Array:
        return product(with_layout_constraint(y_NO.T, Layout((0, 1))), x_NI, 1)

    if x_NI.dtype != jnp.bfloat16:
        return product(y_NO, x_NI, 0)
    # A CPU multiplies bfloat16 in hardware only where the sum runs along rows. Left alone, XLA turns the transpose back
    # into a sum along columns, which takes three times as long.
    return where_cpu(row_by_row, lambda y_NO, x_NI: product(y_NO, x_NI, 0), y_NO, x_NI)


matmul.defvjp(_matmul_forward, _matmul_backward)


def stored_as(x: Float[Array, "..."], dtype: Any) -> Num[Array, "..."]:
    """Values in `dtype`, where uint16 stands for the bits of bfloat16; `as_operand` reads them back.

    XLA's CPU backend has no slices of bfloat16: it would widen a whole stack to float32 before it takes one layer.

    Args:
        x: float values.
        dtype: the dtype to store; uint16 asks for the bits of bfloat16.
    """
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def as_operand(stored: Num[Array, "..."]) -> Float[Array, "..."]:
    """What was stored as it enters a product: int8 in bfloat16, which holds it exactly, bits as what they stand for."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored.astype(jnp.bfloat16) if stored.dtype == jnp.int8 else stored


def rms_norm(x: Float[Array, "*rows D"], scale_D: Float[Array, " D"], epsilon: float) -> Float[Array, "*rows D"]:
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis (Zhang and Sennrich, 2019).

    Args:
        x: rows to normalise, in float32.
        scale_D: one factor per entry.
        epsilon: added to the mean square, so that a row of zeros stays finite.
    """
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    # The scale may be stored in bfloat16, and the norm is float32 all the same.
    return x * jax.lax.rsqrt(mean_square + epsilon) * scale_D.astype(jnp.float32)


def rope(config: ModelConfig, position: Int[Array, "*rows"]) -> tuple[Float[Array, "*rows k"], Float[Array, "*rows k"]]:
    """Cosine and sine of the rotary angles `position * theta^(-2i / K)`, i < K / 2.

    Source: RoFormer (Su et al., 2021), with Llama 3's frequency scaling where configured.

    Args:
        config: the model, which gives K, theta and the scaling.
        position: 0 for the first valid token of a sequence.

    Returns:
        Cosine and sine, K / 2 of each per position.
    """
    exponent_k = jnp.arange(0, config.head_size, 2, dtype=jnp.float32) / config.head_size
    frequency_k = 1.0 / (config.rope_theta**exponent_k)
    if config.rope_scaling is not None:
        frequency_k = frequency_k * config.rope_scaling.multiplier(2 * math.pi / frequency_k)
    # bfloat16 would hold whole positions exactly only up to 256.
    angle = position[..., None].astype(jnp.float32) * frequency_k
    # Every device has the angles of its rows, for all heads.
    return constrain(jnp.cos(angle), "batch"), constrain(jnp.sin(angle), "batch")


def rotate(x: Float[Array, "*rows heads K"], rotation: tuple[Array, Array]) -> Float[Array, "*rows heads K"]:
    """Rotates the pairs (i, i + K/2) of each head by the angles of its position.

    Args:
        x: queries or keys.
        rotation: cosine and sine of `rope`, one row per token of `x`.
    """
    # The new axis is that of the heads, which all turn by the same angles.
    cos, sin = rotation[0][..., None, :], rotation[1][..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
