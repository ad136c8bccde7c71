"""Weights from GGUF files: Llama, Qwen2 and Qwen3 models, dequantized.

Source: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's `convert_hf_to_gguf.py`,
whose two changes to Llama's weights are undone here: it permutes the rows of the query and key
projections for its own rotary layout, and stores Llama 3's frequency scaling as a tensor.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nested_reft.models.config import FAMILIES, ModelConfig, RopeScaling
from nested_reft.models.formats.gguf_reader import GgufFile, open_gguf
from nested_reft.models.formats.stacking import check_tensors, stack_parameters
from nested_reft.models.transformer import Transformer

TENSOR_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers/attention_norm": "blk.{layer}.attn_norm.weight",
    "layers/query": "blk.{layer}.attn_q.weight",
    "layers/key": "blk.{layer}.attn_k.weight",
    "layers/value": "blk.{layer}.attn_v.weight",
    "layers/output": "blk.{layer}.attn_output.weight",
    "layers/mlp_norm": "blk.{layer}.ffn_norm.weight",
    "layers/gate": "blk.{layer}.ffn_gate.weight",
    "layers/up": "blk.{layer}.ffn_up.weight",
    "layers/down": "blk.{layer}.ffn_down.weight",
    "layers/query_bias": "blk.{layer}.attn_q.bias",
    "layers/key_bias": "blk.{layer}.attn_k.bias",
    "layers/value_bias": "blk.{layer}.attn_v.bias",
    "layers/query_norm": "blk.{layer}.attn_q_norm.weight",
    "layers/key_norm": "blk.{layer}.attn_k_norm.weight",
}
# The name is llama.cpp's; its values divide the rotary frequencies.
ROPE_FREQUENCIES = "rope_freqs.weight"


def load_gguf(source: str | Path | GgufFile, dtype: Any = jnp.float32) -> Transformer:
    """The model in a GGUF file.

    Args:
        source: the file's path, or the file already opened.
        dtype: dtype of the parameters.

    Returns:
        The model with its weights dequantized.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, cut off, of an unsupported architecture, or lacking tensors.
    """
    file = source if isinstance(source, GgufFile) else open_gguf(source)
    config = config_from_gguf(file)

    def read(name: str) -> np.ndarray:
        tensor = file.dequantize(name)
        # The converter permutes Llama's rows only; Qwen's rotary layout is ours already.
        if config.family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            return unpermute_rows(tensor, config.head_size)
        return tensor

    return Transformer(config, stack_parameters(config, TENSOR_NAMES, read, dtype))


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The model's shape from a file's metadata, checked against the tensors that it holds.

    Args:
        file: opened by `open_gguf`; no tensor of it is dequantized, but for the small one of the
            frequencies.

    Raises:
        ValueError: unsupported architecture or feature, or tensors that do not fit.
    """
    # Every other key begins with the architecture, so it is read first.
    family = file.require("general.architecture")
    if family not in FAMILIES:
        raise ValueError(
            f"GGUF file '{file.path}': general.architecture is '{family}'; allowed are {', '.join(FAMILIES)}"
        )
    _refuse_unsupported(file, family)
    missing = [name for name in ("token_embd.weight", "output_norm.weight") if name not in file.tensors]
    if missing:
        raise ValueError(f"GGUF file '{file.path}' lacks tensor '{missing[0]}'; it does not hold a whole model")

    width = int(file.require(f"{family}.embedding_length"))
    num_heads = int(file.require(f"{family}.attention.head_count"))
    # Most files leave the head size out where it is the width divided by the heads.
    head_size = int(file.metadata.get(f"{family}.attention.key_length", width // num_heads))
    config = ModelConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        num_layers=int(file.require(f"{family}.block_count")),
        width=width,
        hidden_width=int(file.require(f"{family}.feed_forward_length")),
        num_heads=num_heads,
        num_kv_heads=int(file.metadata.get(f"{family}.attention.head_count_kv", num_heads)),
        head_size=head_size,
        rope_theta=float(file.metadata.get(f"{family}.rope.freq_base", 10_000.0)),
        rope_scaling=_rope_scaling(file, family, head_size),
        norm_epsilon=float(file.require(f"{family}.attention.layer_norm_rms_epsilon")),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        # GGUF has no flag for tied embeddings; the head's tensor is there or it is not.
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=int(file.require(f"{family}.context_length")),
        family=family,
    )
    found = {name: file.shape(name) for name in file.tensors}
    # The frequency divisors are no parameter, and are read by `_rope_scaling`.
    check_tensors(
        config, TENSOR_NAMES, found, f"GGUF file '{file.path}'", ignored=lambda name: name == ROPE_FREQUENCIES
    )
    return config


def unpermute_rows(weight_OI: Float[np.ndarray, "O I"], head_size: int) -> Float[np.ndarray, "O I"]:
    """Rows of a query or key projection back in the order (i, i + K/2) that `rotate` pairs.

    llama.cpp rotates neighbours (2i, 2i + 1), so its converter interleaves each head's halves.

    Args:
        weight_OI: a projection as the file holds it; O is a multiple of the head size.
        head_size: K.
    """
    rows, columns = weight_OI.shape
    # Per head `[K/2, 2]` becomes `[2, K/2]`: all first entries of the pairs, then all second ones.
    return weight_OI.reshape(-1, head_size // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _refuse_unsupported(file: GgufFile, family: str) -> None:
    head_size = file.metadata.get(f"{family}.attention.key_length")
    # Each of these would change what the model computes, and loading it anyway would give wrong logits.
    allowed = {
        "rope.scaling.type": ("none", None),
        "expert_count": (0, None),
        "attention.sliding_window": (0, None),
        "attention.value_length": (head_size, None),
    }
    for key, values in allowed.items():
        value = file.metadata.get(f"{family}.{key}")
        if value not in values:
            raise ValueError(f"GGUF file '{file.path}': {family}.{key} is {value!r}; allowed is {values[0]!r} or none")
    width, num_heads = file.require(f"{family}.embedding_length"), file.require(f"{family}.attention.head_count")
    # A rotation of only a part of the head, as in GPT-NeoX, is not computed here.
    rotated = file.metadata.get(f"{family}.rope.dimension_count")
    if rotated not in (head_size or width // num_heads, None):
        raise ValueError(
            f"GGUF file '{file.path}': {family}.rope.dimension_count is {rotated}; allowed is the whole head,"
            f" {head_size or width // num_heads}"
        )


def _rope_scaling(file: GgufFile, family: str, head_size: int) -> RopeScaling | None:
    """Llama 3's scaling, recognized by the frequency divisors that the converter stored.

    Every released Llama 3 uses low factor 1, high factor 4 and 8,192 original positions; only
    `factor` differs, and it is the largest divisor. The guess is checked against all divisors.
    """
    if ROPE_FREQUENCIES not in file.tensors:
        return None
    divisor_k = file.dequantize(ROPE_FREQUENCIES).astype(np.float64)
    # The longest wavelength is stretched in full, so its divisor is the factor.
    scaling = RopeScaling(float(divisor_k.max()), 1.0, 4.0, 8192)
    theta = float(file.metadata.get(f"{family}.rope.freq_base", 10_000.0))
    wavelength_k = 2 * math.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    keep_k = (scaling.original_max_positions / wavelength_k - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    keep_k = np.clip(keep_k, 0.0, 1.0)
    expected_k = 1 / (keep_k + (1 - keep_k) / scaling.factor)
    # The file holds float32, and other tools round otherwise: 1e-3 is far below the steps between real scalings.
    if divisor_k.shape != expected_k.shape or not np.allclose(divisor_k, expected_k, rtol=1e-3):
        raise ValueError(
            f"GGUF file '{file.path}': tensor '{ROPE_FREQUENCIES}' is not Llama 3's scaling with factors"
            " (1, 4) and 8192 original positions, the only one supported; load the model's safetensors instead"
        )
    return scaling
