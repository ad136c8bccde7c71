"""What a finished run is summed up by: accuracy before and after, speed, and how far off-policy it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nested_reft import processes
from nested_reft.compilation import CompileCounter
from nested_reft.reports.hacking import reward_hacking
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
            # All completions at once may not fit where rows are set.
            rows=config.rollout.rows,
        )
    # The log is written by one process, whose summary is kept.
    history = read_log(run / "metrics.jsonl") if processes.is_writer() else []
    # A run whose updates were all empty has measured none of them.
    # A value that was not finite is null in the log.
    logged = {name: [line[name] for line in history if line.get(name) is not None] for name in MEANS}
    means = {name: float(np.mean(values)) if values else None for name, values in logged.items()}
    hacking = reward_hacking(history, gold_metric(config))
    return {
        "name": config.name,
        "run_directory": str(run),
        "steps": config.train.steps,
        "empty_steps": sum(bool(line.get("empty")) for line in history),
        "before": state.before,
        "after": {name: result.to_json() for name, result in after.items()},
        "nonfinite_updates": state.nonfinite_updates,
        "training_seconds": state.seconds,
        "seconds": clock.seconds(),
        "compilations": compilations.count,
        "compile_seconds": compilations.seconds,
        "versions": versions(),
        **throughput.to_json(),
        **means,
        **({} if hacking is None else {"reward_hacking": hacking}),
    }


def gold_metric(config: Config) -> str | None:
    """The metric beside a learned reward that nobody optimises: a function of weight 0, or what a verifier says.

    Args:
        config: of a run with reward models.

    Returns:
        None where there is none, because all that checks answers is in the reward.
    """
    reward = config.reward
    if reward.function is not None and reward.function_weight == 0:
        return "reward/function"
    checkers = {source.checker or reward.checker for source in config.data.sources}
    # Accuracy is no part of the reward beside a reward model, unless the model or the function decides on it.
    return None if checkers & {"model", "function"} else "accuracy"
