"""What a policy-gradient update minimises, and which combinations of its parts mean something."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nested_reft.estimators.advantages import Advantage
from nested_reft.estimators.importance import LOG_RATIO_LIMIT, BiasMitigation, Level
from nested_reft.estimators.kl import KlPenalty
from nested_reft.estimators.rejection import LEVELS, RejectBy
from nested_reft.literals import check_choice
from nested_reft.losses.value import CriticConfig

Kind = Literal["policy_gradient"]
Signal = Advantage | Literal["gae"]
SIGNALS = Literal[*get_args(Advantage), "gae"]  # the same as one list, for messages
Normalization = Literal["token_mean", "group_token_mean", "sequence_mean", "fixed_length"]
ClipPolicies = Literal["two", "three"]
ClipLevel = Literal["token", "sequence", "geometric"]
LEAST_CLIP = 1e-7  # of `clip_low` and `clip_high`


@dataclass(frozen=True)
class PolicyGradientConfig:
    """Parts of the policy-gradient objective. Nothing here has a default that picks an algorithm.

    Attributes:
        advantage: see `estimators.advantages`; `gae` gives one to each token, by a critic (PPO; see `losses.value`).
        bias_mitigation, level: the importance weight; see the tables of `estimators.importance`.
        normalization: what a token's term is divided by; see `losses.policy_gradient`.
        fixed_length_tokens: the constant length of `fixed_length`, usually the longest completion.
        retrace_lambda: in (0, 1]; for `retrace`.
        truncate_at: C >= 1: weights above it become C (TIS). None for no limit.
        reject_by: what tokens or completions are judged by, a row of the table of `estimators.rejection`; its ratio is
            pi / pi_b, or pi_old / pi_b with three policies, at whatever level the weight is. What is rejected has
            weight 0 and stays in the divisor, so a mask decides which terms there are and changes nothing else.
            None rejects nothing.
        reject_below, reject_above: values outside [reject_below, reject_above] are rejected. None for no bound.
        obrs_lambda: lambda > 0: tokens or completions, as `level` says, are accepted with probability
            min(1, rho / lambda), and then weigh max(rho, lambda); see `estimators.budgeted_rejection`. Unlike a mask it
            adds noise and no bias. What is rejected still takes its share of an update's time. None accepts all.
        mix_share: a, in [0, 1], of `interpolated`; None lets `mix_control` choose it for each batch.
        self_normalized: divide by the sum of weights instead of their number: bounded, with a bias
            that falls as 1 / samples. What is rejected adds nothing to that sum.
        clip_policies: the policies that PPO's clip compares. `two` (bypass): pi and pi_b, so the clip acts on the
            weight h itself. `three` (decoupled): the clip acts on r = pi / pi_old, where pi_old is the full model just
            before the batch's first update. A frozen h, made of pi_old / pi_b, corrects the sampler.
        clip_level: over which tokens r is multiplied, with three policies.
        clip_low, clip_high: PPO's clip of h or r to [1 - clip_low, 1 + clip_high]: tokens beyond it on the side that
            their advantage pushes to lose their gradient. None for no clip there.
        dual_clip: c > 1: where the advantage is negative, h or r above c loses its gradient too (Ye et al., 2020).
            None for no such limit.
        reference_kl: the penalty towards the model at the start of reinforcement; see the tables of `estimators.kl`.
        reference_kl_coefficient: beta, its weight; 0 for none.
        entropy_coefficient: weight of the bonus on the entropy of each next-token distribution at the
            sampled prefixes; 0 for none. It costs the backward pass a second array of all logits.
        self_distillation_coefficient: weight of KL(full || nested) per token of the rollouts, under
            their plan, where the full policy is held fixed: it teaches the nested one to follow. 0 for
            none; otherwise each update runs a nested forward and backward pass more.
        critic: of `gae`, how its values are used and learnt; None for the other advantages.
        kind: tells this objective from the others; it has one value.
    """

    advantage: Signal
    bias_mitigation: BiasMitigation
    level: Level
    normalization: Normalization
    fixed_length_tokens: int | None = None
    retrace_lambda: float = 1.0
    truncate_at: float | None = None
    reject_by: RejectBy | None = None
    reject_below: float | None = None
    reject_above: float | None = None
    obrs_lambda: float | None = None
    mix_share: float | None = None
    self_normalized: bool = False
    clip_policies: ClipPolicies = "two"
    clip_level: ClipLevel = "token"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    reference_kl: KlPenalty | None = None
    reference_kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    self_distillation_coefficient: float = 0.0
    critic: CriticConfig | None = None
    kind: Kind = "policy_gradient"

    def __post_init__(self):
        # Names and ranges come first, so that the later checks compare values that make sense.
        _check_names(self)
        _check_ranges(self)
        _check_needed(self)
        _check_meaning(self)
        _check_clip(self)
        _check_mask(self)
        _check_budget(self)
        _check_reach(self)
        _check_critic(self)

    @property
    def may_reject(self) -> bool:
        """Whether tokens may have weight 0: by a mask, or by the draws of a budget."""
        return self.reject_by is not None or self.obrs_lambda is not None


def claims_unbiased(config: PolicyGradientConfig) -> bool:
    """Whether the expected gradient points exactly along that of E_{y ~ pi}[R(y)], minus beta KL with
    `k1_in_reward`; `group_mean` changes its length by (G - 1) / G.

    It holds for every batch size, provided that the behavior policy has full support, that every
    completion counts, and that `mixture` gets the rollouts of a mixture. The enumeration
    (`nested_reft.verification.enumeration`) lists every combination that returns True with at most one optional part,
    and shows it for each.
    `token_mean` does not qualify: its divisor, the number of sampled tokens, varies with the sample,
    which leaves a bias of the order 1 / batch.

    Two things outside the loss limit the claim. Log-weights and k1 are clamped to +-20 nats, so the claim
    ends where a completion's ratio exceeds exp(20). Dynamic sampling keeps the groups with right and wrong
    answers: where all others have advantage zero, that changes the gradient's length alone. With `no_baseline`, a
    shaped reward or `k1_in_reward` they have not, so the kept groups are a biased sample.

    Args:
        config: the loss; how completions are sampled is not asked.
    """
    # Only the ratio of whole completions corrects the prefix and what follows a token as well.
    exact_weight = config.bias_mitigation in ("base", "mixture") and config.level == "sequence"
    # With three policies the weight is (pi_old / pi_b) times r, which is exact where r is of whole completions too.
    exact_weight &= config.clip_policies == "two" or config.clip_level == "sequence"
    # Every limit changes some weight, and a weighted mean divides by a number that depends on the sample.
    limits = (config.truncate_at, config.reject_by, config.clip_low, config.clip_high, config.dual_clip)
    unlimited = all(limit is None for limit in limits) and not config.self_normalized
    # The penalties that are added as losses differentiate the KL at given prefixes only. The group's mean makes the
    # reward's part shorter, by (G - 1) / G, and not the KL's: their sum then points elsewhere.
    kl_of_completions = config.reference_kl == "k1_in_reward" and config.advantage != "group_mean"
    return (
        exact_weight
        and unlimited
        # A standard deviation weighs prompts by how mixed their groups came out, and a critic may be wrong.
        and config.advantage not in ("group_std", "gae")
        # This is the one divisor that does not depend on how long the sampled completions are.
        and config.normalization == "fixed_length"
        and (config.reference_kl is None or kl_of_completions)
        and config.entropy_coefficient == 0
        and config.self_distillation_coefficient == 0
    )


def _check_names(config: PolicyGradientConfig) -> None:
    choices: dict[str, Any] = {"kind": Kind, "advantage": SIGNALS, "bias_mitigation": BiasMitigation, "level": Level}
    choices |= {"normalization": Normalization, "clip_policies": ClipPolicies, "clip_level": ClipLevel}
    choices |= {"reference_kl": KlPenalty, "reject_by": RejectBy}
    for name, allowed in choices.items():
        if name not in ("reference_kl", "reject_by") or getattr(config, name) is not None:
            check_choice(f"loss.{name}", getattr(config, name), allowed)


def _check_ranges(config: PolicyGradientConfig) -> None:
    least = 0 if config.reject_by == "sequence_k3" else 1
    # Log-ratios are clamped, so beyond this a limit would have nothing to limit.
    smallest, largest = math.exp(-LOG_RATIO_LIMIT), math.exp(LOG_RATIO_LIMIT)
    is_allowed: dict[str, tuple[Callable[[float], bool], str]] = {
        "fixed_length_tokens": (lambda x: x >= 1, "1 or more, or None"),
        "retrace_lambda": (lambda x: 0 < x <= 1, "0 < retrace_lambda <= 1"),
        "truncate_at": (lambda x: 1 <= x < largest, "1 or more, below 4.8e8, or None"),
        # A ratio is 1, and a divergence 0, where the policies agree, and that is never rejected.
        "reject_below": (lambda x: smallest < x < 1, "2.1e-9 < reject_below < 1, or None"),
        "reject_above": (lambda x: least < x < largest, f"more than {least}, below 4.8e8, or None"),
        "obrs_lambda": (lambda x: smallest < x < largest, "from 2.1e-9 to 4.8e8, or None"),
        "mix_share": (lambda x: 0 <= x <= 1, "0 <= mix_share <= 1, or None"),
        # Weights are float32, which would round 1 with a smaller share taken off or added to 1.
        "clip_low": (lambda x: LEAST_CLIP <= x < 1 - smallest, "1e-7 <= clip_low < 1 - 2.1e-9, or None"),
        "clip_high": (lambda x: LEAST_CLIP <= x < largest - 1, "1e-7 or more, below 4.8e8, or None"),
        "dual_clip": (lambda x: 1 < x < largest, "more than 1, below 4.8e8, or None"),
        "reference_kl_coefficient": (lambda x: x >= 0, "0 or more"),
        "entropy_coefficient": (lambda x: x >= 0, "0 or more"),
        "self_distillation_coefficient": (lambda x: x >= 0, "0 or more"),
    }
    for name, (check, allowed) in is_allowed.items():
        value = getattr(config, name)
        # A word in the place of a number would fail in a comparison that names no field.
        is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if not is_number:
            raise ValueError(f"loss.{name} is {value!r}; allowed is a number: {allowed}")
        # NaN fails every comparison, so it is asked for separately and never passes as allowed.
        if value is not None and not (math.isfinite(value) and check(value)):
            raise ValueError(f"loss.{name} is {value}; allowed is {allowed}")


def _check_needed(config: PolicyGradientConfig) -> None:
    """A part and its parameter are set together, or neither is."""
    has_length = config.fixed_length_tokens is not None
    _check_together(config, "fixed_length_tokens", has_length, "normalization", "fixed_length")
    # Lambda 1 is the default and leaves min(1, rho) as it is, so `retrace` does not require another value.
    if config.retrace_lambda != 1:
        _check_together(config, "retrace_lambda", True, "bias_mitigation", "retrace")
    if config.mix_share is not None:
        _check_together(config, "mix_share", True, "bias_mitigation", "interpolated")
    if (config.reference_kl is None) != (config.reference_kl_coefficient == 0):
        raise ValueError(
            f"loss.reference_kl is {config.reference_kl} and loss.reference_kl_coefficient"
            f" {config.reference_kl_coefficient}: a penalty needs both. Allowed are k1_in_reward, k2_loss, k3_loss"
        )


def _check_together(config: PolicyGradientConfig, name: str, is_set: bool, field: str, value: str) -> None:
    # A parameter that nothing reads is refused too, because the user would believe that it acts.
    is_chosen = getattr(config, field) == value
    if is_chosen and not is_set:
        raise ValueError(f"loss.{name} is not set; {field} '{value}' needs it")
    if is_set and not is_chosen:
        raise ValueError(
            f"loss.{name} is {getattr(config, name)}, but {field} is '{getattr(config, field)}';"
            f" only '{value}' reads it"
        )


def _check_meaning(config: PolicyGradientConfig) -> None:
    """Levels and limits that a variant has no use for."""
    variant, level, acts_on_weight = config.bias_mitigation, config.level, config.clip_policies == "two"
    names = ("truncate_at", *(("clip_low", "clip_high", "dual_clip") if acts_on_weight else ()))
    limits = [name for name in names if getattr(config, name) is not None]
    # The weights of a mask are 0 and 1, and those of three policies include r: both have sums of their own.
    is_constant = config.reject_by is None and acts_on_weight
    is_plain = variant == "one" or config.mix_share == 0
    limits += ["self_normalized"] * (config.self_normalized and (not is_plain or is_constant))
    if variant == "one" and level != "token":
        raise ValueError(f"loss.level is '{level}', but bias_mitigation 'one' weighs every level alike; set 'token'")
    name = "'one'" if variant == "one" else "'interpolated' with mix_share 0"
    if is_plain and limits:
        raise ValueError(
            f"loss.{limits[0]} is set, but bias_mitigation {name} has the constant weight 1, which nothing limits;"
            " leave it out, or use 'practical', the ratio to the full model at rollout time"
        )
    if is_plain and is_constant and config.advantage == "weighted_leave_one_out":
        raise ValueError(
            f"loss.advantage is 'weighted_leave_one_out', but bias_mitigation {name} weighs every completion alike; set"
            " 'leave_one_out', which is the same then"
        )
    if variant == "mixture" and level != "sequence":
        raise ValueError(
            f"loss.level is '{level}', but bias_mitigation 'mixture' draws whole completions from one of two models,"
            " so only completions have a density; set 'sequence'"
        )
    if variant == "interpolated" and level not in ("token", "sequence"):
        raise ValueError(
            f"loss.level is '{level}', but bias_mitigation 'interpolated' mixes 1 with a ratio whose mean is 1, which"
            " tokens and completions have; set 'token' or 'sequence'"
        )
    if variant == "retrace" and level not in ("token", "prefix"):
        raise ValueError(
            f"loss.level is '{level}', but bias_mitigation 'retrace' is a trace along the tokens: 'token' or 'prefix'."
            " For a bounded weight of whole completions use 'base' with truncate_at"
        )
    # A weight of at most 1 can still fall below 1 - clip_low.
    useless = [name for name in limits if name != "clip_low"]
    if variant == "retrace" and useless:
        raise ValueError(
            f"loss.{useless[0]} is set, but bias_mitigation 'retrace' already limits the weight to lambda <= 1;"
            " leave it out, or use 'base'"
        )
    if config.self_normalized and "geometric" in (level, config.clip_level):
        raise ValueError(
            "loss.self_normalized is set at level 'geometric': self-normalisation divides by weights whose mean is 1,"
            " which geometric means of ratios have not; use level 'token', 'prefix' or 'sequence'"
        )


def _check_clip(config: PolicyGradientConfig) -> None:
    """Three policies need a weight that corrects the sampler, and two have one level."""
    if config.clip_policies == "two" and config.clip_level != "token":
        raise ValueError(
            f"loss.clip_level is '{config.clip_level}', but with clip_policies 'two' the clip acts on the weight, whose"
            " level is loss.level; set that, or clip_policies 'three'"
        )
    if config.clip_policies == "three" and config.bias_mitigation == "practical":
        raise ValueError(
            "loss.clip_policies is 'three', but bias_mitigation 'practical' does not read the policy that sampled: its"
            " weight pi / pi_old is what the clip acts on already. Use 'base' to correct the sampler, 'one' to ignore"
            " it, or clip_policies 'two'"
        )


def _check_mask(config: PolicyGradientConfig) -> None:
    """A mask has a bound that can act, and judges what the weight is a weight of."""
    bounds = [name for name in ("reject_below", "reject_above") if getattr(config, name) is not None]
    if config.reject_by is None:
        if bounds:
            raise ValueError(
                f"loss.{bounds[0]} is {getattr(config, bounds[0])}, but loss.reject_by is None, so nothing is judged;"
                f" set it to one of {', '.join(get_args(RejectBy))}"
            )
        return
    if not bounds:
        raise ValueError(
            f"loss.reject_by is '{config.reject_by}' without a bound, so nothing is rejected; set reject_above"
            + ("" if config.reject_by == "sequence_k3" else " or reject_below")
        )
    if config.reject_by == "sequence_k3" and config.reject_below is not None:
        raise ValueError(
            f"loss.reject_below is {config.reject_below}, but a divergence is 0 where the policies agree: a lower bound"
            " would reject the best completions; set reject_above alone"
        )
    if config.bias_mitigation == "mixture":
        raise ValueError(
            f"loss.reject_by is '{config.reject_by}', but bias_mitigation 'mixture' weighs by the density of the whole"
            " mixture: a mask judges by the component that drew, and what it keeps has another density. Leave it out,"
            " since the weight is bounded, or use 'base'"
        )
    if config.reject_by == "token_ratio" and config.level != "token":
        raise ValueError(
            f"loss.reject_by is 'token_ratio' at level '{config.level}': the ratio of a rejected token stays in the"
            " weights of the other tokens; use reject_by 'sequence_ratio', 'geometric_mean' or 'sequence_k3', or level"
            " 'token'"
        )


def _check_budget(config: PolicyGradientConfig) -> None:
    """Budgeted rejection draws by the ratio that the weight is, and no other limit acts on that ratio."""
    if config.obrs_lambda is None:
        return
    if config.bias_mitigation != "base" or config.level not in ("token", "sequence"):
        raise ValueError(
            f"loss.obrs_lambda is set with bias_mitigation '{config.bias_mitigation}' at level '{config.level}': what"
            " is accepted has a known density for the ratio of tokens or completions alone; use bias_mitigation 'base'"
            " and level 'token' or 'sequence'"
        )
    if config.reject_by is not None:
        raise ValueError(
            f"loss.obrs_lambda is set beside reject_by '{config.reject_by}': the bias of the mask would undo what the"
            " random rejection keeps exact; leave one out"
        )
    if config.truncate_at is not None and config.truncate_at <= config.obrs_lambda:
        raise ValueError(
            f"loss.truncate_at is {config.truncate_at} and obrs_lambda {config.obrs_lambda}: accepted weights are at"
            " least obrs_lambda, so all would be truncated; raise truncate_at or leave it out"
        )
    clips = [name for name in ("clip_low", "clip_high", "dual_clip") if getattr(config, name) is not None]
    if config.clip_policies == "two" and clips:
        raise ValueError(
            f"loss.{clips[0]} is set with clip_policies 'two', which would clip the weights max(rho, obrs_lambda) of"
            " accepted samples and not rho; set clip_policies 'three'"
        )


def _check_critic(config: PolicyGradientConfig) -> None:
    """A critic serves the advantages of tokens, which have a KL penalty of their own."""
    if (config.critic is None) != (config.advantage != "gae"):
        raise ValueError(
            f"loss.advantage is '{config.advantage}' and loss.critic {config.critic}; 'gae' needs a critic, and nothing"
            " else reads one"
        )
    if config.critic is not None and config.reference_kl == "k1_in_reward":
        raise ValueError(
            "loss.reference_kl is 'k1_in_reward' with advantage 'gae', whose token rewards have that penalty"
            " themselves; set loss.critic.kl_coefficient instead"
        )


def _weights_left(config: PolicyGradientConfig) -> tuple[float, float]:
    """The smallest and the largest weight that the mask leaves, before truncation and clips."""
    lowest, highest = math.exp(-LOG_RATIO_LIMIT), math.exp(LOG_RATIO_LIMIT)
    # Only a mask that judges the ratio which the weight is made of bounds the weight; `practical` has another one.
    judges_weight = config.reject_by is not None and LEVELS.get(config.reject_by) == config.level
    if judges_weight and config.bias_mitigation in ("base", "retrace", "interpolated"):
        lowest, highest = config.reject_below or lowest, config.reject_above or highest
    if config.bias_mitigation == "retrace":
        return config.retrace_lambda * lowest, config.retrace_lambda * min(highest, 1.0)
    if config.bias_mitigation == "interpolated" and config.mix_share is not None:
        # A share that follows a budget may be 1, which is the widest range.
        share = config.mix_share
        return 1 - share + share * lowest, 1 - share + share * highest
    return lowest, highest


def _check_reach(config: PolicyGradientConfig) -> None:
    """Of several limits of the weight, each must be able to act, and together they must leave something."""
    truncate_at, highest = config.truncate_at, _weights_left(config)[1]
    if truncate_at is not None and truncate_at >= highest:
        raise ValueError(
            f"loss.truncate_at is {truncate_at} and loss.reject_above {config.reject_above}, of the same ratio"
            ": what truncation would change is rejected already; lower truncate_at or leave one out"
            if config.mix_share is None
            else f"loss.truncate_at is {truncate_at}, but with mix_share {config.mix_share:g} and reject_above"
            f" {config.reject_above} no weight is above {highest:g}; lower truncate_at or leave it out"
        )
    # With three policies the clip acts on another ratio than the other limits.
    if config.clip_policies == "three":
        return
    _check_lower_reach(config)
    # A clip above the largest weight that is left would never act.
    ceiling = min(highest, math.inf if truncate_at is None else truncate_at)
    for name, reach in (("clip_high", 1 + (config.clip_high or 0)), ("dual_clip", config.dual_clip or 0)):
        if getattr(config, name) is not None and reach >= ceiling:
            raise ValueError(
                f"loss.{name} acts on weights above {reach:g}, but truncate_at or reject_above leaves none above"
                f" {ceiling:g}; leave one out"
                + ("" if config.mix_share is None else f", or raise mix_share, which is {config.mix_share:g}")
            )


def _check_lower_reach(config: PolicyGradientConfig) -> None:
    """The clip from below has weights to act on, and leaves some of them their gradient."""
    if config.clip_low is None:
        return
    lowest, most = 1 - config.clip_low, config.retrace_lambda
    least = _weights_left(config)[0]
    if least >= lowest:
        cause = "reject_below" if config.mix_share is None else f"mix_share {config.mix_share:g}"
        raise ValueError(
            f"loss.clip_low acts on weights below {lowest:g}, but {cause} leaves none below {least:g}; leave one out"
        )
    # At `prefix` level the weights of `retrace` are at most lambda^t at the t-th token, so with any lambda below 1 a
    # long completion passes the limit.
    if most <= lowest or (config.level == "prefix" and most < 1):
        bound = "lambda^t at the t-th token" if config.level == "prefix" else "lambda"
        raise ValueError(
            f"loss.clip_low takes the gradient of weights below {lowest:g} where the advantage is negative, and"
            f" retrace_lambda {most:g} makes all weights (at most {bound}) that small; leave clip_low out or raise"
            " retrace_lambda"
        )
