"""What masks judge, against numbers worked out by hand; which samples they keep; and which bounds would keep most."""

import math
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.rejection import RejectBy, accepted, keeping_bounds, mismatch

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


def test_keeping_bounds_keep_what_they_say():
    """2,000 completions of 1 to 5 tokens: the mask with these bounds keeps 95 % and 99 % of its own samples."""
    random = np.random.default_rng(0)
    behavior_BGC = jnp.full((2000, 1, 5), -1.0)
    target_BGC = behavior_BGC + jnp.array(random.normal(-0.1, 0.5, (2000, 1, 5)), jnp.float32)
    mask_BGC = jnp.arange(5) < jnp.array(random.integers(1, 6, (2000, 1, 1)))
    bounds = keeping_bounds(target_BGC, behavior_BGC, mask_BGC)
    for reject_by in get_args(RejectBy):
        value_BGC = mismatch(target_BGC, behavior_BGC, mask_BGC, reject_by)
        for (low, high), share in zip(np.asarray(bounds[reject_by]).reshape(2, 2).tolist(), (0.95, 0.99), strict=True):
            kept_BGC = np.asarray(accepted(value_BGC, low, high))
            # Every completion counts once, however long it is.
            counts_BGC = np.asarray(mask_BGC) if reject_by == "token_ratio" else np.arange(5) < 1
            assert kept_BGC[np.broadcast_to(counts_BGC, kept_BGC.shape)].mean() == pytest.approx(share, abs=2e-3)
    assert bounds["sequence_k3"][0] == bounds["sequence_k3"][2] == 0, "a divergence needs no lower bound"


def test_keeping_bounds_of_nothing_are_zero():
    behavior_BGC = jnp.full((1, 1, 5), -1.0)
    bounds = keeping_bounds(behavior_BGC, behavior_BGC, jnp.zeros((1, 1, 5), bool))
    assert all(not np.any(bound) for bound in bounds.values())
