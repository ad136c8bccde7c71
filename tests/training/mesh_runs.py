"""Runs of five steps that must not depend on how they are laid out over devices and processes."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nested_reft import processes
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.run_directory import RunDirectory, SilentRunDirectory
from nested_reft.sharding import MeshConfig
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.training.runs import MOVING, PPO, comparable, metrics_of, nano

STEPS = 5
ONE = MeshConfig()
SPREAD = MeshConfig(data=4, tensor=2)
STORED = MeshConfig(slices=2, fsdp=2, tensor=2)
RELATIVE, ABSOLUTE = 1e-3, 1e-5  # between the metrics of two layouts, which add up in other orders
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


def taken_steps(variant: str, mesh: MeshConfig, place: Path | None = None) -> list[dict[str, Any]]:
    """Metrics and sampled tokens of each step, as JSON has them.

    Args:
        variant: one of `VARIANTS`.
        mesh: of all processes.
        place: where the run may be made, for several processes to share it.
    """
    config, found = nano(mesh=mesh, **(FAST | VARIANTS[variant])), []
    with tempfile.TemporaryDirectory() as directory:
        path = (place or Path(directory)) / variant
        made = processes.by_writer(lambda: RunDirectory(path))
        run = Trainer(prepare(config), made or SilentRunDirectory(path)).open()
        placed = shards_of(run)
        for number in range(STEPS):
            step = run.step(number)
            tokens = step.found[0].rollouts.tokens_BGC.tolist()
            found.append({"metrics": comparable(metrics_of(run, step)), "tokens": tokens})
        # An update gives back what it took as it took it, or the next one would compile again.
        assert shards_of(run) == placed
        run.close()
    return json.loads(json.dumps(found))


def shards_of(run: Trainer) -> dict[str, tuple[int, ...]]:
    """The shape of what one device holds of each trained array and its moments."""
    arrays = jax.tree_util.tree_leaves_with_path(run.state.learner.state)
    return {jax.tree_util.keystr(path): x.sharding.shard_shape(x.shape) for path, x in arrays}


def distances(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, float]:
    """How far each metric is off, as a share of the tolerance, by step and name; other tokens are infinitely far off.

    Args:
        expected: of `taken_steps`, on one device.
        found: of another layout.
    """
    far: dict[str, float] = {}
    for number, (mine, other) in enumerate(zip(expected, found, strict=True)):
        far[f"step {number}, tokens"] = 0.0 if mine["tokens"] == other["tokens"] else np.inf
        (values, structure), (others, same) = jax.tree.flatten(mine["metrics"]), jax.tree.flatten(other["metrics"])
        assert structure == same
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mine["metrics"])]
        for name, value, found_value in zip(names, values, others, strict=True):
            far[f"step {number}, {name}"] = _distance(value, found_value)
    return far


def _distance(value: Any, other: Any) -> float:
    if value == other or (value != value and other != other):
        return 0.0
    if not isinstance(value, float) or not isinstance(other, float):
        return np.inf
    distance = abs(value - other) / (ABSOLUTE + RELATIVE * abs(value))
    return distance if np.isfinite(distance) else np.inf
