"""How completions are sampled: the configuration of rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nested_reft.literals import check_choice, check_whole
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.untrusted import MAX_WHOLE

Mode = Literal["nested", "exact"]
Weights = Literal["target", "bfloat16", "int8"]


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled.

    Attributes:
        group_size: G, completions per prompt; every advantage but `no_baseline` needs 2 or more.
        max_completion_tokens: C.
        sampling: temperature and truncation.
        mode: `nested` samples from the layer-skipped policy; `exact` only drafts with it, and the full model
            verifies, so that samples are exactly its own (`rollout.exact`).
        mixture_alpha: in (0, 1], the probability of drawing a completion from the full model instead of the
            nested one (a defensive mixture); None draws all from the nested one.
        draft_length: tokens that an `exact` round drafts before the full model verifies them.
        weights: what rollouts are computed with: the `target`'s own weights, or a `bfloat16` or `int8` copy made
            after each update (`models.low_precision`), whose rounding the importance weight corrects.
        rows: completions of a batch that are decoded at the same time (`rollout.refill`): one that ends makes room for
            the next, so caches grow with `rows` and not with the batch. It changes no sample but for ties of rounding.
            0 decodes all at once.
    """

    group_size: int
    max_completion_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mode: Mode = "nested"
    mixture_alpha: float | None = None
    draft_length: int = 2
    weights: Weights = "target"
    rows: int = 0

    def __post_init__(self):
        for name in ("group_size", "max_completion_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}; allowed is 1 or more")
        # A completion is never longer than its limit, and a small one may be shorter than the default draft.
        check_whole("rollout.draft_length", self.draft_length, 1, max(2, self.max_completion_tokens))
        check_whole("rollout.rows", self.rows, 0, MAX_WHOLE, "all at once")
        # Completions that are all alike have equal rewards, so every advantage of the group would be zero.
        if self.sampling.temperature == 0:
            raise ValueError("rollout.sampling.temperature is 0; allowed is more, as greedy completions are all alike")
        if self.sampling.top_k == 1:
            raise ValueError(
                "rollout.sampling.top_k is 1; allowed is 0 (keep all), or 2 or more, since greedy completions are alike"
            )
        check_choice("rollout.mode", self.mode, Mode)
        check_choice("rollout.weights", self.weights, Weights)
        if self.mixture_alpha is not None and not 0 < self.mixture_alpha <= 1:
            raise ValueError(
                f"rollout.mixture_alpha is {self.mixture_alpha}; allowed is 0 < mixture_alpha <= 1, or None"
            )
        # Verification makes samples those of the weights that verify. With a rounded copy they would be the copy's.
        if self.mode == "exact" and self.weights != "target":
            raise ValueError(
                f"rollout.mode is 'exact' and rollout.weights '{self.weights}'; exact rollouts are the target's own:"
                " use weights 'target', or mode 'nested'"
            )
        if self.mode == "exact" and self.rows:
            raise ValueError(
                f"rollout.mode is 'exact' and rollout.rows {self.rows}; exact rollouts draft and verify all completions"
                " of a batch at once: leave rows at 0, or use mode 'nested'"
            )
        if self.mode == "exact" and self.mixture_alpha is not None:
            raise ValueError(
                f"rollout.mode is 'exact' and rollout.mixture_alpha {self.mixture_alpha}; exact rollouts are all the"
                " full model's, so there is nothing to mix: leave mixture_alpha out, or use mode 'nested'"
            )
        # The mixture's weight takes pi_full from the target, while a copy has another density.
        if self.weights != "target" and self.mixture_alpha is not None:
            raise ValueError(
                f"rollout.weights is '{self.weights}' and rollout.mixture_alpha {self.mixture_alpha}; a mixture weighs"
                " with the target's own density: use weights 'target', or leave mixture_alpha out"
            )
