"""What is kept of an update whose loss or gradient was not finite, so that a user can look into it.

It has the form of a checkpoint: the learner's arrays as the update found them, and its batch as arrays on the host.
`nested_reft.api.repeat_failed_update` repeats the update from it. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from nested_reft import processes
from nested_reft.checkpoints import Checkpoints, Exchange, newest_checkpoint
from nested_reft.layer_plan import LayerPlan
from nested_reft.sharding import replicate, shard_batch, to_host
from nested_reft.training.learner import LearnerBatch
from nested_reft.training.phases import Phase
from nested_reft.training.run_state import RunState
from nested_reft.training.step import UpdatePlans
from nested_reft.types import TrainBatch

DIRECTORY = "failed_update"  # within the run's


def keep_failed_update(run: Path, state: RunState, exchange: Exchange | None = None) -> Path:
    """Writes the learner's arrays and the batch of its latest update; one that was kept before goes.

    Args:
        run: the run's directory.
        state: of the run; its latest update was left out, so the arrays are still those that it found.
        exchange: as that of the run's checkpoints.

    Raises:
        OSError: they could not be written.

    Returns:
        The directory.
    """
    learner, failed = state.learner, state.learner.failed
    assert failed is not None, "the latest update was finite"
    names = [field.name for field in dataclasses.fields(failed.arrays)]
    arrays = {name: getattr(failed.arrays, name) for name in names}
    host = {
        "phase": state.phase,
        "trained_before": state.trained_before,
        "division": state.division,
        "batch": {name: to_host(array) for name, array in arrays.items() if array is not None},
        "plans": {
            name: None if plan is None else plan.host_parts(learner.num_layers)
            for name, plan in (("target", failed.plans.target), ("nested", failed.plans.nested))
        },
    }
    directory = run / DIRECTORY
    processes.by_writer(lambda: shutil.rmtree(directory) if directory.exists() else None)
    with Checkpoints(directory, 1, exchange=exchange) as kept:
        # The step that is under way, counted from 1.
        kept.save(state.step + 1, learner.arrays(with_reference=False), host)
    return directory


def kept_number(run: Path) -> int:
    """The step, counted from 1, whose update a run has kept.

    Args:
        run: the run's directory.

    Raises:
        ValueError: nothing is kept.
    """
    number = newest_checkpoint(run / DIRECTORY)
    if number is None:
        raise ValueError(
            f"run '{run}' has no {DIRECTORY}; a run keeps one when train.stop_after_nonfinite_updates ends it"
        )
    return number


def load_failed_update(run: Path, state: RunState, phases: Sequence[Phase]) -> LearnerBatch:
    """Gives the learner the arrays that were kept, and returns the batch.

    Args:
        run: the run's directory.
        state: of a run that has not begun; it changes.
        phases: of the run.

    Raises:
        ValueError: nothing is kept, or it is damaged.
    """
    number = kept_number(run)
    with Checkpoints(run / DIRECTORY, keep=1) as kept:
        host = kept.restore_host(number)
        state.phase, state.trained_before, state.division = host["phase"], host["trained_before"], host["division"]
        phases[state.phase].prepare(state)
        learner = state.learner
        learner.load(kept.restore_some(number, learner.arrays(with_reference=False)))
    none = {field.name: None for field in dataclasses.fields(TrainBatch)}
    arrays = shard_batch(TrainBatch(**none | host["batch"]), learner.mesh)
    plans = {
        name: None if part_L is None else replicate(LayerPlan.of_parts(part_L), learner.mesh)
        for name, part_L in host["plans"].items()
    }
    return LearnerBatch(arrays, UpdatePlans(**plans))
