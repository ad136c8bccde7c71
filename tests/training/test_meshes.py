"""A run is the same on one device and on several, however parameters, prompts and heads are split."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.sharding import MeshConfig
from nested_reft.training.trainer import Trainer
from tests.training.runs import MOVING, PPO, comparable, metrics_of, nano, trainer

STEPS = 5
ONE = MeshConfig()
SPREAD = MeshConfig(data=4, tensor=2)
STORED = MeshConfig(slices=2, fsdp=2, tensor=2)
# An untrained model is always wrong, so what it learns is to answer at length; and evaluation would only cost time.
FAST = {
    "optimizer__learning_rate": 0.003,
    "reward": RewardConfig(overlong_cache_tokens=8),
    "evaluation__samples_per_prompt": 0,
    "evaluation__every_steps": 100,
}
MIXED = dataclasses.replace(MOVING, bias_mitigation="mixture", level="sequence", truncate_at=None)
VARIANTS = {
    "nested": {"loss": MOVING},
    "mixture": {"loss": MIXED, "rollout__mixture_alpha": 0.5},
    "exact": {"loss": MOVING, "rollout__mode": "exact"},
    "lora": {"loss": MOVING, "lora": LoraConfig(rank=2)},
    # Early steps of Adam turn rounding of small gradients into steps of full size, so the rate is small. The gradients
    # of the first step agree to 1e-6 at any rate.
    "ppo": {"loss": PPO, "optimizer__learning_rate": 0.001},
    "tb": {"loss": TrajectoryBalanceConfig(beta=1.0)},
}


@functools.cache
def steps_of(variant: str, mesh: MeshConfig) -> list[tuple[dict, np.ndarray]]:
    """Metrics and sampled tokens of each step."""
    with tempfile.TemporaryDirectory() as path:
        return taken_steps(trainer(nano(mesh=mesh, **(FAST | VARIANTS[variant])), Path(path) / "run"))


def taken_steps(run: Trainer) -> list[tuple[dict, np.ndarray]]:
    placed = shards_of(run)
    found = []
    for number in range(STEPS):
        step = run.step(number)
        found.append((comparable(metrics_of(run, step)), step.found[0].rollouts.tokens_BGC))
    # An update gives back what it took as it took it, or the next one would compile again.
    assert shards_of(run) == placed
    run.close()
    return found


def shards_of(run: Trainer) -> dict[str, tuple[int, ...]]:
    """The shape of what one device holds of each trained array and its moments."""
    arrays = jax.tree_util.tree_leaves_with_path(run.state.learner.state)
    return {jax.tree_util.keystr(path): x.sharding.shard_shape(x.shape) for path, x in arrays}


CASES = [("nested", SPREAD, "spread"), *((variant, STORED, "stored") for variant in VARIANTS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "mesh"), [pytest.param(variant, mesh, id=f"{variant}-{name}") for variant, mesh, name in CASES]
)
def test_eight_devices_train_as_one_does(variant, mesh):
    one, many = steps_of(variant, ONE), steps_of(variant, mesh)
    assert one[-1][0]["gradient_norm"] > 0
    # Nothing has been carried on by then.
    assert many[0][0]["gradient_norm"] == pytest.approx(one[0][0]["gradient_norm"], rel=1e-5)
    wrong = []
    for number, ((expected, tokens), (found, found_tokens)) in enumerate(zip(one, many, strict=True)):
        assert np.array_equal(tokens, found_tokens), f"step {number}"
        (values, structure), (others, same) = jax.tree.flatten(expected), jax.tree.flatten(found)
        assert structure == same
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
        wrong += [
            (number, name, value, other)
            for name, value, other in zip(names, values, others, strict=True)
            if not (value == other or np.allclose(other, value, rtol=1e-3, atol=1e-5, equal_nan=True))
        ]
    assert not wrong
