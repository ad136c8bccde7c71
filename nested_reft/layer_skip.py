"""Layer plans: which layers a nested policy keeps, as data.

A plan is an array of kept-layer indices. Its length is static, so the nested model really is
shorter; its values are dynamic, so a new plan of the same length runs the same compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class LayerPlan:
    """The layers of one policy.

    Attributes:
        kept_S: indices of the kept layers, ascending. The plan of all layers is the full model.
    """

    kept_S: Int[Array, " S"]

    @property
    def num_kept(self) -> int:
        """Kept layers: the static size that a compiled program depends on."""
        return self.kept_S.shape[0]

    @classmethod
    def full(cls, num_layers: int) -> LayerPlan:
        """The empty skip set: every layer, in order."""
        return cls(jnp.arange(num_layers, dtype=jnp.int32))

    @classmethod
    def from_mask(cls, kept_mask_L: Bool[np.ndarray, " L"]) -> LayerPlan:
        """The plan that keeps the layers where `kept_mask_L` is True (host values only)."""
        return cls(jnp.asarray(np.flatnonzero(kept_mask_L), dtype=jnp.int32))

    @classmethod
    def skipping(cls, num_layers: int, skipped: Sequence[int]) -> LayerPlan:
        """The plan that keeps every layer not named in `skipped`."""
        kept_mask_L = np.ones(num_layers, dtype=bool)
        kept_mask_L[list(skipped)] = False
        return cls.from_mask(kept_mask_L)

    def to_mask(self, num_layers: int) -> Bool[Array, " L"]:
        """`mask[l]` is True where layer `l` is kept."""
        return jnp.zeros(num_layers, dtype=bool).at[self.kept_S].set(True)

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the skipped layers, on the host, for logs."""
        return tuple(int(i) for i in np.flatnonzero(~np.asarray(self.to_mask(num_layers))))


@dataclass(frozen=True)
class NestingConfig:
    """How the behavior policy's layers are chosen, anew for each batch.

    Attributes:
        skip_ratio: x in [0, 1); floor(x * L) layers are skipped. Ignored by `fixed`.
        border: the first and last `border` layers are never skipped.
        choice: `uniform` draws without replacement; `fixed` always skips `layers`; `measured`
            draws without replacement with probability proportional to
            exp(-divergence / divergence_temperature), so that cheap layers go more often.
        layers: the skipped layers of `fixed`.
        divergence_file: for `measured`, a JSON file written by `nested-reft measure-layers`; a
            relative path is looked for beside the shipped configurations too.
        divergence_temperature: nats; 0 always skips the layers of least divergence.
    """

    skip_ratio: float = 0.0
    border: int = 1
    choice: Literal["uniform", "fixed", "measured"] = "uniform"
    layers: tuple[int, ...] = ()
    divergence_file: str | None = None
    divergence_temperature: float = 0.05

    def __post_init__(self):
        if not (math.isfinite(self.skip_ratio) and 0 <= self.skip_ratio < 1):
            raise ValueError(f"nesting.skip_ratio is {self.skip_ratio}; allowed is 0 <= skip_ratio < 1")
        if self.border < 0:
            raise ValueError(f"nesting.border is {self.border}; allowed is 0 or more")
        if not (math.isfinite(self.divergence_temperature) and self.divergence_temperature >= 0):
            raise ValueError(
                f"nesting.divergence_temperature is {self.divergence_temperature}; allowed is 0 or more (nats)"
            )
        if self.choice == "fixed" and not self.layers:
            raise ValueError("nesting.layers is empty; choice 'fixed' needs the layers to skip")
        if self.choice != "fixed" and self.layers:
            raise ValueError(f"nesting.layers is {self.layers}, but choice is '{self.choice}'; set choice to 'fixed'")
        if self.choice == "measured" and self.divergence_file is None:
            raise ValueError(
                "nesting.divergence_file is not set; choice 'measured' needs the file that"
                " 'nested-reft measure-layers' writes"
            )

    def num_skipped(self, num_layers: int) -> int:
        """floor(skip_ratio * L), or the number of fixed layers."""
        if self.choice == "fixed":
            return len(set(self.layers))
        return math.floor(self.skip_ratio * num_layers + 1e-9)

    def validate_for(self, num_layers: int) -> None:
        """Refuses a configuration that this model's depth does not allow.

        Raises:
            ValueError: a border too wide, more layers to skip than there are, or fixed layers that
                the model does not have.
        """
        if self.choice == "fixed":
            unknown = [layer for layer in self.layers if not 0 <= layer < num_layers]
            if unknown:
                raise ValueError(f"nesting.layers names {unknown}; the model has layers 0 to {num_layers - 1}")
            if len(set(self.layers)) >= num_layers:
                raise ValueError(f"nesting.layers skips all {num_layers} layers; at least one must remain")
            return
        candidates = num_layers - 2 * self.border
        if self.num_skipped(num_layers) > 0 and candidates < self.num_skipped(num_layers):
            raise ValueError(
                f"nesting.border is {self.border} and nesting.skip_ratio {self.skip_ratio}: {max(candidates, 0)} of"
                f" {num_layers} layers may be skipped, but {self.num_skipped(num_layers)} are to be; lower one of them"
            )
        if self.num_skipped(num_layers) >= num_layers:
            raise ValueError(
                f"nesting.skip_ratio is {self.skip_ratio}: no layer of {num_layers} would remain; lower it"
            )


def draw_plan(
    key: jax.Array,
    config: NestingConfig,
    num_layers: int,
    divergence_L: Float[np.ndarray, " L"] | None = None,
) -> LayerPlan:
    """Draws the layer plan of one batch.

    Source: Nested-ReFT (arXiv 2508.10123): floor(x L) layers, uniform without replacement from
    those at least `border` away from either end, anew for each batch. `measured` is this
    project's own: the same draw with layer weights exp(-divergence / temperature), by the
    Gumbel top-k method; it equals `uniform` when all divergences are equal.

    Args:
        key: PRNG key of this batch.
        config: validated for `num_layers`.
        num_layers: L.
        divergence_L: KL(full || full without layer l) per token in nats, for `measured`.

    Returns:
        A plan of `L - config.num_skipped(L)` layers.
    """
    if config.choice == "fixed":
        return LayerPlan.skipping(num_layers, config.layers)
    num_skipped = config.num_skipped(num_layers)
    if num_skipped == 0:
        return LayerPlan.full(num_layers)
    score_L = np.asarray(jax.random.gumbel(key, (num_layers,)), dtype=np.float64)
    if config.choice == "measured":
        if divergence_L is None:
            raise ValueError("draw_plan: choice 'measured' needs divergence_L")
        if config.divergence_temperature == 0:
            score_L = -np.asarray(divergence_L, dtype=np.float64)
        else:
            score_L = score_L - divergence_L / config.divergence_temperature
    index_L = np.arange(num_layers)
    allowed_L = (index_L >= config.border) & (index_L < num_layers - config.border)
    score_L = np.where(allowed_L, score_L, -np.inf)
    skipped = np.argsort(-score_L, kind="stable")[:num_skipped]
    return LayerPlan.skipping(num_layers, skipped.tolist())
