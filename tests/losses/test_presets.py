"""Presets against slow loops written from the papers' objectives, differentiated numerically."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from nested_reft.losses import presets
from nested_reft.losses.policy_gradient import policy_gradient_loss
from tests.losses.batches import random_batch


def clipped(ratio, advantage, low, high):
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def token_ratios(target, old):
    return [math.exp(new - before) for new, before in zip(target, old, strict=True)]


def grpo(groups):
    """DeepSeekMath, eq. 3: mean over groups, completions and then tokens; beta 0.04 times k3 (eq. 4)."""
    return np.mean([
        np.mean([
            np.mean([
                clipped(ratio, y.advantage, 0.2, 0.2) - 0.04 * (math.exp(ref - new) - (ref - new) - 1)
                for ratio, new, ref in zip(token_ratios(y.target, y.old), y.target, y.reference, strict=True)
            ])
            for y in group
        ])
        for group in groups
    ])  # fmt: skip


def dr_grpo(groups):
    """Dr. GRPO: the sum over tokens is divided by a constant, here 6, and not by the length."""

    def term(y):
        return sum(clipped(ratio, y.advantage, 0.2, 0.2) for ratio in token_ratios(y.target, y.old)) / 6

    return np.mean([np.mean([term(y) for y in group]) for group in groups])


def dapo(groups):
    """DAPO, eq. 8 and 10, over the tokens of the batch."""
    terms = [
        clipped(ratio, y.advantage, 0.2, 0.28)
        for group in groups
        for y in group
        for ratio in token_ratios(y.target, y.old)
    ]
    return np.mean(terms)


def gspo(groups):
    """GSPO, eq. 5 and 7: differentiating it goes through the length-normalised ratio of the whole completion."""

    def term(y):
        ratio = math.exp((sum(y.target) - sum(y.old)) / len(y.target))
        return clipped(ratio, y.advantage, 3e-4, 4e-4)

    return np.mean([np.mean([term(y) for y in group]) for group in groups])


def cispo(groups, frozen_groups):
    """MiniMax-M1, eq. 4: stop-gradient of the truncated ratio, times A log pi, over the tokens of the batch."""
    terms = [
        min(ratio, 1.2) * frozen.advantage * new
        for group, frozen_group in zip(groups, frozen_groups, strict=True)
        for y, frozen in zip(group, frozen_group, strict=True)
        for ratio, new in zip(token_ratios(frozen.target, frozen.old), y.target, strict=True)
    ]
    return np.mean(terms)


@dataclasses.dataclass
class Completion:
    target: list[float]
    old: list[float]
    reference: list[float]
    advantage: float


def completions(target_BGC, batch):
    arrays = (target_BGC, batch.behavior_logprob_BGC, batch.reference_logprob_BGC)
    target, old, reference = (np.asarray(x, np.float64) for x in arrays)

    def one(b, g):
        own = slice(int(batch.forced_BG[b, g]), int(batch.length_BG[b, g]))
        rows = [list(x[b, g, own]) for x in (target, old, reference)]
        target_T, old_T, reference_T = rows
        return Completion(target_T, old_T, reference_T, float(batch.signal_BG[b, g]))

    return [[one(b, g) for g in range(target.shape[1])] for b in range(target.shape[0])]


def numerical_gradient(objective, target_BGC, batch, step=1e-5):
    gradient = np.zeros(target_BGC.shape)
    for index in np.ndindex(*target_BGC.shape):
        values = []
        for sign in (1, -1):
            moved = np.array(target_BGC, np.float64)
            moved[index] += sign * step
            values.append(objective(completions(moved, batch)))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


def unforced_batch(near: float):
    """All completions have tokens of their own; `near` scales how far off-policy they are."""
    target_BGC, batch = random_batch(jax.random.key(8), prompts=2, group=3, tokens=4)
    behavior_BGC = target_BGC + near * (batch.behavior_logprob_BGC - target_BGC)
    return target_BGC, dataclasses.replace(batch, forced_BG=0 * batch.forced_BG, behavior_logprob_BGC=behavior_BGC)


@pytest.mark.parametrize(
    ("config", "objective", "near"),
    [
        (presets.grpo("base"), grpo, 1.0),
        (presets.dr_grpo("base", fixed_length_tokens=6), dr_grpo, 1.0),
        (presets.dapo("base"), dapo, 1.0),
        (presets.gspo("base"), gspo, 1.0),
        (presets.gspo("base"), gspo, 1e-3),
    ],
    ids=["grpo", "dr_grpo", "dapo", "gspo, mostly clipped", "gspo, hardly clipped"],
)
def test_value_and_gradient_equal_the_paper(config, objective, near):
    target_BGC, batch = unforced_batch(near)
    value, gradient_BGC = jax.value_and_grad(lambda t: policy_gradient_loss(t, batch, config).total.mean())(target_BGC)
    assert float(value) == pytest.approx(-objective(completions(target_BGC, batch)), rel=1e-4, abs=1e-6)
    expected_BGC = numerical_gradient(objective, target_BGC, batch)
    np.testing.assert_allclose(gradient_BGC, -expected_BGC, rtol=1e-3, atol=1e-5)
    assert np.any(expected_BGC)


def test_cispo_gradient_equals_the_paper():
    """Its value is not comparable (h A here, h A log pi there); every token keeps a gradient."""
    target_BGC, batch = unforced_batch(1.0)
    frozen = completions(target_BGC, batch)
    config = presets.cispo("base", truncate_at=1.2)
    gradient_BGC = jax.grad(lambda t: policy_gradient_loss(t, batch, config).total.mean())(target_BGC)
    expected_BGC = numerical_gradient(lambda groups: cispo(groups, frozen), target_BGC, batch)
    np.testing.assert_allclose(gradient_BGC, -expected_BGC, rtol=1e-3, atol=1e-5)


def test_practical_reads_the_old_policy():
    """The same loss with pi_old in the denominator: as if the full model at rollout time had sampled."""
    target_BGC, batch = unforced_batch(1.0)
    config = presets.dapo("practical")
    value = policy_gradient_loss(target_BGC, batch, config).total.mean()
    as_behavior = dataclasses.replace(batch, behavior_logprob_BGC=batch.old_logprob_BGC)
    assert float(value) == pytest.approx(-dapo(completions(target_BGC, as_behavior)), rel=1e-4)


def test_dapo_without_its_changes_is_grpo():
    changed = dataclasses.replace(presets.dapo("base"), normalization="sequence_mean", clip_high=0.2)
    assert changed == presets.grpo("base", reference_kl_coefficient=0.0)


def test_all_presets_differ():
    made = (presets.grpo, presets.dapo, presets.gspo)
    losses = [preset("practical") for preset in made]
    losses += [presets.dr_grpo("practical", fixed_length_tokens=6), presets.cispo("practical", truncate_at=3.0)]
    assert len(set(losses)) == 5
