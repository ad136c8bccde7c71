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


@pytest.mark.parametrize(
    ("start", "changes", "message"),
    [
        (RETRACE, {"retrace_lambda": 0.0}, "retrace_lambda is 0.0; allowed is 0 < retrace_lambda <= 1"),
        (RETRACE, {"retrace_lambda": 1.1}, "retrace_lambda is 1.1"),
        (RETRACE, {"retrace_lambda": float("nan")}, "retrace_lambda is nan"),
        (TOKEN, {"fixed_length_tokens": 0}, "fixed_length_tokens is 0; allowed is 1 or more"),
        (TOKEN, {"truncate_at": 0.5}, "truncate_at is 0.5; allowed is 1 or more"),
        (TOKEN, {"truncate_at": float("inf")}, "truncate_at is inf"),
        (TOKEN, {"drop_below": 1.0}, "drop_below is 1.0; allowed is 0 < drop_below < 1"),
        (TOKEN, {"drop_above": 1.0}, "drop_above is 1.0; allowed is more than 1"),
        (TOKEN, {"clip_low": 1.0}, "clip_low is 1.0; allowed is 0 < clip_low < 1"),
        (TOKEN, {"clip_high": 0.0}, "clip_high is 0.0; allowed is more than 0"),
        (TOKEN, {"dual_clip": 1.0}, "dual_clip is 1.0; allowed is more than 1"),
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
        (MIXTURE, {"level": "token"}, "only completions have a density; set 'sequence'"),
        (RETRACE, {"level": "sequence"}, "use 'base' with truncate_at"),
        (RETRACE, {"level": "geometric"}, "'token' or 'prefix'"),
        (RETRACE, {"truncate_at": 2.0}, "truncate_at is set, but bias_mitigation 'retrace' already limits the weight"),
        (RETRACE, {"clip_high": 0.2}, "clip_high is set, but bias_mitigation 'retrace'"),
        (TOKEN, {"level": "geometric", "self_normalized": True}, "self_normalized is set at level 'geometric'"),
        # Limits that could never act.
        (TOKEN, {"truncate_at": 3.0, "drop_above": 2.0}, "dropped already; lower truncate_at or leave one out"),
        (TOKEN, {"truncate_at": 1.2, "clip_high": 0.28}, "clip_high acts on weights above 1.28"),
        (TOKEN, {"drop_above": 2.0, "dual_clip": 3.0}, "dual_clip acts on weights above 3"),
        (TOKEN, {"drop_below": 0.8, "clip_low": 0.2}, "clip_low acts on weights below 0.8, but drop_below leaves none"),
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
        (TOKEN, {"drop_below": 0.5, "clip_low": 0.2}),
        (TOKEN, {"truncate_at": 1.0}),
        (TOKEN, {"truncate_at": 5.0, "drop_above": 10.0, "clip_high": 0.28, "dual_clip": 3.0}),
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
        ({"drop_below": 0.5}, False),
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
