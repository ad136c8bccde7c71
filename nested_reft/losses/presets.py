"""Published algorithms as combinations of the loss's parts.

Each takes `bias_mitigation`, because the papers sample from the policy they call pi_old itself:
with nested rollouts the ratio is either to the nested policy that sampled (`base`) or to the full
model at rollout time (`practical`), and the papers do not choose. What surrounds the loss (dynamic
sampling, length penalties, learning rates) is not part of a preset.
"""

from __future__ import annotations

from typing import Literal

from nested_reft.losses.config import PolicyGradientConfig

Denominator = Literal["base", "practical"]


def grpo(
    bias_mitigation: Denominator, clip: float = 0.2, reference_kl_coefficient: float = 0.04
) -> PolicyGradientConfig:
    """GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3): clipped token ratios, mean over each completion, k3.

    The paper gives beta 0.04 and no clip range; 0.2 is PPO's.

    Args:
        bias_mitigation: the policy that the ratio divides by: `base` or `practical`.
        clip: epsilon of both sides, in (0, 1).
        reference_kl_coefficient: beta, 0 or more; 0 leaves the penalty out.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        bias_mitigation=bias_mitigation,
        level="token",
        normalization="sequence_mean",
        clip_low=clip,
        clip_high=clip,
        # A penalty of weight 0 is refused by the configuration, so it is left out whole.
        reference_kl="k3_loss" if reference_kl_coefficient else None,
        reference_kl_coefficient=reference_kl_coefficient,
    )


def dr_grpo(bias_mitigation: Denominator, fixed_length_tokens: int, clip: float = 0.2) -> PolicyGradientConfig:
    """Dr. GRPO (arXiv 2503.20783): GRPO without the division by std and by length, and without KL.

    Args:
        bias_mitigation: the policy that the ratio divides by: `base` or `practical`.
        fixed_length_tokens: the constant that every completion is divided by, usually the longest length.
        clip: epsilon of both sides, in (0, 1).
    """
    return PolicyGradientConfig(
        advantage="group_mean",
        bias_mitigation=bias_mitigation,
        level="token",
        normalization="fixed_length",
        fixed_length_tokens=fixed_length_tokens,
        clip_low=clip,
        clip_high=clip,
    )


def dapo(bias_mitigation: Denominator, dual_clip: float | None = None) -> PolicyGradientConfig:
    """DAPO (arXiv 2503.14476, eq. 8): clip-higher 0.2 / 0.28 and one mean over all tokens, without KL.

    Departure: the mean is over the tokens of the whole batch, as in today's reference code; eq. 8
    has one per group (`normalization="group_token_mean"`). The recipe adds a dual clip at 10.

    Args:
        bias_mitigation: the policy that the ratio divides by: `base` or `practical`.
        dual_clip: c, more than 1; None leaves it out, as eq. 8 does.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        bias_mitigation=bias_mitigation,
        level="token",
        normalization="token_mean",
        clip_low=0.2,
        # The wider upper side lets unlikely tokens gain probability, which keeps the entropy up.
        clip_high=0.28,
        dual_clip=dual_clip,
    )


def gspo(bias_mitigation: Denominator) -> PolicyGradientConfig:
    """GSPO (arXiv 2507.18071, eq. 5-7): the clip acts on the length-normalised ratio of completions.

    Each completion's term s_i A_i has the gradient s_i A_i sum_t grad log pi_t / |y_i|: that of the
    weight s_i on each token under a mean over the completion. Clip ranges 3e-4 and 4e-4 [section 5.1].

    Args:
        bias_mitigation: the policy that the ratio divides by: `base` or `practical`.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        bias_mitigation=bias_mitigation,
        level="geometric",
        normalization="sequence_mean",
        # The geometric mean of a completion's ratios stays near 1, so these ranges are far narrower than PPO's.
        clip_low=3e-4,
        clip_high=4e-4,
    )


def cispo(bias_mitigation: Denominator, truncate_at: float) -> PolicyGradientConfig:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): truncated weights, so that no token loses its gradient.

    The paper uses no lower bound, so there is none here.

    Args:
        bias_mitigation: the policy that the ratio divides by: `base` or `practical`.
        truncate_at: 1 + epsilon_high, for which the paper gives no number; 1 or more.
    """
    return PolicyGradientConfig(
        advantage="group_std",
        bias_mitigation=bias_mitigation,
        level="token",
        normalization="token_mean",
        truncate_at=truncate_at,
    )
