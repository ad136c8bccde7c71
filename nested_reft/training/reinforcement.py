"""The phase that the others prepare: reinforcement learning from rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from nested_reft import processes
from nested_reft.compilation import CompileCounter
from nested_reft.evaluation import Evaluation
from nested_reft.losses.registry import make_objective
from nested_reft.reports.hacking import EARLIEST, reward_hacking
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.training import record
from nested_reft.training.clock import Clock
from nested_reft.training.config import Config
from nested_reft.training.heldout import heldout_results
from nested_reft.training.keys import RunKeys
from nested_reft.training.optimizer import make_optimizer
from nested_reft.training.phases import count_nonfinite, take_divided_sources
from nested_reft.training.record import StepRecord
from nested_reft.training.run_state import RunState
from nested_reft.training.setup import RunData
from nested_reft.training.step import LearnerTask
from nested_reft.training.summary import gold_metric, run_summary
from nested_reft.untrusted import printable

OnStep = Callable[[StepRecord], None]


def reinforcement_task(config: Config, shared_prefix: int) -> LearnerTask:
    """What the learner minimises in reinforcement.

    Args:
        config: of the run.
        shared_prefix: leading tokens that all training prompts have in common.
    """
    train = config.train
    return LearnerTask(
        objective=make_objective(config.loss),
        # The schedule counts updates, and each batch makes several of them.
        optimizer=make_optimizer(config.optimizer, train.steps * train.updates_per_batch),
        # Behavior and target must be compared at one temperature; else the ratio would not be 1 on-policy.
        temperature=config.rollout.sampling.temperature,
        updates_per_batch=train.updates_per_batch,
        micro_batches=train.micro_batches,
        remat=train.remat,
        shared_prefix=shared_prefix,
        max_completion_tokens=config.rollout.max_completion_tokens,
        compute_dtype=train.compute_dtype,
        mini_batches=train.mini_batches,
        full_support=not config.rollout.sampling.truncates,
    )


class EmptyUpdatesError(RuntimeError):
    """Too many updates in a row changed nothing, and the configuration says to stop then."""


class Reinforcement:
    """Runs the trainer's steps: each is checked, evaluated where it is time, and logged."""

    trains, rate = True, "optimizer.learning_rate"

    def __init__(
        self,
        config: Config,
        data: RunData,
        keys: RunKeys,
        run: RunDirectory,
        clock: Clock,
        train_step: Callable[[int], StepRecord],
        on_step: OnStep | None,
    ):
        """Args:
        config: of the run.
        data: its prompts, undivided.
        keys: its random keys.
        run: where steps are logged.
        clock: counts the time of evaluations.
        train_step: takes the step of a number, counted from 0.
        on_step: called with the record of each step, after it was logged.
        """
        self._config, self._data, self._keys, self._run = config, data, keys, run
        self._clock, self._train_step, self._on_step = clock, train_step, on_step
        self.name, self.steps = config.name, config.train.steps
        self._shown_accuracy, self._warned = dict[str, float](), set[str]()

    def prepare(self, state: RunState) -> None:
        """A fresh optimizer, the divided sources, and the reference where the objective has one."""
        take_divided_sources(state, self._data, self._config)
        task = reinforcement_task(self._config, state.data.shared_prefix)
        state.learner.begin(task)
        # The reference is a second copy of the trained parameters, so it is kept only where it is read.
        if "reference_logprob_BGC" in task.needs.logprobs:
            state.learner.keep_reference()

    def start(self, state: RunState) -> None:
        """Held-out results before the first step."""
        key_of = self._keys.step(0).evaluation
        with self._clock.stage("evaluation"):
            found = heldout_results(state.learner.policy(), state.data, self._config, key_of)
        _say_heldout("before training", found)
        # They go into the state, because the summary compares with them, perhaps after a resume.
        state.before = {name: result.to_json() for name, result in found.items()}
        self._run.log_metrics(0, {f"heldout/{name}": result.greedy_accuracy for name, result in found.items()})

    def step(self, state: RunState, number: int) -> str:
        """One step of the trainer, logged and checked.

        Args:
            state: the trainer's own, which its step changes.
            number: of the step, counted from 0.

        Raises:
            NonFiniteUpdatesError: it was one update too many that was not finite.
            EmptyUpdatesError: it was one too many that changed nothing. The newest checkpoint is from before it.
        """
        found = self._train_step(number)
        # Evaluation belongs to the record, so it happens before the step is logged.
        if found.number % self._config.evaluation.every_steps == 0:
            found = dataclasses.replace(found, heldout=self._evaluate_trained_sources(state, found))
        names = state.data.source_names
        self._run.log_samples(found.number, record.samples(found, self._config, names))
        self._run.log_metrics(found.number, record.metrics(found, self._config, names))
        if self._on_step is not None:
            self._on_step(found)
        # A run that is off-policy warns at every step, and one line of each kind above the bar is enough.
        for kind, warning in (found.warnings(self._config) | self._hacking(found.number)).items():
            if kind not in self._warned:
                again = "summary.json" if kind == "hacking" else "metrics.jsonl"
                tqdm.write(f"step {found.number}: {warning} (later ones: {again})")
                self._warned.add(kind)
        count_nonfinite(self, found.number, found.update, state)
        state.empty_updates = state.empty_updates + 1 if found.update.empty else 0
        if state.empty_updates == self._config.train.stop_after_empty_updates:
            raise EmptyUpdatesError(
                f"step {found.number}: {state.empty_updates} updates in a row changed nothing, which is"
                f" train.stop_after_empty_updates: {found.why_empty(self._config)}"
            )
        return record.progress(found, self._shown_accuracy)

    def summary(self, state: RunState, compilations: CompileCounter) -> dict[str, Any]:
        """What the run ended with; see `run_summary`.

        Args:
            state: after the last step.
            compilations: what was compiled so far.
        """
        return run_summary(self._config, state, self._keys, self._run.path, compilations, self._clock)

    def _hacking(self, number: int) -> dict[str, str]:
        """That the policy exploits its reward model, by what is logged so far; asked with each evaluation, until it
        does."""
        config = self._config
        is_due = number % config.evaluation.every_steps == 0 and number >= EARLIEST
        # The log is written by one process.
        if not (config.reward.model and is_due and processes.is_writer()) or "hacking" in self._warned:
            return {}
        found = reward_hacking(read_log(self._run.path / "metrics.jsonl"), gold_metric(config))
        return {} if found is None or found["warning"] is None else {"hacking": found["warning"]}

    def _evaluate_trained_sources(self, state: RunState, found: StepRecord) -> dict[str, Evaluation]:
        """Greedy held-out accuracy of the sources that the step trained on."""
        # Several training sources may be parts of one source of the configuration, whose prompts are held out once.
        drawn = np.unique(found.all.prompts.source_B)
        sources = sorted({state.data.heldout_of_source[int(index)] for index in drawn})
        key_of = self._keys.step(found.number).evaluation
        policy = state.learner.policy()
        with self._clock.stage("evaluation"):
            results = heldout_results(policy, state.data, self._config, key_of, samples=False, sources=sources)
        _say_heldout(f"step {found.number}", results)
        self._shown_accuracy = {f"heldout/{name}": result.greedy_accuracy for name, result in results.items()}
        return results


def _say_heldout(when: str, found: dict[str, Evaluation]) -> None:
    """A line above the bar, which a log file keeps too."""
    shares = ", ".join(f"{printable(name)} {result.greedy_accuracy:.3f}" for name, result in found.items())
    tqdm.write(f"{when}: held-out accuracy {shares}")
