"""The phases of a run: warm start, splitting of the sources, reinforcement.

Each works on the same state, and each is checkpointed and resumed like the others. The last one has a
file of its own, `training.reinforcement`. A checkpoint's number counts the steps of all phases, and one
more for the beginning of each, so that numbers rise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
from tqdm.auto import tqdm

from nested_reft.curriculum import CurriculumState
from nested_reft.data.pipeline import PromptStream
from nested_reft.rollout.policy import Policy
from nested_reft.training.config import Config
from nested_reft.training.keys import RunKeys
from nested_reft.training.learner import Update
from nested_reft.training.run_state import RunState, initial_run_state
from nested_reft.training.setup import RunData, Setup
from nested_reft.training.split import divide, divided
from nested_reft.training.warm_start import demonstrations, dropout_plan, sources_of, warm_start_task


@runtime_checkable
class Phase(Protocol):
    """One part of a run.

    Attributes:
        name: as the progress bar shows it.
        steps: how many it takes.
        trains: whether it moves the parameters.
        rate: the field of its learning rate, which is what to lower where numbers overflow.
    """

    name: str
    steps: int
    trains: bool
    rate: str

    def prepare(self, state: RunState) -> None:
        """Gives arrays and data position a place to go: optimizer, update and stream of this phase, all fresh.

        Called when the phase begins, and before a checkpoint of the phase is loaded.
        """
        ...

    def start(self, state: RunState) -> None:
        """What happens once, before the first step; its results are in the phase's first checkpoint."""
        ...

    def step(self, state: RunState, number: int) -> str:
        """One step of the phase.

        Args:
            state: changed in place, but for the counters, which the loop keeps.
            number: of the step, counted from 0.

        Returns:
            What the progress bar shows.
        """
        ...


class WarmStart:
    """Supervised training on the questions and answers of all sources, which take turns."""

    name, trains, rate = "warm start", True, "warm_start.learning_rate"

    def __init__(self, config: Config, data: RunData, keys: RunKeys):
        """Args:
        config: of the run.
        data: its prompts.
        keys: its random keys.
        """
        self._config, self._data, self._key = config, data, keys.warm_start
        self.steps = self.steps_in(config)

    @staticmethod
    def steps_in(config: Config) -> int:
        """How many steps a run takes of it; 0 where it has none."""
        return config.warm_start.steps

    def prepare(self, state: RunState) -> None:
        """A fresh optimizer and a fresh pass over the data."""
        config = self._config
        state.learner.begin(
            warm_start_task(
                config.warm_start,
                config.rollout.max_completion_tokens,
                config.train.remat,
                self._data.shared_prefix,
                config.train.compute_dtype,
            )
        )
        take_whole_sources(state, self._data, config)

    def start(self, state: RunState) -> None:
        """Nothing but the steps."""

    def step(self, state: RunState, number: int) -> str:
        """One update on a batch of demonstrations, under the layers that layer dropout leaves.

        Args:
            state: its learner and its stream move on.
            number: of the step, counted from 0.

        Raises:
            NonFiniteUpdatesError: it was one update too many that was not finite.
        """
        config, learner = self._config.warm_start, state.learner
        # The key follows from the number of the step, so a resumed warm start drops the same layers.
        plan = dropout_plan(jax.random.fold_in(self._key, number), config, learner.num_layers)
        prompts = state.next_prompts(sources_of(config.batch_size, len(self._data.train_examples)))
        # An answer has at most as many tokens as a completion may have; `prepare` has checked that.
        batch = demonstrations(prompts, prompts.answers, learner.tokenizer, learner.task.max_completion_tokens)
        update = learner.update(learner.written_batch(batch, plan))
        count_nonfinite(self, number + 1, update, state)
        return f"loss {update.loss:.3f}"


class Split:
    """Divides the sources by what the policy can do at the start of reinforcement; one step."""

    name, trains, rate = "splitting sources", False, ""

    def __init__(self, config: Config, data: RunData, keys: RunKeys):
        """Args:
        config: of the run.
        data: its prompts, undivided.
        keys: its random keys.
        """
        self._config, self._data, self._key = config, data, keys.split
        self.steps = self.steps_in(config)

    @staticmethod
    def steps_in(config: Config) -> int:
        """How many steps a run takes of it; 0 where it has none."""
        return 0 if config.data.split.kind == "none" else 1

    def prepare(self, state: RunState) -> None:
        """No optimizer, since nothing trains; and a data position, which the next phase makes anew."""
        state.learner.rest()
        take_whole_sources(state, self._data, self._config)

    def start(self, state: RunState) -> None:
        """Nothing but the step."""

    def step(self, state: RunState, number: int) -> str:
        """Measures and divides.

        Args:
            state: its division is set.
            number: 0, since there is one step.
        """
        state.division = divide(self._config, self._data, state.learner.policy(), self._key)
        return f"{sum(len(parts) for parts in state.division)} parts"


# Pass rates are those of the policy after its warm start, so the split comes second.
_EARLIER: tuple[type[WarmStart | Split], ...] = (WarmStart, Split)


def earlier_phases(config: Config, data: RunData, keys: RunKeys) -> list[Phase]:
    """What a run does before reinforcement, in its order.

    Args:
        config: of the run.
        data: its prompts, undivided.
        keys: its random keys.
    """
    return [kind(config, data, keys) for kind in _EARLIER if kind.steps_in(config)]


def take_whole_sources(state: RunState, data: RunData, config: Config) -> None:
    """Gives a state the sources as the configuration names them, and a data position at their beginning.

    Args:
        state: its data and its stream are replaced.
        data: the prompts, undivided.
        config: of the run.
    """
    state.data, state.stream = data, PromptStream(data.train_examples, config.train.seed)


def take_divided_sources(state: RunState, data: RunData, config: Config) -> None:
    """Gives a state the sources as they were divided, with stream and curriculum at their beginning.

    Args:
        state: its data, stream and curriculum are replaced.
        data: the prompts, undivided.
        config: of the run.
    """
    # The division was measured once and is stored, because a later policy would divide the sources otherwise.
    data = data if state.division is None else divided(data, state.division)
    take_whole_sources(state, data, config)
    # The curriculum counts training sources, whose number the division may have changed.
    state.curriculum = CurriculumState.start([len(examples) for examples in data.train_examples])


def warm_started(setup: Setup) -> Policy:
    """The policy after the warm start alone: one start for several runs that are compared.

    Args:
        setup: its configuration says how; its policy stays as it is.
    """
    state, keys = initial_run_state(setup), RunKeys(jax.random.key(setup.config.train.seed))
    phase = WarmStart(setup.config, setup.data, keys)
    phase.prepare(state)
    bar = tqdm(range(phase.steps), desc=phase.name, unit="step")
    for number in bar:
        bar.set_postfix_str(phase.step(state, number))
    state.step = phase.steps
    check_finite_state(phase, state)
    # For the runs that start from it, this policy is the beginning.
    return dataclasses.replace(state.learner.policy(), version=0)


class NonFiniteUpdatesError(FloatingPointError):
    """As many updates in a row as the configuration allows had a loss or a gradient that was not finite."""


def count_nonfinite(phase: Phase, number: int, update: Update, state: RunState) -> None:
    """Counts the updates that were left out because their loss or gradient was not finite, and says the first of them.

    One of them may come from a batch that is out of the ordinary. Several in a row come from the model.

    Args:
        phase: that took the step.
        number: of the step, counted from 1.
        update: what the step did.
        state: of the run; its counts change.

    Raises:
        NonFiniteUpdatesError: there were too many of them in a row.
    """
    if update.all_nonfinite:
        state.nonfinite_in_a_row += update.nonfinite
    elif not update.empty:  # an empty batch says nothing of the model
        state.nonfinite_in_a_row = update.nonfinite_last
    if not update.nonfinite:
        return
    is_first, limit = not state.nonfinite_updates, state.config.train.stop_after_nonfinite_updates
    state.nonfinite_updates += update.nonfinite
    if state.nonfinite_in_a_row >= limit:
        raise NonFiniteUpdatesError(
            f"{phase.name}, step {number}: {state.nonfinite_in_a_row} updates in a row were left out, since loss or"
            f" gradient was not finite; train.stop_after_nonfinite_updates is {limit}. Loss is {update.loss:.4g} and"
            f" gradient_norm {update.gradient_norm:.4g}; the newest checkpoint is from before. Lower {phase.rate}"
        )
    if is_first:
        tqdm.write(
            f"{phase.name}, step {number}: {update.nonfinite} of the step's updates changed nothing, since loss or"
            f" gradient was not finite (later ones: metrics.jsonl); lower {phase.rate} if there are many"
        )


def check_finite_state(phase: Phase, state: RunState) -> None:
    """Stops before a broken model is saved: loss and gradient of an update are those of the model before it.

    Args:
        phase: that the state is in.
        state: about to be saved.

    Raises:
        FloatingPointError: a parameter or the optimizer's memory is not finite.
    """
    name = state.learner.not_finite()
    if name is None:
        return
    if not (state.step or state.trained_before):
        raise FloatingPointError(f"the model that the run starts from holds a value that is not finite, in {name}")
    raise FloatingPointError(
        f"{phase.name}, step {state.step}: the update left a value that is not finite in {name}, so nothing is saved;"
        f" the newest checkpoint is from before. Lower {phase.rate}"
    )


def first_checkpoint(phases: Sequence[Phase], index: int) -> int:
    """The number of the checkpoint with which a phase begins.

    Args:
        phases: all phases of the run, in their order.
        index: of the phase.
    """
    # Each phase writes one checkpoint before its first step, hence the 1.
    return sum(phase.steps + 1 for phase in phases[:index])


def last_checkpoint(config: Config) -> int:
    """The number of the checkpoint that ends a run of this configuration; no model is loaded for it."""
    earlier = [kind.steps_in(config) for kind in _EARLIER]
    return sum(steps + 1 for steps in earlier if steps) + config.train.steps
