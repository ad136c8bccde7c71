"""Off-policy measures by hand and against slow loops, and the warnings they raise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.health import Health, effective_sample_size, health_warning, kish, off_policy_health
from nested_reft.types import valid_mask


def test_effective_sample_size_by_hand():
    """Weights 1 and 3: 4^2 / (2 * 10) = 0.8. Not dividing by n would give 1.6."""
    assert float(effective_sample_size(jnp.log(jnp.array([1.0, 3.0])))) == pytest.approx(0.8)
    assert float(kish(jnp.array(2.0), jnp.array(5.0))) == pytest.approx(0.8)
    assert float(effective_sample_size(jnp.array([1e3, 1e3]))) == pytest.approx(1)
    assert float(effective_sample_size(jnp.array([-jnp.inf, 0.0]))) == pytest.approx(1)
    assert float(effective_sample_size(jnp.full(3, -jnp.inf))) == 0
    assert float(kish(jnp.array(0.0), jnp.array(0.0))) == 0


def test_health_by_hand():
    """One completion with ratios 2 and 1/2, one with the ratio 3; a token that does not count has the ratio 100.

    Per token: sums 5.5 and 4 + 1/4 + 9 = 13.25, so ESS = 5.5^2 / (3 * 13.25) = 30.25 / 39.75.
    Per completion: products 1 and 3, so ESS = 4^2 / (2 * 10) = 0.8. Their mean ratios instead would give 0.93.
    KL: -(log 2 - log 2 + log 3) / 3. Median 2; the quantiles 0.05 and 0.95 lie a tenth of the way from the ends:
    0.5 + 0.1 * 1.5 and 3 - 0.1 * 1.
    """
    ratio_BGC = jnp.array([[[2.0, 0.5], [3.0, 100.0]]])
    mask_BGC = jnp.array([[[True, True], [True, False]]])
    health = off_policy_health(-jnp.ones(ratio_BGC.shape), -1 - jnp.log(ratio_BGC), mask_BGC)
    expected = Health(
        ess_token=30.25 / 39.75,
        ess_sequence=0.8,
        ratio_mean=5.5 / 3,
        sequence_ratio_mean=2.0,
        ratio_max=3.0,
        kl_behavior_target=-np.log(3) / 3,
        ratio_quantile_05=0.65,
        ratio_quantile_50=2.0,
        ratio_quantile_95=2.9,
        ratio_tail=1 / 3,
    )
    for name, value in dataclasses.asdict(expected).items():
        assert float(getattr(health, name)) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    ("ratios", "tail"),
    [([1.9, 0.55, 1.0, 1.0], 0), ([2.1, 0.45, 1.0, 1.0], 0.5), ([0.1, 1.0, 1.0, 1.0], 0.25), ([np.nan, 1, 1, 1], 0.25)],
)
def test_the_tail_is_the_share_of_tokens_beyond_a_factor_of_two(ratios, tail):
    """Either way, and what is not a number is as far off as can be."""
    log_ratio_BGC = jnp.log(jnp.array([[ratios]]))
    health = off_policy_health(log_ratio_BGC, jnp.zeros((1, 1, 4)), jnp.ones((1, 1, 4), bool))
    assert float(health.ratio_tail) == tail


def test_no_token_at_all_gives_zero_everywhere():
    shape = (1, 2, 3)
    health = off_policy_health(-jnp.ones(shape), -2 * jnp.ones(shape), jnp.zeros(shape, bool))
    assert [float(value) for value in jax.tree.leaves(health)] == [0.0] * 10


def test_equals_slow_loops(key):
    target_BGC = -jax.random.exponential(key, (2, 3, 5))
    behavior_BGC = target_BGC + 0.5 * jax.random.normal(jax.random.fold_in(key, 1), (2, 3, 5))
    length_BG = jnp.array([[1, 5, 3], [2, 4, 5]])
    health = off_policy_health(target_BGC, behavior_BGC, valid_mask(length_BG, 5))

    ratios, sequences, log_ratios = [], [], []
    for b in range(2):
        for g in range(3):
            difference = np.asarray(target_BGC - behavior_BGC, np.float64)[b, g, : length_BG[b, g]]
            log_ratios += list(difference)
            ratios += list(np.exp(difference))
            sequences.append(np.exp(difference.sum()))
    ratios, sequences = np.array(ratios), np.array(sequences)
    expected = {
        "ess_token": ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()),
        "ess_sequence": sequences.sum() ** 2 / (len(sequences) * (sequences**2).sum()),
        "ratio_mean": ratios.mean(),
        "sequence_ratio_mean": sequences.mean(),
        "ratio_max": ratios.max(),
        "ratio_quantile_05": np.quantile(ratios, 0.05),
        "ratio_quantile_50": np.quantile(ratios, 0.5),
        "ratio_quantile_95": np.quantile(ratios, 0.95),
        "ratio_tail": np.mean((ratios > 2) | (ratios < 0.5)),
        "kl_behavior_target": -np.mean(log_ratios),
    }
    assert 0 < expected["ratio_tail"] < 1
    assert dataclasses.asdict(health).keys() == expected.keys()
    for name, value in expected.items():
        assert float(getattr(health, name)) == pytest.approx(value, rel=1e-5), name


def test_on_policy_is_one():
    logprob_BGC = -jnp.ones((1, 2, 3))
    health = off_policy_health(logprob_BGC, logprob_BGC, jnp.ones((1, 2, 3), bool))
    assert {name: float(value) for name, value in dataclasses.asdict(health).items()} == {
        "ess_token": 1, "ess_sequence": 1, "ratio_mean": 1, "sequence_ratio_mean": 1, "ratio_max": 1,
        "kl_behavior_target": 0,
        "ratio_quantile_05": 1, "ratio_quantile_50": 1, "ratio_quantile_95": 1,
        "ratio_tail": 0,
    }  # fmt: skip


@pytest.mark.parametrize("target", [-1.0, -101.0, 99.0, -jnp.inf])
@pytest.mark.parametrize("valid", [True, False])
def test_finite_in_every_corner(target, valid):
    shape = (1, 2, 3)
    health = off_policy_health(jnp.full(shape, target), -jnp.ones(shape), jnp.full(shape, valid))
    assert all(np.isfinite(value) for value in jax.tree.leaves(health))


HEALTHY = Health(
    ess_token=0.7,
    ess_sequence=0.6,
    ratio_mean=0.9,
    sequence_ratio_mean=0.8,
    ratio_max=2.0,
    kl_behavior_target=0.12,
    ratio_quantile_05=0.5,
    ratio_quantile_50=1.0,
    ratio_quantile_95=1.5,
    ratio_tail=0.1,
)


def test_no_warning_while_healthy():
    assert health_warning(HEALTHY, 0.8, 0.5) is None


def test_noisy_weights_are_named_with_remedies():
    warning = health_warning(HEALTHY, 0.2, 0.5)
    assert warning is not None
    for part in ("ess_weight is 0.200", "under 0.5", "0.12 nats", "skip_ratio", "rollout.mixture_alpha", "truncate_at"):
        assert part in warning


def test_bounded_weights_do_not_hide_the_gap():
    """`one` has ess_weight 1 however far off-policy it is: the ratios themselves must speak."""
    warning = health_warning(dataclasses.replace(HEALTHY, ess_token=0.1), 1.0, 0.5)
    assert warning is not None and "ess_token is 0.100" in warning and "biased rather than noisy" in warning
    assert "truncate_at" not in warning


def test_an_objective_without_weights_is_judged_by_its_ratios():
    assert health_warning(HEALTHY, None, 0.5) is None
    warning = health_warning(dataclasses.replace(HEALTHY, ess_token=0.1), None, 0.5)
    assert warning is not None and warning.startswith("ess_token is 0.100")


def test_nan_warns():
    assert health_warning(HEALTHY, float("nan"), 0.5) is not None
    assert health_warning(dataclasses.replace(HEALTHY, ess_token=float("nan")), 0.8, 0.5) is not None


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, float("nan")])
def test_threshold_is_checked(threshold):
    with pytest.raises(ValueError, match="allowed is 0 < threshold < 1"):
        health_warning(HEALTHY, 0.8, threshold)
