"""Searchers that are processes of a Ray cluster on this machine."""

import dataclasses
import os
import signal
import time
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from nested_reft.training import ray_search
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import prepare
from tests.training.runs import MOVING, assert_equal_arrays, comparable_steps, nano, trainer

START_SECONDS = 120  # in which searchers must be there
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'nested_reft[ray]'")


def pids(searchers: Any, number: int) -> set[int]:
    """Of the searchers' processes, once so many have started; Ray tells nobody when."""
    deadline = time.monotonic() + START_SECONDS
    while len(searchers.sites) < number:
        assert time.monotonic() < deadline, "the searchers did not start"
        time.sleep(0.05)
    return {site.pid for site in searchers.sites}


@needs_ray
def test_a_run_survives_the_death_of_a_searcher(tmp_path):
    """Killed by its process id while batches are under way: replaced, and all steps are those of a run without Ray."""
    config = nano(loss=MOVING, optimizer__learning_rate=0.01)
    setup = prepare(config)

    def run_with(name: str, **search):
        searched = dataclasses.replace(config, search=SearchConfig(lag=4, **search))
        return trainer(dataclasses.replace(setup, config=searched), tmp_path / name)

    handler = signal.getsignal(signal.SIGTERM)
    run = run_with("ray", backend="ray", searchers=2)
    assert signal.getsignal(signal.SIGTERM) == handler
    killed = min(pids(run.pool, 2))
    found = comparable_steps(run, range(1))
    os.kill(killed, signal.SIGKILL)
    # If it had nothing to do, its death shows when its turn comes.
    while not run.pool.replaced:
        assert len(found) < 50
        found += comparable_steps(run, range(len(found), len(found) + 1))
    found += comparable_steps(run, range(len(found), len(found) + 2))
    assert found == comparable_steps(run_with("inline"), range(len(found)))
    assert len({line["loss"] for line in found}) == len(found) >= 3
    assert not {killed, os.getpid()} & pids(run.pool, 2)
    assert run.pool.replaced == 1
    run.close()
    assert not ray_search._ray().is_initialized()


def test_weights_of_another_model_are_refused():
    """Both models are named: one by its file, the other by what is different."""
    model = prepare(nano()).policy.model
    arrays = {name: np.asarray(array) for name, array in ray_search.named_arrays(model).items()}
    (place,) = [name for name in arrays if "embedding" in name]
    same = ray_search.with_weights(model, arrays, True, "scratch")
    assert_equal_arrays(same, model)
    doubled = ray_search.with_weights(same, {place: 2 * arrays[place]}, False, "scratch")
    assert np.array_equal(doubled.embedding[...], 2 * arrays[place])
    with pytest.raises(
        ValueError, match=r"of another model than 'scratch', .*: .*embedding.* is float32\[9, 64\] there"
    ):
        ray_search.with_weights(model, {place: arrays[place][:9]}, False, "scratch")
    with pytest.raises(ValueError, match=r"norm.* is missing there and float32\["):
        ray_search.with_weights(model, {place: arrays[place]}, True, "scratch")
    with pytest.raises(ValueError, match=r"\.head is float32\[2\] there and missing here"):
        ray_search.with_weights(model, {".head": np.zeros(2, np.float32)}, False, "scratch")
