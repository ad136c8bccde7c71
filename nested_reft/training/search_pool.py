"""Where orders are carried out: by the learner itself, or by searchers that work beside it.

An order is everything that decides what a search finds. So it may be carried out anywhere, and again where a searcher
was lost. A pool gives results in the order of issue and never in that of completion: short answers have no advantage,
and a run does not depend on the number, the speed or the death of searchers.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from nested_reft.heartbeat import beat
from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import MeshConfig, mesh_of, replicate
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import Setup
from nested_reft.types import Prompts, Scored

logger = logging.getLogger(__name__)
WAIT_SECONDS = 10.0  # between two signs that a result is waited for
CLOSE_SECONDS = 10.0  # that a pool waits for its searchers when a run ends


@dataclass(frozen=True, eq=False)
class Order:
    """What a searcher is asked to find.

    Attributes:
        number: counts the orders of the run; results come in this order.
        policy: what samples.
        prompts: what is asked.
        plan: the layers of the nested policy.
        key: PRNG key of the completions.
        temperature: at which they are sampled; None is the policy's own.
    """

    number: int
    policy: Policy
    prompts: Prompts
    plan: LayerPlan
    key: jax.Array
    temperature: float | None = None


class SearcherLost(RuntimeError):
    """A searcher is gone, with what it was searching; another one can carry the order out."""


class SearchError(RuntimeError):
    """Searching cannot go on, though nothing of this run is wrong: it can continue once the searchers are mended."""


@runtime_checkable
class SearchPool(Protocol):
    """Whoever carries orders out.

    Attributes:
        replaced: searchers that were lost and replaced so far.
        left: searchers that had not ended when the pool was closed.
    """

    replaced: int
    left: Sequence[str]

    @property
    def started(self) -> int:
        """Searchers that are ready or at work."""
        ...

    def __len__(self) -> int:
        """Orders that were submitted and whose results were not taken."""
        ...

    def submit(self, order: Order) -> None:
        """Accepts an order, whose number is larger than those before; does not wait for it where others search.

        Raises:
            Exception: whatever a searcher raised before.
        """
        ...

    def check(self) -> None:
        """Does nothing, unless a searcher has failed while nobody waited for it.

        Raises:
            Exception: whatever it raised.
        """
        ...

    def take(self) -> Scored:
        """The result of the oldest order that was not taken, waiting for it if need be.

        Raises:
            TimeoutError: it took longer than `search.timeout_seconds`.
            SearchError: too many searchers were lost.
            Exception: whatever a searcher raised.
        """
        ...

    def close(self) -> None:
        """Ends all searchers; what they were searching is dropped. Closing it again does nothing."""
        ...


class InlinePool:
    """The learner's own thread searches, as soon as an order comes, so that old weights need not be kept."""

    replaced, started = 0, 1
    left: Sequence[str] = ()

    def __init__(self, searcher: Searcher):
        """Args:
        searcher: what searches.
        """
        self._searcher, self._found = searcher, deque[Scored]()

    def __len__(self) -> int:
        return len(self._found)

    def submit(self, order: Order) -> None:
        """Searches."""
        policy = at_temperature(order.policy, order.temperature)
        self._found.append(self._searcher.search(policy, order.prompts, order.plan, order.key))

    def take(self) -> Scored:
        """The oldest result."""
        return self._found.popleft()

    def check(self) -> None:
        """Does nothing: what the learner's thread raises is heard at once."""

    def close(self) -> None:
        """Drops all results."""
        self._found.clear()


@runtime_checkable
class Site(Protocol):
    """One place where a searcher works: devices of this process, or another process."""

    def search(self, work: Any) -> Scored:
        """Carries an order out.

        Args:
            work: the order, in the form in which its pool gives it.

        Raises:
            SearcherLost: the searcher is gone; another site can carry the order out.
        """
        ...

    def close(self) -> None:
        """Gives up the place."""
        ...


OpenSite = Callable[[int, threading.Event], Site]
"""From the index of a searcher, and an event that is set when its pool closes, to its place."""


class ThreadedPool:
    """One thread for each searcher, which takes the oldest order that waits.

    What a searcher raises ends the run: `take` raises it. A searcher that is lost gives its order back and is replaced.

    Attributes:
        sites: places that have been opened, where searchers work.
        left: searchers that had not ended when the pool was closed.
    """

    def __init__(self, open_site: OpenSite, config: SearchConfig):
        """Args:
        open_site: opens the place of a searcher.
        config: how many searchers, and the limits.
        """
        self._open_site, self._config = open_site, config
        self.replaced, self.sites = 0, set[Site]()
        self.left: Sequence[str] = ()
        self._submitted, self._waiting = deque[int](), list[tuple[int, Any]]()
        self._found = dict[int, Scored]()
        self._error: BaseException | None = None
        # It guards all of the above.
        self._changed, self._closed = threading.Condition(), threading.Event()
        # The orders that are being carried out, by the names of the threads, each of which writes its own.
        self._at = dict[str, int]()
        # A daemon does not keep the process alive if its searcher never comes back.
        self._threads = [
            threading.Thread(target=self._work, args=(index,), name=f"searcher-{index}", daemon=True)
            for index in range(config.searchers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def started(self) -> int:
        """Searchers that are ready or at work; others are starting, or have failed."""
        return len(self.sites)

    def __len__(self) -> int:
        return len(self._submitted)

    def submit(self, order: Order) -> None:
        """Gives an order to the next searcher that is free."""
        self._give(order.number, order)

    def _give(self, number: int, work: Any) -> None:
        """Gives an order, in the form that the sites of this pool take, to the next searcher that is free."""
        self.check()
        if len(self) > self._config.lag:
            raise RuntimeError(
                f"{len(self)} batches were ordered and not taken, and search.lag is {self._config.lag}: take one before"
                " another is ordered"
            )
        with self._changed:
            self._submitted.append(number)
            heapq.heappush(self._waiting, (number, work))
            self._changed.notify_all()

    def take(self) -> Scored:
        """The result of the oldest order; waits until it is there."""
        number, limit = self._submitted[0], self._config.timeout_seconds
        deadline = time.monotonic() + limit
        with self._changed:
            while number not in self._found:
                if self._error is not None:
                    raise self._error
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(
                        f"search.timeout_seconds is {limit:g}, and batch {number} was not found in that time:"
                        f" {len(self.sites)} of {self._config.searchers} searchers (search.backend"
                        f" '{self._config.backend}') have started, and {len(self._waiting)} batches wait for one."
                        " Raise the limit, or see what holds them up"
                    )
                # This wait has a limit of its own, so it is no stall before that.
                beat()
                self._changed.wait(min(left, WAIT_SECONDS))
            self._submitted.popleft()
            return self._found.pop(number)

    def check(self) -> None:
        """Does nothing, unless a searcher has failed while nobody waited for it."""
        with self._changed:
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Lets each searcher end what it is at, and waits for that a short while; a warning names who takes longer."""
        # Who was interrupted while it waited does not want to wait again.
        if self._closed.is_set():
            return
        self._closed.set()
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()
        limit = min(CLOSE_SECONDS, self._config.timeout_seconds)
        deadline = time.monotonic() + limit
        try:
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            self.left = [thread.name for thread in self._threads if thread.is_alive()]
            for name in self.left:
                number = self._at.get(name)
                doing = "has not started yet" if number is None else f"is still at batch {number}"
                logger.warning("%s %s after %g seconds; the run ends without it", name, doing, limit)
            self._found.clear()

    def _work(self, index: int) -> None:
        """The life of a thread: a searcher, and those that replace it."""
        try:
            while not self._closed.is_set():
                try:
                    with closing(self._open_site(index, self._closed)) as site:
                        self._serve(site)
                except SearcherLost as lost:
                    self._replace(lost)
        # Whatever it is, the learner must hear of it, or it would wait for ever.
        except BaseException as error:
            self._fail(error)

    def _serve(self, site: Site) -> None:
        with self._changed:
            self.sites.add(site)
        try:
            while (order := self._next()) is not None:
                self._search(site, *order)
                # A thread that waits must not hold a policy, or the learner could not train in its buffers.
                del order
        finally:
            with self._changed:
                self.sites.remove(site)

    def _search(self, site: Site, number: int, work: Any) -> None:
        name = threading.current_thread().name
        self._at[name] = number
        try:
            scored = site.search(work)
        except SearcherLost:
            with self._changed:
                heapq.heappush(self._waiting, (number, work))
                self._changed.notify_all()
            raise
        finally:
            del self._at[name]
        with self._changed:
            self._found[number] = scored
            self._changed.notify_all()

    def _next(self) -> tuple[int, Any] | None:
        """Number and form of the oldest order that waits, once there is one; None when the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
            return None if self._closed.is_set() else heapq.heappop(self._waiting)

    def _replace(self, lost: SearcherLost) -> None:
        with self._changed:
            # A searcher that is ended on purpose is not lost.
            if self._closed.is_set():
                return
            if self.replaced == self._config.max_replacements:
                raise SearchError(
                    f"search.max_replacements is {self.replaced}, and one more searcher was lost: {lost}"
                ) from lost
            self.replaced += 1

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class DeviceSite:
    """Devices of this process."""

    def __init__(self, searcher: Searcher, mesh: Mesh):
        """Args:
        searcher: what searches.
        mesh: where; of the same shape as the learner's.
        """
        self._searcher, self._mesh = searcher, mesh
        self._placed: tuple[weakref.ref[Policy], Policy] | None = None

    def search(self, work: Order) -> Scored:
        """Brings the weights here, unless they are, and searches."""
        started = time.monotonic()
        policy = self._here(work.policy)
        sync_seconds = time.monotonic() - started
        policy = at_temperature(policy, work.temperature)
        scored = self._searcher.search(policy, work.prompts, work.plan, replicate(work.key, self._mesh))
        return with_sync_seconds(scored, sync_seconds)

    def close(self) -> None:
        """Gives the weights back."""
        self._placed = None

    def _here(self, policy: Policy) -> Policy:
        if policy.mesh == self._mesh:
            return policy
        # Orders of one version share their policy. It is not held, because the learner must get its buffers back.
        if self._placed is None or self._placed[0]() is not policy:
            self._placed = None  # old weights go before new ones come
            self._placed = weakref.ref(policy), _arrived(policy.on(self._mesh))
        return self._placed[1]


def _arrived(policy: Policy) -> Policy:
    """The policy once its weights are there."""
    jax.block_until_ready(policy.model)
    return policy


def at_temperature(policy: Policy, temperature: float | None) -> Policy:
    """The policy, sampling at another temperature.

    Args:
        policy: shares its weights with the result.
        temperature: None leaves it as it is.
    """
    if temperature is None:
        return policy
    return dataclasses.replace(policy, sampling=dataclasses.replace(policy.sampling, temperature=temperature))


def with_sync_seconds(scored: Scored, seconds: float) -> Scored:
    """A result whose statistics say how long its weights took to come to the searcher.

    Args:
        scored: what a searcher found.
        seconds: time until the weights were there.
    """
    assert scored.stats is not None
    return dataclasses.replace(scored, stats=dataclasses.replace(scored.stats, sync_seconds=seconds))


def searcher_meshes(mesh: Mesh, searchers: int) -> list[Mesh]:
    """One mesh for each searcher, of the shape of the learner's: the same programs on it give the same samples.

    Args:
        mesh: of the learner.
        searchers: how many work side by side.

    Returns:
        Meshes of devices that the learner does not use, taking turns where there are too few; without any, the
        learner's own. Only meshes of one device are shared, because `check_backend` refuses the others.
    """
    used = set(mesh.devices.flat)
    free = [device for device in jax.local_devices() if device not in used]
    groups = [free[start : start + mesh.size] for start in range(0, len(free) - mesh.size + 1, mesh.size)]
    if not groups:
        return [mesh] * searchers
    meshes = [mesh_of(group, MeshConfig(*mesh.devices.shape)) for group in groups[:searchers]]
    return [meshes[index % len(meshes)] for index in range(searchers)]


def make_pool(setup: Setup, searcher: Searcher) -> SearchPool:
    """The pool that a configuration asks for.

    Args:
        setup: what the run starts from.
        searcher: what searches in this process.

    Raises:
        ImportError: Ray is asked for and not installed.
        ConnectionError: its cluster cannot be reached.
    """
    config, mesh = setup.config.search, setup.policy.mesh
    if config.backend == "inline":
        return InlinePool(searcher)
    if config.backend == "ray":
        from nested_reft.training.ray_search import RayPool  # Ray is optional

        return RayPool(setup)
    meshes = searcher_meshes(mesh, config.searchers)
    return ThreadedPool(lambda index, _: DeviceSite(searcher, meshes[index]), config)
