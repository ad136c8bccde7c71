"""Which layers the behavior policy leaves out: how the plan of a batch is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from nested_reft.bridging import BridgeConfig
from nested_reft.layer_plan import LayerPlan, Part, PlanShape
from nested_reft.literals import check_choice

Choice = Literal["uniform", "per_layer", "fixed", "measured"]
LeftOut = Literal["layer", "attention", "mlp"]


@dataclass(frozen=True)
class NestingConfig:
    """How the behavior policy's layers are chosen, anew for each batch.

    Attributes:
        skip_ratio: x in [0, 1); floor(x * L) layers are left out. Ignored by `fixed`; where nesting
            control starts.
        border: the first and last `border` layers are never left out.
        choice: which layers; all but `fixed` draw one after the other, without replacement.
            `uniform`: all alike. `per_layer`: with probability rising with depth, as in LayerSkip.
            `measured`: with probability proportional to exp(-divergence / divergence_temperature),
            so that cheap layers go more often. `fixed`: always `layers`.
        layers: those of `fixed`.
        leave_out: what is left out of the layers that are chosen: all of each, or its attention or MLP alone.
        bridge: what stands in for whole layers that are left out. With bridges `measured` needs no file: layers are
            measured with their bridges after each fit.
        divergence_file: for `measured`, a JSON file written by `nested-reft measure-layers`; one that
            ships is found by its name. None with `remeasure_every` starts from equal divergences, which is
            `uniform`.
        divergence_temperature: nats; 0 always skips the layers of least divergence.
        remeasure_every: for `measured`, steps between new measurements of all layers, the first in the
            first step; 0 for none. Each replaces the one before from the next step on.
        remeasure_prompts: prompts of the step's own rollouts that a new measurement reads.
        remeasure_completions: completions of each of them that it reads.
    """

    skip_ratio: float = 0.0
    border: int = 1
    choice: Choice = "uniform"
    layers: tuple[int, ...] = ()
    leave_out: LeftOut = "layer"
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    divergence_file: str | None = None
    divergence_temperature: float = 0.05
    remeasure_every: int = 0
    remeasure_prompts: int = 4
    remeasure_completions: int = 2

    def __post_init__(self):
        check_choice("nesting.choice", self.choice, Choice)
        check_choice("nesting.leave_out", self.leave_out, LeftOut)
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
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"nesting.layers is {self.layers}, which names a layer twice; allowed is each once")
        if self.divergence_file == "":
            raise ValueError(
                "nesting.divergence_file is ''; allowed is a file that `nested-reft measure-layers` wrote, or None"
            )
        # A setting that nothing reads is refused: the user would believe that it works. Those that need another part of
        # the configuration are with `training.compatibility`.
        if self.choice != "fixed" and self.layers:
            raise ValueError(f"nesting.layers is {self.layers}, but choice is '{self.choice}'; set choice to 'fixed'")
        self._check_bridge()
        if self.choice == "measured" and not (self.divergence_file or self.remeasure_every or self.bridge.is_on):
            raise ValueError(
                "nesting.divergence_file is not set; choice 'measured' needs the file that"
                " 'nested-reft measure-layers' writes, or nesting.remeasure_every"
            )
        if self.remeasure_every < 0:
            raise ValueError(f"nesting.remeasure_every is {self.remeasure_every}; allowed is 0 (never) or more steps")
        if self.remeasure_every and self.choice != "measured":
            raise ValueError(
                f"nesting.remeasure_every is {self.remeasure_every}, but choice is '{self.choice}'; only 'measured'"
                " reads it"
            )
        for name in ("remeasure_prompts", "remeasure_completions"):
            if getattr(self, name) < 1:
                raise ValueError(f"nesting.{name} is {getattr(self, name)}; allowed is 1 or more")

    def _check_bridge(self) -> None:
        """Refuses settings that bridges would not read, or that could not use them."""
        bridge = self.bridge
        if not bridge.is_on:
            return
        if self.leave_out != "layer":
            raise ValueError(
                f"nesting.leave_out is '{self.leave_out}' and nesting.bridge.kind '{bridge.kind}': a bridge stands in"
                " for a whole layer; set leave_out to 'layer', or bridge.kind to 'off'"
            )
        if self.divergence_file is not None or self.remeasure_every:
            raise ValueError(
                f"nesting.bridge.kind is '{bridge.kind}': layers are measured with their bridges after each fit, so"
                " nesting.divergence_file and nesting.remeasure_every are not read; leave both out"
            )
        # How many bridges a plan has must not depend on which layers were drawn, because each number compiles.
        if bridge.kind == "per_run" and self.choice != "fixed":
            raise ValueError(
                f"nesting.bridge.kind is 'per_run' and nesting.choice '{self.choice}'; the runs must be known"
                " beforehand: set choice to 'fixed', or bridge.kind to 'per_layer'"
            )

    @property
    def part(self) -> Part:
        """What a plan does with the layers that are chosen."""
        if self.bridge.is_on:
            return Part.BRIDGE
        return {"layer": Part.SKIP, "attention": Part.NO_ATTENTION, "mlp": Part.NO_MLP}[self.leave_out]

    @property
    def is_deterministic(self) -> bool:
        """Whether every plan of one size is the same until layers are measured anew."""
        return self.choice == "fixed" or (self.choice == "measured" and self.divergence_temperature == 0)

    def num_skipped(self, num_layers: int) -> int:
        """floor(skip_ratio * L), or the number of fixed layers.

        Args:
            num_layers: L of the model.

        Returns:
            Layers that each plan skips, unless nesting control chooses another number.
        """
        if self.choice == "fixed":
            return len(self.layers)
        return layers_in(self.skip_ratio, num_layers)

    def most_skipped(self, num_layers: int) -> int:
        """The largest number of layers that a plan may skip: not the borders, and not all.

        Args:
            num_layers: L of the model.
        """
        if self.choice == "fixed":
            return self.num_skipped(num_layers)
        unskippable = max(2 * self.border, 1)  # with `per_layer`, layer 0 has probability 0
        return max(num_layers - unskippable, 0)

    def validate_for(self, num_layers: int) -> None:
        """Refuses a configuration that this model's depth does not allow.

        Args:
            num_layers: L of the model.

        Raises:
            ValueError: a border too wide, more layers to skip than there are, a ratio that skips none, or fixed
                layers that the model does not have.
        """
        if self.choice == "fixed":
            unknown = [layer for layer in self.layers if not 0 <= layer < num_layers]
            if unknown:
                raise ValueError(f"nesting.layers names {unknown}; the model has layers 0 to {num_layers - 1}")
            if len(self.layers) >= num_layers:
                raise ValueError(f"nesting.layers skips all {num_layers} layers; at least one must remain")
            return
        check_share("nesting.skip_ratio", self.skip_ratio, num_layers)
        most = self.most_skipped(num_layers)
        if self.num_skipped(num_layers) > most:
            raise ValueError(
                f"nesting.border is {self.border} and nesting.skip_ratio {self.skip_ratio}: {most} of"
                f" {num_layers} layers may be skipped, but {self.num_skipped(num_layers)} are to be; lower one of them"
            )


def layers_in(share: float, num_layers: int) -> int:
    """floor(share * L): how many layers a share of them is.

    Args:
        share: in [0, 1).
        num_layers: L of the model.
    """
    # A product such as 0.29 * 100 = 28.999... lies just below its integer, and floor would lose a layer.
    return math.floor(share * num_layers + 1e-9)


def check_share(name: str, share: float, num_layers: int) -> None:
    """Refuses a share of layers that is none of them, since the user believes that some are left out.

    Args:
        name: of the field.
        share: its value; 0 asks for none and is fine.
        num_layers: L of the model.

    Raises:
        ValueError: the share is more than 0 and less than one layer.
    """
    if share and not layers_in(share, num_layers):
        raise ValueError(
            f"{name} is {share:g}, which of {num_layers} layers is none; allowed is 0, or at least"
            f" {math.ceil(1e4 / num_layers) / 1e4:g}, which is one layer"
        )


def draw_plan(
    key: jax.Array,
    config: NestingConfig,
    num_layers: int,
    divergence_L: Float[np.ndarray, " L"] | None = None,
    num_skipped: int | None = None,
) -> LayerPlan:
    """Draws the layer plan of one batch.

    Layers are drawn one after the other without replacement, each with probability proportional to
    its weight p_l among those left; the Gumbel top-k method draws them all at once:

        uniform     p_l = 1: Nested-ReFT (arXiv 2508.10123), floor(x L) layers
        per_layer   p_l = exp(l ln 2 / (L - 1)) - 1: how LayerSkip's dropout rates rise with depth (arXiv
                    2404.16710, section 4.1): 0 for the first layer, 1 for the last. LayerSkip drops
                    each layer by itself; here their number is given, since a plan's size compiles.
        measured    p_l = exp(-divergence_l / temperature), this project's own. All layers cost the same and a plan
                    leaves the same part out of each, so divergence per saved second ranks them alike.

    Layers less than `border` from either end are never drawn. Equal weights give equal plans,
    whatever the choice.

    Args:
        key: PRNG key of this batch.
        config: validated for `num_layers`.
        num_layers: L.
        divergence_L: KL(full || full without layer l) per token in nats, for `measured`.
        num_skipped: layers to skip, at most `config.most_skipped(L)`; None takes those of `skip_ratio`.
            `fixed` does not read it.

    Returns:
        A plan that runs `L - num_skipped` layers whole, and what `config` puts in place of the others.

    Raises:
        ValueError: `measured` without divergences, or more layers to skip than may be.
    """
    if config.choice == "fixed":
        return _plan_without(config, num_layers, config.layers)
    num_skipped = config.num_skipped(num_layers) if num_skipped is None else num_skipped
    if not 0 <= num_skipped <= config.most_skipped(num_layers):
        raise ValueError(f"draw_plan: num_skipped is {num_skipped}; allowed is 0 to {config.most_skipped(num_layers)}")
    # With nothing to skip, `measured` needs no divergences.
    if num_skipped == 0:
        return LayerPlan.full(num_layers)
    score_L = _log_weights(config, num_layers, divergence_L)
    # Gumbel noise on the log-weights makes the k largest scores a draw of k layers without replacement.
    if not (config.choice == "measured" and config.divergence_temperature == 0):
        score_L = score_L + np.asarray(jax.random.gumbel(key, (num_layers,)), dtype=np.float64)
    index_L = np.arange(num_layers)
    allowed_L = (index_L >= config.border) & (index_L < num_layers - config.border)
    # A score of -inf comes after every other one, and `most_skipped` keeps it out of the first `num_skipped`.
    score_L = np.where(allowed_L, score_L, -np.inf)
    # A stable sort lets ties, which temperature 0 can have, always fall to the lower layer.
    skipped = np.argsort(-score_L, kind="stable")[:num_skipped]
    return _plan_without(config, num_layers, skipped.tolist())


def _plan_without(config: NestingConfig, num_layers: int, layers: Sequence[int]) -> LayerPlan:
    """The plan that leaves out of these layers what the configuration says."""
    plan = LayerPlan.skipping(num_layers, layers, config.part)
    if config.bridge.kind != "per_run":
        return plan
    part_L = plan.host_parts(num_layers)
    # The bridge of a run's first layer spans the others, which have no step.
    inner = (part_L[1:] == Part.BRIDGE) & (part_L[:-1] == Part.BRIDGE)
    part_L[1:][inner] = Part.SKIP
    return LayerPlan.of_parts(part_L)


def _log_weights(
    config: NestingConfig, num_layers: int, divergence_L: Float[np.ndarray, " L"] | None
) -> Float[np.ndarray, " L"]:
    """log p_l of `draw_plan`; at temperature 0 the order alone, which no noise is added to."""
    if config.choice == "per_layer":
        with np.errstate(divide="ignore"):  # log 0 of the first layer
            # A model of one layer has no depth to divide by, so the divisor is at least 1.
            return np.log(np.expm1(np.arange(num_layers) * math.log(2) / max(num_layers - 1, 1)))
    if config.choice == "measured":
        if divergence_L is None:
            raise ValueError("draw_plan: choice 'measured' needs divergence_L")
        # At temperature 0 only the order counts, and any divisor leaves it as it is.
        return -np.asarray(divergence_L, dtype=np.float64) / (config.divergence_temperature or 1.0)
    # Equal weights: the noise alone decides.
    return np.zeros(num_layers)


@dataclass(frozen=True, eq=False)
class PlanRule:
    """How the next plan of a run is drawn.

    Attributes:
        config: of the run.
        divergence_L: of each layer, in nats per token, as it was last measured.
        num_skipped: layers that the plan leaves out.
        nests: False until the run has fitted its bridges; plans are the full model until then.
    """

    config: NestingConfig
    divergence_L: Float[np.ndarray, " L"]
    num_skipped: int
    nests: bool = True

    def draw(self, key: jax.Array) -> LayerPlan:
        """The plan.

        Args:
            key: PRNG key of the plan.
        """
        num_layers = len(self.divergence_L)
        if not self.nests:
            return LayerPlan.full(num_layers)
        return draw_plan(key, self.config, num_layers, self.divergence_L, self.num_skipped)


def nested_shape(config: NestingConfig, num_layers: int) -> PlanShape:
    """The shape of the plans that a configuration draws: what a compiled rollout depends on.

    Args:
        config: validated for `num_layers`.
        num_layers: L of the model.
    """
    # All plans of a configuration that leave out as many layers have one shape, so any of them tells it.
    divergence_L = np.zeros(num_layers)
    return draw_plan(jax.random.key(0), config, num_layers, divergence_L).shape
