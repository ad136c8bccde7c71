"""Presets against slow loops written from the papers' objectives, differentiated numerically."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.advantages import group_advantages
from nested_reft.estimators.rejection import accepted, mismatch
from nested_reft.losses import presets
from nested_reft.losses.policy_gradient import policy_gradient_loss
from nested_reft.losses.supervised import SupervisedConfig
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
        (presets.grpo("base", clip_policies="two"), grpo, 1.0),
        (presets.dr_grpo("base", fixed_length_tokens=6, clip_policies="two"), dr_grpo, 1.0),
        (presets.dapo("base", clip_policies="two"), dapo, 1.0),
        (presets.gspo("base", clip_policies="two"), gspo, 1.0),
        (presets.gspo("base", clip_policies="two"), gspo, 1e-3),
    ],
    ids=["grpo", "dr_grpo", "dapo", "gspo, mostly clipped", "gspo, hardly clipped"],
)
def test_value_and_gradient_equal_the_paper(config, objective, near):
    target_BGC, batch = unforced_batch(near)
    value, gradient_BGC = jax.value_and_grad(lambda t: policy_gradient_loss(t, batch, config).total.mean())(target_BGC)
    assert float(value) == pytest.approx(-objective(completions(target_BGC, batch)), abs=1e-6)
    expected_BGC = numerical_gradient(objective, target_BGC, batch)
    np.testing.assert_allclose(gradient_BGC, -expected_BGC, rtol=0, atol=1e-6)
    assert np.any(expected_BGC)


def test_cispo_gradient_equals_the_paper():
    """Its value is not comparable (h A here, h A log pi there); every token keeps a gradient."""
    target_BGC, batch = unforced_batch(1.0)
    frozen = completions(target_BGC, batch)
    config = presets.cispo("base", truncate_at=1.2)
    gradient_BGC = jax.grad(lambda t: policy_gradient_loss(t, batch, config).total.mean())(target_BGC)
    expected_BGC = numerical_gradient(lambda groups: cispo(groups, frozen), target_BGC, batch)
    np.testing.assert_allclose(gradient_BGC, -expected_BGC, rtol=0, atol=1e-6)


def test_practical_reads_the_old_policy():
    """The same loss with pi_old in the denominator: as if the full model at rollout time had sampled."""
    target_BGC, batch = unforced_batch(1.0)
    config = presets.dapo("practical")
    value = policy_gradient_loss(target_BGC, batch, config).total.mean()
    as_behavior = dataclasses.replace(batch, behavior_logprob_BGC=batch.old_logprob_BGC)
    assert float(value) == pytest.approx(-dapo(completions(target_BGC, as_behavior)), abs=1e-6)


@pytest.mark.parametrize("preset", [presets.grpo, presets.dapo, presets.gspo])
def test_the_clip_compares_with_the_policy_before_the_update(preset):
    """By default, as in the papers: against the full model, whether its samples or the nested ones are corrected."""
    assert preset("practical").clip_policies == "two"
    target_BGC, batch = unforced_batch(1.0)
    batch = dataclasses.replace(batch, behavior_logprob_BGC=batch.old_logprob_BGC)
    values = [
        float(policy_gradient_loss(target_BGC, batch, preset(denominator)).total.mean())
        for denominator in ("practical", "base")
    ]
    assert values[0] == values[1]


# Corrections.


def surrogate(y, t, low=0.2, high=0.28):
    return clipped(math.exp(y.target[t] - y.old[t]), y.advantage, low, high)


def ratio(y, t):
    return math.exp(y.old[t] - y.behavior[t])


def completion_ratio(y):
    return np.prod([ratio(y, t) for t in range(len(y.old))])


def geometric_mean(y):
    return completion_ratio(y) ** (1 / len(y.old))


def k3(y):
    return np.mean([ratio(y, t) - 1 - math.log(ratio(y, t)) for t in range(len(y.old))])


# The published weight of token t of completion y; each multiplies PPO's surrogate.
PUBLISHED = {
    # Yao et al. (2025): min(pi_old / pi_b, C).
    "token TIS": (presets.token_tis, lambda y, t: min(ratio(y, t), 2.0)),
    # Liu et al. (2025): the same of whole completions.
    "sequence TIS": (presets.sequence_tis, lambda y, t: min(completion_ratio(y), 2.0)),
    "token MIS": (
        lambda loss: presets.token_mis(loss, reject_above=1.3),
        lambda y, t: ratio(y, t) if ratio(y, t) <= 1.3 else 0.0,
    ),
    # Liu et al. (2025): w 1[w <= C].
    "sequence MIS": (
        lambda loss: presets.sequence_mis(loss, reject_above=1.5, reject_below=0.5),
        lambda y, t: completion_ratio(y) if 0.5 <= completion_ratio(y) <= 1.5 else 0.0,
    ),
    "Geo-RS": (
        lambda loss: presets.geo_rs(loss, 0.75, 1.25),
        lambda y, t: float(0.75 <= geometric_mean(y) <= 1.25),
    ),
    "Geo-RS with token TIS": (
        lambda loss: presets.geo_rs_token_tis(loss, 0.75, 1.25, truncate_at=1.2),
        lambda y, t: min(ratio(y, t), 1.2) * (0.75 <= geometric_mean(y) <= 1.25),
    ),
    "k3-RS": (lambda loss: presets.k3_rs(loss, 0.05), lambda y, t: float(k3(y) <= 0.05)),
    # Zhao et al. (2025): M(k) = k within [alpha, beta], else 0.
    "IcePop": (
        lambda loss: presets.icepop(loss, 0.8, 1.3),
        lambda y, t: ratio(y, t) if 0.8 <= ratio(y, t) <= 1.3 else 0.0,
    ),
}


@dataclasses.dataclass
class Sample:
    """A completion and the log-probabilities of the three policies."""

    target: list[float]
    old: list[float]
    behavior: list[float]
    reference: list[float]
    advantage: float


def samples(target_BGC, batch):
    names = ("old", "behavior", "reference")
    arrays = [target_BGC, *(getattr(batch, f"{name}_logprob_BGC") for name in names)]
    arrays = [np.asarray(array, np.float64) for array in arrays]
    length_BG = np.asarray(batch.length_BG)

    def sample(b: int, g: int) -> Sample:
        target, old, behavior, reference = (list(x[b, g, : length_BG[b, g]]) for x in arrays)
        return Sample(target, old, behavior, reference, float(batch.signal_BG[b, g]))

    return [[sample(b, g) for g in range(length_BG.shape[1])] for b in range(length_BG.shape[0])]


def assert_value_and_gradient_equal(config, objective, target_BGC, batch):
    """To 1e-6: of the loss, and of its gradient against central differences of the objective."""

    @jax.value_and_grad
    def loss(target_BGC):
        return policy_gradient_loss(target_BGC, batch, config).total.mean()

    value, gradient_BGC = loss(target_BGC)
    assert float(value) == pytest.approx(-objective(samples(target_BGC, batch)), abs=1e-6)
    expected_BGC = np.zeros(target_BGC.shape)
    for index in np.ndindex(*target_BGC.shape):
        moved = np.array([target_BGC, target_BGC], np.float64)
        moved[(slice(None), *index)] += [1e-5, -1e-5]
        up, down = (objective(samples(x, batch)) for x in moved)
        expected_BGC[index] = (up - down) / 2e-5
    np.testing.assert_allclose(gradient_BGC, -expected_BGC, rtol=0, atol=1e-6)
    # Some tokens push and others do not, so masks and clips were at work.
    pushes = np.abs(expected_BGC) > 1e-8
    assert pushes.any() and not pushes[np.asarray(batch.mask_BGC)].all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_corrections_equal_the_published_equation(name):
    """Of DAPO: the mean over all tokens of the weight times PPO's surrogate. What is rejected stays in the divisor."""
    correction, weight = PUBLISHED[name]

    def objective(groups):
        terms = [weight(y, t) * surrogate(y, t) for group in groups for y in group for t in range(len(y.target))]
        return np.mean(terms)

    target_BGC, batch = unforced_batch(1.0)
    assert_value_and_gradient_equal(correction(presets.dapo("base")), objective, target_BGC, batch)


TRL = json.loads((Path(__file__).parent / "trl_losses.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("found", TRL["losses"], ids=lambda found: f"{found['loss']}, {found['mode']}")
def test_corrections_equal_trl(found):
    """TRL's trainer on the same batch: its surrogate times a ratio cut at a cap, the KL added without it."""
    values, cap = TRL["batch"], TRL["cap"]
    correction = {
        "token_truncate": lambda loss: presets.token_tis(loss, cap),
        "sequence_truncate": lambda loss: presets.sequence_tis(loss, cap),
        "token_mask": lambda loss: presets.token_mis(loss, cap),
        "sequence_mask": lambda loss: presets.sequence_mis(loss, cap),
    }[found["mode"]]
    config = {
        "grpo": presets.grpo("base", reference_kl_coefficient=0.04),
        "dapo": presets.dapo("base"),
        "dr_grpo": presets.dr_grpo("base", fixed_length_tokens=TRL["tokens"]),
    }[found["loss"]]

    def groups(name):
        return jnp.asarray(values[name], jnp.float32).reshape(2, 3, *np.shape(values[name])[1:])

    reward_BG, length_BG = groups("reward"), groups("length").astype(jnp.int32)
    batch = dataclasses.replace(
        random_batch(jax.random.key(0))[1],
        length_BG=length_BG,
        forced_BG=jnp.zeros_like(length_BG),
        signal_BG=group_advantages(reward_BG, jnp.ones(reward_BG.shape, bool), config.advantage),
        behavior_logprob_BGC=groups("behavior"),
        old_logprob_BGC=groups("old"),
        reference_logprob_BGC=groups("reference"),
    )
    value, gradient_BGC = jax.value_and_grad(
        lambda target_BGC: policy_gradient_loss(target_BGC, batch, correction(config)).total.mean()
    )(groups("target"))
    assert float(value) == pytest.approx(found["value"], abs=1e-6)
    np.testing.assert_allclose(gradient_BGC.reshape(6, 4), found["gradient"], rtol=0, atol=1e-6)
    # Some tokens push and others do not, so clips and cuts were at work.
    pushes = np.abs(found["gradient"]) > 1e-8
    assert (pushes.any() and not pushes[np.asarray(batch.mask_BGC).reshape(6, 4)].all()) or found["loss"] == "grpo"


@pytest.mark.parametrize("name", presets.CORRECTIONS)
def test_corrections_replace_weight_and_mask_and_leave_the_rest(name):
    """Whatever the loss had before; its clip keeps its level."""
    correction = presets.CORRECTIONS[name]
    start = presets.gspo("base", clip_policies="two")
    assert correction(start).clip_level == "geometric" and correction(start).clip_low == start.clip_low
    assert correction(presets.gspo("base")) == correction(start)
    for other in presets.CORRECTIONS.values():
        assert correction(other(start)) == correction(start)


def test_nested_completions_pass_the_default_masks():
    """At 0.12 nats a token, 30 tokens: the defaults keep most completions, the published bounds hardly any."""
    shape = (200, 1, 30)
    behavior_BGC, mask_BGC = jnp.full(shape, -1.0), jnp.ones(shape, bool)
    spread = 0.49  # of log rho, so that E_b[rho] = exp(-0.12 + 0.49^2 / 2) = 1
    target_BGC = behavior_BGC - 0.12 + spread * jax.random.normal(jax.random.key(0), shape)

    def accepted_share(config):
        value_BGC = mismatch(target_BGC, behavior_BGC, mask_BGC, config.reject_by)
        return float(accepted(value_BGC, config.reject_below, config.reject_above).mean())

    loss = presets.dapo("base")
    defaults = [presets.geo_rs, presets.geo_rs_token_tis, presets.k3_rs, presets.icepop, presets.sequence_mis]
    assert min(accepted_share(correction(loss)) for correction in defaults) > 0.9
    published = [presets.geo_rs(loss, 0.999, 1.001), presets.k3_rs(loss, 0.01), presets.sequence_mis(loss, 2.0, 0.5)]
    assert max(map(accepted_share, published)) < 0.2


def test_dapo_without_its_changes_is_grpo():
    changed = dataclasses.replace(presets.dapo("base"), normalization="sequence_mean", clip_high=0.2)
    assert changed == presets.grpo("base", reference_kl_coefficient=0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Geo-RS with token TIS", presets.geo_rs_token_tis),
        ("geo_rs_token_tis", presets.geo_rs_token_tis),
        ("Icepop", presets.icepop),
        ("k3-rs", presets.k3_rs),
        ("GSPO", lambda loss: presets.gspo("base")),
        ("dr-grpo", lambda loss: presets.dr_grpo("base", fixed_length_tokens=6)),
    ],
)
def test_presets_by_name(name, expected):
    loss = presets.dr_grpo("base", fixed_length_tokens=6)
    assert presets.named(loss, name) == expected(loss)


def test_an_algorithm_takes_from_the_loss_what_its_paper_leaves_open():
    practical = presets.dapo("practical")
    assert presets.named(practical, "grpo") == presets.grpo("practical")
    assert presets.named(SupervisedConfig(), "dapo") == presets.dapo("base")
    with pytest.raises(ValueError, match=r"loss.preset 'cispo' takes loss.truncate_at from the configuration"):
        presets.named(practical, "cispo")
    cispo = presets.cispo("practical", truncate_at=3.0)
    assert presets.named(cispo, "cispo") == cispo


def test_what_a_correction_cannot_change_is_refused_by_name():
    """In a process of its own, because the types of arguments are checked in tests before anything else."""
    code = """
from nested_reft.losses import presets
dapo = presets.dapo("base")
for call in (lambda: presets.token_tis("dapo"), lambda: presets.token_tis(dapo, "2")):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "a correction changes the loss of a policy gradient, and was given 'dapo'; allowed is a Policy" in found
    assert "loss.truncate_at is '2'; allowed is a number: 1 or more" in found


def test_all_presets_differ():
    made = (presets.grpo, presets.dapo, presets.gspo)
    losses = [preset("practical") for preset in made]
    losses += [presets.dr_grpo("practical", fixed_length_tokens=6), presets.cispo("practical", truncate_at=3.0)]
    assert len(set(losses)) == 5
