"""The `config.json` of Hugging Face models, in and out: Llama, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from nested_reft.models.config import FAMILIES, ModelConfig, RopeScaling
from nested_reft.untrusted import Fields, shown

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# transformers takes these where config.json says nothing.
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}


def config_from_huggingface(settings: Mapping[str, Any]) -> ModelConfig:
    """The model's shape from the contents of `config.json`.

    Fields that are absent take the defaults of transformers for their family.

    Args:
        settings: the parsed `config.json`.

    Raises:
        ValueError: a field is missing, or asks for something that the model does not compute.
    """
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type is {shown(family)}; allowed are {', '.join(FAMILIES)}")
    fields = Fields(settings, "config.json: ")
    _refuse_unsupported(fields, family)
    width, num_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    max_positions = fields.whole("max_position_embeddings", _DEFAULT_MAX_POSITIONS[family])
    theta, scaling = _rope(fields, max_positions)
    # Qwen3's heads do not follow from its width; 128 is the default of transformers.
    default_head_size = 128 if family == "qwen3" else width // num_heads
    return ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        num_layers=fields.whole("num_hidden_layers"),
        width=width,
        hidden_width=fields.whole("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(fields, family, num_heads),
        # Some files hold the field with the value null.
        head_size=default_head_size if fields.get("head_dim") is None else fields.whole("head_dim"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_positions=max_positions,
        family=family,
    )


def config_to_huggingface(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The contents of `config.json` for a model.

    Rotary settings are written in the older form, `rope_theta` and `rope_scaling`, which every
    version of transformers reads.

    Args:
        config: the model.
        dtype: the dtype of the weights that are written beside it.

    Raises:
        ValueError: the family's Hugging Face model has no such biases or norms, or no such width.
    """
    # transformers refuses the directory, although it says the size of the heads by itself.
    if config.family == "llama" and config.width % config.num_heads:
        raise ValueError(
            f"model.shape.width is {config.width} and model.shape.num_heads {config.num_heads}; a 'llama' model is"
            " exported only where the first is a multiple of the second"
        )
    # The classes of transformers have these biases and norms fixed by family, so others could not be loaded.
    for field, family in (("qkv_bias", "qwen2"), ("qk_norm", "qwen3")):
        if getattr(config, field) != (config.family == family):
            raise ValueError(
                f"model.{field} is {getattr(config, field)}; a '{config.family}' model is exported with"
                f" {config.family == family} only"
            )
    settings = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_to_huggingface(config.rope_scaling),
        "tie_word_embeddings": config.tied_embeddings,
        # The older of two names, which all versions of transformers understand.
        "torch_dtype": str(jnp.dtype(dtype)),
        "use_cache": True,
    }
    if config.family != "qwen2":
        settings["attention_bias"] = False
    if config.family == "llama":
        settings["mlp_bias"] = False
    else:
        settings["use_sliding_window"] = False
    return settings


def _kv_heads(fields: Fields, family: str, num_heads: int) -> int:
    """Null means one key head per query head, and so does no field in Llama; Qwen must say."""
    absent = "num_key_value_heads" not in fields.values
    if fields.get("num_key_value_heads") is None and (family == "llama" or not absent):
        return num_heads
    return fields.whole("num_key_value_heads")


def _refuse_unsupported(fields: Fields, family: str) -> None:
    # Each of these would change what the model computes, and loading it anyway would give wrong logits.
    allowed = {
        "hidden_act": ("silu", "swish", None),
        "mlp_bias": (False, None),
        "attention_bias": (True, None) if family == "qwen2" else (False, None),
        "partial_rotary_factor": (1.0, None),
        "quantization_config": (None,),
    }
    for field, values in allowed.items():
        if fields.get(field) not in values:
            raise fields.refused(
                field, f"allowed is {' or '.join('absent' if value is None else repr(value) for value in values)}"
            )
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        raise fields.refused("layer_types", "allowed is a list of texts")
    if _slides(fields, layer_types):
        raise ValueError(
            f"config.json: sliding_window is {shown(fields.get('sliding_window'))} and in use"
            f" (use_sliding_window {shown(fields.get('use_sliding_window'))}, layer_types"
            f" {shown(sorted(set(layer_types)))}); allowed is full attention in every layer"
        )


def _slides(fields: Fields, layer_types: list[str]) -> bool:
    """True when any layer's attention is limited to a window; Qwen slides from `max_window_layers` up."""
    if layer_types:
        return set(layer_types) != {"full_attention"}
    full_layers = fields.whole("max_window_layers", 28, least=0)
    return bool(fields.get("use_sliding_window")) and full_layers < fields.whole("num_hidden_layers")


def _rope(fields: Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embeddings, from `rope_parameters` or the older fields."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise fields.refused(name, "allowed is an object")
    inner = Fields(rope, f"config.json: {name}.")
    theta = inner.number("rope_theta") if "rope_theta" in rope else fields.number("rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    # A dictionary among the values means one setting per kind of layer, which is not supported.
    nested = any(isinstance(value, dict) for value in rope.values())
    if kind not in ("default", "llama3") or nested or rope.get("partial_rotary_factor", 1) != 1:
        raise fields.refused(name, "allowed rope_type is default or llama3, for the whole head and all layers alike")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=inner.number("factor"),
        low_frequency_factor=inner.number("low_freq_factor"),
        high_frequency_factor=inner.number("high_freq_factor"),
        original_max_positions=inner.whole("original_max_position_embeddings", max_positions),
    )


def _rope_scaling_to_huggingface(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
