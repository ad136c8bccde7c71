"""The training loop.

    curriculum -> dataset reset -> orders -> search: rollout(plan), rewards -> replay -> learn: batch, loss, update
        ^              ^                             ^                                                |
        |              |                             +----- renew: nesting control, bridges, ... <----+
        +- |advantage| +- accuracy ------------------+

`Trainer.step` reads like that line; every stage is one call on one typed value.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from nested_reft import curriculum, dataset_reset, kl_control, processes
from nested_reft.checkpoints import CheckpointError, Checkpoints
from nested_reft.compilation import CompileCounter
from nested_reft.heartbeat import beats
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses.registry import OfflineConfig
from nested_reft.plan_price import plan_price
from nested_reft.replay import GenerationLimitError
from nested_reft.run_directory import RunDirectory
from nested_reft.training import group_supply
from nested_reft.training.agreement import agree, digest, digests_of, highest
from nested_reft.training.clock import Clock, advance
from nested_reft.training.failed_update import keep_failed_update
from nested_reft.training.interrupts import asked_for, finishing, stop_if, stop_requests
from nested_reft.training.keys import RunKeys
from nested_reft.training.nested_policy import renew
from nested_reft.training.offline import Offline
from nested_reft.training.orders import Orders
from nested_reft.training.phases import (
    NonFiniteUpdatesError,
    Phase,
    check_finite_state,
    earlier_phases,
    first_checkpoint,
)
from nested_reft.training.preemption import leave_unsaved, save_limit
from nested_reft.training.pricing import decode_step
from nested_reft.training.record import StepRecord
from nested_reft.training.reinforcement import EmptyUpdatesError, OnStep, Reinforcement
from nested_reft.training.run_state import initial_run_state
from nested_reft.training.search_pool import CLOSE_SECONDS, make_pool
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import Setup
from nested_reft.training.watchdog import Watchdog
from nested_reft.types import Scored

logger = logging.getLogger(__name__)
# Every process of a run raises these in the same step, so that they can end in order. A second Ctrl-C is the exception.
ENDS_OF_ALL = (KeyboardInterrupt, FloatingPointError, EmptyUpdatesError, GenerationLimitError)


class Trainer:
    """One run: its state, and the loop over phases and steps.

    Everything random follows from `config.train.seed` and the step number, so a run that resumes
    from a checkpoint continues as if it had not stopped. Used as a context manager, it waits for
    checkpoints in flight and closes the logs whatever ends the run.

    Attributes:
        state: everything that a resumed run needs.
    """

    def __init__(
        self,
        setup: Setup,
        run: RunDirectory,
        on_step: OnStep | None = None,
        on_stall: Callable[[str], None] | None = None,
    ):
        """Args:
        setup: what `prepare` made of the configuration; it can be used again.
        run: where everything is written.
        on_step: called with the record of each training step, after it was logged.
        on_stall: called with words where nothing goes on for `train.stall_seconds`, from another thread. By default
            they are a warning.
        """
        self.config, self.run_directory, self._on_step, self._on_stall = setup.config, run, on_step, on_stall
        # It is kept until `open` only, because it holds the buffers that training takes over.
        self._setup: Setup | None = setup
        self._opened, self._searching = ExitStack(), ExitStack()
        self._digests: dict[str, int] = {}

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # After an error of one process the others are not there any more, and what needs them would never end.
        if kind is not None and not issubclass(kind, ENDS_OF_ALL) and processes.count() > 1:
            self.run_directory.close()
            return
        self.close()

    def close(self) -> None:
        """Waits for checkpoints and whatever else is under way, and closes the logs.

        A second signal ends the wait for searchers, and no other: what they find is not needed any more.
        """
        try:
            self._searching.close()
        finally:
            with finishing():
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

        SIGINT, SIGTERM or SIGHUP ends it after the step in progress, with a checkpoint. SIGTERM sets a time limit,
        `train.save_seconds`: when it is over, the process ends at once with exit code 75, and the checkpoint before
        holds.

        Raises:
            KeyboardInterrupt: it was asked to stop; `Preempted` by SIGTERM alone.
            FloatingPointError: too many updates in a row, or a parameter, were not finite; the last checkpoint is from
                before.
            GenerationLimitError: dynamic sampling found too few mixed groups and was told to stop.
            EmptyUpdatesError: as many updates in a row changed nothing as the configuration allows.
            SearchError: searchers cannot start, or too many of them were lost.
            OSError: a checkpoint or a log could not be written, or a searcher took too long (TimeoutError).
        """
        # The requests are the outer block, because closing waits for a checkpoint that no signal may drop.
        seconds, run = self.config.train.save_seconds, self.run_directory
        limit = save_limit(seconds, lambda: leave_unsaved(run.address, run.newest_checkpoint, seconds))
        with stop_requests() as stop_requested, limit, self._watchdog(), self:
            self.run_earlier_phases(stop_requested)
            self._run_phase(self.phases[-1], stop_requested)
            # The summary still generates, so it comes before the context closes everything.
            summary = self._last.summary(self.state, self.compilations)
            # A run whose last checkpoint is not on the disk has not ended.
            self.checkpoints.wait()
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
            RuntimeError: the run is still in a phase before reinforcement, which `run` would go through, or it has no
                reinforcement.
        """
        if isinstance(self._last, Offline):
            raise RuntimeError(f"loss.kind is '{self.config.loss.kind}', which samples nothing; call run")
        if self.state.phase < len(self.phases) - 1:
            name = self.phases[self.state.phase].name
            raise RuntimeError(f"the run is in its phase '{name}', and this is a step of reinforcement; call run")
        config, state, keys, found = self.config, self.state, self.keys.step(number), list[Scored]()
        started, version, before = time.monotonic(), state.learner.version, state.curriculum
        state.buffer = group_supply.without_stale(state.buffer, config, version)
        while not group_supply.ready(state.buffer, config, len(found)):
            # Sources, prompts, plan, key and weights are those of the step that issued the order.
            scored = self.orders.next(state, number)
            # The curriculum sees every batch, also the groups that dynamic sampling passes over.
            state.curriculum = curriculum.update(state.curriculum, config.curriculum, scored)
            state.reset = dataset_reset.update(state.reset, config.reset, scored)
            state.buffer = group_supply.add(state.buffer, config, scored)
            found.append(scored)
        groups, state.buffer = group_supply.draw(state.buffer, config, keys.replay)
        search = self.orders.end_step(state, number)
        batch = state.learner.batch(groups, keys.acceptance, state.mix.share, state.kl.coefficient)
        update = state.learner.update(batch, keys.mini_batches)
        state.kl = kl_control.update(state.kl, config.loss, update.parts.get("completion_kl"))
        self._digests = digests_of(groups, update.loss)
        # The next plan is drawn after this, so a budget that was broken changes it at once.
        renewed = renew(state, number, found, update.health, self.keys.step(number + 1).plan)
        plan = LayerPlan.of_parts(np.asarray(found[0].rollouts.part_BGL[0, 0]))
        return StepRecord(
            # Records count from 1, since 0 in the logs is the evaluation before training.
            number=number + 1,
            plan=plan,
            price=plan_price(plan.shape, self.decode_step),
            found=tuple(found),
            groups=groups,
            version=version,
            stored=group_supply.summary(state.buffer, version),
            update=update,
            curriculum_before=before,
            curriculum_after=state.curriculum,
            nesting=state.nesting,
            mix=state.mix,
            reset=state.reset,
            kl=state.kl,
            renewed=renewed,
            search=search,
            seconds=time.monotonic() - started,
            compilations=self.compilations.count,
        )

    def save(self) -> None:
        """Starts writing a checkpoint of the state as it is.

        Raises:
            FloatingPointError: a parameter is not finite, so that every resumed run would begin with it.
            CheckpointError: this checkpoint or the one before could not be written, or the one before not copied.
        """
        state = self.state
        # Batches under way are waited for, so that a resumed run begins with them and needs no old weights. A second
        # signal ends this wait.
        self.orders.drain(state)
        with finishing(), self.clock.stage("saving"):
            check_finite_state(self.phases[state.phase], state)
            number = first_checkpoint(self.phases, state.phase) + state.step
            # A checkpoint must not be removed here before it is copied to where the run belongs.
            self.run_directory.wait_copied()
            state.save(self.checkpoints, number, self.run_directory.marks())
            self.run_directory.copy(number)

    def _watchdog(self) -> Watchdog:
        """Watches what goes on between the opening of a run and the end of its closing."""
        clock, state = self.clock, self.state
        return Watchdog(
            self.config.train.stall_seconds,
            self.run_directory.path,
            # Stages that take long give signs of their own.
            signs=lambda: (clock.changes, beats()),
            where=lambda: f"{self.phases[state.phase].name}, step {state.step + 1}, stage '{clock.now_in}'",
            on_stall=self._on_stall,
        )

    def _make(self, setup: Setup) -> None:
        """Everything that has a life while the run is open, and the state of a run that has not begun."""
        # Each part is entered as soon as it is made, so that a failure later on closes those before it.
        config, opened, run = self.config, self._opened, self.run_directory
        self.compilations = CompileCounter()
        self.clock = Clock(lambda: self.compilations.seconds)
        opened.callback(self.compilations.close)
        opened.callback(run.close)
        opened.callback(self._wait_for_devices)
        self._exchange = run.exchange()
        self.checkpoints = opened.enter_context(
            Checkpoints(run.path / "checkpoints", config.train.keep_checkpoints, exchange=self._exchange)
        )
        self.keys = RunKeys(jax.random.key(config.train.seed))
        self.decode_step = decode_step(setup)
        self.searcher = Searcher(config.rollout, config.reward, setup.data.shared_prefix, config.measures_mismatch)
        # Closed before the devices are waited for, because searchers use them.
        self.pool = self._searching.enter_context(closing(make_pool(setup, self.searcher)))
        self.orders = Orders(config, self.keys, self.pool)
        self.state = initial_run_state(setup)
        self._last = (
            Offline(config, setup.data, self.keys, run, self.clock)
            if isinstance(config.loss, OfflineConfig)
            else Reinforcement(config, setup.data, self.keys, run, self.clock, self.step, self._on_step)
        )
        self.phases = [*earlier_phases(config, setup.data, self.keys), self._last]

    def _wait_for_devices(self) -> None:
        """A process must not end while devices still work for it, but for a searcher that may never come back."""
        arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
        left = getattr(getattr(self, "pool", None), "left", ())  # it may be that no pool could be made
        if not left:
            jax.block_until_ready(arrays)
            return
        # JAX waits without a limit.
        waiting = threading.Thread(target=jax.block_until_ready, args=(arrays,), daemon=True)
        waiting.start()
        waiting.join(CLOSE_SECONDS)
        if waiting.is_alive():
            logger.warning("devices still work, perhaps for %s; the run ends all the same", ", ".join(left))

    def _load(self) -> None:
        run = self.run_directory
        processes.agreed(run.check_logs)
        marks = self.state.load(self.checkpoints, prepare=lambda state: self.phases[state.phase].prepare(state))
        # Everything has been checked and read, so from here on files may change.
        is_last = self.state.phase == len(self.phases) - 1
        # Log lines belong to the last phase; a run that has not reached it has none to keep.
        processes.agreed(lambda: run.continue_from(self.state.step if is_last else -1, marks))

    def _run_phase(self, phase: Phase, stop_requested: Callable[[], bool]) -> None:
        state, train = self.state, self.config.train
        # A resumed run counts on from the time that the checkpoint holds.
        started = time.monotonic() - state.seconds
        # The first checkpoint of a phase holds what `start` measured, so a resumed run does not measure it again.
        if not state.started:
            stop_if(highest(asked_for(stop_requested())))
            phase.start(state)
            state.started, state.seconds = True, time.monotonic() - started
            self.save()
        stop_if(highest(asked_for(stop_requested())))
        first, is_due = state.step, False
        with tqdm(initial=first, total=phase.steps, unit="step", desc=phase.name) as bar:
            bar.set_postfix_str("compiling")
            for number in range(first, phase.steps):
                # In phases that search nothing, nobody else hears of a searcher that cannot start.
                self.pool.check()
                with self.clock.stage("training" if phase is self.phases[-1] else phase.name):
                    shown = self._step_of(phase, number)
                advance(bar, shown, timed=number > first)
                state.step, state.seconds = number + 1, time.monotonic() - started
                # The request is read once, because it may come between the two uses below.
                stop = self._agreed_stop(phase, asked_for(stop_requested()), shown)
                is_due |= state.step % train.checkpoint_every == 0
                # A model whose updates fail at present may have gone wrong before. Its checkpoint would take the place
                # of one from before that, so it waits.
                if stop or state.step == phase.steps or (is_due and not state.nonfinite_in_a_row):
                    self.save()
                    is_due = False
                stop_if(stop)

    def _agreed_stop(self, phase: Phase, stop: int, shown: str) -> int:
        """What any process was asked for, as `asked_for` says it; ends a step on all of them.

        Raises:
            CheckpointError: a checkpoint could not be written, by this process or another.
            DivergedError: processes hold different values.
        """
        error = None
        try:
            self.checkpoints.check()
            self.run_directory.check_copied()
        except CheckpointError as found:
            error = found
        # A step of reinforcement has left its digests. What others show of theirs says it all.
        digests = self._digests or {"progress": digest(np.frombuffer(shown.encode(), np.uint8))}
        step = f"{phase.name}, step {self.state.step}"
        stop, failed = agree(step, stop, error is not None, digests | {"updates": self.state.learner.version})
        self._digests = {}
        if failed is not None:
            raise error or CheckpointError(f"process {failed} could not write its part of a checkpoint")
        return stop

    def _step_of(self, phase: Phase, number: int) -> str:
        """One step of a phase. Where it ends the run for its updates, the last of them is kept."""
        try:
            return phase.step(self.state, number)
        except NonFiniteUpdatesError as error:
            try:
                path = keep_failed_update(self.run_directory.path, self.state, self._exchange)
                self.run_directory.copy()
                run = self.run_directory.address
                kept = f"The last of them is kept in '{path}'; to repeat it: nested-reft replay-batch {run}"
            except OSError as failure:
                kept = f"The last of them could not be kept: {failure}"
            raise NonFiniteUpdatesError(f"{error}. {kept}") from None
