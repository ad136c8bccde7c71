"""The weight of the KL penalty: by hand, and in a loop with a policy that it pushes back."""

import dataclasses
import json

import pytest

from nested_reft.kl_control import KlControlState, initial_state, update
from nested_reft.losses import presets
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.losses.value import CriticConfig

PPO = presets.ppo("base")
HELD = dataclasses.replace(PPO, critic=CriticConfig(kl_coefficient=0.5, kl_target=4.0, kl_gain=0.1))


@pytest.mark.parametrize(
    ("completion_kl", "expected"),
    [
        (4.4, 0.5 * 1.01),  # 10 % over the target, a tenth of which is 1 %
        (40.0, 0.5 * 1.02),  # the error is clipped to 0.2
        (3.8, 0.5 * 0.995),
        (0.0, 0.5 * 0.98),
        (4.0, 0.5),
        (None, 0.5),
        (float("nan"), 0.5),
    ],
)
def test_a_step_by_hand(completion_kl, expected):
    assert update(initial_state(HELD), HELD, completion_kl).coefficient == pytest.approx(expected)


def test_it_holds_the_target():
    """A policy whose divergence is 2 / beta: the target 4 needs beta 0.5, wherever it begins."""
    for start in (0.05, 5.0):
        state = KlControlState(start)
        for _ in range(300):
            state = update(state, HELD, 2 / state.coefficient)
        assert state.coefficient == pytest.approx(0.5, rel=0.05)


def test_nothing_is_held_without_a_target():
    fixed = dataclasses.replace(PPO, critic=CriticConfig(kl_coefficient=0.5))
    without = TrajectoryBalanceConfig(beta=0.1)
    assert update(initial_state(fixed), fixed, 40.0) == KlControlState(0.5)
    assert update(initial_state(without), without, 40.0) == KlControlState(0.0)


def test_the_state_survives_json():
    state = KlControlState(0.3)
    assert KlControlState.from_json(json.loads(json.dumps(state.to_json()))) == state
