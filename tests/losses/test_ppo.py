"""PPO with a critic: loss and gradient against a slow loop of plain numbers, and what it leaves alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.cli.overrides import override
from nested_reft.losses import presets
from nested_reft.losses.config import PolicyGradientConfig, claims_unbiased
from nested_reft.losses.objective import TargetPass
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.losses.value import CriticConfig, value_loss
from nested_reft.training.config import Config, load_config
from nested_reft.types import TrainBatch

SHAPE = (2, 3, 5)
CRITIC = CriticConfig(
    gamma=0.97, gae_lambda=0.9, value_coefficient=0.3, value_clip=0.25, kl_coefficient=0.4, whiten_rewards=True
)
PPO = PolicyGradientConfig(
    "gae", "practical", "token", "token_mean", clip_low=0.2, clip_high=0.3, entropy_coefficient=0.0, critic=CRITIC
)


def random_batch(seed: int = 0) -> tuple[TargetPass, TrainBatch]:
    """Completions of unequal lengths, some with forced tokens and one that does not count."""
    generator = np.random.default_rng(seed)

    def logprob() -> jax.Array:
        return jnp.asarray(-generator.uniform(0.2, 2.0, SHAPE), jnp.float32)

    old = logprob()
    batch = TrainBatch(
        prompt_BP=jnp.zeros((2, 1), jnp.int32),
        prompt_length_B=jnp.ones(2, jnp.int32),
        tokens_BGC=jnp.zeros(SHAPE, jnp.int32),
        length_BG=jnp.array([[5, 3, 1], [4, 2, 5]]),
        forced_BG=jnp.array([[2, 0, 0], [0, 1, 0]]),
        counted_BG=jnp.array([[True, True, True], [True, True, False]]),
        signal_BG=jnp.asarray(generator.normal(size=SHAPE[:2]), jnp.float32),
        behavior_logprob_BGC=logprob(),
        old_logprob_BGC=old,
        reference_logprob_BGC=logprob(),
        old_value_BGC=jnp.asarray(generator.normal(size=SHAPE), jnp.float32),
    )
    # The target has moved by up to half a nat, so that both clips act on some tokens.
    target = jnp.minimum(old + jnp.asarray(generator.uniform(-0.5, 0.5, SHAPE), jnp.float32), 0.0)
    value = batch.old_value_BGC + jnp.asarray(generator.uniform(-0.6, 0.6, SHAPE), jnp.float32)
    return TargetPass(target, jnp.zeros(SHAPE), None, value), batch


def slow_loss(target, value, batch: TrainBatch, config: PolicyGradientConfig, groups=(0, 1)) -> float:
    """The same loss as loops over completions and tokens, in double precision: of some groups, with the advantages of
    all."""
    critic = config.critic
    arrays = {
        f.name: np.asarray(getattr(batch, f.name), float)
        for f in dataclasses.fields(batch)
        if getattr(batch, f.name) is not None
    }
    rows = []
    for b in range(SHAPE[0]):
        for g in range(SHAPE[1]):
            if arrays["counted_BG"][b, g]:
                rows.append([(b, g, t) for t in range(int(arrays["forced_BG"][b, g]), int(arrays["length_BG"][b, g]))])
    reward = {}
    for row in rows:
        for place in row:
            kl = arrays["old_logprob_BGC"][place] - arrays["reference_logprob_BGC"][place]
            reward[place] = -critic.kl_coefficient * kl
        reward[row[-1]] += arrays["signal_BG"][row[-1][:2]]
    if critic.whiten_rewards:
        mean = sum(reward.values()) / len(reward)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in reward.values()) / len(reward) + 1e-8)
        reward = {place: mean + (x - mean) / deviation for place, x in reward.items()}
    advantage, returns = {}, {}
    for row in rows:
        later, following = 0.0, 0.0
        for place in reversed(row):
            now = arrays["old_value_BGC"][place]
            later = reward[place] + critic.gamma * following - now + critic.gamma * critic.gae_lambda * later
            advantage[place], returns[place], following = later, later + now, now
    mean = sum(advantage.values()) / len(advantage)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in advantage.values()) / len(advantage) + 1e-8)
    total, seen = 0.0, {place: raw for place, raw in advantage.items() if place[0] in groups}
    for place, raw in seen.items():
        scaled = (raw - mean) / deviation
        ratio = math.exp(target[place] - arrays["old_logprob_BGC"][place])
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        total -= min(ratio * scaled, clipped * scaled)
        old = arrays["old_value_BGC"][place]
        near = min(max(value[place], old - critic.value_clip), old + critic.value_clip)
        squares = (value[place] - returns[place]) ** 2, (near - returns[place]) ** 2
        total += critic.value_coefficient * max(squares) / 2
    return total / len(seen)


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_those_of_a_slow_loop(seed):
    target, batch = random_batch(seed)
    objective = PolicyGradient(PPO)
    ready = objective.with_token_signals(batch, CRITIC.kl_coefficient)

    def fast(logprob, value):
        return objective.loss(TargetPass(logprob, target.entropy_BGC, None, value), ready).mean()

    found, gradients = jax.value_and_grad(fast, argnums=(0, 1))(target.logprob_BGC, target.value_BGC)
    arrays = [np.asarray(x, float) for x in (target.logprob_BGC, target.value_BGC)]

    def slow(arrays):
        return slow_loss(arrays[0], arrays[1], batch, PPO)

    assert found == pytest.approx(slow(arrays), abs=1e-5)
    for which, gradient in enumerate(gradients):
        for place in np.ndindex(SHAPE):
            moved = [[array.copy() for array in arrays] for _ in range(2)]
            for sign, copies in zip((1, -1), moved, strict=True):
                copies[which][place] += sign * 1e-6
            difference = (slow(moved[0]) - slow(moved[1])) / 2e-6
            assert gradient[place] == pytest.approx(difference, abs=2e-5), (which, place)
    # Both clips took some gradients and left others.
    mask = np.asarray(batch.mask_BGC)
    assert all(0 < (np.asarray(gradient)[mask] == 0).sum() < mask.sum() for gradient in gradients)
    assert all(not np.asarray(gradient)[~mask].any() for gradient in gradients)


def test_parts_of_the_batch_add_up_to_the_whole():
    """The signals are of the whole batch, so the losses of its halves add up, whatever is whitened."""
    target, batch = random_batch()
    objective = PolicyGradient(PPO)
    ready = objective.with_token_signals(batch, 0.4)
    whole = objective.loss(target, ready)
    halves = [objective.loss(*jax.tree.map(lambda x, b=b: x[b : b + 1], (target, ready))) for b in range(2)]
    total = halves[0].total + halves[1].total
    assert total.mean() == pytest.approx(float(whole.total.mean()), rel=1e-5)


def test_a_mini_batch_has_the_advantages_of_the_whole_batch():
    """An update on one group of two is the slow loop over its tokens, whose advantages the whole batch has scaled.
    Scaling them within the mini-batch would give another loss."""
    target, batch = random_batch()
    objective, arrays = PolicyGradient(PPO), [np.asarray(x, float) for x in (target.logprob_BGC, target.value_BGC)]
    ready = objective.with_token_signals(batch, CRITIC.kl_coefficient)
    for group in range(2):

        def only(value, group=group):
            return jax.tree.map(lambda x: x[group : group + 1], value)

        found = objective.loss(only(target), only(ready)).mean()
        assert found == pytest.approx(slow_loss(arrays[0], arrays[1], batch, PPO, (group,)), abs=1e-5)
        alone = objective.loss(only(target), objective.with_token_signals(only(batch), CRITIC.kl_coefficient)).mean()
        assert abs(alone - found) > 0.01


def test_the_value_loss_by_hand():
    """V_old 0, c 0.2, R 1. A value of 0.5 has moved past the limit towards R: (0.2 - 1)^2 / 2 = 0.32 and no gradient.
    One of -0.5 has moved away: (-0.5 - 1)^2 / 2 = 1.125 with its gradient. Taking the smaller error would swap them."""
    value = jnp.array([[[0.5, -0.5, 0.1]]])
    zero, one = jnp.zeros_like(value), jnp.ones_like(value)
    loss, clipped = value_loss(value, zero, one, 0.2)
    np.testing.assert_allclose(loss[0, 0], [0.32, 1.125, 0.405], rtol=1e-6)
    assert clipped[0, 0].tolist() == [True, False, False]
    gradient = jax.grad(lambda value: value_loss(value, zero, one, 0.2)[0].sum())(value)
    np.testing.assert_allclose(gradient[0, 0], [0, -1.5, -0.9], rtol=1e-6)
    np.testing.assert_allclose(value_loss(value, zero, one, None)[0][0, 0], [0.125, 1.125, 0.405], rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias_mitigation": "base"},
        {"bias_mitigation": "base", "level": "sequence", "truncate_at": 2.0, "clip_low": None, "clip_high": None},
        {"bias_mitigation": "base", "clip_policies": "three"},
        {"bias_mitigation": "retrace", "clip_high": None, "clip_low": None},
        {"bias_mitigation": "base", "self_normalized": True},
    ],
)
def test_weights_multiply_the_advantages_of_tokens_and_not_the_values(changes):
    """With an advantage of 1 everywhere the policy's part is minus the sum of limited weights; the critic's stays."""
    target, batch = random_batch()
    loss = dataclasses.replace(PPO, **changes)
    ready = PolicyGradient(PPO).with_token_signals(batch, 0.4)
    ready = dataclasses.replace(ready, token_signal_BGC=jnp.ones(SHAPE))
    gradient = jax.grad(
        lambda logprob: PolicyGradient(loss).loss(dataclasses.replace(target, logprob_BGC=logprob), ready).mean()
    )(target.logprob_BGC)
    found = PolicyGradient(loss).loss(target, ready)
    plain = PolicyGradient(PPO).loss(target, ready)
    assert found.parts["value_loss"].sum == plain.parts["value_loss"].sum
    weight = np.asarray(found.weight_BGC)
    divisor = weight.sum() if loss.self_normalized else np.asarray(batch.mask_BGC).sum()
    moving = np.asarray(gradient) != 0
    np.testing.assert_allclose(np.asarray(gradient)[moving], -weight[moving] / divisor, rtol=1e-4)


@pytest.mark.parametrize("forced", [0, 1])
def test_the_divergence_is_that_of_the_full_model_whoever_sampled(forced):
    """Of two tokens pi_old draws the first with 0.9, the reference with 0.6, the sampler with 0.5; so each comes once:
    0.9 ln(0.9 / 0.6) + 0.1 ln(0.1 / 0.4) = 0.2263 nats. The mean of log(pi_old / pi_ref) over the two is -0.4904. A
    forced token in front does not count, however far the policies are apart there."""

    def logprob(first: float, given: float) -> jax.Array:
        own = jnp.log(jnp.array([[[first], [1 - first]]]))
        return jnp.pad(own, ((0, 0), (0, 0), (forced, 0)), constant_values=given)

    shape, count = (1, 2, 1 + forced), jnp.full((1, 2), forced, jnp.int32)
    batch = TrainBatch(
        prompt_BP=jnp.zeros((1, 1), jnp.int32),
        prompt_length_B=jnp.ones(1, jnp.int32),
        tokens_BGC=jnp.zeros(shape, jnp.int32),
        length_BG=count + 1,
        forced_BG=count,
        counted_BG=jnp.ones((1, 2), bool),
        signal_BG=jnp.zeros((1, 2)),
        behavior_logprob_BGC=logprob(0.5, 0.0),
        old_logprob_BGC=logprob(0.9, -1.0),
        reference_logprob_BGC=logprob(0.6, -9.0),
        old_value_BGC=jnp.zeros(shape),
    )
    ready = PolicyGradient(PPO).with_token_signals(batch, 0.4)
    target = TargetPass(logprob(0.9, -1.0), jnp.zeros(shape), None, jnp.zeros(shape))
    found = PolicyGradient(PPO).loss(target, ready).parts["completion_kl"].mean()
    assert found == pytest.approx(0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4), abs=1e-6)


def test_a_completion_that_does_not_count_has_no_part():
    _, batch = random_batch()
    ready = PolicyGradient(PPO).with_token_signals(batch, 0.4)
    moved = dataclasses.replace(batch, signal_BG=batch.signal_BG.at[1, 2].set(jnp.nan))
    again = PolicyGradient(PPO).with_token_signals(moved, 0.4)
    assert jnp.array_equal(ready.token_signal_BGC, again.token_signal_BGC)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma": 1.1}, "loss.critic.gamma is 1.1; allowed is 0 to 1"),
        ({"gae_lambda": -0.1}, "loss.critic.gae_lambda is -0.1; allowed is 0 to 1"),
        ({"value_coefficient": 0.0}, "loss.critic.value_coefficient is 0.0; allowed is more than 0"),
        ({"value_clip": 0.0}, "loss.critic.value_clip is 0.0; allowed is more than 0, or None"),
        ({"kl_coefficient": -1.0}, "loss.critic.kl_coefficient is -1.0; allowed is a number, 0 or more"),
        ({"kl_target": 3.0}, "loss.critic.kl_target is 3.0 and kl_coefficient 0"),
    ],
)
def test_bad_critics_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CriticConfig(**fields)


def test_a_critic_and_its_advantage_go_together():
    with pytest.raises(ValueError, match=r"loss.advantage is 'gae' and loss.critic None"):
        PolicyGradientConfig("gae", "base", "token", "token_mean")
    with pytest.raises(ValueError, match=r"loss.advantage is 'group_std' and loss.critic CriticConfig"):
        dataclasses.replace(PPO, advantage="group_std")
    with pytest.raises(ValueError, match=r"set loss.critic.kl_coefficient instead"):
        dataclasses.replace(PPO, reference_kl="k1_in_reward", reference_kl_coefficient=0.1)


def test_the_preset_has_the_numbers_of_the_paper():
    loss = presets.ppo("base")
    assert (loss.clip_low, loss.clip_high, loss.clip_policies) == (0.2, 0.2, "three") and not claims_unbiased(loss)
    critic = loss.critic
    assert critic is not None and (critic.gamma, critic.gae_lambda, critic.value_clip) == (1.0, 0.95, 0.2)
    assert (critic.value_coefficient, critic.kl_coefficient, critic.kl_target) == (0.1, 0.05, None)


def test_a_critic_needs_no_group_and_survives_a_file():
    config = load_config("tiny", loss=presets.ppo("base"), rollout={"group_size": 1})
    assert Config.from_json(config.to_json()) == config
    changed = override(config, ["--loss.critic.gae-lambda", "0.5"])
    assert changed.loss == dataclasses.replace(
        presets.ppo("base"), critic=dataclasses.replace(presets.ppo("base").critic, gae_lambda=0.5)
    )
