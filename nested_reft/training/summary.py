"""What a finished run is summed up by: accuracy before and after, speed, and how far off-policy it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nested_reft.compilation import CompileCounter
from nested_reft.reports.hacking import reward_hacking
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.throughput import compare_throughput
from nested_reft.run_directory import read_log, versions
from nested_reft.training.clock import Clock
from nested_reft.training.config import Config
from nested_reft.training.heldout import heldout_results
from nested_reft.training.keys import RunKeys
from nested_reft.training.run_state import RunState

# Metrics of which the mean over steps is given.
MEANS = ("ess_token", "ess_sequence", "kl_behavior_target", "step_seconds", "rollout_seconds")


def run_summary(
    config: Config, state: RunState, keys: RunKeys, run: Path, compilations: CompileCounter, clock: Clock
) -> dict[str, Any]:
    """The summary of a run whose last step is done; measures held-out accuracy and throughput.

    Args:
        config: of the run.
        state: after the last step; its data position moves on.
        keys: of the run.
        run: its directory.
        compilations: what was compiled so far.
        clock: of this process; its stages are those of the summary.
    """
    with clock.stage("evaluation"):
        after = heldout_results(state.learner.policy(), state.data, config, keys.step(config.train.steps).evaluation)
    # The last checkpoint has its position already, so these prompts move nothing that a resumed run reads.
    prompts = state.next_prompts(np.zeros(config.data.prompts_per_batch, np.int32))
    with clock.stage("measuring speed"):
        throughput = compare_throughput(
            state.learner.behavior_policy(),
            prompts,
            state.draw_plan(keys.throughput_plan),
            keys.throughput,
            config.rollout.group_size,
            state.data.shared_prefix,
        )
    history = read_log(run / "metrics.jsonl")
    # A run whose updates were all empty has measured none of them.
    # A value that was not finite is null in the log.
    logged = {name: [line[name] for line in history if line.get(name) is not None] for name in MEANS}
    means = {name: float(np.mean(values)) if values else None for name, values in logged.items()}
    hacking = reward_hacking(history, _gold_metric(config.reward))
    return {
        "name": config.name,
        "run_directory": str(run),
        "steps": config.train.steps,
        "before": state.before,
        "after": {name: result.to_json() for name, result in after.items()},
        "training_seconds": state.seconds,
        "seconds": clock.seconds(),
        "compilations": compilations.count,
        "compile_seconds": compilations.seconds,
        "versions": versions(),
        **throughput.to_json(),
        **means,
        **({} if hacking is None else {"reward_hacking": hacking}),
    }


def _gold_metric(reward: RewardConfig) -> str | None:
    """What is logged beside a learned reward that no model has learnt."""
    if reward.function is not None:
        return "reward/function"
    return None if reward.checker == "model" else "accuracy"
