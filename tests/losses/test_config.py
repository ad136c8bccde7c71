"""Which losses may be configured: every refusal names the field, the value and what to use."""

import dataclasses

import pytest

from nested_reft.losses.config import PolicyGradientConfig, claims_unbiased
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.train.config import load_config

EXACT = PolicyGradientConfig("leave_one_out", "base", "sequence", "fixed_length", fixed_length_tokens=8)
TOKEN = dataclasses.replace(EXACT, level="token")
MIXTURE = dataclasses.replace(EXACT, bias_mitigation="mixture", mixture_alpha=0.25)
ONE = dataclasses.replace(TOKEN, bias_mitigation="one")
RETRACE = dataclasses.replace(TOKEN, bias_mitigation="retrace")


@pytest.mark.parametrize(
    ("start", "changes", "message"),
    [
        (RETRACE, {"retrace_lambda": 0.0}, "retrace_lambda is 0.0; allowed is 0 < retrace_lambda <= 1"),
        (RETRACE, {"retrace_lambda": 1.1}, "retrace_lambda is 1.1"),
        (RETRACE, {"retrace_lambda": float("nan")}, "retrace_lambda is nan"),
        (MIXTURE, {"mixture_alpha": 0.0}, "mixture_alpha is 0.0; allowed is 0 < mixture_alpha <= 1"),
        (MIXTURE, {"mixture_alpha": 1.5}, "mixture_alpha is 1.5"),
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
        (MIXTURE, {"mixture_alpha": None}, "mixture_alpha is not set; bias_mitigation 'mixture' needs it"),
        (EXACT, {"mixture_alpha": 0.5}, "mixture_alpha is 0.5, but bias_mitigation is 'base'; only 'mixture' reads it"),
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
    ],
)
def test_refusals(start, changes, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(start, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        (RETRACE, {"level": "prefix", "retrace_lambda": 0.9, "clip_low": 0.2}),
        (TOKEN, {"truncate_at": 1.0}),
        (TOKEN, {"truncate_at": 5.0, "drop_above": 10.0, "clip_high": 0.28, "dual_clip": 3.0}),
        (MIXTURE, {"mixture_alpha": 1.0, "self_normalized": True}),
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
        ({"overlong_filter": True}, False),
    ],
)
def test_claims(changes, claims):
    assert claims_unbiased(dataclasses.replace(EXACT, **changes)) is claims
    assert claims_unbiased(MIXTURE)


def test_groups_of_one_need_no_baseline():
    EXACT.validate_for(2, truncated_sampling=False)
    dataclasses.replace(EXACT, advantage="no_baseline").validate_for(1, truncated_sampling=False)
    for advantage in ("leave_one_out", "group_mean", "group_std"):
        with pytest.raises(ValueError, match=r"group_size 1: .*needs 2 or more.*use advantage 'no_baseline'"):
            dataclasses.replace(EXACT, advantage=advantage).validate_for(1, truncated_sampling=False)


def test_truncated_sampling_forbids_the_claim():
    for loss in (EXACT, MIXTURE):
        with pytest.raises(ValueError, match=r"Set top_k 0 and top_p 1, or choose a biased weight knowingly"):
            loss.validate_for(4, truncated_sampling=True)
    TOKEN.validate_for(4, truncated_sampling=True)


@pytest.mark.parametrize("sampling", [SamplingConfig(top_k=5), SamplingConfig(top_p=0.9)])
def test_a_run_is_checked_as_a_whole(sampling):
    config = load_config("tiny")
    rollout = dataclasses.replace(config.rollout, sampling=sampling)
    dataclasses.replace(config, rollout=rollout)
    with pytest.raises(ValueError, match=r"rollout\.sampling truncates"):
        dataclasses.replace(config, rollout=rollout, loss=EXACT)
    with pytest.raises(ValueError, match="group_size 1"):
        dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, group_size=1))
