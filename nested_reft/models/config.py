"""Shape and flavour of a decoder-only transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary embeddings.

    Wavelengths longer than `original_max_positions / low_frequency_factor` are stretched by
    `factor`, those shorter than `original_max_positions / high_frequency_factor` are kept, and
    those between are interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int

    def __post_init__(self):
        if not (0 < self.low_frequency_factor < self.high_frequency_factor and self.factor > 0):
            raise ValueError(
                f"model.shape.rope_scaling has factor {self.factor}, low_frequency_factor {self.low_frequency_factor}"
                f" and high_frequency_factor {self.high_frequency_factor}; all must be more than 0, and the last must"
                " be more than the one before"
            )
        if self.original_max_positions < 1:
            raise ValueError(
                f"model.shape.rope_scaling.original_max_positions is {self.original_max_positions};"
                " allowed is 1 or more"
            )

    def multiplier(self, wavelength_k: Any) -> Any:
        """What each rotary frequency is multiplied by.

        Args:
            wavelength_k: in positions, as an array of NumPy or JAX.
        """
        # 0 where the wavelength is long (fully stretched), 1 where it is short (kept).
        keep_k = (self.original_max_positions / wavelength_k - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        keep_k = keep_k.clip(0.0, 1.0)
        return keep_k + (1 - keep_k) / self.factor


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
        vocab_size, num_layers, width, hidden_width: V, L, D, F.
        num_heads, num_kv_heads, head_size: H, J, K; H is a multiple of J.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3 scaling, or None.
        norm_epsilon: added to the mean square in RMSNorm.
        qkv_bias: biases on the q, k and v projections (Qwen2, Qwen2.5).
        qk_norm: RMSNorm over each head's q and k before the rotation (Qwen3).
        tied_embeddings: the output head is the transposed embedding.
        max_positions: longest sequence the model was made for, in tokens.
        family: `llama`, `qwen2` or `qwen3`: names the exported architecture.
    """

    vocab_size: int
    num_layers: int
    width: int
    hidden_width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    max_positions: int = 2048
    family: str = "llama"

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "width", "hidden_width", "num_heads", "num_kv_heads", "head_size")
        for name in (*sizes, "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.shape.{name} is {getattr(self, name)}; allowed is 1 or more")
        # Each key head serves the same number of query heads (grouped-query attention).
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.shape.num_heads is {self.num_heads}, model.shape.num_kv_heads {self.num_kv_heads};"
                " the first must be a multiple of the second"
            )
        # The rotation turns entry i together with entry i + K/2.
        if self.head_size % 2:
            raise ValueError(f"model.shape.head_size is {self.head_size}; rotary embeddings need an even size")
        for name in ("rope_theta", "norm_epsilon"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"model.shape.{name} is {getattr(self, name)}; allowed is more than 0")
        if self.family not in FAMILIES:
            raise ValueError(f"model.shape.family is '{self.family}'; allowed are {', '.join(FAMILIES)}")


FAMILIES = ("llama", "qwen2", "qwen3")
