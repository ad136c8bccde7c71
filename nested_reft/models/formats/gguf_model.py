"""Weights from GGUF files: Llama, Qwen2 and Qwen3 models, dequantized.

Source: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's `convert_hf_to_gguf.py`,
whose two changes to Llama's weights are undone here: it permutes the rows of the query and key
projections for its own rotary layout, and stores Llama 3's frequency scaling as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from nested_reft.models.config import FAMILIES, ModelConfig, RopeScaling
from nested_reft.models.formats.gguf_reader import GgufFile, open_gguf
from nested_reft.models.formats.stacking import check_tensors, stack_parameters
from nested_reft.models.transformer import Transformer
from nested_reft.untrusted import Fields, reading, shown

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

# Keys after the architecture's name. What stands in none of these tables would change what the model computes.
_SHAPE_KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
)
# The vocabulary is that of the embedding. The others describe a scaling that is off, or how the file was made.
_KEYS_WITHOUT_EFFECT = (
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
# With these values the model computes what it computes without the key.
_VALUES_WITHOUT_EFFECT = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "attention.causal": (True,),
    "logit_scale": (0, 1),
}
# Any other key has no effect where it is zero: llama.cpp takes that for switched off.
_OFF = (0,)


def load_gguf(source: str | Path | GgufFile, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Transformer:
    """The model in a GGUF file.

    Args:
        source: the file's path, or the file already opened.
        dtype: dtype of the parameters.
        mesh: where they are placed; None is one device.

    Returns:
        The model with its weights dequantized.

    Raises:
        FileNotFoundError: no such file.
        BadFile: not a GGUF file, cut off, of an unsupported architecture, or lacking tensors.
    """
    file = source if isinstance(source, GgufFile) else open_gguf(source)
    config = config_from_gguf(file)

    def read(name: str) -> np.ndarray:
        tensor = file.dequantize(name)
        # The converter permutes Llama's rows only; Qwen's rotary layout is ours already.
        if config.family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            return unpermute_rows(tensor, config.head_size)
        return tensor

    return Transformer(config, stack_parameters(config, TENSOR_NAMES, read, dtype, mesh))


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The model's shape from a file's metadata, checked against the tensors that it holds.

    Args:
        file: opened by `open_gguf`; no tensor of it is dequantized, but for the small one of the
            frequencies.

    Raises:
        BadFile: unsupported architecture or feature, or tensors that do not fit.
    """
    with reading(f"GGUF file '{file.path}'"):
        config = _config(file)
        found = {name: file.shape(name) for name in file.tensors}
        # The frequency divisors are no parameter, and are read by `_rope_scaling`.
        check_tensors(config, TENSOR_NAMES, found, ignored=lambda name: name == ROPE_FREQUENCIES)
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


def _config(file: GgufFile) -> ModelConfig:
    # Every other key begins with the architecture, so it is read first.
    file.require("general.architecture")
    family = file.fields.text("general.architecture")
    if family not in FAMILIES:
        raise file.fields.refused("general.architecture", f"allowed are {', '.join(FAMILIES)}")
    fields = _understood_fields(file, family)
    missing = [name for name in ("token_embd.weight", "output_norm.weight") if name not in file.tensors]
    if missing:
        raise ValueError(f"it lacks tensor '{missing[0]}'; it does not hold a whole model")
    head_size = _head_size(fields)
    num_heads = fields.whole("attention.head_count")
    rope_theta = fields.number("rope.freq_base", 10_000.0)
    return ModelConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        num_layers=fields.whole("block_count"),
        width=fields.whole("embedding_length"),
        hidden_width=fields.whole("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=fields.whole("attention.head_count_kv", num_heads),
        head_size=head_size,
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, rope_theta, head_size),
        norm_epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        # GGUF has no flag for tied embeddings; the head's tensor is there or it is not.
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=fields.whole("context_length"),
        family=family,
    )


def _understood_fields(file: GgufFile, family: str) -> Fields:
    """The architecture's fields without its name; refused are those that would change what the model computes."""
    kind = file.fields.text("general.type") or "model"
    if kind != "model" or file.fields.whole("split.count", 0, least=0) > 1:
        raise ValueError(
            f"it holds a part of a model (general.type is {shown(kind)}, split.count is"
            f" {file.metadata.get('split.count', 'absent')}); give one file with a whole model"
        )
    prefix = f"{family}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    fields = Fields({key: _one_value(f"{prefix}{key}", value, own) for key, value in own.items()}, prefix)
    for key, value in fields.values.items():
        if key in _SHAPE_KEYS or key in _KEYS_WITHOUT_EFFECT:
            continue
        allowed = _VALUES_WITHOUT_EFFECT.get(key, _OFF)
        # Loading what is not understood would give wrong logits without a word.
        if value not in allowed:
            raise fields.refused(key, f"allowed is {' or '.join(map(repr, allowed))} or none")
    return fields


def _one_value(key: str, value: Any, own: Mapping[str, Any]) -> Any:
    """The value of all layers, where a file gives one for each."""
    if not isinstance(value, np.ndarray):
        return value
    values = value.tolist()
    if len(values) != own.get("block_count") or len(set(values)) != 1:
        raise ValueError(f"{key} is {shown(values)}; allowed is one value, or the same value for each layer")
    return values[0]


def _head_size(fields: Fields) -> int:
    """K: of keys and of values, all of it rotated."""
    # Most files leave it out where it is the width divided by the heads.
    head_size = fields.whole(
        "attention.key_length", fields.whole("embedding_length") // fields.whole("attention.head_count")
    )
    # Values of another size, or a rotation of only a part of the head as in GPT-NeoX, are not computed here.
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.whole(key, head_size) != head_size:
            raise fields.refused(key, f"allowed is the whole head, {head_size}")
    return head_size


def _rope_scaling(file: GgufFile, rope_theta: float, head_size: int) -> RopeScaling | None:
    """Llama 3's scaling, recognized by the frequency divisors that the converter stored.

    Every released Llama 3 uses low factor 1, high factor 4 and 8,192 original positions; only
    `factor` differs, and it is the largest divisor. The guess is checked against all divisors.
    """
    if ROPE_FREQUENCIES not in file.tensors:
        return None
    # The size is checked before anything is computed from it.
    if file.shape(ROPE_FREQUENCIES) == (head_size // 2,):
        divisor_k = file.dequantize(ROPE_FREQUENCIES).astype(np.float64)
        # The longest wavelength is stretched in full, so its divisor is the factor.
        scaling = RopeScaling(float(divisor_k.max()), 1.0, 4.0, 8192)
        wavelength_k = 2 * math.pi * rope_theta ** (np.arange(0, head_size, 2) / head_size)
        # The file holds float32, and other tools round otherwise: 1e-3 is far below the steps between real scalings.
        if np.allclose(divisor_k, 1 / scaling.multiplier(wavelength_k), rtol=1e-3):
            return scaling
    raise ValueError(
        f"tensor '{ROPE_FREQUENCIES}' is not Llama 3's scaling with factors (1, 4) and 8192 original positions, the"
        " only one supported; load the model's safetensors instead"
    )
