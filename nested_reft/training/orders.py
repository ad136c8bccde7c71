"""Issuing orders ahead of need, and taking their results in the order of issue.

Orders are issued at points of the run that its steps alone decide: `Orders.next` keeps `search.lag` of them under way
beside the one whose result it returns. Sources, prompts, plan, key and weights are those of the moment of issue. So the
age of each batch is exact, and a run is the same whoever searches, and however fast.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nested_reft import curriculum
from nested_reft.training.config import Config
from nested_reft.training.keys import RunKeys
from nested_reft.training.run_state import RunState
from nested_reft.training.search_pool import Order, SearchPool
from nested_reft.types import Scored


@dataclass(frozen=True)
class SearchReport:
    """How searching went in one step.

    Attributes:
        waited_seconds: time that the learner waited for results, or sampled itself.
        drained_seconds: time that a checkpoint after the step before waited for all that was under way.
        period_seconds: time since the report before.
        under_way: batches that were ordered and not yet trained on.
        replaced: searchers that were lost and replaced since the process began.
        started: searchers that are ready or at work.
    """

    waited_seconds: float
    drained_seconds: float
    period_seconds: float
    under_way: int
    replaced: int
    started: int


class Orders:
    """The orders of a run's reinforcement."""

    def __init__(self, config: Config, keys: RunKeys, pool: SearchPool):
        """Args:
        config: of the run.
        keys: its random keys.
        pool: carries orders out.
        """
        self._config, self._keys, self._pool = config, keys, pool
        # The batches that a step orders have keys of their own, which count from 0 in each step.
        self._issued_in_step = 0
        self._waited, self._drained, self._reported = 0.0, 0.0, time.monotonic()

    def next(self, state: RunState, step: int) -> Scored:
        """The result of the oldest order; `search.lag` younger ones are under way when it returns.

        Args:
            state: of the run; its data position moves on with each order.
            step: number of the step that asks, counted from 0.

        Raises:
            TimeoutError: the result did not come in time.
            Exception: whatever a searcher raised.
        """
        while self._under_way(state) <= self._config.search.lag:
            order = self._order(state, step)
            with self._waiting():  # one that searches itself does it now
                self._pool.submit(order)
            # Only the pool holds the order, and lets its weights go when it has been carried out.
            del order
        if state.found_ahead:
            scored, *rest = state.found_ahead
            state.found_ahead = tuple(rest)
            return scored
        with self._waiting():
            return self._pool.take()

    def drain(self, state: RunState) -> None:
        """Waits for all that is under way and puts it into the state, where a checkpoint finds it.

        Searchers have nothing to do then until the next step. The last checkpoint of a run needs the results as well,
        because the run may be continued with more steps.

        Args:
            state: of the run.

        Raises:
            TimeoutError: a result did not come in time.
            Exception: whatever a searcher raised.
        """
        started = time.monotonic()
        # One by one, so that a wait that fails or is interrupted loses nothing that was taken before.
        while len(self._pool):
            state.found_ahead = (*state.found_ahead, self._pool.take())
        self._drained += time.monotonic() - started

    def end_step(self, state: RunState, step: int) -> SearchReport:
        """What searching took in a step; called before its update.

        Args:
            state: of the run.
            step: its number, counted from 0.
        """
        # Nobody holds weights that no further order gets, so that the update can take their buffers.
        if (step + 1) % self._config.search.sync_every == 0:
            state.searching = None
        now = time.monotonic()
        report = SearchReport(
            waited_seconds=self._waited,
            drained_seconds=self._drained,
            period_seconds=now - self._reported,
            under_way=self._under_way(state),
            replaced=self._pool.replaced,
            started=self._pool.started,
        )
        self._waited, self._drained, self._reported, self._issued_in_step = 0.0, 0.0, now, 0
        return report

    def _under_way(self, state: RunState) -> int:
        return len(state.found_ahead) + len(self._pool)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def _order(self, state: RunState, step: int) -> Order:
        """The next order, with all that is as it is now."""
        config = self._config
        keys = self._keys.step(step)
        key = keys.batch(self._issued_in_step)
        source_B = curriculum.choose(state.curriculum, config.curriculum, key.curriculum, config.data.prompts_per_batch)
        temperatures, ratios = config.search.temperatures, config.search.skip_ratios
        if state.searching is None:
            state.searching = state.learner.behavior_policy()
        order = Order(
            number=state.ordered,
            policy=state.searching,
            prompts=state.with_prefixes(state.next_prompts(source_B), key.reset, step),
            # All batches that a step orders share its plan, but for its size where that takes turns.
            plan=state.draw_plan(keys.plan, ratios[state.ordered % len(ratios)] if ratios else None),
            key=key.rollout,
            temperature=temperatures[state.ordered % len(temperatures)] if temperatures else None,
        )
        state.ordered, self._issued_in_step = state.ordered + 1, self._issued_in_step + 1
        return order
