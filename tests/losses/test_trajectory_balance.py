"""Trajectory balance by its identities: each says what a wrong normaliser, mask or sign would give."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.estimators.advantages import group_advantages
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.objective import LossOutput, TargetPass
from nested_reft.losses.registry import make_objective
from nested_reft.losses.trajectory_balance import TrajectoryBalance, TrajectoryBalanceConfig
from nested_reft.types import TrainBatch, concat
from tests.losses.batches import one_group, random_batch
from tests.scored_groups import scored

BETA = 0.5


def loss(target_BGC, batch: TrainBatch) -> LossOutput:
    objective = TrajectoryBalance(TrajectoryBalanceConfig(BETA))
    return objective.loss(TargetPass(target_BGC, jnp.zeros_like(target_BGC)), batch)


def with_beta(batch: TrainBatch, beta: float = BETA) -> TrainBatch:
    return dataclasses.replace(batch, beta_B=jnp.full(len(batch.length_BG), beta))


def random_groups(seed: int, prompts: int = 4, group: int = 3):
    """Groups of unequal lengths with forced tokens, one completion that does not count and one without a reward."""
    target_BGC, batch = random_batch(jax.random.key(seed), prompts, group)
    batch = dataclasses.replace(
        batch,
        counted_BG=batch.counted_BG.at[0, 1].set(False),
        signal_BG=batch.signal_BG.at[1, 2].set(jnp.nan),
        forced_BG=jnp.zeros_like(batch.forced_BG).at[2].set(1),
    )
    return target_BGC, with_beta(batch)


def choices(target_Y, reference_Y, reward_Y, index_BG) -> tuple[jax.Array, TrainBatch]:
    """Groups of one-token completions, drawn by hand from a table over Y."""
    index_BG = np.asarray(index_BG)
    _, batch = one_group(np.ones((index_BG.shape[1], 1)), np.zeros(index_BG.shape[1]))
    batch = jax.tree.map(lambda x: jnp.repeat(x, len(index_BG), axis=0), batch)
    batch = dataclasses.replace(
        batch,
        signal_BG=jnp.asarray(reward_Y)[index_BG],
        reference_logprob_BGC=jnp.asarray(reference_Y)[index_BG][..., None],
    )
    return jnp.asarray(target_Y)[index_BG][..., None], with_beta(batch)


def slow_loss(target_BGC, batch: TrainBatch) -> tuple[float, np.ndarray, float]:
    """Loss, gradient and number of completions, one completion after the other in float64."""
    gradient_BGC, square, number = np.zeros(target_BGC.shape), 0.0, 0
    for b in range(len(target_BGC)):
        sums, rewards, rows = [], [], []
        for g in range(target_BGC.shape[1]):
            if not batch.counted_BG[b, g] or np.isnan(batch.signal_BG[b, g]):
                continue
            tokens = range(int(batch.forced_BG[b, g]), int(batch.length_BG[b, g]))
            sums.append(sum(float(target_BGC[b, g, t]) - float(batch.reference_logprob_BGC[b, g, t]) for t in tokens))
            rewards.append(float(batch.signal_BG[b, g]))
            rows.append((g, list(tokens)))
        for (g, tokens), total, reward in zip(rows, sums, rewards, strict=True):
            advantage = reward - np.mean(rewards) - BETA * (total - np.mean(sums))
            square += (advantage / BETA) ** 2
            gradient_BGC[b, g, tokens] = -2 / BETA * advantage
        number += len(rows)
    return square / number, gradient_BGC / number, number


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_a_loop_over_completions(seed):
    """The gradient is -(2 / beta) A grad log pi, A = (r - rbar) - beta (S - Sbar), and L the residual's variance."""
    target_BGC, batch = random_groups(seed)
    expected, gradient_BGC, number = slow_loss(target_BGC, batch)
    value, found_BGC = jax.value_and_grad(lambda t: loss(t, batch).mean())(target_BGC)
    assert float(value) == pytest.approx(expected, rel=1e-5) and float(loss(target_BGC, batch).total.weight) == number
    np.testing.assert_allclose(found_BGC, gradient_BGC, rtol=1e-4, atol=1e-5)
    weight_BGC = np.asarray(loss(target_BGC, batch).weight_BGC)
    # A residual of exactly zero would have no gradient either, which random numbers do not give.
    assert ((weight_BGC == 1) == (gradient_BGC != 0)).all()


def test_zero_at_the_best_policy_whoever_sampled_and_the_normaliser_is_true():
    """pi* = pi_ref exp(r / beta) / Z: every pair of completions gives log Z. A mean over both prompts' would not."""
    reference_Y = np.log([0.1, 0.2, 0.3, 0.4]).astype(np.float32)
    reward_Y = np.array([1.0, 0.0, 0.5, -1.0], np.float32)
    log_z = np.log(np.sum(np.exp(reference_Y + reward_Y / BETA)))
    best_Y = reference_Y + reward_Y / BETA - log_z
    pairs = list(itertools.combinations_with_replacement(range(4), 2))
    target_BGC, batch = choices(best_Y, reference_Y, reward_Y, pairs)
    value, gradient_BGC = jax.value_and_grad(lambda t: loss(t, batch).mean())(target_BGC)
    assert float(value) == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(gradient_BGC, 0, atol=1e-5)
    assert float(loss(target_BGC, batch).parts["log_z"].mean()) == pytest.approx(log_z, rel=1e-6)


def test_a_constant_per_prompt_changes_nothing_and_no_other_change_of_rewards_does_that():
    target_BGC, batch = random_groups(0)
    shifted = dataclasses.replace(batch, signal_BG=batch.signal_BG + jnp.arange(4.0)[:, None])
    assert float(loss(target_BGC, shifted).mean()) == pytest.approx(float(loss(target_BGC, batch).mean()), rel=1e-5)
    one_moved = dataclasses.replace(batch, signal_BG=batch.signal_BG.at[3, 0].add(1.0))
    assert abs(float(loss(target_BGC, one_moved).mean() - loss(target_BGC, batch).mean())) > 0.01


def test_nothing_to_learn_at_the_reference_under_equal_rewards():
    """A loss with a learnt or constant Z would be (log Z - r / beta)^2."""
    target_BGC, batch = random_groups(0)
    at_reference = dataclasses.replace(batch, signal_BG=jnp.full((4, 3), 0.7), reference_logprob_BGC=target_BGC)
    value, gradient_BGC = jax.value_and_grad(lambda t: loss(t, at_reference).mean())(target_BGC)
    assert float(value) == pytest.approx(0, abs=1e-10) and float(jnp.abs(gradient_BGC).max()) < 1e-5


def test_a_group_with_one_completion_that_counts_has_no_loss():
    target_BGC, batch = random_groups(0)
    alone = dataclasses.replace(batch, counted_BG=jnp.arange(3) == jnp.ones((4, 1)))
    assert float(loss(target_BGC, alone).total.sum) == 0


def test_parts_of_a_batch_add_up():
    """Splits along the prompts give the same sums. A normaliser over the whole part would depend on the split."""
    target_BGC, batch = random_groups(1)
    whole = loss(target_BGC, batch)
    for size in (1, 2):
        parts = [
            loss(target_BGC[at : at + size], jax.tree.map(lambda x: x[at : at + size], batch))  # noqa: B023
            for at in range(0, 4, size)
        ]
        for name in whole.parts:
            total = sum((part.parts[name] for part in parts[1:]), parts[0].parts[name])
            assert float(total.mean()) == pytest.approx(float(whole.parts[name].mean()), rel=1e-5)
        assert sum(float(part.total.sum) for part in parts) == pytest.approx(float(whole.total.sum), rel=1e-5)


def test_finite_without_a_completion_that_counts_and_at_impossible_tokens():
    target_BGC, batch = random_groups(0)
    nothing = dataclasses.replace(batch, counted_BG=jnp.zeros((4, 3), bool))
    value, gradient_BGC = jax.value_and_grad(lambda t: loss(t, nothing).mean())(target_BGC)
    assert float(value) == 0 and not gradient_BGC.any()
    # Behind the end of a completion there may be anything.
    ends_BG = batch.length_BG.at[3].set(2)
    broken = dataclasses.replace(
        batch, length_BG=ends_BG, reference_logprob_BGC=batch.reference_logprob_BGC.at[3, :, 3].set(jnp.nan)
    )
    value, gradient_BGC = jax.value_and_grad(lambda t: loss(t, broken).mean())(target_BGC.at[3, :, 2].set(-jnp.inf))
    assert jnp.isfinite(value) and jnp.isfinite(gradient_BGC).all()


def bandit_batch(index_BG, reference_Y, reward_Y) -> TrainBatch:
    shape = index_BG.shape
    return TrainBatch(
        prompt_BP=jnp.zeros((shape[0], 1), jnp.int32),
        prompt_length_B=jnp.ones(shape[0], jnp.int32),
        tokens_BGC=index_BG[..., None],
        length_BG=jnp.ones(shape, jnp.int32),
        forced_BG=jnp.zeros(shape, jnp.int32),
        counted_BG=jnp.ones(shape, bool),
        signal_BG=reward_Y[index_BG],
        behavior_logprob_BGC=jnp.full((*shape, 1), -jnp.log(4.0)),
        reference_logprob_BGC=reference_Y[index_BG][..., None],
        beta_B=jnp.full(shape[0], BETA),
    )


def test_a_bandit_learns_the_best_policy_from_uniform_samples_and_reinforce_does_not():
    """Four arms that are sampled uniformly for ever. REINFORCE takes them for its own samples, so its gradient is zero
    elsewhere than at pi*, whichever way it is regularised."""
    reference_Y = jnp.log(jnp.array([0.55, 0.25, 0.15, 0.05]))
    reward_Y = jnp.array([0.0, 0.5, 1.0, 0.8])
    best_Y = np.asarray(jax.nn.softmax(reference_Y + reward_Y / BETA))
    index_NBG = jax.random.randint(jax.random.key(0), (3000, 8, 4), 0, 4)
    uncorrected = {
        "advantage": "group_mean",
        "bias_mitigation": "one",
        "level": "token",
        "normalization": "fixed_length",
        "fixed_length_tokens": 1,
        "reference_kl_coefficient": BETA,
    }

    def distance(config, rate) -> float:
        """The largest error of a probability after gradient descent on a table of logits."""
        objective = make_objective(config)

        def mean_loss(logits_Y, index_BG):
            batch = bandit_batch(index_BG, reference_Y, reward_Y)
            if isinstance(config, PolicyGradientConfig):
                advantage_BG = group_advantages(batch.signal_BG, batch.counted_BG, config.advantage)
                batch = dataclasses.replace(batch, signal_BG=advantage_BG)
            target_BGC = jax.nn.log_softmax(logits_Y)[index_BG][..., None]
            return objective.loss(TargetPass(target_BGC, jnp.zeros_like(target_BGC)), batch).mean()

        def step(logits_Y, index_BG):
            return logits_Y - rate * jax.grad(mean_loss)(logits_Y, index_BG), None

        found_Y, _ = jax.jit(lambda start_Y: jax.lax.scan(step, start_Y, index_NBG))(reference_Y)
        return float(np.abs(jax.nn.softmax(found_Y) - best_Y).max())

    assert distance(TrajectoryBalanceConfig(BETA), 0.02) < 0.005
    for changes in ({"reference_kl": "k1_in_reward"}, {"reference_kl": "k3_loss"}):
        # The same step length: trajectory balance has the gradient of this objective times 2 / beta.
        assert distance(PolicyGradientConfig(**uncorrected | changes), 0.02 * 2 / BETA) > 0.05


def test_the_signal_is_the_reward_and_nan_without_one():
    groups = scored([[1.0, 0.0, 0.0]], reward_BG=[[2.0, 0.5, 9.0]], scored_BG=[[True, True, False]])
    found = TrajectoryBalance(TrajectoryBalanceConfig(BETA)).signal(groups).tolist()
    assert found[0][:2] == [2.0, 0.5] and np.isnan(found[0][2])


def test_completions_of_a_group_must_go_on_from_the_same_prefix():
    """Tokens of a group are equal here, so a common length is a common prefix. Groups may differ."""
    objective = TrajectoryBalance(TrajectoryBalanceConfig(BETA))
    groups = concat([scored([[1.0, 0.0]]), scored([[1.0, 0.0]], first=1)])
    for forced_BG, allowed in (([[2, 2], [0, 0]], True), ([[0, 0], [2, 1]], False)):
        rollouts = dataclasses.replace(groups.rollouts, forced_BG=np.array(forced_BG, np.int32))
        forced = dataclasses.replace(groups, rollouts=rollouts)
        if allowed:
            objective.signal(forced)
            continue
        with pytest.raises(ValueError, match="1 of 2 groups have completions with different forced prefixes"):
            objective.signal(forced)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, r"loss.beta is 0.0; allowed is more than 0"),
        ({"beta": float("nan")}, r"loss.beta is nan; allowed is more than 0"),
        ({"beta": 1.0, "beta_final": -1.0, "beta_decay_steps": 3}, r"loss.beta_final is -1.0; allowed is more than 0"),
        ({"beta": 1.0, "beta_final": 0.5}, r"loss.beta_final is 0.5 and loss.beta_decay_steps None; a schedule needs"),
        ({"beta": 1.0, "beta_final": 0.5, "beta_decay_steps": 0}, r"loss.beta_decay_steps is 0; allowed is 1 or more"),
        ({"beta": 1.0, "reference_reset_every": 0}, r"loss.reference_reset_every is 0; allowed is 1 or more"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryBalanceConfig(**fields)


def test_beta_goes_to_its_last_value_and_stays_there():
    config = TrajectoryBalanceConfig(0.012, 0.004, 500)
    assert [config.beta_at(batches) for batches in (0, 250, 500, 900)] == pytest.approx([0.012, 0.008, 0.004, 0.004])
    assert TrajectoryBalanceConfig(0.1).beta_at(7) == 0.1
