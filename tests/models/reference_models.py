"""Small random Hugging Face models: the independent reference of the weight-format tests."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reference logits need torch")
transformers = pytest.importorskip("transformers", reason="reference logits need transformers")

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
# With 64 original positions and theta 10,000, heads of 16 have kept, interpolated and stretched wavelengths.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama3": ("Llama", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_untied": ("Qwen2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-3}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_untied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
}


def random_model(case: str, **changes):
    """The case's model with every weight, norm and bias random, so that none can be left out unnoticed."""
    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(**SHAPE | settings | changes)
    torch.manual_seed(sum(map(ord, case)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.5 if name.endswith("bias") else 0.2)
    return model


def reference_logits(model, tokens_BT) -> np.ndarray:
    """Logits of a Hugging Face model, in float32."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens_BT))).logits.float().numpy()


def random_tokens(batch: int, length: int, vocab_size: int = SHAPE["vocab_size"]) -> np.ndarray:
    """Token ids of a fixed seed."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length), dtype=np.int32)
