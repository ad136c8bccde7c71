"""The training loop.

    curriculum -> search: rollout(plan), rewards -> replay -> learn: signal, batch, loss, update
        ^                     ^                                                      |
        |                     +------------ nesting control (ESS / KL budget) <------+
        +------ |advantage| --+

`Trainer.step` reads like that line; every stage is one call on one typed value.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from nested_reft import curriculum, nesting_control, replay
from nested_reft.checkpoints import Checkpoints
from nested_reft.compilation import CompileCounter
from nested_reft.data.pipeline import PromptStream, batch_prompts
from nested_reft.divergence import measure_layer_divergence, texts_of
from nested_reft.evaluation import Evaluation, evaluate
from nested_reft.layer_skip import LayerPlan, draw_plan
from nested_reft.run_directory import RunDirectory
from nested_reft.sharding import replicate
from nested_reft.train import record
from nested_reft.train.keys import RunKeys, StepKeys
from nested_reft.train.learner import Learner
from nested_reft.train.phases import Phase, Split, WarmStart, first_checkpoint, fresh_data, reinforcement_task
from nested_reft.train.record import Remeasured, StepRecord
from nested_reft.train.run_state import RunState
from nested_reft.train.searcher import Searcher
from nested_reft.train.setup import Setup
from nested_reft.train.summary import run_summary
from nested_reft.types import Prompts, Scored

OnStep = Callable[[StepRecord], None]


class Trainer:
    """One run: its state, and the loop over phases and steps.

    Everything random follows from `config.train.seed` and the step number, so a run that resumes
    from a checkpoint continues as if it had not stopped. Used as a context manager, it waits for
    checkpoints in flight and closes the logs whatever ends the run.

    Attributes:
        state: everything that a resumed run needs.
        data: the prompts, divided once the split has been made.
    """

    def __init__(self, setup: Setup, run: RunDirectory, on_step: OnStep | None = None):
        """Args:
        setup: what `prepare` made of the configuration; it can be used again.
        run: where everything is written.
        on_step: called with the record of each training step, after it was logged.
        """
        self.config, self.run_directory, self.on_step = setup.config, run, on_step
        self.data, self.num_layers = setup.data, setup.policy.num_layers
        self._undivided, self._start, self._divergence_L = setup.data, setup.policy, setup.divergence_L
        self._opened = ExitStack()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Waits for checkpoints and closes the logs."""
        self._opened.close()

    def open(self, resume: bool = False) -> Trainer:
        """Makes the state of a new run, or takes over that of the run's newest checkpoint.

        Args:
            resume: continue instead of starting.

        Raises:
            ValueError: there is no checkpoint to continue from, or it is damaged or of another run.
        """
        config, setup_policy = self.config, self._start
        opened = self._opened
        self.compilations = CompileCounter()
        opened.callback(self.compilations.close)
        opened.callback(self.run_directory.close)
        directory = self.run_directory.path / "checkpoints"
        self.checkpoints = opened.enter_context(Checkpoints(directory, config.train.keep_checkpoints))
        key = replicate(jax.random.key(config.train.seed), setup_policy.mesh)
        self.keys = RunKeys(key)
        self.searcher = Searcher(config.rollout, config.reward, self.data.shared_prefix)
        self.phases: list[Phase] = [Reinforcement(self)]
        if config.data.split.kind != "none":
            self.phases.insert(0, Split(config, self._undivided, self.keys))
        if config.warm_start.steps:
            self.phases.insert(0, WarmStart(config, self._undivided, self.keys))
        self.state = RunState(
            learner=Learner(setup_policy, config.rollout.weights),
            stream=PromptStream(self.data.train_examples, config.train.seed),
            curriculum=curriculum.CurriculumState.start([len(e) for e in self.data.train_examples]),
            nesting=nesting_control.initial_state(config.nesting_control, config.nesting.num_skipped(self.num_layers)),
            divergence_L=self._divergence_L,
        )
        self.shown_accuracy, self._warned = dict[str, float](), False
        del self._start, setup_policy  # the learner holds what it needs; the start's buffers may be taken
        if resume:
            self._load()
        else:
            self.phases[0].prepare(self.state)
        return self

    def run(self) -> dict[str, Any]:
        """Trains to the last step of the last phase and returns the summary, which is also written.

        SIGINT or SIGTERM ends it after the step in progress, with a checkpoint.

        Raises:
            KeyboardInterrupt: it was asked to stop.
            FloatingPointError: an update was not finite; the last checkpoint is from before it.
            GenerationLimitError: dynamic sampling found too few mixed groups and was told to stop.
        """
        with self, _stop_requests() as stop_requested:
            for index in range(self.state.phase, len(self.phases)):
                if index > self.state.phase:
                    self.state.trained_before |= self.phases[index - 1].trains
                    self.state.phase, self.state.step = index, 0
                    self.phases[index].prepare(self.state)
                self._run_phase(self.phases[index], stop_requested)
            summary = run_summary(self)
            self.run_directory.write_summary(summary)
        return summary

    def step(self, number: int) -> StepRecord:
        """One training step: choose prompts, sample nested, score, and update the full model."""
        config, state, keys = self.config, self.state, self.keys.step(number)
        started, size, before = time.monotonic(), config.data.prompts_per_batch, state.curriculum
        plan = self.draw_plan(keys.plan)
        buffer, found = replay.Buffer(), list[Scored]()
        while not replay.ready(buffer, config.dynamic_sampling, size):
            key = keys.batch(len(found))
            source_B = curriculum.choose(state.curriculum, config.curriculum, key.curriculum, size)
            prompts = self.next_prompts(source_B)
            scored = self.searcher.search(state.learner.behavior_policy(), prompts, plan, key.rollout)
            state.curriculum = curriculum.observe(state.curriculum, config.curriculum, scored)
            buffer = replay.add(buffer, scored)
            found.append(scored)
        groups, buffer = replay.draw(buffer, config.dynamic_sampling, size)
        batch = state.learner.batch(groups)
        update = state.learner.update(batch)
        state.nesting = nesting_control.update(state.nesting, config.nesting_control, update.health)
        remeasured = self._remeasure(number, found[0])
        return StepRecord(
            number=number + 1,
            plan=plan,
            found=tuple(found),
            groups=groups,
            update=update,
            curriculum_before=before,
            curriculum_after=state.curriculum,
            nesting=state.nesting,
            remeasured=remeasured,
            seconds=time.monotonic() - started,
            compilations=self.compilations.count,
        )

    def draw_plan(self, key: jax.Array) -> LayerPlan:
        """The layers of the next batch's nested policy."""
        num_skipped = nesting_control.choose(self.state.nesting)
        return draw_plan(key, self.config.nesting, self.num_layers, self.state.divergence_L, num_skipped)

    def next_prompts(self, source_B: np.ndarray) -> Prompts:
        """The next prompt of each source named, as one batch."""
        encoded = [self.state.stream.next(int(source)) for source in source_B]
        return batch_prompts(encoded, source_B.tolist(), self.data.prompt_size)

    def evaluate(self, source: int, keys: StepKeys, samples: bool) -> Evaluation:
        """Held-out results of one source of the configuration; the curriculum does not see them."""
        config = self.config
        return evaluate(
            self.state.learner.policy(),
            self.data.heldout_examples[source],
            config.reward,
            config.evaluation,
            keys.evaluation,
            samples,
        )

    def evaluate_all(self, step: int) -> dict[str, Any]:
        """Held-out results of every source, samples included, as JSON-able values by name."""
        sources = enumerate(tqdm(self.config.data.sources, desc="held-out evaluation", unit="source", leave=False))
        keys = self.keys.step(step)
        return {source.name: self.evaluate(index, keys, samples=True).to_json() for index, source in sources}

    def save(self) -> None:
        """Starts writing a checkpoint of the state as it is."""
        self.state.save(self.checkpoints, first_checkpoint(self.phases, self.state.phase) + self.state.step)

    def _run_phase(self, phase: Phase, stop_requested: Callable[[], bool]) -> None:
        state, train = self.state, self.config.train
        started = time.monotonic() - state.seconds
        if state.step == 0:
            phase.start(state)
            state.seconds = time.monotonic() - started
            self.save()
        steps = range(state.step, phase.steps)
        bar = tqdm(steps, initial=state.step, total=phase.steps, unit="step", desc=phase.name)
        for number in bar:
            bar.set_postfix_str(phase.step(state, number))
            state.step, state.seconds = number + 1, time.monotonic() - started
            ends = state.step == phase.steps
            stop = stop_requested()
            if ends or stop or state.step % train.checkpoint_every == 0:
                self.save()
            if stop and not (ends and phase is self.phases[-1]):
                raise KeyboardInterrupt

    def _remeasure(self, number: int, scored: Scored) -> Remeasured | None:
        """Measures every layer anew where it is time; the next step draws by the new divergences."""
        nesting = self.config.nesting
        if not nesting.remeasure_every or number % nesting.remeasure_every:
            return None
        started = time.monotonic()
        texts = texts_of(scored.rollouts, nesting.remeasure_prompts, nesting.remeasure_completions)
        policy = self.state.learner.policy()
        self.state.divergence_L = measure_layer_divergence(policy.model, texts, policy.sampling.temperature)
        return Remeasured(self.state.divergence_L, time.monotonic() - started)

    def _load(self) -> None:
        _, host = self.checkpoints.restore_host()
        state, index = self.state, host["phase"]
        state.phase, state.division = index, host["division"]
        self.phases[index].prepare(state)
        state.load(self.checkpoints, host)
        is_last = index == len(self.phases) - 1
        # Log lines belong to the last phase; a run that has not reached it has none to keep.
        self.run_directory.drop_after(state.step if is_last else -1)


class Reinforcement:
    """The phase that the others prepare: reinforcement learning from rollouts."""

    trains = True

    def __init__(self, trainer: Trainer):
        """Args:
        trainer: whose steps it runs and logs.
        """
        self._trainer, self.name, self.steps = trainer, trainer.config.name, trainer.config.train.steps

    def prepare(self, state: RunState) -> None:
        """A fresh optimizer, the divided sources, and the reference where the objective has one."""
        trainer, config = self._trainer, self._trainer.config
        task = reinforcement_task(config, trainer.data.shared_prefix)
        state.learner.begin(task)
        if "reference_logprob_BGC" in task.needs.logprobs:
            state.learner.keep_reference()
        trainer.data = fresh_data(state, config, trainer._undivided)

    def start(self, state: RunState) -> None:
        """Held-out results before the first step."""
        trainer = self._trainer
        state.before = trainer.evaluate_all(0)
        trainer.run_directory.log_metrics(
            0, {f"heldout/{name}": result["greedy_accuracy"] for name, result in state.before.items()}
        )

    def step(self, state: RunState, number: int) -> str:
        """One step of the trainer, checked and logged."""
        trainer, config = self._trainer, self._trainer.config
        found = trainer.step(number)
        self._check_finite(found)
        if found.number % config.evaluation.every_steps == 0:
            found = dataclasses.replace(found, heldout=self._evaluate_trained_sources(found))
        trainer.run_directory.log_samples(found.number, record.samples(found, trainer.num_layers))
        trainer.run_directory.log_metrics(found.number, record.metrics(found, config, trainer.data.source_names))
        if trainer.on_step is not None:
            trainer.on_step(found)
        warning = found.warning(config.train.ess_warning)
        if warning is not None and not trainer._warned:
            tqdm.write(f"step {found.number}: {warning} (later ones: metrics.jsonl)")
            trainer._warned = True
        return record.progress(found, trainer.shown_accuracy)

    def _evaluate_trained_sources(self, found: StepRecord) -> dict[str, Evaluation]:
        """Greedy held-out accuracy of the sources that the step trained on."""
        trainer = self._trainer
        drawn = np.unique(found.all.prompts.source_B)
        sources = sorted({trainer.data.heldout_of_source[int(index)] for index in drawn})
        keys, names = trainer.keys.step(found.number), trainer.config.data.sources
        results = {names[index].name: trainer.evaluate(index, keys, samples=False) for index in sources}
        trainer.shown_accuracy = {f"heldout/{name}": result.greedy_accuracy for name, result in results.items()}
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


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one acts at once.

    The handler only sets a flag: whatever it interrupts (a log line, a checkpoint) goes on.
    """
    requested = False

    def request(number: int, _frame: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
