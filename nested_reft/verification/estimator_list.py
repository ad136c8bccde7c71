"""The estimators that are enumerated: losses by name, in groups, and every claim to be unbiased."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nested_reft.estimators.advantages import Advantage
from nested_reft.estimators.importance import BiasMitigation, Level
from nested_reft.losses import presets
from nested_reft.losses.config import Normalization, PolicyGradientConfig, claims_unbiased
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig

GROUP_SIZE = 3
ALPHA = 1 / GROUP_SIZE  # so that the mixture with fixed counts draws one full completion per group
BETA = 0.1
# Each optional part of a loss, with a value at which it acts.
OPTIONAL_PARTS: tuple[dict[str, Any], ...] = (
    {},
    {"retrace_lambda": 0.9},
    {"truncate_at": 2.0},
    {"reject_by": "token_ratio", "reject_below": 0.5},
    {"reject_by": "sequence_ratio", "reject_above": 2.0},
    {"reject_by": "geometric_mean", "reject_above": 1.2},
    {"reject_by": "sequence_k3", "reject_above": 0.1},
    {"obrs_lambda": 2.0},
    {"mix_share": 0.5},
    {"self_normalized": True},
    {"clip_policies": "three"},
    {"clip_policies": "three", "clip_level": "sequence"},
    {"clip_policies": "three", "clip_level": "sequence", "clip_high": 0.2},
    {"clip_low": 0.2},
    {"clip_high": 0.2},
    {"dual_clip": 3.0},
    {"reference_kl": "k1_in_reward", "reference_kl_coefficient": BETA},
    {"reference_kl": "k2_loss", "reference_kl_coefficient": BETA},
    {"reference_kl": "k3_loss", "reference_kl_coefficient": BETA},
    {"entropy_coefficient": BETA},
    {"self_distillation_coefficient": BETA},
)
Sampling = Literal["nested", "nested, accepted at random", "full", "mixture", "mixture with fixed counts"]
Group = Literal[
    "exact", "weights", "masks", "clips", "mixes", "divisors and penalties", "presets", "trajectory balance"
]
# Trajectory balance has one loss for all of them.
BALANCED: dict[str, Sampling] = {"full rollouts": "full", "nested": "nested", "mixture": "mixture"}


@dataclass(frozen=True)
class Estimator:
    """A loss, and how the completions of its groups are drawn.

    Attributes:
        group: what the estimator is an example of.
        name: as the table shows it.
        loss: the production configuration.
        sampling: `nested` draws all from the nested model and `full` all from the full one at rollout time;
            `nested, accepted at random` also draws which completions budgeted rejection accepts. `mixture` draws each
            from the full model with probability 1/3, independently; `mixture with fixed counts` draws one of three
            from it, always.
    """

    group: Group
    name: str
    loss: PolicyGradientConfig | TrajectoryBalanceConfig
    sampling: Sampling = "nested"

    @property
    def claimed_scale(self) -> float | None:
        """The length that the expected gradient claims to have, as a share of the true one; None without a claim.

        `claims_unbiased` makes the claim, of the sampling that the loss is made for.
        """
        # Trajectory balance points along the true gradient on-policy alone, and aims at its optimum everywhere.
        if isinstance(self.loss, TrajectoryBalanceConfig):
            return None
        if not claims_unbiased(self.loss) or self.sampling != fitting_sampling(self.loss):
            return None
        return (GROUP_SIZE - 1) / GROUP_SIZE if self.loss.advantage == "group_mean" else 1.0

    @property
    def kl_coefficient(self) -> float:
        """Weight of the KL to the reference in the objective whose gradient is estimated."""
        if isinstance(self.loss, TrajectoryBalanceConfig):
            return self.loss.beta
        return 0.0 if self.loss.reference_kl is None else self.loss.reference_kl_coefficient


def named_estimators() -> list[Estimator]:
    """Every variant, level, limit, advantage, normalisation, sampling, penalty and preset, and every claim, named."""
    # This one is unbiased; each of the others changes something about it.
    exact = PolicyGradientConfig("leave_one_out", "base", "sequence", "fixed_length", fixed_length_tokens=1)
    mixture = dataclasses.replace(exact, bias_mitigation="mixture")
    interpolated = dataclasses.replace(exact, bias_mitigation="interpolated", mix_share=0.0)

    def vary(
        group: Group, name: str, loss: PolicyGradientConfig = exact, sampling: Sampling = "nested", **changes: Any
    ) -> Estimator:
        return Estimator(group, name, dataclasses.replace(loss, **changes), sampling)

    divisors: Group = "divisors and penalties"
    fixed: Sampling = "mixture with fixed counts"
    random: Sampling = "nested, accepted at random"
    # Bounds that act on ratios of three tokens.
    weights: dict[str, dict[str, Any]] = {"one": {"bias_mitigation": "one", "level": "token"}, "base, sequence": {}}
    masks: dict[str, dict[str, Any]] = {
        "sequence ratio in [0.5, 2]": {"reject_by": "sequence_ratio", "reject_below": 0.5, "reject_above": 2.0},
        "geometric mean in [0.7, 1.2]": {"reject_by": "geometric_mean", "reject_below": 0.7, "reject_above": 1.2},
        "k3 below 0.1": {"reject_by": "sequence_k3", "reject_above": 0.1},
    }
    three: dict[str, Any] = {"clip_policies": "three", "clip_low": 0.2, "clip_high": 0.2}
    chosen = [
        vary("exact", "base, sequence, leave-one-out"),
        vary("exact", "base, sequence, no baseline", advantage="no_baseline"),
        vary("exact", "base, sequence, group mean", advantage="group_mean"),
        vary("exact", "base, sequence, weighted leave-one-out", advantage="weighted_leave_one_out"),
        vary("exact", "one, full rollouts", sampling="full", bias_mitigation="one", level="token"),
        vary("exact", "mixture, leave-one-out", mixture, "mixture"),
        vary("exact", "mixture, no baseline", mixture, "mixture", advantage="no_baseline"),
        vary("exact", "mixture, weighted leave-one-out", mixture, "mixture", advantage="weighted_leave_one_out"),
        vary("exact", "mixture, fixed counts, leave-one-out", mixture, fixed),
        vary("exact", "mixture, fixed counts, no baseline", mixture, fixed, advantage="no_baseline"),
        vary("weights", "base, prefix", level="prefix"),
        vary("weights", "base, prefix, weighted leave-one-out", level="prefix", advantage="weighted_leave_one_out"),
        vary("weights", "base, token", level="token"),
        vary("weights", "base, token, weighted leave-one-out", level="token", advantage="weighted_leave_one_out"),
        vary("weights", "base, geometric", level="geometric"),
        vary("weights", "one", bias_mitigation="one", level="token"),
        vary("weights", "practical, sequence", bias_mitigation="practical"),
        vary("weights", "practical, token", bias_mitigation="practical", level="token"),
        vary("weights", "retrace 1, token", bias_mitigation="retrace", level="token"),
        vary("weights", "retrace 0.9, token", bias_mitigation="retrace", level="token", retrace_lambda=0.9),
        vary("weights", "retrace 1, prefix", bias_mitigation="retrace", level="prefix"),
        vary("weights", "retrace 0.9, prefix", bias_mitigation="retrace", level="prefix", retrace_lambda=0.9),
        vary("weights", "retrace 0.7, prefix", bias_mitigation="retrace", level="prefix", retrace_lambda=0.7),
        vary("weights", "base, token, truncated at 2", level="token", truncate_at=2.0),
        vary("weights", "base, prefix, truncated at 2", level="prefix", truncate_at=2.0),
        vary("weights", "base, sequence, truncated at 2", truncate_at=2.0),
        vary("weights", "base, sequence, truncated at 5", truncate_at=5.0),
        vary(
            "weights", "base, sequence, truncated at 2, weighted", truncate_at=2.0, advantage="weighted_leave_one_out"
        ),
        vary("weights", "base, sequence, self-normalised", self_normalized=True),
        *(
            vary("masks", f"base, sequence, budgeted rejection, lambda {bound:g}", sampling=random, obrs_lambda=bound)
            for bound in (0.5, 1.0, 2.0)
        ),
        *(
            vary("mixes", f"{level}, {share:.0%} of the weight", interpolated, level=level, mix_share=share)
            for level in ("token", "sequence")
            for share in (0.25, 0.5, 0.75)
        ),
        *(
            vary("masks", f"{weight}, {name}", **changes, **mask)
            for weight, changes in weights.items()
            for name, mask in masks.items()
        ),
        vary("clips", "base, token, clipped 0.2", level="token", clip_low=0.2, clip_high=0.2),
        vary("clips", "base, sequence, clipped 0.2", clip_low=0.2, clip_high=0.2),
        vary("clips", "base, token, clipped 0.2, three policies", level="token", **three),
        vary(
            "clips", "base, token, truncated at 2, clipped 0.2, three policies", level="token", truncate_at=2.0, **three
        ),
        vary("clips", "base, sequence, clipped 0.2, three policies", **three),
        vary("clips", "base, sequence, truncated at 2, clipped 0.2, three policies", truncate_at=2.0, **three),
        vary("clips", "one, clipped 0.2, three policies", bias_mitigation="one", level="token", **three),
        vary(divisors, "base, sequence, group std", advantage="group_std"),
        vary(divisors, "base, sequence, token mean", normalization="token_mean", fixed_length_tokens=None),
        vary(divisors, "base, sequence, sequence mean", normalization="sequence_mean", fixed_length_tokens=None),
        vary(divisors, "base, sequence, k1 in reward", reference_kl="k1_in_reward", reference_kl_coefficient=BETA),
        vary(divisors, "base, sequence, k2 as loss", reference_kl="k2_loss", reference_kl_coefficient=BETA),
        vary(divisors, "base, sequence, k3 as loss", reference_kl="k3_loss", reference_kl_coefficient=BETA),
        Estimator("presets", "GRPO", presets.grpo("base", reference_kl_coefficient=0.0)),
        Estimator("presets", "Dr. GRPO", presets.dr_grpo("base", fixed_length_tokens=1)),
        Estimator("presets", "DAPO", presets.dapo("base")),
        Estimator("presets", "GSPO", presets.gspo("base")),
        Estimator("presets", "CISPO, 1 + epsilon 2", presets.cispo("base", truncate_at=2.0)),
        *(Estimator("presets", name, correction(exact)) for name, correction in presets.CORRECTIONS.items()),
        *(
            Estimator("trajectory balance", f"trajectory balance, {name}", TrajectoryBalanceConfig(BETA), sampling)
            for name, sampling in BALANCED.items()
        ),
    ]
    listed = [(estimator.loss, estimator.sampling) for estimator in chosen]
    return chosen + [claim for claim in claims() if (claim.loss, claim.sampling) not in listed]


def claims() -> list[Estimator]:
    """Every estimator that claims to be unbiased, as `claims_unbiased` itself says it of all combinations."""
    found = [loss for loss in all_combinations() if claims_unbiased(loss)]
    # With a KL the truth is that of another objective, so such an estimator stands beside its like.
    return [
        Estimator(
            "exact" if loss.reference_kl is None else "divisors and penalties",
            _name(loss),
            loss,
            fitting_sampling(loss),
        )
        for loss in found
    ]


def fitting_sampling(loss: PolicyGradientConfig) -> Sampling:
    """How the completions are drawn that a loss is made for.

    Args:
        loss: whose weight decides.
    """
    if loss.obrs_lambda is not None:
        return "nested, accepted at random"
    return "mixture" if loss.bias_mitigation == "mixture" else "nested"


def all_combinations() -> list[PolicyGradientConfig]:
    """Every loss that the configuration accepts with at most one of its optional parts.

    One part is enough: a claim that forgets a part shows as soon as that part is there.
    """
    required = itertools.product(
        get_args(Advantage), get_args(BiasMitigation), get_args(Level), get_args(Normalization)
    )
    found = []
    for names, part in itertools.product(required, OPTIONAL_PARTS):
        length = 1 if names[-1] == "fixed_length" else None
        try:
            found.append(PolicyGradientConfig(*names, fixed_length_tokens=length, **part))
        except ValueError:  # a combination without a meaning
            continue
    return found


def _name(loss: PolicyGradientConfig) -> str:
    """An estimator's name: its required parts, and the optional ones that are not at their defaults."""
    optional = [f for f in dataclasses.fields(loss) if f.default is not dataclasses.MISSING]
    changed = {f.name: getattr(loss, f.name) for f in optional if getattr(loss, f.name) != f.default}
    # A length and a coefficient are numbers of a part that has its own name here.
    parts = [
        str(value) if name == "reference_kl" else f"{name} {value}"
        for name, value in changed.items()
        if not name.endswith(("_tokens", "kl_coefficient"))
    ]
    # Most of the list divides by a fixed length, which is therefore not said.
    divisor = [loss.normalization] * (loss.normalization != "fixed_length")
    return ", ".join([loss.bias_mitigation, loss.level, loss.advantage, *divisor, *parts]).replace("_", " ")
