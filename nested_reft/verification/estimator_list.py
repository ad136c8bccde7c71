"""The estimators that are enumerated: losses by name, in groups, and every claim to be unbiased."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
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
Group = Literal["exact", "weights", "masks", "clips", "mixes", "divisors", "penalties", "presets", "trajectory balance"]
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


# This one is unbiased; each of the others changes something about it.
EXACT = PolicyGradientConfig("leave_one_out", "base", "sequence", "fixed_length", fixed_length_tokens=1)


def named_estimators() -> list[Estimator]:
    """Every variant, level, limit, advantage, normalisation, sampling, penalty and preset, and every claim, named."""
    groups = (_exact, _weights, _masks, _mixes, _clips, _divisors, _penalties, _presets, _trajectory_balance)
    chosen = [estimator for group in groups for estimator in group()]
    listed = [(estimator.loss, estimator.sampling) for estimator in chosen]
    return chosen + [claim for claim in claims() if (claim.loss, claim.sampling) not in listed]


def _vary(
    group: Group, name: str, loss: PolicyGradientConfig = EXACT, sampling: Sampling = "nested", **changes: Any
) -> Estimator:
    return Estimator(group, name, dataclasses.replace(loss, **changes), sampling)


def _exact() -> list[Estimator]:
    """Unbiased ones, up to the scale that they claim."""
    vary = partial(_vary, "exact")
    mixture = dataclasses.replace(EXACT, bias_mitigation="mixture")
    fixed: Sampling = "mixture with fixed counts"
    return [
        vary("base, sequence, leave-one-out"),
        vary("base, sequence, no baseline", advantage="no_baseline"),
        vary("base, sequence, group mean", advantage="group_mean"),
        vary("base, sequence, weighted leave-one-out", advantage="weighted_leave_one_out"),
        vary("one, full rollouts", sampling="full", bias_mitigation="one", level="token"),
        vary("mixture, leave-one-out", mixture, "mixture"),
        vary("mixture, no baseline", mixture, "mixture", advantage="no_baseline"),
        vary("mixture, weighted leave-one-out", mixture, "mixture", advantage="weighted_leave_one_out"),
        vary("mixture, fixed counts, leave-one-out", mixture, fixed),
        vary("mixture, fixed counts, no baseline", mixture, fixed, advantage="no_baseline"),
    ]


def _weights() -> list[Estimator]:
    """Other levels, limits and traces of the weight."""
    vary = partial(_vary, "weights")
    return [
        vary("base, prefix", level="prefix"),
        vary("base, prefix, weighted leave-one-out", level="prefix", advantage="weighted_leave_one_out"),
        vary("base, token", level="token"),
        vary("base, token, weighted leave-one-out", level="token", advantage="weighted_leave_one_out"),
        vary("base, geometric", level="geometric"),
        vary("one", bias_mitigation="one", level="token"),
        vary("practical, sequence", bias_mitigation="practical"),
        vary("practical, token", bias_mitigation="practical", level="token"),
        vary("retrace 1, token", bias_mitigation="retrace", level="token"),
        vary("retrace 0.9, token", bias_mitigation="retrace", level="token", retrace_lambda=0.9),
        vary("retrace 1, prefix", bias_mitigation="retrace", level="prefix"),
        vary("retrace 0.9, prefix", bias_mitigation="retrace", level="prefix", retrace_lambda=0.9),
        vary("retrace 0.7, prefix", bias_mitigation="retrace", level="prefix", retrace_lambda=0.7),
        vary("base, token, truncated at 2", level="token", truncate_at=2.0),
        vary("base, prefix, truncated at 2", level="prefix", truncate_at=2.0),
        vary("base, sequence, truncated at 2", truncate_at=2.0),
        vary("base, sequence, truncated at 5", truncate_at=5.0),
        vary("base, sequence, truncated at 2, weighted", truncate_at=2.0, advantage="weighted_leave_one_out"),
        vary("base, sequence, self-normalised", self_normalized=True),
    ]


def _masks() -> list[Estimator]:
    """Samples that are accepted or rejected, by a bound or at random."""
    vary = partial(_vary, "masks")
    # Bounds that act on ratios of three tokens.
    weights: dict[str, dict[str, Any]] = {"one": {"bias_mitigation": "one", "level": "token"}, "base, sequence": {}}
    masks: dict[str, dict[str, Any]] = {
        "sequence ratio in [0.5, 2]": {"reject_by": "sequence_ratio", "reject_below": 0.5, "reject_above": 2.0},
        "geometric mean in [0.7, 1.2]": {"reject_by": "geometric_mean", "reject_below": 0.7, "reject_above": 1.2},
        "k3 below 0.1": {"reject_by": "sequence_k3", "reject_above": 0.1},
    }
    random: Sampling = "nested, accepted at random"
    return [
        *(
            vary(f"base, sequence, budgeted rejection, lambda {bound:g}", sampling=random, obrs_lambda=bound)
            for bound in (0.5, 1.0, 2.0)
        ),
        *(
            vary(f"{weight}, {name}", **changes, **mask)
            for weight, changes in weights.items()
            for name, mask in masks.items()
        ),
    ]


def _mixes() -> list[Estimator]:
    """A share of the weight, and the rest of one."""
    vary = partial(_vary, "mixes")
    interpolated = dataclasses.replace(EXACT, bias_mitigation="interpolated", mix_share=0.0)
    return [
        *(
            vary(f"{level}, {share:.0%} of the weight", interpolated, level=level, mix_share=share)
            for level in ("token", "sequence")
            for share in (0.25, 0.5, 0.75)
        ),
    ]


def _clips() -> list[Estimator]:
    """Clips that act on two policies or on three."""
    vary = partial(_vary, "clips")
    three: dict[str, Any] = {"clip_policies": "three", "clip_low": 0.2, "clip_high": 0.2}
    return [
        vary("base, token, clipped 0.2", level="token", clip_low=0.2, clip_high=0.2),
        vary("base, sequence, clipped 0.2", clip_low=0.2, clip_high=0.2),
        vary("base, token, clipped 0.2, three policies", level="token", **three),
        vary("base, token, truncated at 2, clipped 0.2, three policies", level="token", truncate_at=2.0, **three),
        vary("base, sequence, clipped 0.2, three policies", **three),
        vary("base, sequence, truncated at 2, clipped 0.2, three policies", truncate_at=2.0, **three),
        vary("one, clipped 0.2, three policies", bias_mitigation="one", level="token", **three),
    ]


def _divisors() -> list[Estimator]:
    """Other divisors, of advantages or of losses."""
    vary = partial(_vary, "divisors")
    return [
        vary("base, sequence, group std", advantage="group_std"),
        vary("base, sequence, token mean", normalization="token_mean", fixed_length_tokens=None),
        vary("base, sequence, sequence mean", normalization="sequence_mean", fixed_length_tokens=None),
    ]


def _penalties() -> list[Estimator]:
    """Penalties, which change the objective and so the truth."""
    vary = partial(_vary, "penalties")
    return [
        vary("base, sequence, k1 in reward", reference_kl="k1_in_reward", reference_kl_coefficient=BETA),
        vary("base, sequence, k2 as loss", reference_kl="k2_loss", reference_kl_coefficient=BETA),
        vary("base, sequence, k3 as loss", reference_kl="k3_loss", reference_kl_coefficient=BETA),
    ]


def _presets() -> list[Estimator]:
    """The losses of papers, and the corrections that have a name."""
    return [
        Estimator("presets", "GRPO", presets.grpo("base", reference_kl_coefficient=0.0)),
        Estimator("presets", "Dr. GRPO", presets.dr_grpo("base", fixed_length_tokens=1)),
        Estimator("presets", "DAPO", presets.dapo("base")),
        Estimator("presets", "GSPO", presets.gspo("base")),
        Estimator("presets", "CISPO, 1 + epsilon 2", presets.cispo("base", truncate_at=2.0)),
        *(Estimator("presets", name, correction(EXACT)) for name, correction in presets.CORRECTIONS.items()),
    ]


def _trajectory_balance() -> list[Estimator]:
    return [
        Estimator("trajectory balance", f"trajectory balance, {name}", TrajectoryBalanceConfig(BETA), sampling)
        for name, sampling in BALANCED.items()
    ]


def claims() -> list[Estimator]:
    """Every estimator that claims to be unbiased, as `claims_unbiased` itself says it of all combinations."""
    found = [loss for loss in all_combinations() if claims_unbiased(loss)]
    # With a KL the truth is that of another objective, so such an estimator stands beside its like.
    return [
        Estimator(
            "exact" if loss.reference_kl is None else "penalties",
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
    words = ", ".join([loss.bias_mitigation, loss.level, loss.advantage, *divisor, *parts])
    return words.replace("leave_one_out", "leave-one-out").replace("_", " ")
