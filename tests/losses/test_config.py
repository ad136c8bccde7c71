"""Which losses may be configured: every refusal names the field, the value and what to use."""

import dataclasses

import pytest

from nested_reft.losses.config import PolicyGradientConfig, claims_unbiased
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.losses.registry import make_objective
from nested_reft.losses.supervised import Supervised, SupervisedConfig
from nested_reft.training.config import load_config

EXACT = PolicyGradientConfig("leave_one_out", "base", "sequence", "fixed_length", fixed_length_tokens=8)
TOKEN = dataclasses.replace(EXACT, level="token")
MIXTURE = dataclasses.replace(EXACT, bias_mitigation="mixture")
ONE = dataclasses.replace(TOKEN, bias_mitigation="one")
RETRACE = dataclasses.replace(TOKEN, bias_mitigation="retrace")
MASK = {"reject_by": "token_ratio", "reject_above": 2.0}
MIX = dataclasses.replace(TOKEN, bias_mitigation="interpolated", mix_share=0.5)
K3 = {"reject_by": "sequence_k3", "reject_above": 0.1}
GEOMETRIC_CLIP = {"clip_policies": "three", "clip_level": "geometric"}


@pytest.mark.parametrize(
    ("start", "changes", "message"),
    [
        (RETRACE, {"retrace_lambda": 0.0}, "retrace_lambda is 0.0; allowed is 0 < retrace_lambda <= 1"),
        (RETRACE, {"retrace_lambda": 1.1}, "retrace_lambda is 1.1"),
        (RETRACE, {"retrace_lambda": float("nan")}, "retrace_lambda is nan"),
        (TOKEN, {"fixed_length_tokens": 0}, "fixed_length_tokens is 0; allowed is 1 or more"),
        (TOKEN, {"truncate_at": 0.5}, "truncate_at is 0.5; allowed is 1 or more"),
        (TOKEN, {"truncate_at": float("inf")}, "truncate_at is inf"),
        (TOKEN, MASK | {"reject_below": 1.0}, "reject_below is 1.0; allowed is 2.1e-9 < reject_below < 1"),
        (TOKEN, MASK | {"reject_above": 1.0}, "reject_above is 1.0; allowed is more than 1"),
        (TOKEN, MASK | {"reject_above": 1e9}, "reject_above is 1000000000.0; allowed is more than 1, below 4.8e8"),
        (TOKEN, K3 | {"reject_above": 0.0}, "reject_above is 0.0; allowed is more than 0"),
        (TOKEN, {"clip_low": 1.0}, "clip_low is 1.0; allowed is 1e-7 <= clip_low < 1"),
        (TOKEN, {"clip_low": 1e-30}, "clip_low is 1e-30; allowed is 1e-7 <= clip_low < 1"),
        (TOKEN, {"clip_low": 1 - 1e-9}, "allowed is 1e-7 <= clip_low < 1 - 2.1e-9"),
        (TOKEN, {"clip_high": 0.0}, "clip_high is 0.0; allowed is 1e-7 or more"),
        (TOKEN, {"dual_clip": 1.0}, "dual_clip is 1.0; allowed is more than 1"),
        # No weight exceeds exp(20).
        (TOKEN, {"truncate_at": 5e8}, "truncate_at is 500000000.0; allowed is 1 or more, below 4.8e8"),
        (TOKEN, {"clip_high": 5e9}, "clip_high is 5000000000.0; allowed is 1e-7 or more, below 4.8e8"),
        (TOKEN, {"clip_policies": "three", "clip_high": 1e12}, "allowed is 1e-7 or more, below 4.8e8"),
        (TOKEN, {"dual_clip": 1e12}, "dual_clip is 1000000000000.0; allowed is more than 1, below 4.8e8"),
        (TOKEN, {"reference_kl_coefficient": -1.0}, "reference_kl_coefficient is -1.0; allowed is 0 or more"),
        (TOKEN, {"entropy_coefficient": float("nan")}, "entropy_coefficient is nan; allowed is 0 or more"),
        # A part and its parameter come together.
        (TOKEN, {"retrace_lambda": 0.9}, "retrace_lambda is 0.9, but bias_mitigation is 'base'"),
        (TOKEN, {"fixed_length_tokens": None}, "fixed_length_tokens is not set; normalization 'fixed_length' needs it"),
        (TOKEN, {"normalization": "token_mean"}, "fixed_length_tokens is 8, but normalization is 'token_mean'"),
        (TOKEN, {"reference_kl_coefficient": 0.1}, "a penalty needs both. Allowed are k1_in_reward, k2_loss, k3_loss"),
        (TOKEN, {"reference_kl": "k3_loss"}, "a penalty needs both"),
        # Combinations without a meaning.
        (ONE, {"level": "sequence"}, "bias_mitigation 'one' weighs every level alike; set 'token'"),
        (ONE, {"clip_high": 0.2}, "clip_high is set, but bias_mitigation 'one' has the constant weight 1"),
        (ONE, {"self_normalized": True}, "self_normalized is set, but bias_mitigation 'one'"),
        (
            MIX,
            {"mix_share": 0.0, "truncate_at": 2.0},
            "truncate_at is set, but bias_mitigation 'interpolated' with mix_sh",
        ),
        (MIX, {"mix_share": 0.0, "self_normalized": True}, "with mix_share 0 has the constant weight 1"),
        (
            MIX,
            {"mix_share": 0.0, "advantage": "weighted_leave_one_out"},
            "'interpolated' with mix_share 0 weighs every completion alike; set 'leave_one_out'",
        ),
        (ONE, {"advantage": "weighted_leave_one_out"}, "'one' weighs every completion alike; set 'leave_one_out'"),
        (MIXTURE, {"level": "token"}, "only completions have a density; set 'sequence'"),
        (RETRACE, {"level": "sequence"}, "use 'base' with truncate_at"),
        (RETRACE, {"level": "geometric"}, "'token' or 'prefix'"),
        (RETRACE, {"truncate_at": 2.0}, "truncate_at is set, but bias_mitigation 'retrace' already limits the weight"),
        (RETRACE, {"clip_high": 0.2}, "clip_high is set, but bias_mitigation 'retrace'"),
        (TOKEN, {"level": "geometric", "self_normalized": True}, "self_normalized is set at level 'geometric'"),
        # Masks that judge nothing, or what the weight makes meaningless.
        (TOKEN, {"reject_above": 2.0}, "reject_above is 2.0, but loss.reject_by is None"),
        (TOKEN, {"reject_below": 0.5}, "set it to one of token_ratio, sequence_ratio, geometric_mean, sequence_k3"),
        (
            TOKEN,
            {"reject_by": "geometric_mean"},
            "without a bound, so nothing is rejected; set reject_above or reject_be",
        ),
        (TOKEN, {"reject_by": "sequence_k3"}, "without a bound, so nothing is rejected; set reject_above"),
        (TOKEN, K3 | {"reject_below": 0.1}, "a lower bound would reject the best completions; set reject_above alone"),
        (
            EXACT,
            MASK,
            "the ratio of a rejected token stays in the weights of the other tokens; use reject_by 'sequence",
        ),
        (MIXTURE, {"reject_by": "sequence_ratio", "reject_above": 2.0}, "has another density. Leave it out"),
        # Three policies without a weight that corrects the sampler, and levels that nothing reads.
        (TOKEN, {"bias_mitigation": "practical", "clip_policies": "three"}, "Use 'base' to correct the sampler, 'one'"),
        (
            TOKEN,
            {"clip_level": "sequence"},
            "with clip_policies 'two' the clip acts on the weight, whose level is loss",
        ),
        (RETRACE, {"clip_policies": "three", "truncate_at": 2.0}, "already limits the weight to lambda <= 1"),
        (ONE, {"clip_policies": "three", "truncate_at": 2.0}, "has the constant weight 1"),
        (ONE, MASK | {"clip_low": 0.2}, "clip_low is set, but bias_mitigation 'one' has the constant weight 1"),
        (TOKEN, GEOMETRIC_CLIP | {"self_normalized": True}, "self_normalized is set at level 'geometric'"),
        # Limits that could never act.
        (TOKEN, MASK | {"truncate_at": 3.0}, "rejected already; lower truncate_at or leave one out"),
        (TOKEN, MASK | {"truncate_at": 3.0, "clip_policies": "three"}, "rejected already; lower truncate_at or leave"),
        (
            TOKEN,
            {"level": "geometric", "reject_by": "geometric_mean", "reject_above": 1.2, "truncate_at": 1.3},
            "truncate_at is 1.3 and loss.reject_above 1.2, of the same ratio",
        ),
        (TOKEN, {"truncate_at": 1.2, "clip_high": 0.28}, "clip_high acts on weights above 1.28"),
        (TOKEN, MASK | {"dual_clip": 3.0}, "dual_clip acts on weights above 3"),
        (TOKEN, MASK | {"reject_below": 0.8, "clip_low": 0.2}, "clip_low acts on weights below 0.8, but reject_below"),
        (RETRACE, MASK | {"reject_below": 0.9, "retrace_lambda": 0.9, "clip_low": 0.2}, "leaves none below 0.81"),
        # h = 1 - a + a rho: no h is below 0.9 at a = 0.1; rho = 1.9 gives 1.45 at a = 0.5, and rho = 2 1.3 at a = 0.3.
        (MIX, {"mix_share": 0.1, "clip_low": 0.1}, "clip_low acts on weights below 0.9, but mix_share 0.1 leaves none"),
        (
            MIX,
            MASK | {"reject_above": 1.9, "truncate_at": 1.5},
            "with mix_share 0.5 and reject_above 1.9 no weight is ab",
        ),
        (MIX, MASK | {"mix_share": 0.3, "dual_clip": 2.0}, "none above 1.3; leave one out, or raise mix_share"),
        # Limits that leave no gradient to any token of negative advantage.
        (RETRACE, {"retrace_lambda": 0.75, "clip_low": 0.2}, "retrace_lambda 0.75 makes all weights (at most lambda)"),
        (RETRACE, {"retrace_lambda": 0.8, "clip_low": 0.2}, "leave clip_low out or raise retrace_lambda"),
        (RETRACE, {"level": "prefix", "retrace_lambda": 0.99, "clip_low": 0.2}, "(at most lambda^t at the t-th token)"),
    ],
)
def test_refusals(start, changes, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(start, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        (RETRACE, {"retrace_lambda": 0.81, "clip_low": 0.2}),
        (RETRACE, {"level": "prefix", "retrace_lambda": 0.9}),
        (RETRACE, {"level": "prefix", "clip_low": 0.2}),
        (TOKEN, MASK | {"reject_below": 0.5, "clip_low": 0.2}),
        (TOKEN, {"truncate_at": 1.0}),
        (TOKEN, MASK | {"truncate_at": 5.0, "reject_above": 10.0, "clip_high": 0.28, "dual_clip": 3.0}),
        # A bound of another ratio leaves every limit its room.
        (TOKEN, {"reject_by": "geometric_mean", "reject_above": 1.1, "truncate_at": 2.0, "clip_high": 0.28}),
        (TOKEN, {"bias_mitigation": "practical", "truncate_at": 3.0} | MASK),
        (EXACT, K3 | {"truncate_at": 2.0}),
        (MIX, {"mix_share": 0.3, "clip_low": 0.2}),
        (MIX, MASK | {"truncate_at": 1.4}),
        (
            MIX,
            MASK | {"mix_share": None, "truncate_at": 1.9, "clip_low": 0.2},
        ),  # a share that follows a budget may be 1
        (MIX, MASK | {"mix_share": 0.0, "advantage": "weighted_leave_one_out"}),
        # A mask's weights are 0 and 1, and those of three policies move with the optimizer.
        (ONE, MASK | {"advantage": "weighted_leave_one_out"}),
        (ONE, {"clip_policies": "three", "advantage": "weighted_leave_one_out"}),
        (ONE, MASK | {"self_normalized": True}),
        # With three policies the clip acts on the optimizer's ratio, whatever the weight is.
        (ONE, {"clip_policies": "three", "clip_low": 0.2, "self_normalized": True}),
        (RETRACE, {"clip_policies": "three", "retrace_lambda": 0.5, "clip_low": 0.2, "clip_high": 0.2}),
        (TOKEN, MASK | {"reject_below": 0.9, "clip_policies": "three", "clip_low": 0.2, "dual_clip": 3.0}),
        (MIXTURE, {"clip_policies": "three", "clip_level": "geometric", "clip_low": 3e-4}),
        (TOKEN, {"truncate_at": 1.2, "clip_policies": "three", "clip_high": 0.28}),
        (MIXTURE, {"self_normalized": True}),
        (TOKEN, {"level": "geometric", "clip_low": 3e-4, "clip_high": 4e-4}),
    ],
)
def test_what_means_something_is_allowed(start, changes):
    changed = dataclasses.replace(start, **changes)
    assert {name: getattr(changed, name) for name in changes} == changes


@pytest.mark.parametrize(
    ("changes", "claims"),
    [
        ({}, True),
        ({"advantage": "group_mean"}, True),
        ({"advantage": "no_baseline", "reference_kl": "k1_in_reward", "reference_kl_coefficient": 0.1}, True),
        ({"advantage": "group_mean", "reference_kl": "k1_in_reward", "reference_kl_coefficient": 0.1}, False),
        ({"advantage": "group_std"}, False),
        ({"level": "token"}, False),
        ({"level": "prefix"}, False),
        ({"bias_mitigation": "practical"}, False),
        ({"truncate_at": 2.0}, False),
        ({"reject_by": "sequence_ratio", "reject_below": 0.5}, False),
        ({"clip_policies": "three"}, False),  # the ratio of a token since the update corrects no other token
        ({"clip_policies": "three", "clip_level": "sequence"}, True),
        ({"clip_policies": "three", "clip_level": "sequence", "clip_low": 0.2}, False),
        ({"clip_high": 0.2}, False),
        ({"dual_clip": 3.0}, False),
        ({"self_normalized": True}, False),
        ({"normalization": "token_mean", "fixed_length_tokens": None}, False),
        ({"reference_kl": "k3_loss", "reference_kl_coefficient": 0.1}, False),
        ({"entropy_coefficient": 0.01}, False),
        ({"self_distillation_coefficient": 0.01}, False),
    ],
)
def test_claims(changes, claims):
    assert claims_unbiased(dataclasses.replace(EXACT, **changes)) is claims
    assert claims_unbiased(MIXTURE)


def with_loss(loss, **rollout):
    """The smallest shipped configuration with this loss and these fields of its rollouts."""
    config = load_config("tiny")
    return dataclasses.replace(config, loss=loss, rollout=dataclasses.replace(config.rollout, **rollout))


def test_groups_of_one_need_no_baseline():
    with_loss(EXACT, group_size=2)
    with_loss(dataclasses.replace(EXACT, advantage="no_baseline"), group_size=1)
    for advantage in ("leave_one_out", "group_mean", "group_std"):
        with pytest.raises(ValueError, match=r"group_size 1: .*needs 2 or more.*use advantage 'no_baseline'"):
            with_loss(dataclasses.replace(EXACT, advantage=advantage), group_size=1)


def test_the_mixture_weight_needs_rollouts_of_a_mixture():
    with pytest.raises(ValueError, match=r"loss\.bias_mitigation is 'mixture' and rollout\.mixture_alpha None"):
        with_loss(MIXTURE)
    # The other way round is allowed: `base` weighs each completion by the component that drew it.
    with_loss(EXACT, mixture_alpha=0.25)


@pytest.mark.parametrize(
    ("loss", "objective"), [(EXACT, PolicyGradient), (MIXTURE, PolicyGradient), (SupervisedConfig(), Supervised)]
)
def test_the_type_of_a_configuration_says_which_objective_it_is(loss, objective):
    assert isinstance(make_objective(loss), objective)
