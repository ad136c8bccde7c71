"""The phase that the others prepare: reinforcement learning from rollouts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from nested_reft.evaluation import Evaluation
from nested_reft.training import record
from nested_reft.training.phases import fresh_data, reinforcement_task
from nested_reft.training.record import StepRecord
from nested_reft.training.run_state import RunState
from nested_reft.training.setup import RunData

if TYPE_CHECKING:  # the trainer makes its phases
    from nested_reft.training.trainer import Trainer


class Reinforcement:
    """The phase that the others prepare: reinforcement learning from rollouts."""

    trains = True

    def __init__(self, trainer: Trainer, data: RunData):
        """Args:
        trainer: whose steps it runs and logs.
        data: the prompts, undivided.
        """
        self._trainer, self._undivided = trainer, data
        self.name, self.steps = trainer.config.name, trainer.config.train.steps
        self._shown_accuracy, self._warned = dict[str, float](), False

    def prepare(self, state: RunState) -> None:
        """A fresh optimizer, the divided sources, and the reference where the objective has one."""
        trainer, config = self._trainer, self._trainer.config
        task = reinforcement_task(config, trainer.data.shared_prefix)
        state.learner.begin(task)
        # The reference is a second copy of the trained parameters, so it is kept only where it is read.
        if "reference_logprob_BGC" in task.needs.logprobs:
            state.learner.keep_reference()
        trainer.data = fresh_data(state, config, self._undivided)

    def start(self, state: RunState) -> None:
        """Held-out results before the first step."""
        trainer = self._trainer
        # They go into the state, because the summary compares with them, perhaps after a resume.
        state.before = trainer.evaluate_all(0)
        trainer.run_directory.log_metrics(
            0, {f"heldout/{name}": result["greedy_accuracy"] for name, result in state.before.items()}
        )

    def step(self, state: RunState, number: int) -> str:
        """One step of the trainer, checked and logged.

        Args:
            state: the trainer's own, which its step changes.
            number: of the step, counted from 0.

        Raises:
            FloatingPointError: the update was not finite.
        """
        trainer, config = self._trainer, self._trainer.config
        found = trainer.step(number)
        # The check comes before anything is logged or saved.
        self._check_finite(found)
        # Evaluation belongs to the record, so it happens before the step is logged.
        if found.number % config.evaluation.every_steps == 0:
            found = dataclasses.replace(found, heldout=self._evaluate_trained_sources(found))
        trainer.run_directory.log_samples(found.number, record.samples(found))
        trainer.run_directory.log_metrics(found.number, record.metrics(found, config, trainer.data.source_names))
        if trainer.on_step is not None:
            trainer.on_step(found)
        warning = found.warning(config.train.ess_warning)
        # A run that is off-policy warns at every step, and one line above the bar is enough.
        if warning is not None and not self._warned:
            tqdm.write(f"step {found.number}: {warning} (later ones: metrics.jsonl)")
            self._warned = True
        return record.progress(found, self._shown_accuracy)

    def _evaluate_trained_sources(self, found: StepRecord) -> dict[str, Evaluation]:
        """Greedy held-out accuracy of the sources that the step trained on."""
        trainer = self._trainer
        # Several training sources may be parts of one source of the configuration, whose prompts are held out once.
        drawn = np.unique(found.all.prompts.source_B)
        sources = sorted({trainer.data.heldout_of_source[int(index)] for index in drawn})
        keys, names = trainer.keys.step(found.number), trainer.config.data.sources
        results = {names[index].name: trainer.evaluate(index, keys, samples=False) for index in sources}
        self._shown_accuracy = {f"heldout/{name}": result.greedy_accuracy for name, result in results.items()}
        return results

    def _check_finite(self, found: StepRecord) -> None:
        """Stops before a broken model replaces a good checkpoint."""
        update = found.update
        if not (np.isfinite(update.loss) and np.isfinite(update.gradient_norm)):
            raise FloatingPointError(
                f"step {found.number}: loss is {update.loss} and gradient_norm {update.gradient_norm};"
                f" the newest checkpoint in '{self._trainer.run_directory.path}' is from before."
                " Lower optimizer.learning_rate"
            )
