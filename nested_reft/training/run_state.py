"""Everything that a resumed run needs, in one value with one way out and one way back.

What is not in it does not survive; what survives is in it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from nested_reft.checkpoints import Checkpoints
from nested_reft.curriculum import CurriculumState
from nested_reft.data.pipeline import PromptStream
from nested_reft.nesting_control import NestingControlState, initial_state
from nested_reft.training.learner import Learner
from nested_reft.training.setup import Setup
from nested_reft.training.split import Division


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        learner: parameters, optimizer state, counters and the reference.
        stream: the position in every source.
        curriculum: what it remembers of each source.
        nesting: how deep the next batch nests.
        divergence_L: measured divergence of each layer, for `measured` plans.
        division: the parts that the sources were divided into; None before, or where there is no split.
        phase: index of the phase that the run is in.
        started: whether what comes before the phase's first step is done.
        step: steps of that phase that are done.
        seconds: time that the steps so far took.
        before: held-out results before the first step of reinforcement.
        trained_before: whether an earlier phase has moved the parameters, so that the reference is not
            what the configuration starts from.
    """

    learner: Learner
    stream: PromptStream
    curriculum: CurriculumState
    nesting: NestingControlState
    divergence_L: Float[np.ndarray, " L"]
    division: Division | None = None
    phase: int = 0
    started: bool = False
    step: int = 0
    seconds: float = 0.0
    before: dict[str, Any] | None = None
    trained_before: bool = False

    def save(self, checkpoints: Checkpoints, number: int) -> None:
        """Starts writing a checkpoint; the state may change as soon as this returns.

        Args:
            checkpoints: of the run.
            number: of the checkpoint, larger than those before.
        """
        checkpoints.save(number, self._arrays(), self._host())

    def load(self, checkpoints: Checkpoints, host: dict[str, Any]) -> None:
        """Takes over the newest checkpoint.

        Args:
            checkpoints: of the run.
            host: what `Checkpoints.restore_host` gave. The learner has begun the phase that it names, and
                the stream is made of the sources that it divides, so that the arrays have a place to go.

        Raises:
            ValueError: the checkpoint is damaged, or of other data or another model.
        """
        # This comes first, because it decides whether `_arrays` names a reference.
        self.trained_before = host["trained_before"]
        # The state has places for all arrays by now: whether a reference is stored depends on `trained_before`.
        arrays = checkpoints.restore_some(self._arrays())
        reference = arrays.pop("reference", None)
        self.learner.load(dataclasses.replace(self.learner.state, **arrays), reference)
        self.stream.set_state(host["stream"])
        self.curriculum = CurriculumState.from_json(host["curriculum"])
        self.nesting = NestingControlState.from_json(host["nesting"])
        self.divergence_L, self.division = host["divergence"], host["division"]
        self.phase, self.started, self.step = host["phase"], host["started"], host["step"]
        self.seconds, self.before = host["seconds"], host["before"]

    def _arrays(self) -> dict[str, Any]:
        """What lies on the devices. Frozen parameters, and a reference that is the start, come with the model."""
        state = self.learner.state
        arrays = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        if self.trained_before and self.learner.reference is not None:
            # After a phase that trains, the reference is no longer what the configuration starts from.
            arrays["reference"] = self.learner.reference
        return arrays

    def _host(self) -> dict[str, Any]:
        """What lies on the host, as plain values and NumPy arrays."""
        return {
            "phase": self.phase,
            "started": self.started,
            "step": self.step,
            "seconds": self.seconds,
            "before": self.before,
            "trained_before": self.trained_before,
            "curriculum": self.curriculum.to_json(),
            "nesting": self.nesting.to_json(),
            # It may have been measured anew in the run, so the file that it began with does not replace it.
            "divergence": np.asarray(self.divergence_L),
            "division": self.division,
            "stream": self.stream.get_state(),
        }


def initial_run_state(setup: Setup) -> RunState:
    """The state of a run that has not begun.

    Args:
        setup: what the run starts from; it stays as it is.
    """
    config, data = setup.config, setup.data
    return RunState(
        learner=Learner(setup.policy, config.rollout.weights),
        stream=PromptStream(data.train_examples, config.train.seed),
        curriculum=CurriculumState.start([len(examples) for examples in data.train_examples]),
        nesting=initial_state(config.nesting_control, config.nesting.num_skipped(setup.policy.num_layers)),
        divergence_L=setup.divergence_L,
    )
