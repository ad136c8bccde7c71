"""Published algorithms as combinations of the loss's parts, and published corrections as changes to any of them.

The algorithms take `bias_mitigation`, because the papers sample from the policy they call pi_old itself: with nested
rollouts the weight is either that of the nested policy that sampled (`base`) or of the full model before the update
(`practical`), and the papers do not choose. Their clip bounds what the optimizer did since pi_old. So by default it
acts on pi / pi_old here too: with `base` that takes three policies, and with `practical` two. `clip_policies="two"`
with `base` clips the nesting's correction together with the optimizer's step. With three policies nothing bounds the
weights of `base`, unless one of the corrections does.

The corrections compose with them: `token_tis(dapo("base"))` is DAPO with truncated weights of tokens. Each is published
for numerical mismatch between two copies of one policy. A nested policy is further away: at 0.12 nats a token a
completion's geometric mean of 0.89 is normal, and published bounds of 0.999 to 1.001 would reject everything. So the
defaults are wider where they must be, and the published bounds are in the docstrings. `nested-reft report` shows the
bounds that would keep 95 % and 99 % of a run's own samples. A rejected term stays in the divisor, as in TRL and IcePop;
verl takes it out of the divisor too. `self_normalized` does that here, with `bias_mitigation one`.

What surrounds the loss (dynamic sampling, length penalties, learning rates) is not part of a preset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from nested_reft.losses.config import ClipLevel, ClipPolicies, PolicyGradientConfig
from nested_reft.losses.value import CriticConfig

Denominator = Literal["base", "practical"]


def _clip_of(bias_mitigation: Denominator, clip_policies: ClipPolicies | None, level: ClipLevel) -> dict[str, Any]:
    """The fields of a clip on ratios of this level: of the weight with two policies, beside it with three."""
    if clip_policies is None:
        clip_policies = "three" if bias_mitigation == "base" else "two"
    levels = {"level": level} if clip_policies == "two" else {"level": "token", "clip_level": level}
    return {"bias_mitigation": bias_mitigation, "clip_policies": clip_policies} | levels


def grpo(
    bias_mitigation: Denominator,
    clip: float = 0.2,
    reference_kl_coefficient: float = 0.04,
    clip_policies: ClipPolicies | None = None,
) -> PolicyGradientConfig:
    """GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3): clipped token ratios, mean over each completion, k3.

    The paper gives beta 0.04 and no clip range; 0.2 is PPO's.

    Args:
        bias_mitigation: whose samples the weights correct: `base` or `practical`.
        clip: epsilon of both sides, in (0, 1).
        reference_kl_coefficient: beta, 0 or more; 0 leaves the penalty out.
        clip_policies: `two` or `three`; None lets the clip act on pi / pi_old.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        **_clip_of(bias_mitigation, clip_policies, "token"),
        normalization="sequence_mean",
        clip_low=clip,
        clip_high=clip,
        # A penalty of weight 0 is refused by the configuration, so it is left out whole.
        reference_kl="k3_loss" if reference_kl_coefficient else None,
        reference_kl_coefficient=reference_kl_coefficient,
    )


def ppo(
    bias_mitigation: Denominator, kl_coefficient: float = 0.05, clip_policies: ClipPolicies | None = None
) -> PolicyGradientConfig:
    """PPO with a critic, with the numbers of DR-PO (arXiv 2404.08495, table 5): gamma 1, lambda 0.95, clips 0.2.

    Departures: the critic is a head on the policy's trunk, and rewards are not whitened, which the release does and
    its own upstream turned off as harmful.

    Args:
        bias_mitigation: whose samples the weights correct: `base` or `practical`.
        kl_coefficient: beta of the token rewards; 0 leaves the penalty out.
        clip_policies: `two` or `three`; None lets the clip act on pi / pi_old.
    """
    return PolicyGradientConfig(
        advantage="gae",
        **_clip_of(bias_mitigation, clip_policies, "token"),
        normalization="token_mean",
        clip_low=0.2,
        clip_high=0.2,
        critic=CriticConfig(kl_coefficient=kl_coefficient),
    )


def dr_grpo(
    bias_mitigation: Denominator,
    fixed_length_tokens: int,
    clip: float = 0.2,
    clip_policies: ClipPolicies | None = None,
) -> PolicyGradientConfig:
    """Dr. GRPO (arXiv 2503.20783): GRPO without the division by std and by length, and without KL.

    Args:
        bias_mitigation: whose samples the weights correct: `base` or `practical`.
        fixed_length_tokens: the constant that every completion is divided by, usually the longest length.
        clip: epsilon of both sides, in (0, 1).
        clip_policies: `two` or `three`; None lets the clip act on pi / pi_old.
    """
    return PolicyGradientConfig(
        advantage="group_mean",
        **_clip_of(bias_mitigation, clip_policies, "token"),
        normalization="fixed_length",
        fixed_length_tokens=fixed_length_tokens,
        clip_low=clip,
        clip_high=clip,
    )


def dapo(
    bias_mitigation: Denominator, dual_clip: float | None = None, clip_policies: ClipPolicies | None = None
) -> PolicyGradientConfig:
    """DAPO (arXiv 2503.14476, eq. 8): clip-higher 0.2 / 0.28 and one mean over all tokens, without KL.

    Departure: the mean is over the tokens of the whole batch, as in today's reference code; eq. 8
    has one per group (`normalization="group_token_mean"`). The recipe adds a dual clip at 10.

    Args:
        bias_mitigation: whose samples the weights correct: `base` or `practical`.
        dual_clip: c, more than 1; None leaves it out, as eq. 8 does.
        clip_policies: `two` or `three`; None lets the clip act on pi / pi_old.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        **_clip_of(bias_mitigation, clip_policies, "token"),
        normalization="token_mean",
        clip_low=0.2,
        # The wider upper side lets unlikely tokens gain probability, which keeps the entropy up.
        clip_high=0.28,
        dual_clip=dual_clip,
    )


def gspo(bias_mitigation: Denominator, clip_policies: ClipPolicies | None = None) -> PolicyGradientConfig:
    """GSPO (arXiv 2507.18071, eq. 5-7): the clip acts on the length-normalised ratio of completions.

    Each completion's term s_i A_i has the gradient s_i A_i sum_t grad log pi_t / |y_i|: that of the
    weight s_i on each token under a mean over the completion. Clip ranges 3e-4 and 4e-4 [section 5.1]. With three
    policies s_i is the optimizer's alone, and token weights correct the sampler: s_i of the nesting is no such weight.

    Args:
        bias_mitigation: whose samples the weights correct: `base` or `practical`.
        clip_policies: `two` or `three`; None lets the clip act on pi / pi_old.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        **_clip_of(bias_mitigation, clip_policies, "geometric"),
        normalization="sequence_mean",
        # The geometric mean of a completion's ratios stays near 1, so these ranges are far narrower than PPO's.
        clip_low=3e-4,
        clip_high=4e-4,
    )


def cispo(bias_mitigation: Denominator, truncate_at: float) -> PolicyGradientConfig:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): truncated weights, so that no token loses its gradient.

    The paper uses no lower bound, so there is none here.

    Args:
        bias_mitigation: whose samples the weights correct: `base` or `practical`.
        truncate_at: 1 + epsilon_high, for which the paper gives no number; 1 or more.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        bias_mitigation=bias_mitigation,
        level="token",
        normalization="token_mean",
        truncate_at=truncate_at,
    )


def token_tis(loss: PolicyGradientConfig, truncate_at: float = 2.0) -> PolicyGradientConfig:
    """Truncated importance sampling of tokens: min(rho_t, C) min(r A, clip(r) A) (Yao et al., 2025; FlashRL).

    Args:
        loss: what to correct.
        truncate_at: C; 2 as published.
    """
    return _corrected(loss, truncate_at=truncate_at)


def sequence_tis(loss: PolicyGradientConfig, truncate_at: float = 2.0) -> PolicyGradientConfig:
    """Truncated importance sampling of completions: min(w(y), C) in place of `token_tis`'s weight (Liu et al., 2025).

    Args:
        loss: what to correct.
        truncate_at: C; 2 as in verl, 3 in TRL. Nothing wider suits nesting: w(y) is heavy at any bound.
    """
    return _corrected(loss, level="sequence", truncate_at=truncate_at)


def token_mis(
    loss: PolicyGradientConfig, reject_above: float = 3.0, reject_below: float | None = None
) -> PolicyGradientConfig:
    """Masked importance sampling of tokens: rho_t where it is at most C, else 0 (TRL's `token_mask`).

    Args:
        loss: what to correct.
        reject_above: C; 3 as in TRL.
        reject_below: a lower bound; None for none, as in TRL.
    """
    return _corrected(loss, reject_by="token_ratio", reject_above=reject_above, reject_below=reject_below)


def sequence_mis(
    loss: PolicyGradientConfig, reject_above: float = 3.0, reject_below: float | None = None
) -> PolicyGradientConfig:
    """Masked importance sampling of completions: w(y) where it is at most C, else 0 (Liu et al., 2025; TRL's default).

    Args:
        loss: what to correct.
        reject_above: C; 3 as in TRL, 2 in verl.
        reject_below: a lower bound; None for none, as in TRL. verl has 0.5. At 0.12 nats a token, completions of 30
            tokens have a median w(y) near 0.03, so that bound would reject most nested ones.
    """
    fields = {"reject_by": "sequence_ratio", "reject_above": reject_above, "reject_below": reject_below}
    return _corrected(loss, level="sequence", **fields)


def geo_rs(loss: PolicyGradientConfig, reject_below: float = 0.5, reject_above: float = 1.4) -> PolicyGradientConfig:
    """Geo-RS: weight 1 where the geometric mean of a completion's ratios is within bounds, else 0 (verl).

    Args:
        loss: what to correct.
        reject_below, reject_above: bounds; 0.999 and 1.001 in verl, which hardly any nested completion meets. The
            defaults keep about 99 % of the completions of `tiny`, at 0.1 nats a token. (verl bounds the inverse ratio,
            so its lower bound is 1 / reject_above.)
    """
    fields = {"reject_by": "geometric_mean", "reject_below": reject_below, "reject_above": reject_above}
    return _corrected(loss, bias_mitigation="one", **fields)


def geo_rs_token_tis(
    loss: PolicyGradientConfig, reject_below: float = 0.5, reject_above: float = 1.4, truncate_at: float = 2.0
) -> PolicyGradientConfig:
    """Geo-RS with token TIS: the mask of `geo_rs` times the weight of `token_tis` (verl).

    Args:
        loss: what to correct.
        reject_below, reject_above: of `geo_rs`.
        truncate_at: of `token_tis`.
    """
    fields = {"reject_by": "geometric_mean", "reject_below": reject_below, "reject_above": reject_above}
    return _corrected(loss, truncate_at=truncate_at, **fields)


def k3_rs(loss: PolicyGradientConfig, reject_above: float = 0.4) -> PolicyGradientConfig:
    """K3-RS: weight 1 where the mean of rho_t - 1 - log rho_t over a completion is within a bound, else 0 (verl).

    Args:
        loss: what to correct.
        reject_above: the bound, in nats per token; 0.01 in verl, with 0.001 to 0.1 as the usual range. The default
            keeps about 99 % of the completions of `tiny`, at 0.1 nats a token.
    """
    return _corrected(loss, bias_mitigation="one", reject_by="sequence_k3", reject_above=reject_above)


def icepop(loss: PolicyGradientConfig, reject_below: float = 0.25, reject_above: float = 5.0) -> PolicyGradientConfig:
    """IcePop: rho_t where it lies within [alpha, beta], else 0, times PPO's surrogate (Zhao et al., 2025).

    Args:
        loss: what to correct.
        reject_below, reject_above: alpha and beta; 0.5 and 5 as published. At 0.12 nats a token a nested policy has
            about every eighth token below 0.5, hence the lower alpha.
    """
    return _corrected(loss, reject_by="token_ratio", reject_below=reject_below, reject_above=reject_above)


CORRECTIONS: dict[str, Callable[[PolicyGradientConfig], PolicyGradientConfig]] = {
    "token TIS": token_tis,
    "sequence TIS": sequence_tis,
    "token MIS": token_mis,
    "sequence MIS": sequence_mis,
    "Geo-RS": geo_rs,
    "Geo-RS with token TIS": geo_rs_token_tis,
    "k3-RS": k3_rs,
    "IcePop": icepop,
}
"""Each published correction by the name that the field uses."""


def preset_names() -> list[str]:
    """The names that `named` takes, as they are usually written."""
    return [*_ALGORITHMS, *(correction.__name__ for correction in CORRECTIONS.values())]


def named(loss: Any, name: str) -> PolicyGradientConfig:
    """The loss that a preset makes of another one: a correction changes it, and an algorithm takes its place.

    An algorithm takes from the loss what its paper leaves open: `bias_mitigation`, which becomes `base` unless it is
    `practical`; the `fixed_length_tokens` of Dr. GRPO; the `truncate_at` of CISPO. For other numbers than the
    published ones, call the preset's function.

    Args:
        loss: any objective's configuration.
        name: a function of this module or a key of `CORRECTIONS`, in any case and with any signs between its words.

    Raises:
        ValueError: there is no such preset, it changes policy gradients alone, or the loss lacks what it takes.
    """
    corrections = {_bare(key): correction for key, correction in CORRECTIONS.items()}
    corrections |= {_bare(correction.__name__): correction for correction in CORRECTIONS.values()}
    if _bare(name) in corrections:
        return corrections[_bare(name)](loss)
    algorithms = {_bare(key): algorithm for key, algorithm in _ALGORITHMS.items()}
    if _bare(name) not in algorithms:
        raise ValueError(f"loss.preset is {name!r}; allowed are {', '.join(preset_names())}")
    make, needed = algorithms[_bare(name)]
    values = {field: getattr(loss, field, None) for field in needed}
    missing = [field for field, value in values.items() if value is None]
    if missing:
        raise ValueError(f"loss.preset '{name}' takes loss.{missing[0]} from the configuration, where it is not set")
    return make("practical" if getattr(loss, "bias_mitigation", None) == "practical" else "base", **values)


def _bare(name: str) -> str:
    """A name without what is written one way or another."""
    return "".join(filter(str.isalnum, name.lower()))


# Of each algorithm: what makes it, and the numbers that its paper does not give.
_ALGORITHMS: dict[str, tuple[Callable[..., PolicyGradientConfig], tuple[str, ...]]] = {
    "grpo": (grpo, ()),
    "ppo": (ppo, ()),
    "dr_grpo": (dr_grpo, ("fixed_length_tokens",)),
    "dapo": (dapo, ()),
    "gspo": (gspo, ()),
    "cispo": (cispo, ("truncate_at",)),
}


def _corrected(loss: PolicyGradientConfig, **correction: Any) -> PolicyGradientConfig:
    """The loss with this weight and mask in place of its own, and three policies, as all of them are published."""
    if not isinstance(loss, PolicyGradientConfig):
        raise ValueError(
            f"a correction changes the loss of a policy gradient, and was given {loss!r:.80}; allowed is a"
            " PolicyGradientConfig, such as presets.dapo('base')"
        )
    level = loss.clip_level
    # With two policies the clip acts on the weight, so its level is that of the weight. A clip has no prefixes.
    if loss.clip_policies == "two" and loss.level != "prefix":
        level = loss.level
    parts = ("truncate_at", "reject_by", "reject_below", "reject_above", "obrs_lambda", "mix_share")
    none = dict.fromkeys(parts) | {"retrace_lambda": 1.0}
    weight = {"bias_mitigation": "base", "level": "token"} | none | correction
    return dataclasses.replace(loss, clip_policies="three", clip_level=level, **weight)
