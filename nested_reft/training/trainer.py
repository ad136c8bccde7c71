"""The training loop.

    curriculum -> search: rollout(plan), rewards -> replay -> learn: signal, batch, loss, update
        ^                     ^                                                      |
        |                     +------------ nesting control (ESS / KL budget) <------+
        +------ |advantage| --+

`Trainer.step` reads like that line; every stage is one call on one typed value.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from nested_reft import curriculum, nesting_control, replay
from nested_reft.checkpoints import Checkpoints
from nested_reft.compilation import CompileCounter
from nested_reft.data.pipeline import batch_prompts
from nested_reft.divergence import measure_layer_divergence, texts_of
from nested_reft.evaluation import Evaluation, evaluate_examples
from nested_reft.layer_skip import LayerPlan, draw_plan
from nested_reft.run_directory import RunDirectory
from nested_reft.sharding import replicate
from nested_reft.training.interrupts import stop_requests
from nested_reft.training.keys import RunKeys, StepKeys
from nested_reft.training.phases import REINFORCEMENT, Phase, Split, WarmStart, first_checkpoint, phase_steps
from nested_reft.training.record import Remeasured, StepRecord
from nested_reft.training.reinforcement import Reinforcement
from nested_reft.training.run_state import initial_run_state
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import Setup
from nested_reft.training.summary import run_summary
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
        # It is kept until `open` only, because it holds the buffers that training takes over.
        self._setup: Setup | None = setup
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
            RuntimeError: it was called before.

        Returns:
            The trainer itself, ready for `run`.
        """
        # From here on the trainer does not hold the setup any more.
        setup, self._setup = self._setup, None
        if setup is None:
            raise RuntimeError("Trainer.open was called twice; make another trainer")
        try:
            self._make(setup)
            del setup  # the learner holds what it needs of it, and may take over the start's buffers
            self._load() if resume else self.phases[0].prepare(self.state)
        # An interrupt must close the logs as well, so errors of every kind are caught.
        except BaseException:
            self.close()
            raise
        return self

    def run(self) -> dict[str, Any]:
        """Trains to the last step of the last phase and returns the summary, which is also written.

        SIGINT or SIGTERM ends it after the step in progress, with a checkpoint.

        Raises:
            KeyboardInterrupt: it was asked to stop.
            FloatingPointError: an update was not finite; the last checkpoint is from before it.
            GenerationLimitError: dynamic sampling found too few mixed groups and was told to stop.
        """
        with self, stop_requests() as stop_requested:
            self.run_earlier_phases(stop_requested)
            self._run_phase(self.phases[-1], stop_requested)
            # The summary still generates, so it comes before the context closes everything.
            summary = run_summary(self)
            self.run_directory.write_summary(summary)
        return summary

    def run_earlier_phases(self, stop_requested: Callable[[], bool] = lambda: False) -> Trainer:
        """Runs what comes before reinforcement, so that `step` can be called.

        `run` does this itself. It is for callers that take the steps of reinforcement one by one.

        Args:
            stop_requested: whether to stop after the step in progress.

        Raises:
            KeyboardInterrupt: it was asked to stop.

        Returns:
            The trainer itself.
        """
        state = self.state
        # The phase that a run starts or resumes in has been prepared by `open`; the later ones begin here.
        for index in range(state.phase + 1, len(self.phases)):
            earlier = self.phases[index - 1]
            self._run_phase(earlier, stop_requested)
            state.trained_before |= earlier.trains
            state.phase, state.step, state.started = index, 0, False
            self.phases[index].prepare(state)
        return self

    def step(self, number: int) -> StepRecord:
        """One training step: choose prompts, sample nested, score, and update the full model.

        Raises:
            RuntimeError: the run is still in a phase before reinforcement, which `run` would go through.
        """
        if self.state.phase < len(self.phases) - 1:
            name = self.phases[self.state.phase].name
            raise RuntimeError(f"the run is in its phase '{name}', and this is a step of reinforcement; call run")
        config, state, keys = self.config, self.state, self.keys.step(number)
        started, size, before = time.monotonic(), config.data.prompts_per_batch, state.curriculum
        # One plan serves all generation batches of the step, so one size of the nested model is compiled.
        plan = self.draw_plan(keys.plan)
        buffer, found = replay.Buffer(), list[Scored]()
        while not replay.ready(buffer, config.dynamic_sampling, size):
            key = keys.batch(len(found))
            source_B = curriculum.choose(state.curriculum, config.curriculum, key.curriculum, size)
            prompts = self.next_prompts(source_B)
            scored = self.searcher.search(state.learner.behavior_policy(), prompts, plan, key.rollout)
            # The curriculum sees every batch, also the groups that dynamic sampling passes over.
            state.curriculum = curriculum.observe(state.curriculum, config.curriculum, scored)
            buffer = replay.add(buffer, scored)
            found.append(scored)
        groups, buffer = replay.draw(buffer, config.dynamic_sampling, size)
        batch = state.learner.batch(groups)
        update = state.learner.update(batch)
        # The plan of the next step is drawn after this, so a budget that was broken changes it at once.
        state.nesting = nesting_control.update(state.nesting, config.nesting_control, update.health)
        # The first batch is measured, because every step has one.
        remeasured = self._remeasure(number, found[0])
        return StepRecord(
            # Records count from 1, since 0 in the logs is the evaluation before training.
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
        nesting = self.state.nesting
        return draw_plan(key, self.config.nesting, self.num_layers, self.state.divergence_L, nesting.num_skipped)

    def next_prompts(self, source_B: np.ndarray) -> Prompts:
        """The next prompt of each source named, as one batch.

        Args:
            source_B: indices of training sources.
        """
        encoded = [self.state.stream.next(int(source)) for source in source_B]
        return batch_prompts(encoded, source_B.tolist(), self.data.prompt_size)

    def evaluate(self, source: int, keys: StepKeys, samples: bool) -> Evaluation:
        """Held-out results of one source of the configuration; the curriculum does not see them.

        Args:
            source: index among the configuration's sources, not among the training sources.
            keys: of the step that comes after the evaluation.
            samples: also measure pass@k.
        """
        config = self.config
        return evaluate_examples(
            self.state.learner.policy(),
            self.data.heldout_examples[source],
            config.reward,
            config.evaluation,
            keys.evaluation(source),
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

    def _make(self, setup: Setup) -> None:
        """Everything that has a life while the run is open, and the state of a run that has not begun."""
        # Each part is entered as soon as it is made, so that a failure later on closes those before it.
        config, opened = self.config, self._opened
        self.compilations = CompileCounter()
        opened.callback(self.compilations.close)
        opened.callback(self.run_directory.close)
        directory = self.run_directory.path / "checkpoints"
        self.checkpoints = opened.enter_context(Checkpoints(directory, config.train.keep_checkpoints))
        self.keys = RunKeys(replicate(jax.random.key(config.train.seed), setup.policy.mesh))
        self.searcher = Searcher(config.rollout, config.reward, setup.data.shared_prefix)
        self.state = initial_run_state(setup)
        # The order is fixed: pass rates for the split are those of the policy after its warm start.
        made: dict[str, Callable[[], Phase]] = {
            WarmStart.name: lambda: WarmStart(config, setup.data, self.keys),
            Split.name: lambda: Split(config, setup.data, self.keys),
            REINFORCEMENT: lambda: Reinforcement(self, setup.data),
        }
        self.phases = [made[name]() for name in phase_steps(config)]

    def _run_phase(self, phase: Phase, stop_requested: Callable[[], bool]) -> None:
        state, train = self.state, self.config.train
        # A resumed run counts on from the time that the checkpoint holds.
        started = time.monotonic() - state.seconds
        # The first checkpoint of a phase holds what `start` measured, so a resumed run does not measure it again.
        if not state.started:
            phase.start(state)
            state.started, state.seconds = True, time.monotonic() - started
            self.save()
        steps = range(state.step, phase.steps)
        bar = tqdm(steps, initial=state.step, total=phase.steps, unit="step", desc=phase.name)
        for number in bar:
            bar.set_postfix_str(phase.step(state, number))
            state.step, state.seconds = number + 1, time.monotonic() - started
            ends = state.step == phase.steps
            # The request is read once, because it may come between the two uses below.
            stop = stop_requested()
            if ends or stop or state.step % train.checkpoint_every == 0:
                self.save()
            # A run whose last step is done only has its summary left, and finishes.
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
        # The phase makes fresh arrays first, because loading needs their shapes and placement.
        self.phases[index].prepare(state)
        state.load(self.checkpoints, host)
        is_last = index == len(self.phases) - 1
        # Log lines belong to the last phase; a run that has not reached it has none to keep.
        self.run_directory.drop_after(state.step if is_last else -1)
