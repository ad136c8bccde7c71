"""What a finished run is summed up by: accuracy before and after, speed, and how far off-policy it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nested_reft.rollout.throughput import compare_throughput
from nested_reft.run_directory import read_log, versions

if TYPE_CHECKING:  # the trainer imports this module
    from nested_reft.training.trainer import Trainer

MEANS = ("ess_token", "ess_sequence", "kl_behavior_target")  # metrics of which the mean over steps is given


def run_summary(trainer: Trainer) -> dict[str, Any]:
    """The summary of a run whose last step is done; measures held-out accuracy and throughput.

    Args:
        trainer: of the run, still open.
    """
    config, state = trainer.config, trainer.state
    after = trainer.evaluate_all(config.train.steps)
    # The last checkpoint has its position already, so these prompts move nothing that a resumed run reads.
    prompts = trainer.next_prompts(np.zeros(config.data.prompts_per_batch, np.int32))
    throughput = compare_throughput(
        state.learner.behavior_policy(),
        prompts,
        trainer.draw_plan(trainer.keys.throughput_plan),
        trainer.keys.throughput,
        config.rollout.group_size,
        trainer.data.shared_prefix,
    )
    history = read_log(trainer.run_directory.path / "metrics.jsonl")
    # A run whose updates were all empty has measured none of them.
    logged = {name: [line[name] for line in history if name in line] for name in MEANS}
    means = {name: float(np.mean(values)) if values else None for name, values in logged.items()}
    return {
        "name": config.name,
        "run_directory": str(trainer.run_directory.path),
        "steps": config.train.steps,
        "before": state.before,
        "after": after,
        "training_seconds": state.seconds,
        "compilations": trainer.compilations.count,
        "compile_seconds": trainer.compilations.seconds,
        "versions": versions(),
        **throughput.to_json(),
        **means,
    }
