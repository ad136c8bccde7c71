"""Pools of searchers: results in the order of issue, and an end in every case."""

import gc
import os
import threading
import tracemalloc
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from nested_reft.data.pipeline import batch_prompts
from nested_reft.layer_plan import LayerPlan
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.search_pool import (
    DeviceSite,
    InlinePool,
    Order,
    SearcherLost,
    SearchError,
    ThreadedPool,
    make_pool,
    searcher_meshes,
)
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import prepare
from nested_reft.types import Scored
from tests.scored_groups import scored
from tests.training.runs import assert_equal_arrays, nano


@pytest.fixture(scope="module")
def setup():
    return prepare(nano())


@pytest.fixture(scope="module")
def order(setup):
    """Makes orders that differ in their numbers and keys."""
    prompts = batch_prompts(list(setup.data.train_examples[0][:4]), [0] * 4, setup.data.prompt_size)

    def order(number: int, policy=setup.policy) -> Order:
        return Order(number, policy, prompts, LayerPlan.skipping(6, [2]), jax.random.key(number))

    return order


class Scripted:
    """A place whose search is a function."""

    def __init__(self, search):
        self._search, self.closed = search, False

    def search(self, order: Order) -> Scored:
        return self._search(order)

    def close(self) -> None:
        self.closed = True


def pool(search, **config) -> ThreadedPool:
    """Threads that all search with one function; three of them unless said otherwise."""
    config = {"lag": 8, "backend": "thread", "searchers": 3, "timeout_seconds": 30.0} | config
    return ThreadedPool(lambda index, closed: Scripted(search), SearchConfig(**config))


def numbered(order: Order) -> Scored:
    """A result that shows which order it is of."""
    return scored([[1, 0]], first=order.number)


def number_of(found: Scored) -> int:
    return int(found.rollouts.version_BG[0, 0])


def searcher_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("searcher-")]


def test_results_come_in_the_order_of_issue_and_not_of_completion(order):
    """The first order is only found when all others have been."""
    last = threading.Event()

    def search(order):
        if order.number == 0:
            assert last.wait(30)
        if order.number == 4:
            last.set()
        return numbered(order)

    searchers = pool(search)
    for number in range(5):
        searchers.submit(order(number))
    assert [number_of(searchers.take()) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(searchers) == 0
    searchers.close()
    assert not searcher_threads()


def test_a_queue_that_nobody_reads_does_not_grow(order):
    searchers = pool(numbered, lag=2)
    for number in range(3):
        searchers.submit(order(number))
    with pytest.raises(RuntimeError, match=r"3 batches were ordered and not taken, and search.lag is 2: take one"):
        searchers.submit(order(3))
    assert number_of(searchers.take()) == 0 and len(searchers) == 2
    searchers.submit(order(3))
    searchers.close()


def test_what_a_searcher_raises_ends_the_wait(order):
    def search(order):
        raise ValueError("no such table")

    searchers = pool(search)
    searchers.submit(order(0))
    with pytest.raises(ValueError, match="no such table"):
        searchers.take()
    searchers.close()
    assert not searcher_threads()


def test_the_order_of_a_lost_searcher_is_carried_out_again_and_once(order):
    """Two searchers die of order 2, and the third place finds it; nothing is lost and nothing comes twice."""
    carried_out, places = [], []

    def search(order):
        carried_out.append(order.number)
        if order.number == 2 and carried_out.count(2) < 3:
            raise SearcherLost("the host went away")
        return numbered(order)

    def open_site(index, closed):
        places.append(Scripted(search))
        return places[-1]

    searchers = ThreadedPool(open_site, SearchConfig(lag=4, backend="thread", searchers=2, max_replacements=2))
    for number in range(5):
        searchers.submit(order(number))
    assert [number_of(searchers.take()) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert sorted(carried_out) == [0, 1, 2, 2, 2, 3, 4] and searchers.replaced == 2
    searchers.close()
    assert len(places) == 4 and all(place.closed for place in places)


def test_replacements_have_a_limit(order):
    def search(order):
        raise SearcherLost("killed by signal 9")

    searchers = pool(search, searchers=1, max_replacements=2)
    searchers.submit(order(0))
    with pytest.raises(
        SearchError, match=r"search.max_replacements is 2, and one more searcher was lost: killed by signal 9"
    ):
        searchers.take()
    searchers.close()


def test_a_searcher_that_stands_still_ends_the_run_in_time(order, caplog):
    released = threading.Event()

    def search(order):
        released.wait()
        return numbered(order)

    searchers = pool(search, searchers=1, timeout_seconds=0.05)
    searchers.submit(order(0))
    searchers.submit(order(1))
    with pytest.raises(
        TimeoutError,
        match=r"search.timeout_seconds is 0.05, and batch 0 was not found .*: 1 of 1 searchers \(search.backend 'thread"
        r"'\) have started, and 1 batches wait",
    ):
        searchers.take()
    searchers.close()  # it does not wait for ever either
    assert searchers.left == ["searcher-0"]
    assert "searcher-0 is still at batch 0 after 0.05 seconds; the run ends without it" in caplog.text
    caplog.clear()
    searchers.close()
    assert not caplog.text
    released.set()


def test_a_searcher_that_cannot_start_is_heard_before_anything_is_taken(order):
    def open_site(index, closed):
        raise ValueError("no such file on this host")

    searchers = ThreadedPool(open_site, SearchConfig(lag=1, backend="thread"))
    for thread in threading.enumerate():
        if thread.name.startswith("searcher-"):
            thread.join(30)
    for ask in (searchers.check, lambda: searchers.submit(order(0))):
        with pytest.raises(ValueError, match="no such file on this host"):
            ask()
    searchers.close()
    assert not searchers.left


def test_searchers_that_never_start_are_counted(order):
    def open_site(index, closed):
        closed.wait()
        raise SearcherLost("the pool was closed")

    searchers = ThreadedPool(open_site, SearchConfig(lag=1, backend="thread", searchers=2, timeout_seconds=0.05))
    searchers.submit(order(0))
    with pytest.raises(TimeoutError, match=r"0 of 2 searchers .* have started"):
        searchers.take()
    searchers.close()
    assert not searcher_threads() and searchers.replaced == 0


def test_a_policy_is_let_go_when_its_order_is_done(setup, order):
    """Otherwise the learner could not train in its buffers."""
    policy = setup.policy.on(setup.policy.mesh)
    held = weakref.ref(policy)
    searchers = pool(numbered, searchers=1)
    searchers.submit(order(0, policy))
    searchers.take()
    searchers.submit(order(1))  # the thread is past the first order for certain
    searchers.take()
    del policy
    gc.collect()
    assert held() is None
    searchers.close()


def test_searchers_take_the_devices_that_are_free(setup):
    mesh = setup.policy.mesh
    ids = [mesh.devices.flat[0].id for mesh in searcher_meshes(mesh, 9)]
    assert ids == [1, 2, 3, 4, 5, 6, 7, 1, 2]


def test_every_pool_finds_the_same(setup, order):
    """Of two versions of the weights; a thread has them on a device of its own."""
    searcher = Searcher(setup.config.rollout, setup.config.reward, setup.data.shared_prefix)
    other = setup.policy.on(setup.policy.mesh)
    other.model.embedding[...] = other.model.embedding[...] * 2
    orders = [order(0), order(1), order(2, other)]
    inline = InlinePool(searcher)
    (mesh,) = searcher_meshes(setup.policy.mesh, 1)
    sites = []

    def open_site(index, closed):
        sites.append(DeviceSite(searcher, mesh))
        return sites[-1]

    threads = ThreadedPool(open_site, SearchConfig(lag=2, backend="thread"))
    for each in orders:
        inline.submit(each)
        threads.submit(each)
    results = [(inline.take(), threads.take()) for _ in orders]
    for expected, found in results:
        assert_equal_arrays(expected.rollouts, found.rollouts)
        assert expected.texts == found.texts and found.stats.seconds > found.stats.rollout_seconds
    tokens = [expected.rollouts.tokens_BGC for expected, _ in results]
    assert not np.array_equal(tokens[0], tokens[1])
    # The second order found the weights in place.
    assert results[1][1].stats.sync_seconds < results[0][1].stats.sync_seconds
    threads.close()


def test_the_configuration_chooses_the_pool(setup):
    searcher = Searcher(setup.config.rollout, setup.config.reward)
    assert isinstance(make_pool(setup, searcher), InlinePool)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_hundreds_of_orders_leave_nothing_behind(order):
    """Threads, files and memory are those of the first orders."""
    searchers = pool(numbered)
    given = [order(number) for number in range(600)]

    def carry_out(orders) -> None:
        searchers.submit(orders[0])
        for each in orders[1:]:
            searchers.submit(each)
            searchers.take()
        searchers.take()

    tracemalloc.start()
    carry_out(given[:100])
    gc.collect()
    before = threading.active_count(), open_files(), tracemalloc.get_traced_memory()[0]
    carry_out(given[100:])
    gc.collect()
    after = threading.active_count(), open_files(), tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 20_000  # bytes; one result of each order would take a million
    searchers.close()
