"""What masks judge, against numbers worked out by hand; which samples they keep; and which bounds would keep most."""

import math
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.rejection import RejectBy, accepted, keeping_bounds, mismatch, written_bounds
from nested_reft.losses.config import PolicyGradientConfig

# Behind a forced token and before padding, the ratios are 2, 1/2 and 4: their product is 4, of three tokens.
RATIOS = [9.0, 2.0, 0.5, 4.0, 7.0]
MASK = jnp.array([[[False, True, True, True, False]]])


def logprobs(ratios):
    """Of target and behavior policy."""
    behavior_BGC = jnp.full((1, 1, len(ratios)), -2.0)
    return behavior_BGC + jnp.log(jnp.array([[ratios]], jnp.float32)), behavior_BGC


@pytest.mark.parametrize(
    ("reject_by", "expected"),
    [
        ("token_ratio", [2, 0.5, 4]),
        ("sequence_ratio", [4, 4, 4]),
        ("geometric_mean", [4 ** (1 / 3)] * 3),
        # rho - 1 - log rho: 1 - log 2, -1/2 + log 2 and 3 - 2 log 2. The other direction, 1 / rho - 1 + log rho, would
        # give (-1/2 + 1 - 3/4 + 2 log 2) / 3 = 0.38.
        ("sequence_k3", [(3.5 - math.log(4)) / 3] * 3),
    ],
)
def test_values_by_hand(reject_by, expected):
    found = mismatch(*logprobs(RATIOS), MASK, reject_by)
    np.testing.assert_allclose(found[0, 0, 1:4], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        (0.5, None, [False, True, True, True]),  # a value on the bound is kept
        (None, 2.0, [True, True, True, False]),
        (0.6, 1.5, [False, False, True, False]),
    ],
)
def test_bounds(below, above, expected):
    values_BGC = jnp.array([[[0.4, 0.5, 1.0, 2.1]]])
    assert accepted(values_BGC, below, above)[0, 0].tolist() == expected


@pytest.mark.parametrize("reject_by", get_args(RejectBy))
def test_a_broken_model_is_not_hidden_by_its_rejection(reject_by):
    target_BGC, behavior_BGC = logprobs(RATIOS)
    values_BGC = mismatch(target_BGC.at[0, 0, 2].set(jnp.nan), behavior_BGC, MASK, reject_by)
    assert accepted(values_BGC, 1e-3 if reject_by != "sequence_k3" else None, 1.001)[0, 0, 2]


@pytest.mark.parametrize("reject_by", get_args(RejectBy))
def test_values_are_finite_outside_the_supports(reject_by):
    minus, plain = jnp.full((1, 1, 5), -jnp.inf), jnp.full((1, 1, 5), -1.0)
    for target, behavior in ((minus, plain), (plain, minus), (minus, minus)):
        assert np.all(np.isfinite(mismatch(target, behavior, MASK, reject_by)))
    nothing = jnp.zeros((1, 1, 5), bool)
    assert np.all(np.isfinite(mismatch(plain, plain, nothing, reject_by)))


def samples(nats, tokens, spread=0.5, completions=2000, seed=0):
    """Completions of up to so many tokens from a policy so far off: log rho is normal, with mean -nats."""
    random = np.random.default_rng(seed)
    behavior_BGC = jnp.full((completions, 1, tokens), -1.0)
    log_ratio_BGC = jnp.array(random.normal(-nats, spread, behavior_BGC.shape), jnp.float32)
    return behavior_BGC + log_ratio_BGC, behavior_BGC, jnp.ones(behavior_BGC.shape, bool)


def test_keeping_bounds_keep_what_they_say():
    """2,000 completions of 1 to 5 tokens: the mask with these bounds keeps 95 % and 99 % of its own samples."""
    target_BGC, behavior_BGC, _ = samples(0.1, 5)
    mask_BGC = jnp.arange(5) < jnp.array(np.random.default_rng(0).integers(1, 6, (2000, 1, 1)))
    bounds = keeping_bounds(target_BGC, behavior_BGC, mask_BGC)
    for reject_by in get_args(RejectBy):
        value_BGC = mismatch(target_BGC, behavior_BGC, mask_BGC, reject_by)
        found = [None if math.isnan(bound) else bound for bound in np.asarray(bounds[reject_by]).tolist()]
        for low, high, share in ((*found[:2], 0.95), (*found[2:], 0.99)):
            kept_BGC = np.asarray(accepted(value_BGC, low, high))
            # Every completion counts once, however long it is.
            counts_BGC = np.asarray(mask_BGC) if reject_by == "token_ratio" else np.arange(5) < 1
            assert kept_BGC[np.broadcast_to(counts_BGC, kept_BGC.shape)].mean() == pytest.approx(share, abs=2e-3)
    assert np.isnan(bounds["sequence_k3"][::2]).all(), "a divergence needs no lower bound"
    assert not np.isnan(bounds["geometric_mean"]).any(), "these ratios lie on both sides of 1"


@pytest.mark.parametrize(
    ("nats", "tokens", "spread", "without"),
    [
        # Nearly all geometric means are below 1, and ratios of completions at the clamp.
        (0.12, 300, 0.5, {"sequence_ratio": [0, 0, 0, 0], "geometric_mean": [1, 0, 1, 0]}),
        (0.4, 30, 0.9, {"geometric_mean": [1, 0, 1, 1]}),
        (0.1, 5, 0.5, {"geometric_mean": [1, 1, 1, 1], "sequence_ratio": [1, 1, 1, 1]}),
        (5e-5, 5, 1e-2, {"geometric_mean": [1, 1, 1, 1], "sequence_k3": [0, 1, 0, 1]}),
        (0.0, 5, 1e-8, {name: [0, 0, 0, 0] for name in get_args(RejectBy)}),
    ],
)
def test_every_suggestion_may_be_set_and_keeps_what_it_says(nats, tokens, spread, without):
    """As it is written, rounded, in the log and the report; `without` has 0 where a side has no bound."""
    data = samples(nats, tokens, spread)
    found = {name: written_bounds(name, np.asarray(x).tolist()) for name, x in keeping_bounds(*data).items()}
    for reject_by, bounds in found.items():
        value_BGC = mismatch(*data, reject_by)
        for low, high, share in ((*bounds[:2], 0.95), (*bounds[2:], 0.99)):
            if low is None and high is None:
                continue
            level = "token" if reject_by == "token_ratio" else "sequence"
            loss = PolicyGradientConfig(
                "group_mean", "base", level, "token_mean", reject_by=reject_by, reject_below=low, reject_above=high
            )
            kept = accepted(value_BGC, loss.reject_below, loss.reject_above).mean()
            assert share - 3e-3 < kept < 1 - (1 - share) / 3, "rounding moves a bound by half a percent at most"
    given = {name: [int(bound is not None) for bound in found[name]] for name in without}
    assert given == without


def test_bounds_near_one_keep_their_side_when_they_are_written():
    assert written_bounds("token_ratio", [0.99987, 1.000123, 0.5128, 37.46]) == [0.99987, 1.000123, 0.513, 37.5]
    # What the configuration refuses is no bound, as logs of earlier versions have it.
    assert written_bounds("geometric_mean", [0.84, 0.94, 1.0, 1.0]) == [0.84, None, None, None]
    assert written_bounds("sequence_k3", [0.0, 0.12345, math.nan, None]) == [None, 0.123, None, None]
    assert written_bounds("sequence_ratio", [2.0612e-9, 4.8517e8, 2.1e-9, 4.8e8]) == [None, None, 2.1e-9, 4.8e8]


def test_nothing_has_no_keeping_bounds():
    behavior_BGC = jnp.full((1, 1, 5), -1.0)
    bounds = keeping_bounds(behavior_BGC, behavior_BGC, jnp.zeros((1, 1, 5), bool))
    assert all(np.isnan(bound).all() for bound in bounds.values())
