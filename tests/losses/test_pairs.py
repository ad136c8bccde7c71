"""Bradley-Terry and DPO: by hand, and against slow loops of plain numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.losses.bradley_terry import PAIR_SIGNALS, BradleyTerry, BradleyTerryConfig
from nested_reft.losses.dpo import Dpo, DpoConfig
from nested_reft.losses.objective import Objective, RolloutObjective, TargetPass
from nested_reft.losses.registry import make_objective
from nested_reft.losses.supervised import SftConfig
from nested_reft.types import TrainBatch

SHAPE = (4, 2, 5)
OBJECTIVES = {"bradley_terry": BradleyTerry(), "dpo": Dpo(DpoConfig(beta=0.3))}


def pairs(seed: int = 0, counted: int = 3) -> tuple[TargetPass, TrainBatch]:
    """Pairs of unequal lengths, of which the last one does not count."""
    generator = np.random.default_rng(seed)

    def array(low: float, high: float) -> jax.Array:
        return jnp.asarray(generator.uniform(low, high, SHAPE), jnp.float32)

    batch = TrainBatch(
        prompt_BP=jnp.zeros((4, 1), jnp.int32),
        prompt_length_B=jnp.ones(4, jnp.int32),
        tokens_BGC=jnp.zeros(SHAPE, jnp.int32),
        length_BG=jnp.array([[4, 2], [1, 4], [3, 3], [2, 4]]),
        forced_BG=jnp.zeros((4, 2), jnp.int32),
        counted_BG=jnp.broadcast_to(jnp.arange(4)[:, None] < counted, (4, 2)),
        signal_BG=jnp.tile(jnp.array(PAIR_SIGNALS), (4, 1)),
        reference_logprob_BGC=array(-3, -0.1),
    )
    return TargetPass(array(-3, -0.1), jnp.zeros(SHAPE), None, array(-2, 2)), batch


def slow(name: str, target: TargetPass, batch: TrainBatch) -> float:
    """The same losses as loops in double precision."""
    total, count = 0.0, 0
    for b in range(SHAPE[0]):
        if not bool(batch.counted_BG[b, 0]):
            continue
        scores = []
        for g in range(2):
            length = int(batch.length_BG[b, g])
            if name == "bradley_terry":
                # The state after the last token: that before it would be the value at length - 1.
                scores.append(float(target.value_BGC[b, g, length]))  # pyright: ignore[reportOptionalSubscript]
                continue
            ratio = 0.0
            for t in range(length):
                ratio += float(target.logprob_BGC[b, g, t])
                ratio -= float(batch.reference_logprob_BGC[b, g, t])  # pyright: ignore[reportOptionalSubscript]
            scores.append(0.3 * ratio)
        total += -math.log(1 / (1 + math.exp(-(scores[0] - scores[1]))))
        count += 1
    return total / count


def mean_loss(name: str, array, target: TargetPass, batch: TrainBatch) -> jax.Array:
    field = "value_BGC" if name == "bradley_terry" else "logprob_BGC"
    return OBJECTIVES[name].loss(dataclasses.replace(target, **{field: array}), batch).mean()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_equal_a_slow_loop(name):
    target, batch = pairs()
    array = target.value_BGC if name == "bradley_terry" else target.logprob_BGC
    value, gradient = jax.value_and_grad(lambda x: mean_loss(name, x, target, batch))(array)
    assert float(value) == pytest.approx(slow(name, target, batch), rel=1e-5)
    field, step = ("value_BGC" if name == "bradley_terry" else "logprob_BGC"), 1e-3
    numbers = np.asarray(array, np.float64)
    for index in np.ndindex(SHAPE):
        moved = []
        for sign in (1, -1):
            changed = numbers.copy()
            changed[index] += sign * step
            moved.append(slow(name, dataclasses.replace(target, **{field: changed}), batch))  # type: ignore[arg-type]
        assert float(gradient[index]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=2e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_add_up_to_the_whole(name):
    """Sums and weights add; a mean of means would weigh the part with one counted pair like that with two."""
    target, batch = pairs()

    def rows(index):
        return jax.tree.map(lambda x: x[index], (target, batch))

    whole = OBJECTIVES[name].loss(target, batch)
    one, two = (OBJECTIVES[name].loss(*rows(part)) for part in (slice(0, 2), slice(2, 4)))
    assert float((one.total + two.total).mean()) == pytest.approx(float(whole.total.mean()), rel=1e-6)
    for part, value in whole.parts.items():
        assert float((one.parts[part] + two.parts[part]).mean()) == pytest.approx(float(value.mean()), rel=1e-6)
    assert abs(float((one.mean() + two.mean()) / 2) - float(whole.mean())) > 1e-3


def test_equal_scores_cost_log_2_and_the_other_order_flips_the_margin():
    """Identity (j): equal rewards -> ln 2; swapping a pair changes the sign of its margin."""
    target, batch = pairs(counted=4)
    flat = dataclasses.replace(target, value_BGC=jnp.ones(SHAPE))
    output = OBJECTIVES["bradley_terry"].loss(flat, batch)
    assert float(output.mean()) == pytest.approx(math.log(2))
    assert float(output.parts["pair_accuracy"].mean()) == 0.5  # neither right nor wrong
    swapped = dataclasses.replace(batch, signal_BG=-batch.signal_BG)
    margins = [float(OBJECTIVES["bradley_terry"].loss(target, b).parts["margin"].mean()) for b in (batch, swapped)]
    assert margins[0] == pytest.approx(-margins[1]) and margins[0] != 0


def test_dpo_by_hand_equals_the_published_formula():
    """Chosen: log ratios of 0.5 and 0.1 sum to 0.6; rejected: -0.2. beta 0.1: the margin is 0.08, and the loss
    -log sigmoid(0.08) = 0.65394. A mean over tokens instead of the sum would give a margin of 0.05, and 0.66846."""
    batch = jax.tree.map(lambda x: x[:1], pairs()[1])
    reference = jnp.array([[[-1.5, -1.1, 0, 0, 0], [-0.8, 9, 0, 0, 0]]])
    batch = dataclasses.replace(batch, length_BG=jnp.array([[2, 1]]), reference_logprob_BGC=reference)
    logprob = jnp.array([[[-1.0, -1.0, 5, 5, 5], [-1.0, -jnp.inf, 0, 0, 0]]])
    output = Dpo(DpoConfig()).loss(TargetPass(logprob, jnp.zeros(logprob.shape)), batch)
    assert float(output.mean()) == pytest.approx(0.65394, abs=1e-5)
    assert float(output.parts["chosen_score"].mean()) == pytest.approx(0.06)
    assert float(output.parts["rejected_score"].mean()) == pytest.approx(-0.02)
    # d loss / d log pi = -beta sigmoid(-0.08) at the chosen tokens: 0.1 * 0.480.
    assert output.weight_BGC[0].tolist() == [pytest.approx([0.0480, 0.0480, 0, 0, 0], abs=1e-4), pytest.approx(
        [-0.0480, 0, 0, 0, 0], abs=1e-4)]  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_pair_that_counts_gives_zero_and_finite_gradients(name):
    target, batch = pairs(counted=0)
    array = target.value_BGC if name == "bradley_terry" else target.logprob_BGC
    value, gradient = jax.value_and_grad(lambda x: mean_loss(name, x, target, batch))(array)
    assert float(value) == 0 and not np.asarray(gradient).any()


def test_offline_objectives_have_no_signal_for_rollouts():
    for config in (BradleyTerryConfig(), DpoConfig()):
        assert isinstance(make_objective(config), Objective)
        assert not isinstance(make_objective(config), RolloutObjective)
    assert not make_objective(SftConfig()).needs(1).off_policy


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_is_more_than_zero(beta):
    with pytest.raises(ValueError, match=r"loss.beta is .*; allowed is more than 0"):
        DpoConfig(beta=beta)
