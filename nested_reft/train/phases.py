"""The phases of a run: warm start, splitting of the sources, reinforcement.

Each works on the same state, and each is checkpointed and resumed like the others. A checkpoint's
number counts the steps of all phases, and one more for the beginning of each, so that numbers rise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
from tqdm.auto import tqdm

from nested_reft.curriculum import CurriculumState
from nested_reft.data.pipeline import PromptStream, batch_prompts
from nested_reft.losses.registry import make_objective
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import replicate, shard_batch
from nested_reft.train.config import Config
from nested_reft.train.keys import RunKeys
from nested_reft.train.learner import LearnerBatch
from nested_reft.train.optimizer import make_optimizer
from nested_reft.train.run_state import RunState, initial_run_state
from nested_reft.train.setup import RunData, Setup
from nested_reft.train.split import divide, divided
from nested_reft.train.step import Task, UpdatePlans
from nested_reft.train.warm_start import demonstrations, dropout_plan, sources_of, warm_start_task


@runtime_checkable
class Phase(Protocol):
    """One part of a run.

    Attributes:
        name: as the progress bar shows it.
        steps: how many it takes.
        trains: whether it moves the parameters.
    """

    name: str
    steps: int
    trains: bool

    def prepare(self, state: RunState) -> None:
        """Gives arrays and data position a place to go: optimizer, update and stream of this phase, all fresh.

        Called when the phase begins, and before a checkpoint of the phase is loaded.
        """
        ...

    def start(self, state: RunState) -> None:
        """What happens once, before the first step; its results are in the phase's first checkpoint."""
        ...

    def step(self, state: RunState, number: int) -> str:
        """Step `number`, counted from 0; returns what the progress bar shows."""
        ...


class WarmStart:
    """Supervised training on the questions and answers of all sources, which take turns."""

    name, trains = "warm start", True

    def __init__(self, config: Config, data: RunData, keys: RunKeys):
        """Args:
        config: of the run.
        data: its prompts.
        keys: its random keys.
        """
        self._config, self._data, self._key = config, data, keys.warm_start
        self.steps = config.warm_start.steps

    def prepare(self, state: RunState) -> None:
        """A fresh optimizer and a fresh pass over the data."""
        config = self._config
        state.learner.begin(
            warm_start_task(
                config.warm_start,
                config.rollout.max_completion_tokens,
                config.train.remat,
                self._data.shared_prefix,
            )
        )
        state.stream = PromptStream(self._data.train_examples, config.train.seed)

    def start(self, state: RunState) -> None:
        """Nothing but the steps."""

    def step(self, state: RunState, number: int) -> str:
        """One update on a batch of demonstrations, under the layers that layer dropout leaves."""
        config, learner = self._config.warm_start, state.learner
        policy = learner.policy()
        plan = dropout_plan(jax.random.fold_in(self._key, number), config, policy.num_layers)
        sources = sources_of(config.batch_size, len(self._data.train_examples))
        prompts = batch_prompts([state.stream.next(source) for source in sources], sources, self._data.prompt_size)
        batch = demonstrations(prompts, prompts.answers, policy.tokenizer, policy.max_completion_tokens)
        mesh = learner.mesh
        del policy  # so that the update can take its buffers
        update = learner.update(LearnerBatch(shard_batch(batch, mesh), UpdatePlans(target=replicate(plan, mesh))))
        return f"loss {update.loss:.3f}"


class Split:
    """Divides the sources by what the policy can do at the start of reinforcement; one step."""

    name, steps, trains = "splitting sources", 1, False

    def __init__(self, config: Config, data: RunData, keys: RunKeys):
        """Args:
        config: of the run.
        data: its prompts, undivided.
        keys: its random keys.
        """
        self._config, self._data, self._key = config, data, keys.split

    def prepare(self, state: RunState) -> None:
        """Nothing changes but the data position, which the next phase makes anew."""
        state.stream = PromptStream(self._data.train_examples, self._config.train.seed)

    def start(self, state: RunState) -> None:
        """Nothing but the step."""

    def step(self, state: RunState, number: int) -> str:
        """Measures and divides."""
        state.division = divide(self._config, self._data, state.learner.policy(), self._key)
        return f"{sum(len(parts) for parts in state.division)} parts"


def reinforcement_task(config: Config, shared_prefix: int) -> Task:
    """What the learner minimises in reinforcement.

    Args:
        config: of the run.
        shared_prefix: leading tokens that all training prompts have in common.
    """
    train = config.train
    return Task(
        objective=make_objective(config.loss),
        optimizer=make_optimizer(config.optimizer, train.steps * train.updates_per_batch),
        temperature=config.rollout.sampling.temperature,
        updates_per_batch=train.updates_per_batch,
        micro_batches=train.micro_batches,
        remat=train.remat,
        shared_prefix=shared_prefix,
        max_completion_tokens=config.rollout.max_completion_tokens,
    )


def fresh_data(state: RunState, config: Config, data: RunData) -> RunData:
    """The sources as divided, with stream and curriculum at their beginning.

    Args:
        state: its stream and curriculum are replaced.
        config: of the run.
        data: its prompts, undivided.
    """
    data = data if state.division is None else divided(config, data, state.division)
    state.stream = PromptStream(data.train_examples, config.train.seed)
    state.curriculum = CurriculumState.start([len(examples) for examples in data.train_examples])
    return data


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
    return dataclasses.replace(state.learner.policy(), version=0)


def first_checkpoint(phases: Sequence[Phase], index: int) -> int:
    """The number of the checkpoint with which phase `index` begins."""
    return sum(phase.steps + 1 for phase in phases[:index])


def last_checkpoint(config: Config) -> int:
    """The number of the checkpoint that ends a run of this configuration."""
    before = [config.warm_start.steps] * (config.warm_start.steps > 0) + [1] * (config.data.split.kind != "none")
    return sum(steps + 1 for steps in before) + config.train.steps
