"""When the bridges of a nested policy are fitted, and on which texts: pure rules on a small state.

The texts are the rollouts of the run itself. The first steps run the full model, until they have sampled enough
tokens to fit on. From then on the latest texts are kept, so that a refit follows the policy as it moves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from nested_reft.literals import check_choice
from nested_reft.types import Rollouts

BridgeKind = Literal["off", "per_layer", "per_run"]
SMALLEST = 1e-12  # of a ridge or a learning rate


@dataclass(frozen=True)
class BridgeConfig:
    """What stands in for the layers that a plan leaves out, and how it is found.

    Attributes:
        kind: `off` skips layers plainly. `per_layer` gives each of them a bridge. `per_run` gives one bridge to each
            run of neighbouring ones.
        rank: r of the bridges' maps; None is full rank.
        ridge: strength of the ridge, as a share of the mean diagonal of the normal equations.
        tokens: completion tokens that a fit reads: the latest.
        refit_every: steps between fits after the first; 0 fits once.
        distil_steps: steps of distillation after each fit, which lower KL(full || nested) of plans as the run draws
            them.
        distil_learning_rate: of its optimizer, Adam.
        file: bridges to begin with, which `nested-reft fit-bridges` wrote; None fits them in the run's first steps.
    """

    kind: BridgeKind = "off"
    rank: int | None = None
    ridge: float = 0.01
    tokens: int = 8192
    refit_every: int = 0
    distil_steps: int = 0
    distil_learning_rate: float = 3e-4
    file: str | None = None

    def __post_init__(self):
        check_choice("nesting.bridge.kind", self.kind, BridgeKind)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"nesting.bridge.rank is {self.rank}; allowed is 1 or more, or None for full rank")
        for name in ("ridge", "distil_learning_rate"):
            # Less than this is nothing beside float32's rounding.
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= SMALLEST):
                raise ValueError(f"nesting.bridge.{name} is {getattr(self, name)}; allowed is {SMALLEST:g} or more")
        if self.tokens < 1:
            raise ValueError(f"nesting.bridge.tokens is {self.tokens}; allowed is 1 or more")
        for name in ("refit_every", "distil_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"nesting.bridge.{name} is {getattr(self, name)}; allowed is 0 (never) or more steps")
        if self.file == "":
            raise ValueError(
                "nesting.bridge.file is ''; allowed is a file that `nested-reft fit-bridges` wrote, or None"
            )
        if not self.is_on:
            self._check_defaults()

    def _check_defaults(self) -> None:
        """Refuses settings that nothing reads, because the user would believe that they work."""
        unread = [
            f"nesting.bridge.{entry.name} is {getattr(self, entry.name)!r} (allowed is {entry.default!r})"
            for entry in dataclasses.fields(self)
            if getattr(self, entry.name) != entry.default
        ]
        if unread:
            raise ValueError(
                f"{', '.join(unread)}, but nesting.bridge.kind is 'off', so nothing reads it; set kind to 'per_layer'"
                " or 'per_run'"
            )

    @property
    def is_on(self) -> bool:
        """Whether plans have bridges."""
        return self.kind != "off"

    def validate_for(self, width: int) -> None:
        """Refuses bridges that the model or the tokens do not allow.

        Args:
            width: D of the model.

        Raises:
            ValueError: a rank above D, or fewer tokens than a fit of this rank needs.
        """
        if not self.is_on:
            return
        if self.rank is not None and self.rank >= width:
            raise ValueError(
                f"nesting.bridge.rank is {self.rank}; allowed is 1 to {width - 1}, less than the model's width, or None"
                " for full rank"
            )
        self.check_tokens(self.tokens, width, f"nesting.bridge.tokens is {self.tokens}", "raise it")

    def check_tokens(self, tokens: int, width: int, what: str, remedy: str) -> None:
        """Refuses fewer tokens than a fit needs.

        Args:
            tokens: completion tokens of the fit.
            width: D of the model.
            what: says in the message where they come from.
            remedy: says how to get more.

        Raises:
            ValueError: there are too few.
        """
        # A map of rank r has r directions to tell apart, and noise in each of them needs more than one token.
        needed = 2 * (self.rank or width)
        if tokens < needed:
            rank = "full rank" if self.rank is None else f"rank {self.rank}"
            raise ValueError(
                f"{what}; a bridge of {rank} needs {needed} or more: {remedy}, or lower nesting.bridge.rank"
            )


class TextBatch(NamedTuple):
    """One batch of texts on the host: what `divergence.Texts` holds."""

    prompt_BP: Int[np.ndarray, "B P"]
    prompt_length_B: Int[np.ndarray, " B"]
    tokens_BGC: Int[np.ndarray, "B G C"]
    length_BG: Int[np.ndarray, "B G"]

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return int(np.sum(self.length_BG))


@dataclass(frozen=True)
class BridgeState:
    """What is kept for the next fit.

    Attributes:
        texts: the latest batches, oldest first.
        fits: fits so far; plans have bridges from the first on.
        fitted_at: the step of the latest fit.
    """

    texts: tuple[TextBatch, ...] = ()
    fits: int = 0
    fitted_at: int = 0

    @property
    def tokens(self) -> int:
        """Completion tokens of all texts."""
        return sum(batch.tokens for batch in self.texts)

    def to_plain(self) -> dict[str, Any]:
        """The state as plain values and arrays."""
        return {"texts": [list(batch) for batch in self.texts], "fits": self.fits, "fitted_at": self.fitted_at}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> BridgeState:
        """The state that `to_plain` wrote.

        Args:
            value: what `to_plain` returned.
        """
        return cls(tuple(TextBatch(*batch) for batch in value["texts"]), value["fits"], value["fitted_at"])


def add(state: BridgeState, config: BridgeConfig, found: Sequence[Rollouts]) -> BridgeState:
    """Takes in the texts of a step, and drops the oldest batches that a fit does not need.

    Args:
        state: before.
        config: says how many tokens a fit reads.
        found: everything that the step generated.
    """
    if not config.is_on or (state.fits and not config.refit_every):
        return state
    texts = [*state.texts, *(_texts_of(rollouts) for rollouts in found)]
    while sum(batch.tokens for batch in texts[1:]) >= config.tokens:
        texts = texts[1:]
    return BridgeState(tuple(texts), state.fits, state.fitted_at)


def _texts_of(rollouts: Rollouts) -> TextBatch:
    fields = (rollouts.prompt_BP, rollouts.prompt_length_B, rollouts.tokens_BGC, rollouts.length_BG)
    return TextBatch(*(np.asarray(field) for field in fields))


def is_due(state: BridgeState, config: BridgeConfig, number: int) -> bool:
    """Whether the bridges are to be fitted at the end of this step.

    Args:
        state: with the step's texts.
        config: the rule.
        number: of the step, counted from 0.
    """
    if not config.is_on or state.tokens < config.tokens:
        return False
    return not state.fits or bool(config.refit_every and number - state.fitted_at >= config.refit_every)


def fitted(state: BridgeState, config: BridgeConfig, number: int) -> BridgeState:
    """The state after a fit; texts that no later fit will read are let go.

    Args:
        state: before.
        config: the rule.
        number: of the step, counted from 0.
    """
    return BridgeState(state.texts if config.refit_every else (), state.fits + 1, number)
