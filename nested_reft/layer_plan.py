"""Layer plans: what a nested policy runs of each layer, as data.

A plan is a list of steps. Each step runs a part of one layer: all of it, its attention alone, its MLP alone, or the
bridge that stands in for it (`models.bridges`). How many steps of each kind there are is static, so the nested model
really is cheaper; which layers they are of is dynamic, so a new plan of the same counts runs the same compiled program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Int8


class Part(IntEnum):
    """What a plan does with a layer; the numbers are what `Rollouts.part_BGL` holds."""

    SKIP = 0
    """The residual stream passes the layer by. After a bridge: the bridge may span this layer too."""
    KEEP = 1
    """The whole layer runs."""
    BRIDGE = 2
    """The layer's bridge runs in its place."""
    NO_ATTENTION = 3
    """The MLP alone runs."""
    NO_MLP = 4
    """Attention alone runs."""


_STEPS = (Part.KEEP, Part.BRIDGE, Part.NO_ATTENTION, Part.NO_MLP)  # in the order of `PlanShape`


class PlanShape(NamedTuple):
    """How many steps of each kind a plan has: the static size that a compiled program depends on.

    Optional steps run their whole layer or nothing, as the plan's data says. Plans that have them share a program
    whatever the number of layers that they skip.
    """

    kept: int
    bridged: int = 0
    without_attention: int = 0
    without_mlp: int = 0
    optional: int = 0

    @classmethod
    def of(cls, parts: Iterable[int]) -> PlanShape:
        """Counts the steps; a skipped layer is none.

        Args:
            parts: a `Part` for each layer.
        """
        count = Counter(parts)
        return cls(*(count[part] for part in _STEPS))

    @property
    def steps(self) -> int:
        """Steps of all kinds."""
        return sum(self)

    @property
    def cached(self) -> int:
        """Steps with attention, each of which needs caches."""
        return self.kept + self.without_mlp + self.optional

    @property
    def with_mlp(self) -> int:
        """Steps that read the weights of their layer's MLP."""
        return self.kept + self.without_attention + self.optional

    @property
    def parts(self) -> tuple[Part, ...]:
        """The kinds that occur, in the order of `Part`."""
        return tuple(part for part, count in self._most().items() if count)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many steps there are of each of `parts`, at most."""
        return tuple(count for count in self._most().values() if count)

    def _most(self) -> dict[Part, int]:
        named = dict(zip(_STEPS, self, strict=False))
        return {Part.SKIP: self.optional} | named | {Part.KEEP: self.kept + self.optional}


@struct.dataclass
class LayerPlan:
    """The steps of one policy.

    Attributes:
        layer_S: the layer that each step is of, ascending.
        part_S: what runs of it, as a `Part`; SKIP in optional steps only.
        shape: how many steps of each kind there are.
    """

    layer_S: Int[Array, " S"]
    part_S: Int[Array, " S"]
    shape: PlanShape = struct.field(pytree_node=False)

    @classmethod
    def full(cls, num_layers: int) -> LayerPlan:
        """Every layer, whole and in order.

        Args:
            num_layers: L of the model.
        """
        return cls.keeping(jnp.arange(num_layers, dtype=jnp.int32))

    @classmethod
    def keeping(cls, kept_S: Int[Array, " S"]) -> LayerPlan:
        """The plan of whole layers that skips all others.

        Args:
            kept_S: indices of the kept layers, ascending; they may be traced.
        """
        return cls(kept_S, jnp.full(kept_S.shape, Part.KEEP, jnp.int32), PlanShape(kept_S.shape[0]))

    @classmethod
    def of_parts(cls, part_L: Int[np.ndarray, " L"]) -> LayerPlan:
        """The plan that does with each layer what `part_L` says (host values only).

        Args:
            part_L: a `Part` for every layer.

        Raises:
            ValueError: no layer keeps its attention, so that tokens could not see one another; or a value is no part.
        """
        part_L = np.asarray(part_L, np.int32)
        unknown = sorted({int(part) for part in part_L} - {int(part) for part in Part})
        if unknown:
            raise ValueError(f"the plan has parts {unknown}; allowed are {', '.join(f'{p}' for p in Part)}")
        shape = PlanShape.of(part_L.tolist())
        if not shape.cached:
            raise ValueError(
                f"the plan leaves attention in none of {len(part_L)} layers; at least one must keep it, or a token"
                " would not see the others"
            )
        (layer_S,) = np.nonzero(part_L)
        return cls(jnp.asarray(layer_S, jnp.int32), jnp.asarray(part_L[layer_S]), shape)

    @classmethod
    def skipping(cls, num_layers: int, layers: Sequence[int], part: Part = Part.SKIP) -> LayerPlan:
        """The plan that keeps every layer not named in `layers`, and does with those what `part` says.

        Args:
            num_layers: L of the model.
            layers: indices from 0 to L - 1, in any order; empty gives the full model.
            part: what is left of them.

        Raises:
            ValueError: a layer that the model does not have, or no layer that remains.
        """
        unknown = [layer for layer in layers if not 0 <= layer < num_layers]
        if unknown:
            raise ValueError(f"the plan skips {unknown}; the model has layers 0 to {num_layers - 1}")
        if len(set(layers)) == num_layers and part not in (Part.KEEP, Part.NO_MLP):
            raise ValueError(f"the plan skips all {num_layers} layers; at least one must remain")
        part_L = np.full(num_layers, Part.KEEP, np.int32)
        part_L[list(layers)] = part
        return cls.of_parts(part_L)

    def with_optional(self, num_layers: int, most: int) -> LayerPlan:
        """A plan of whole layers with a step for every layer, so that others which skip `most` or fewer share its
        program (host values only).

        Args:
            num_layers: L of the model.
            most: layers that any of these plans skips, at least as many as this one does.
        """
        part_L = self.host_parts(num_layers)
        assert is_whole(self) and np.sum(part_L == Part.SKIP) <= most
        shape = PlanShape(num_layers - most, optional=most)
        return LayerPlan(jnp.arange(num_layers, dtype=jnp.int32), jnp.asarray(part_L, jnp.int32), shape)

    def to_parts(self, num_layers: int) -> Int8[Array, " L"]:
        """The `Part` of every layer: the inverse of `of_parts`.

        Args:
            num_layers: L of the model.
        """
        # A scatter works with traced indices, where a Python loop over layers would not.
        return jnp.zeros(num_layers, jnp.int8).at[self.layer_S].set(self.part_S.astype(jnp.int8))

    def has_attention_S(self) -> Bool[Array, " S"]:
        """True at the steps that need caches."""
        return (self.part_S == Part.KEEP) | (self.part_S == Part.NO_MLP)

    def left_out(self, num_layers: int) -> tuple[int, ...]:
        """The layers that do not run whole, on the host, for logs.

        Args:
            num_layers: L of the model.
        """
        return tuple(left_out(self.host_parts(num_layers)))

    def host_parts(self, num_layers: int) -> Int8[np.ndarray, " L"]:
        """What `to_parts` returns, as a NumPy array: a log line must not compile a program for each new shape.

        Args:
            num_layers: L of the model.
        """
        part_L = np.zeros(num_layers, np.int8)
        part_L[np.asarray(self.layer_S)] = np.asarray(self.part_S)
        return part_L


def left_out(part_L: Int[np.ndarray, " L"]) -> list[int]:
    """The layers that a plan does not run whole, on the host, for logs.

    Args:
        part_L: what `LayerPlan.to_parts` returned.
    """
    return np.flatnonzero(np.asarray(part_L) != Part.KEEP).tolist()


def replaced_layers(part_L: Int[np.ndarray, " L"]) -> dict[str, list[int]]:
    """Those of `left_out` of which something runs all the same, by the names of their metrics.

    Args:
        part_L: what `LayerPlan.to_parts` returned.
    """
    names = {
        "bridged_layers": Part.BRIDGE,
        "layers_without_attention": Part.NO_ATTENTION,
        "layers_without_mlp": Part.NO_MLP,
    }
    found = {name: np.flatnonzero(np.asarray(part_L) == part).tolist() for name, part in names.items()}
    return {name: layers for name, layers in found.items() if layers}


def cached_steps(plan: LayerPlan) -> Int[Array, " A"]:
    """The steps of a plan that have caches, in order.

    Args:
        plan: its values may be traced.
    """
    return jnp.flatnonzero(plan.has_attention_S(), size=plan.shape.cached)


def cache_slots(plan: LayerPlan) -> Int[Array, " S"]:
    """For each step with attention the place of its caches among those of the plan; meaningless for the others.

    Args:
        plan: its values may be traced.
    """
    has_attention_S = plan.has_attention_S()
    return jnp.cumsum(has_attention_S) - has_attention_S


def is_whole(plan: LayerPlan | None) -> bool:
    """Whether a plan runs whole layers only, so that it needs neither bridges nor a choice between parts.

    Args:
        plan: None is the full model.
    """
    return plan is None or plan.shape.parts == (Part.KEEP,)
