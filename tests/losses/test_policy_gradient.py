"""The policy-gradient loss: numbers by hand, a slow loop for every combination, invariances, corners."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.kl import self_distillation_kl
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.policy_gradient import PolicyGradient, normalization_shares, policy_gradient_loss
from nested_reft.losses.presets import dapo
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.types import gradient_mask, valid_mask
from tests.losses.batches import one_group, random_batch
from tests.tiny_models import tiny_model, tiny_prompts

PLAIN = PolicyGradientConfig("leave_one_out", "base", "token", "token_mean")
LIMITS = [
    {},
    {"truncate_at": 1.3},
    {"reject_by": "token_ratio", "reject_below": 0.8, "reject_above": 1.3},
    {"reject_by": "sequence_ratio", "reject_below": 0.8},
    {"reject_by": "geometric_mean", "reject_above": 1.1, "self_normalized": True},
    {"reject_by": "sequence_k3", "reject_above": 0.1, "clip_low": 0.1},
    {"clip_policies": "three", "clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.3},
    {"clip_policies": "three", "clip_level": "sequence", "truncate_at": 1.3, "self_normalized": True},
    {"clip_policies": "three", "clip_level": "geometric", "clip_high": 0.1, "reject_by": "sequence_k3"}
    | {"reject_above": 0.1},
    {"self_normalized": True},
    {"clip_low": 0.1},
    {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.3},
    {"reference_kl": "k1_in_reward", "reference_kl_coefficient": 0.3},
    {"reference_kl": "k2_loss", "reference_kl_coefficient": 0.3},
    {"reference_kl": "k3_loss", "reference_kl_coefficient": 0.3},
    {"reference_kl": "k3_loss", "reference_kl_coefficient": 0.3, "self_normalized": True},
]


def every_combination() -> list[PolicyGradientConfig]:
    """All that the configuration does not refuse, with limits at one normalisation and all normalisations without."""
    variants = [("base", {}), ("one", {}), ("practical", {}), ("retrace", {"retrace_lambda": 0.9})]
    variants.append(("mixture", {}))
    normalizations = [(name, {}) for name in ("token_mean", "group_token_mean", "sequence_mean")]
    normalizations.append(("fixed_length", {"fixed_length_tokens": 5}))
    levels = ("token", "prefix", "sequence", "geometric")
    found = []
    for (variant, own), level, (normalization, length), limit in itertools.product(
        variants, levels, normalizations, LIMITS
    ):
        if limit and normalization != "sequence_mean":
            continue
        try:
            found.append(PolicyGradientConfig("leave_one_out", variant, level, normalization, **own, **length, **limit))
        except ValueError:
            continue
    return found


def identity(config: PolicyGradientConfig) -> str:
    changed = [
        str(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    return "-".join(changed[1:])


def gradient_and_parts(target_BGC, batch, config):
    """Gradient of the loss's mean with respect to the log-probabilities, as the update divides it."""

    def mean_loss(target_BGC):
        output = policy_gradient_loss(target_BGC, batch, config)
        return output.mean(), output

    gradient_BGC, output = jax.grad(mean_loss, has_aux=True)(target_BGC)
    return np.asarray(gradient_BGC), output.total, output.parts


def slow_gradient(target_BGC, batch, config) -> np.ndarray:
    """The documented gradient, token by token: -c_t h_t A_t / W where no clip acts, plus the penalty's over its W.

    With three policies h_t is the product of the weight and the optimizer's ratio.
    """
    arrays = [target_BGC, batch.behavior_logprob_BGC, batch.old_logprob_BGC, batch.nested_logprob_BGC]
    target, behavior, old, nested = (np.asarray(array, np.float64) for array in arrays)
    reference = np.asarray(batch.reference_logprob_BGC, np.float64)
    end = np.asarray(batch.length_BG)
    start = np.where(np.asarray(batch.counted_BG), np.asarray(batch.forced_BG), end)
    surrogate, penalty = np.zeros(target.shape), np.zeros(target.shape)
    # With three policies the weight stops at the policy before the update.
    corrected = old if config.clip_policies == "three" else target
    weight_sum, count, tokens_of_group = 0.0, 0.0, np.maximum(end - start, 0).sum(axis=1)
    for b, g in itertools.product(*map(range, end.shape)):
        own = range(start[b, g], end[b, g])
        for t in own:
            sampler = {s: math.exp(corrected[b, g, s] - behavior[b, g, s]) for s in own}
            ratios = dict(sampler)
            if config.bias_mitigation == "practical":
                ratios = {s: math.exp(target[b, g, s] - old[b, g, s]) for s in own}
            if config.bias_mitigation == "one":
                ratios = dict.fromkeys(own, 1.0)
            if config.bias_mitigation == "retrace":
                ratios = {s: config.retrace_lambda * min(1.0, ratio) for s, ratio in ratios.items()}
            product = math.prod(ratios.values())
            if config.bias_mitigation == "mixture":
                densities = [math.exp(sum(policy[b, g, s] for s in own)) for policy in (corrected, old, nested)]
                alpha = float(batch.full_share_BG[b, g])
                h = densities[0] / (alpha * densities[1] + (1 - alpha) * densities[2])
            elif config.level == "token":
                h = ratios[t]
            elif config.level == "prefix":
                h = math.prod(ratios[s] for s in own if s <= t)
            else:
                h = product if config.level == "sequence" else product ** (1 / len(own))
            judged = {
                "token_ratio": sampler[t],
                "sequence_ratio": math.prod(sampler.values()),
                "geometric_mean": math.prod(sampler.values()) ** (1 / len(own)),
                "sequence_k3": np.mean([ratio - 1 - math.log(ratio) for ratio in sampler.values()]),
                None: 1.0,
            }[config.reject_by]
            rejected = (config.reject_below or 0) > judged or judged > (config.reject_above or math.inf)
            factor, r = 0.0 if rejected else 1.0, min(h, config.truncate_at or math.inf)
            if config.clip_policies == "three":
                steps = {s: math.exp(target[b, g, s] - old[b, g, s]) for s in own}
                product = math.prod(steps.values())
                step_of_level = {"token": steps[t], "sequence": product, "geometric": product ** (1 / len(own))}
                factor, r = factor * r, step_of_level[config.clip_level]

            advantage = float(batch.signal_BG[b, g])
            if config.reference_kl == "k1_in_reward":
                to_come = sum(target[b, g, s] - reference[b, g, s] for s in own if s >= t)
                advantage -= config.reference_kl_coefficient * to_come
            too_high = config.clip_high is not None and advantage > 0 and r > 1 + config.clip_high
            too_low = config.clip_low is not None and advantage < 0 and r < 1 - config.clip_low
            far_too_high = config.dual_clip is not None and advantage < 0 and r > config.dual_clip
            h = factor * r
            term = 0.0 if too_high or too_low or far_too_high else h * advantage

            log_ratio = target[b, g, t] - reference[b, g, t]
            pull = {"k2_loss": log_ratio, "k3_loss": 1 - math.exp(-log_ratio)}.get(config.reference_kl, 0.0)

            c, share = {
                "token_mean": (1.0, 1.0),
                "group_token_mean": (1 / tokens_of_group[b], 1 / tokens_of_group[b]),
                "sequence_mean": (1 / len(own), 1 / len(own)),
                "fixed_length": (1 / (config.fixed_length_tokens or 1), 1 / len(own)),
            }[config.normalization]
            weight_sum, count = weight_sum + share * (h if config.self_normalized else 1.0), count + share
            surrogate[b, g, t] = -c * term
            penalty[b, g, t] = c * config.reference_kl_coefficient * pull
    return surrogate / weight_sum + penalty / count


@pytest.mark.parametrize("config", every_combination(), ids=identity)
def test_gradient_of_every_combination_equals_the_slow_loop(config):
    target_BGC, batch = random_batch(jax.random.key(3))
    gradient_BGC, _, _ = gradient_and_parts(target_BGC, batch, config)
    np.testing.assert_allclose(gradient_BGC, slow_gradient(target_BGC, batch, config), rtol=2e-4, atol=1e-6)


def test_the_combinations_are_many():
    assert len(every_combination()) > 80


# Clips.


def alive(ratio, advantage, config):
    gradient_BGC, _, parts = gradient_and_parts(*one_group([[ratio]], [advantage]), config)
    assert (gradient_BGC[0, 0, 0] == 0) == (float(parts["clipped_share"].mean()) == 1)
    return gradient_BGC[0, 0, 0] != 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "survives"),
    [
        (1.25, 1.0, True),  # a symmetric clip of 0.2 would kill it
        (1.29, 1.0, False),
        (0.1, 1.0, True),
        (0.79, -1.0, False),
        (0.81, -1.0, True),
        (0.75, -1.0, False),  # a symmetric clip of 0.28 would let it live
        (1.29, -1.0, True),
        (1000.0, -1.0, True),
    ],
)
def test_clip_higher(ratio, advantage, survives):
    assert alive(ratio, advantage, dapo("base", clip_policies="two")) == survives


@pytest.mark.parametrize(
    ("ratio", "advantage", "survives"), [(2.9, -1.0, True), (3.1, -1.0, False), (0.79, -1.0, False), (1.2, 1.0, True)]
)
def test_dual_clip(ratio, advantage, survives):
    config = dapo("base", dual_clip=3.0, clip_policies="two")
    assert alive(ratio, advantage, config) == survives
    _, total, _ = gradient_and_parts(*one_group([[3.1]], [-1.0]), config)
    assert float(total.mean()) == pytest.approx(3)  # not 3.1


def test_sequence_levels_clip_all_tokens_together():
    """Ratios 1.5 and 0.9: the geometric mean 1.16 dies beyond 1.1 for both; per token only the first would."""
    target_BGC, batch = one_group([[1.5, 0.9]], [1.0])
    for level, expected in (("geometric", [True, True]), ("token", [True, False])):
        config = dataclasses.replace(PLAIN, level=level, clip_high=0.1)
        gradient_BGC, _, _ = gradient_and_parts(target_BGC, batch, config)
        assert (gradient_BGC[0, 0] == 0).tolist() == expected


# Masks.


def test_rejected_tokens_neither_push_nor_count_as_value():
    """h = 0 with A = -1: the clip's floor 1 - clip_low would otherwise leave a value of 0.8 behind.

    A rejected token stays in the divisor; without it the gradient would be 1.
    """
    config = dataclasses.replace(PLAIN, reject_by="token_ratio", reject_below=0.5, clip_low=0.2)
    gradient_BGC, total, parts = gradient_and_parts(*one_group([[0.3, 1.0]], [-1.0]), config)
    np.testing.assert_allclose(gradient_BGC[0, 0], [0, 0.5])
    assert float(total.mean()) == pytest.approx(0.5)
    assert float(parts["limited_share"].mean()) == 0 and float(parts["clipped_share"].mean()) == 0


def test_rejected_tokens_have_no_weight_that_was_truncated():
    """Ratios 1, 3 and 9: truncation at 2 changes two of them, and the mask takes one of these away."""
    target_BGC, batch = one_group([[1.0, 3.0, 9.0]], [1.0])
    config = PolicyGradientConfig(
        "no_baseline", "base", "token", "token_mean", truncate_at=2.0, reject_by="token_ratio", reject_above=5.0
    )
    parts = policy_gradient_loss(target_BGC, batch, config).parts
    assert float(parts["limited_share"].mean()) == pytest.approx(1 / 3)
    assert float(parts["accepted_tokens"].mean()) == pytest.approx(2 / 3)


def test_what_a_mask_keeps_is_logged():
    """Of three completions with geometric means 2, 1 and 1/4, of 2, 1 and 2 tokens, the first two are kept.

    Token weights 4, 1, 1, 1/4, 1/4: of all five the mean is 6 / 5 and the ESS 36 / (5 * 18); of the three that are
    kept the mean is 2 and the ESS 36 / (3 * 18).
    """
    target_BGC, batch = one_group([[4.0, 1.0], [1.0, 9.0], [0.25, 0.25]], [1.0, 1.0, 1.0], [2, 1, 2])
    config = dataclasses.replace(PLAIN, reject_by="geometric_mean", reject_below=0.5)
    output = policy_gradient_loss(target_BGC, batch, config)
    found = PolicyGradient(config).metrics({name: part.mean() for name, part in output.parts.items()})
    expected = {"accepted_tokens": 3 / 5, "accepted_completions": 2 / 3, "weight_mean": 6 / 5, "ess_weight": 0.4}
    expected |= {"kept_weight_mean": 2.0, "ess_kept": 36 / 54}
    assert {name: float(found[name]) for name in expected} == pytest.approx(expected)
    # A token's ratio that is rejected takes no other token of its completion with it.
    config = dataclasses.replace(PLAIN, reject_by="token_ratio", reject_above=2.0)
    parts = policy_gradient_loss(target_BGC, batch, config).parts
    assert float(parts["accepted_tokens"].mean()) == pytest.approx(4 / 5)
    assert float(parts["accepted_completions"].mean()) == 1


def test_metrics_of_nothing_kept_are_zero():
    target_BGC, batch = one_group([[4.0, 4.0]], [1.0])
    config = dataclasses.replace(PLAIN, reject_by="token_ratio", reject_above=2.0)
    output = policy_gradient_loss(target_BGC, batch, config)
    found = PolicyGradient(config).metrics({name: part.mean() for name, part in output.parts.items()})
    assert all(float(found[name]) == 0 for name in ("accepted_tokens", "kept_weight_mean", "ess_kept", "ess_weight"))


def test_self_normalisation_divides_by_what_is_kept():
    """Weights 3, 1 and 8, of which the last is rejected: the others' gradients are -3/4 and -1/4."""
    config = dataclasses.replace(PLAIN, self_normalized=True, reject_by="token_ratio", reject_above=5.0)
    gradient_BGC, _, _ = gradient_and_parts(*one_group([[3.0], [1.0], [8.0]], [1.0, 1.0, 1.0]), config)
    np.testing.assert_allclose(gradient_BGC[0, :, 0], [-0.75, -0.25, 0], rtol=1e-6)


# Three policies.

CLIPS = {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.3}


def value_gradient_and_weights(target_BGC, batch, config):
    def mean_loss(target_BGC):
        output = policy_gradient_loss(target_BGC, batch, config)
        return output.mean(), output.weight_BGC

    (value, weight_BGC), gradient_BGC = jax.value_and_grad(mean_loss, has_aux=True)(target_BGC)
    return np.asarray(value), np.asarray(gradient_BGC), np.asarray(weight_BGC)


def assert_same_bits(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("normalization", ["token_mean", "group_token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("variant", ["base", "one"])
def test_three_policies_are_ppo_where_the_full_model_sampled(variant, level, normalization):
    """pi_b = pi_old: every weight pi_old / pi_b is 1, and what is left is PPO on pi / pi_old, bit for bit."""
    length = {"fixed_length_tokens": 5} if normalization == "fixed_length" else {}
    ppo = dataclasses.replace(PLAIN, level=level, normalization=normalization, **length, **CLIPS)
    three = dataclasses.replace(ppo, bias_mitigation=variant, level="token", clip_policies="three", clip_level=level)
    target_BGC, batch = random_batch(jax.random.key(11), prompts=6)
    batch = dataclasses.replace(batch, old_logprob_BGC=batch.behavior_logprob_BGC)
    expected = value_gradient_and_weights(target_BGC, batch, ppo)
    assert_same_bits(value_gradient_and_weights(target_BGC, batch, three), expected)
    # Some tokens are clipped and others are not, so the comparison says something.
    alive_BGC = expected[1][np.asarray(batch.mask_BGC)] != 0
    assert alive_BGC.any() and not alive_BGC.all()


PLAIN_WEIGHTS = [
    {},
    {"level": "sequence"},
    {"level": "geometric", "truncate_at": 1.2},
    {"truncate_at": 1.3, "reject_by": "geometric_mean", "reject_below": 0.9},
    {"bias_mitigation": "retrace", "level": "prefix", "retrace_lambda": 0.9},
    {"bias_mitigation": "mixture", "level": "sequence"},
    {"self_normalized": True},
]


@pytest.mark.parametrize(
    ("weight", "clip_level"),
    # Self-normalisation goes with no geometric level.
    [
        *itertools.product(PLAIN_WEIGHTS, ["token", "sequence"]),
        *((weight, "geometric") for weight in PLAIN_WEIGHTS[:-1]),
    ],
)
def test_three_policies_are_the_plain_weight_before_the_optimizer_has_moved(weight, clip_level):
    """pi = pi_old, given or left out: the clip has nothing to act on, and the weight is that of two policies."""
    plain = dataclasses.replace(PLAIN, **weight)
    three = dataclasses.replace(plain, clip_policies="three", clip_level=clip_level, **CLIPS)
    target_BGC, batch = random_batch(jax.random.key(12))
    for old_BGC in (None, jnp.maximum(target_BGC, -1e4)):
        batch = dataclasses.replace(batch, old_logprob_BGC=old_BGC)
        expected = value_gradient_and_weights(target_BGC, batch, plain)
        assert_same_bits(value_gradient_and_weights(target_BGC, batch, three), expected)


def test_the_clip_no_longer_acts_on_the_nesting():
    """The sampler underrates a right token by 1.5. Two policies clip it at once; three once the optimizer has moved."""
    two = dataclasses.replace(PLAIN, clip_high=0.28)
    three = dataclasses.replace(two, clip_policies="three")
    target_BGC, batch = one_group([[1.5]], [1.0])
    for old_logprob, config, expected in ((-1.0, two, 0), (-1.0, three, -1.5), (-1.3, three, 0)):
        batch = dataclasses.replace(batch, old_logprob_BGC=jnp.full((1, 1, 1), old_logprob))
        gradient_BGC, _, _ = gradient_and_parts(target_BGC, batch, config)
        np.testing.assert_allclose(gradient_BGC[0, 0, 0], expected, rtol=1e-6)


# Normalisation.


@pytest.mark.parametrize(
    ("normalization", "relation"),
    [("token_mean", 10), ("group_token_mean", 10), ("sequence_mean", 1), ("fixed_length", 10)],
)
def test_weight_of_long_completions(normalization, relation):
    """Lengths 100 and 10, same advantage: the long one's gradient weighs 10 : 1, under a mean per completion 1 : 1."""
    fixed = {"fixed_length_tokens": 100} if normalization == "fixed_length" else {}
    config = PolicyGradientConfig("leave_one_out", "base", "token", normalization, **fixed)
    gradient_BGC, _, _ = gradient_and_parts(*one_group(np.ones((2, 100)), [1.0, 1.0], [100, 10]), config)
    total_G = gradient_BGC[0].sum(axis=-1)
    assert total_G[0] / total_G[1] == pytest.approx(relation, rel=1e-4)


def test_normalisers_by_hand():
    """Two groups of one, of 1 and 3 tokens. A mean of micro-batch means would give the token mean 1/2 and 1/6."""
    mask_BGC = jnp.array([[[True, False, False]], [[True, True, True]]])
    expected = {
        "token_mean": ([1, 1, 1, 1], 4),
        "group_token_mean": ([1, 1 / 3, 1 / 3, 1 / 3], 2),
        "sequence_mean": ([1, 1 / 3, 1 / 3, 1 / 3], 2),
        "fixed_length": ([1 / 6] * 4, 2),
    }
    for name, (coefficients, weight) in expected.items():
        c_BGC, share_BGC = normalization_shares(mask_BGC, name, 6 if name == "fixed_length" else None)
        np.testing.assert_allclose(c_BGC[mask_BGC], coefficients, rtol=1e-6, err_msg=name)
        assert float(share_BGC.sum()) == pytest.approx(weight)
        assert not np.any(c_BGC[~mask_BGC]) and not np.any(share_BGC[~mask_BGC])


def test_a_fully_forced_completion_counts_nowhere():
    mask_BGC = gradient_mask(jnp.array([[3, 3]]), jnp.array([[3, 0]]), jnp.ones((1, 2), bool), 3)
    for name in ("token_mean", "group_token_mean", "sequence_mean", "fixed_length"):
        _, share_BGC = normalization_shares(mask_BGC, name, 3 if name == "fixed_length" else None)
        assert float(share_BGC.sum()) == (3 if name == "token_mean" else 1)


def test_self_normalisation_by_hand():
    """Weights 3 and 1, advantages 1 and -1: gradients -3/4 and 1/4. Unnormalised they would be -3/2 and 1/2."""
    config = dataclasses.replace(PLAIN, self_normalized=True)
    gradient_BGC, total, _ = gradient_and_parts(*one_group([[3.0], [1.0]], [1.0, -1.0]), config)
    np.testing.assert_allclose(gradient_BGC[0, :, 0], [-0.75, 0.25], rtol=1e-6)
    assert float(total.mean()) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "penalty",
    [
        {"reference_kl": "k2_loss", "reference_kl_coefficient": 0.3},
        {"reference_kl": "k3_loss", "reference_kl_coefficient": 0.3},
        {"entropy_coefficient": 0.3},
        {"self_distillation_coefficient": 0.3},
    ],
)
def test_self_normalisation_leaves_penalties_alone(penalty):
    """Without any advantage the loss is the penalty, which no change of the behavior policy can grow."""
    target_BGC, batch = random_batch(jax.random.key(4))
    batch = dataclasses.replace(batch, signal_BG=jnp.zeros_like(batch.signal_BG))
    config = dataclasses.replace(PLAIN, level="sequence", self_normalized=True, **penalty)

    def loss(batch, config):
        return float(policy_gradient_loss(target_BGC, batch, config, target_BGC**2, target_BGC**2).mean())

    unlikely = dataclasses.replace(batch, behavior_logprob_BGC=batch.behavior_logprob_BGC + 2.0)
    expected = loss(batch, dataclasses.replace(config, self_normalized=False))
    assert abs(expected) > 0.01
    assert loss(batch, config) == pytest.approx(expected) and loss(unlikely, config) == pytest.approx(expected)


SPLIT = [
    config for config in every_combination() if config.normalization == "sequence_mean" or config.level == "sequence"
]


@pytest.mark.parametrize("config", SPLIT[::5], ids=identity)
def test_micro_batches_add_up(config):
    """Sums and weights of single prompts add up to those of the batch, and so do their gradients."""
    target_BGC, batch = random_batch(jax.random.key(5), prompts=3)

    def sums(target_BGC, batch):
        output = policy_gradient_loss(target_BGC, batch, config)
        return sum(part.sum for part in output.sums), (output.sums, output.parts)

    whole_gradient, whole = jax.grad(sums, has_aux=True)(target_BGC, batch)
    parts = []
    for b in range(3):
        one = jax.tree.map(lambda x, b=b: x[b : b + 1], (target_BGC, batch))
        gradient, added = jax.grad(sums, has_aux=True)(*one)
        parts.append(added)
        np.testing.assert_allclose(gradient[0], whole_gradient[b], rtol=1e-5, atol=1e-6)
    added = jax.tree.map(lambda *values: sum(values), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), added, whole)


# What must not matter, and what must.


def test_forced_and_padding_tokens_have_no_part():
    target_BGC, batch = random_batch(jax.random.key(1))
    batch = dataclasses.replace(batch, forced_BG=jnp.array([[2, 1, 0], [9, 0, 1]]))
    mask_BGC = np.asarray(batch.mask_BGC)
    other = jax.tree.map(
        lambda x: x - 3.0 * ~mask_BGC if x.shape == mask_BGC.shape and x.dtype == jnp.float32 else x, batch
    )
    for config in every_combination()[::7]:
        gradient_BGC, total, _ = gradient_and_parts(target_BGC, batch, config)
        assert not np.any(gradient_BGC[~mask_BGC])
        again_BGC, again, _ = gradient_and_parts(target_BGC - 5.0 * ~mask_BGC, other, config)
        np.testing.assert_array_equal(gradient_BGC, again_BGC)
        assert float(total.sum) == float(again.sum)


@pytest.mark.parametrize("config", every_combination()[::7], ids=identity)
def test_completions_that_do_not_count_have_no_part(config):
    """They push no token and enter no divisor, whatever they hold; the others' gradients equal the slow loop's."""
    target_BGC, batch = random_batch(jax.random.key(9), prompts=3)
    batch = dataclasses.replace(
        batch, counted_BG=jnp.array([[True, False, True], [False, False, True], [True, True, True]])
    )
    gradient_BGC, total, _ = gradient_and_parts(target_BGC, batch, config)
    np.testing.assert_allclose(gradient_BGC, slow_gradient(target_BGC, batch, config), rtol=2e-4, atol=1e-6)
    skipped_BGC = ~np.asarray(batch.counted_BG)[..., None] & np.ones(target_BGC.shape, bool)
    assert not np.any(gradient_BGC[skipped_BGC])
    other = dataclasses.replace(batch, signal_BG=jnp.where(batch.counted_BG, batch.signal_BG, 99.0))
    again_BGC, again, _ = gradient_and_parts(target_BGC - 5.0 * skipped_BGC, other, config)
    np.testing.assert_array_equal(gradient_BGC, again_BGC)
    assert float(total.sum) == float(again.sum) and float(total.weight) == float(again.weight)


@pytest.mark.parametrize(
    ("changes", "updates", "expected"),
    [
        ({}, 1, ()),
        ({}, 2, ()),  # `base` compares with what sampled, wherever the target has gone
        ({"clip_policies": "three"}, 1, ()),  # the update's own pass is the policy before it
        ({"clip_policies": "three"}, 2, ("old_logprob_BGC",)),
        ({"bias_mitigation": "practical"}, 1, ()),
        ({"bias_mitigation": "practical"}, 2, ("old_logprob_BGC",)),
        ({"bias_mitigation": "mixture", "level": "sequence"}, 1, ("nested_logprob_BGC",)),
        ({"bias_mitigation": "mixture", "level": "sequence"}, 2, ("old_logprob_BGC", "nested_logprob_BGC")),
        ({"reference_kl": "k3_loss", "reference_kl_coefficient": 0.1}, 1, ("reference_logprob_BGC",)),
    ],
)
def test_only_what_the_loss_reads_is_scored(changes, updates, expected):
    config = dataclasses.replace(PLAIN, **changes)
    needs = PolicyGradient(config).needs(updates)
    assert needs.logprobs == expected and needs.off_policy
    assert needs.mixture_density == (config.bias_mitigation == "mixture")
    assert not needs.entropy_gradient and not needs.self_distillation


def test_parts_with_a_pass_of_their_own_say_so():
    assert PolicyGradient(dataclasses.replace(PLAIN, entropy_coefficient=0.1)).needs(1).entropy_gradient
    assert PolicyGradient(dataclasses.replace(PLAIN, self_distillation_coefficient=0.1)).needs(1).self_distillation


def test_the_weights_of_the_output_are_those_of_the_loss():
    """Ratios 3 and 1/2 truncated at 2, behind a token that does not count: 2, 1/2, 0."""
    target_BGC, batch = one_group([[3.0, 0.5, 7.0]], [1.0], [2])
    output = policy_gradient_loss(target_BGC, batch, dataclasses.replace(PLAIN, truncate_at=2.0))
    np.testing.assert_allclose(output.weight_BGC[0, 0], [2, 0.5, 0], rtol=1e-6)


def test_token_advantages_replace_those_of_completions():
    target_BGC, batch = random_batch(jax.random.key(2))
    spread = dataclasses.replace(batch, token_signal_BGC=jnp.broadcast_to(batch.signal_BG[..., None], target_BGC.shape))
    np.testing.assert_array_equal(
        gradient_and_parts(target_BGC, batch, PLAIN)[0], gradient_and_parts(target_BGC, spread, PLAIN)[0]
    )
    _, rising = one_group([[1.0, 1.0]], [7.0])
    rising = dataclasses.replace(rising, token_signal_BGC=jnp.array([[[1.0, 2.0]]]))
    gradient_BGC, _, _ = gradient_and_parts(jnp.full((1, 1, 2), -1.0), rising, PLAIN)
    np.testing.assert_allclose(gradient_BGC[0, 0], [-0.5, -1.0], rtol=1e-6)


def test_without_old_logprobs_the_target_is_the_old_policy():
    target_BGC, batch = random_batch(jax.random.key(2))
    for variant in ("practical", "mixture"):
        config = PolicyGradientConfig("leave_one_out", variant, "sequence", "token_mean")
        missing = gradient_and_parts(target_BGC, dataclasses.replace(batch, old_logprob_BGC=None), config)[0]
        given = gradient_and_parts(target_BGC, dataclasses.replace(batch, old_logprob_BGC=target_BGC), config)[0]
        np.testing.assert_array_equal(missing, given)


@pytest.mark.parametrize("config", every_combination()[::4], ids=identity)
def test_finite_in_every_corner(config):
    """Empty masks, one token, ratios of e^100 both ways, and tokens outside the support of either policy."""
    target_BGC, batch = random_batch(jax.random.key(4))
    nothing = dataclasses.replace(batch, forced_BG=batch.length_BG)
    one_token = dataclasses.replace(
        batch, length_BG=jnp.ones_like(batch.length_BG), forced_BG=jnp.zeros_like(batch.forced_BG)
    )
    whole = dataclasses.replace(
        batch, length_BG=jnp.full_like(batch.length_BG, 4), forced_BG=jnp.zeros_like(batch.forced_BG)
    )
    minus_infinity = jnp.full_like(target_BGC, -jnp.inf)
    behavior = {"behavior_logprob_BGC": minus_infinity, "nested_logprob_BGC": minus_infinity}
    corners = [
        (target_BGC, nothing),
        (target_BGC, one_token),
        (target_BGC - 100, whole),
        (target_BGC + 100, whole),
        (minus_infinity, whole),
        (target_BGC, dataclasses.replace(whole, **behavior)),
        (
            minus_infinity,
            dataclasses.replace(
                whole, **behavior, old_logprob_BGC=minus_infinity, reference_logprob_BGC=minus_infinity
            ),
        ),
    ]
    for target, corner in corners:
        output = policy_gradient_loss(target, corner, config)
        total = output.total
        gradient = jax.grad(lambda t, corner=corner: policy_gradient_loss(t, corner, config).total.sum)(target)
        for leaf in jax.tree.leaves((gradient, output)):
            assert jnp.all(jnp.isfinite(leaf))
        assert jnp.isfinite(total.mean())
        if corner is nothing:
            assert float(total.weight) == 0 and float(total.mean()) == 0 and not jnp.any(gradient)


def test_what_a_loss_needs_is_named():
    target_BGC, batch = random_batch(jax.random.key(1))
    mixture = PolicyGradientConfig("leave_one_out", "mixture", "sequence", "token_mean")
    with pytest.raises(ValueError, match=r"needs batch\.nested_logprob_BGC"):
        policy_gradient_loss(target_BGC, dataclasses.replace(batch, nested_logprob_BGC=None), mixture)
    with pytest.raises(ValueError, match=r"needs batch\.full_share_BG"):
        policy_gradient_loss(target_BGC, dataclasses.replace(batch, full_share_BG=None), mixture)
    for variant in ("base", "retrace"):
        config = dataclasses.replace(PLAIN, bias_mitigation=variant)
        with pytest.raises(ValueError, match=rf"'{variant}' needs batch\.behavior_logprob_BGC"):
            policy_gradient_loss(target_BGC, dataclasses.replace(batch, behavior_logprob_BGC=None), config)
    kl = dataclasses.replace(PLAIN, reference_kl="k2_loss", reference_kl_coefficient=0.1)
    with pytest.raises(ValueError, match=r"needs batch\.reference_logprob_BGC"):
        policy_gradient_loss(target_BGC, dataclasses.replace(batch, reference_logprob_BGC=None), kl)
    with pytest.raises(ValueError, match="pass the differentiable entropy_BGC"):
        policy_gradient_loss(target_BGC, batch, dataclasses.replace(PLAIN, entropy_coefficient=0.1))


def test_entropy_bonus_is_the_mean_entropy_of_the_counted_tokens():
    target_BGC, batch = random_batch(jax.random.key(6))
    batch = dataclasses.replace(batch, signal_BG=0 * batch.signal_BG)
    entropy_BGC = jax.random.uniform(jax.random.key(7), target_BGC.shape)
    config = dataclasses.replace(PLAIN, entropy_coefficient=0.5)
    mask_BGC = batch.mask_BGC
    value, gradient_BGC = jax.value_and_grad(lambda e: policy_gradient_loss(target_BGC, batch, config, e).total.mean())(
        entropy_BGC
    )
    assert float(value) == pytest.approx(-0.5 * float((entropy_BGC * mask_BGC).sum() / mask_BGC.sum()), rel=1e-5)
    np.testing.assert_allclose(gradient_BGC, -0.5 * mask_BGC / mask_BGC.sum(), rtol=1e-6)


@pytest.mark.parametrize("differentiable", [True, False])
def test_entropy_is_differentiable_on_request_only(differentiable):
    """Its directional derivative against a finite difference; without the request it is zero, the value the same."""
    model, (prompt_BP, length_B) = tiny_model(), tiny_prompts()
    tokens_BGC = jnp.zeros((3, 1, 2), jnp.int32)
    parameters = model.parameters()

    @jax.jit
    def entropy(scale):
        scaled = Transformer(model.config, parameters | {"final_norm": scale * parameters["final_norm"]})
        logprobs = completion_logprobs(
            scaled, prompt_BP, length_B, tokens_BGC, 1.0, differentiable_entropy=differentiable
        )
        return logprobs[1].sum()

    step = 1e-2
    difference = float(entropy(1 + step) - entropy(1 - step)) / (2 * step)
    assert difference < -0.1
    assert float(jax.grad(entropy)(1.0)) == pytest.approx(difference if differentiable else 0, rel=0.02)


def test_self_distillation_is_added_by_the_losses_own_shares(key):
    """`sequence_mean`: gamma times the mean over completions of each one's mean KL; masked tokens count nowhere."""
    target_BGC, batch = random_batch(key)
    batch = dataclasses.replace(batch, signal_BG=jnp.zeros_like(batch.signal_BG))
    mask_BGC = np.asarray(batch.mask_BGC)
    kl_BGC = jax.random.exponential(key, target_BGC.shape)
    config = PolicyGradientConfig("leave_one_out", "base", "token", "sequence_mean", self_distillation_coefficient=0.5)
    kept = [(b, g) for b, g in np.ndindex(mask_BGC.shape[:2]) if mask_BGC[b, g].any()]
    means = [np.asarray(kl_BGC)[row][mask_BGC[row]].mean() for row in kept]
    output = policy_gradient_loss(target_BGC, batch, config, self_distillation_kl_BGC=kl_BGC)
    assert float(output.total.mean()) == pytest.approx(0.5 * np.mean(means), rel=1e-5)
    logged = float(output.parts["self_distillation_kl"].mean())
    assert logged == pytest.approx(np.asarray(kl_BGC)[mask_BGC].mean(), rel=1e-5)


def test_self_distillation_reaches_kept_layers_only():
    """Through the nested pass; the skipped layers' part in the full pass is stopped."""
    model, (prompt_BP, length_B) = tiny_model(), tiny_prompts()
    tokens_BGC = jnp.zeros((3, 1, 2), jnp.int32)
    plan = LayerPlan.skipping(5, [1, 3])

    @jax.jit
    @jax.grad
    def gradient(parameters):
        policy, valid_BP = Transformer(model.config, parameters), valid_mask(length_B, prompt_BP.shape[1])
        hidden = [policy.completion_hidden(prompt_BP, valid_BP, tokens_BGC, layers) for layers in (None, plan)]
        return self_distillation_kl(*(policy.logits(h) for h in hidden)).sum()

    for name, value in gradient(model.parameters()).items():
        if name.startswith("layers/"):
            by_layer = jnp.abs(value).reshape(5, -1).max(axis=-1)
            assert (by_layer > 0).tolist() == [True, False, True, False, True], name


def test_self_distillation_needs_its_divergence(key):
    target_BGC, batch = random_batch(key)
    config = PolicyGradientConfig("leave_one_out", "base", "token", "token_mean", self_distillation_coefficient=0.5)
    with pytest.raises(ValueError, match="self_distillation_coefficient is set: pass"):
        policy_gradient_loss(target_BGC, batch, config)
