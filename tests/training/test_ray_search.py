"""Searchers that are processes of a Ray cluster on this machine."""

import dataclasses
import gc
import itertools
import os
import signal
import socket
import threading
import time
import weakref
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from nested_reft.data.pipeline import batch_prompts
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.training import ray_search
from nested_reft.training.learner import Learner
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.search_pool import Order, SearchError
from nested_reft.training.setup import prepare
from tests.scored_groups import texts_of
from tests.training.runs import assert_equal_arrays, comparable_steps, nano, trainer
from tests.training.test_ppo_runs import PPO

# An untrained model is always wrong, so its rewards differ by length.
REPLAYED = nano(
    loss=TrajectoryBalanceConfig(beta=0.5),
    reward=RewardConfig(overlong_cache_tokens=8),
    replay=ReplayConfig(capacity=96, recent_share=0.5, inverse_temperature=1.0, prefill=24, max_staleness=8),
    optimizer__learning_rate=0.01,
)
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
    """Killed by its process id while batches are under way: replaced, and all steps are those of a run without Ray.

    Every completion is stored for replay, so one that was lost or came twice would show in what is trained on.
    """
    config = REPLAYED
    setup = prepare(config)

    def run_with(name: str, **search):
        searched = dataclasses.replace(config, search=SearchConfig(lag=4, sync_every=2, **search))
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
    inline = run_with("inline")
    assert found == comparable_steps(inline, range(len(found)))
    assert texts_of(run.state.buffer) == texts_of(inline.state.buffer)
    assert len({line["loss"] for line in found}) == len(found) >= 3
    assert not {killed, os.getpid()} & pids(run.pool, 2)
    assert run.pool.replaced == 1
    run.close()
    assert not ray_search._ray().is_initialized()


class Reference:
    """What `ray.put` and a call of an actor give: a name for a value that lies elsewhere."""

    numbers = itertools.count()

    def __init__(self, value: Any):
        self.value, self._number = value, next(self.numbers)

    def hex(self) -> str:
        return str(self._number)


class Actor:
    """It carries calls out at once, in this process."""

    def __init__(self, made: Any):
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: Reference(getattr(self._made, name)(*args)))


class RayHere:
    """What a run asks of Ray, in one process."""

    exceptions = SimpleNamespace(RayTaskError=ZeroDivisionError, RayError=ZeroDivisionError)  # which nothing raises

    def __init__(self):
        self.put_names = list[set[str]]()

    def is_initialized(self) -> bool:
        return True

    def put(self, value: dict[str, Any]) -> Reference:
        self.put_names.append(set(value))
        return Reference(value)

    def get(self, asked: Any) -> Any:
        return [each.value for each in asked] if isinstance(asked, list) else asked.value

    def wait(self, references: list[Reference], timeout: float) -> tuple[list[Reference], list[Reference]]:
        return references, []

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: Actor(kind())))

    def kill(self, actor: Actor) -> None:
        pass


@pytest.fixture
def ray_here(monkeypatch) -> RayHere:
    ray = RayHere()
    monkeypatch.setattr(ray_search, "_ray", lambda: ray)
    return ray


@pytest.mark.parametrize(
    "config", [nano(loss=PPO, optimizer__learning_rate=0.01), REPLAYED], ids=["critic", "trajectory balance"]
)
def test_actors_find_what_the_learner_itself_finds(config, ray_here, tmp_path):
    """With a critic, whose head the actors do not have, and with completions that are kept for replay."""
    setup = prepare(config)

    def run_with(name: str, **search):
        searched = dataclasses.replace(config, search=SearchConfig(lag=2, sync_every=2, **search))
        return trainer(dataclasses.replace(setup, config=searched), tmp_path / name)

    run = run_with("ray", backend="ray", searchers=2)
    found = comparable_steps(run, range(4))
    assert found == comparable_steps(run_with("inline"), range(4)) and len({line["loss"] for line in found}) == 4
    run.close()
    # What never changes is put once, and the rest for steps 0 and 2.
    assert len(ray_here.put_names) == 3
    assert not any("value_head" in name for names in ray_here.put_names for name in names)


def test_the_learner_has_its_buffers_back_once_an_order_is_sent(ray_here, monkeypatch):
    """Searchers that stand still hold no weights of it: those are in the store, once for two orders."""
    setup, released = prepare(nano()), threading.Event()
    monkeypatch.setattr(ray_search.RaySearcher, "search", lambda *_: released.wait())
    pool = ray_search.RayPool(dataclasses.replace(setup, config=nano(search=SearchConfig(lag=2, backend="ray"))))
    policy = Learner(setup.policy).policy()
    held = weakref.ref(policy.model)
    for number in range(2):
        prompts, plan = prompts_and_plan(setup)
        pool.submit(Order(number, policy, prompts, plan, jax.random.key(number)))
    del policy
    gc.collect()
    assert held() is None and len(ray_here.put_names) == 2
    released.set()
    pool.close()


def prompts_and_plan(setup) -> tuple[Any, Any]:
    prompts = batch_prompts(list(setup.data.train_examples[0][:4]), [0] * 4, setup.data.prompt_size)
    return prompts, LayerPlan.skipping(6, [2])


def test_what_is_missing_on_a_host_is_a_line_that_names_the_host(monkeypatch):
    def missing(config):
        raise ValueError("model.name is '/models/here', which is no model")

    monkeypatch.setattr(ray_search, "initial_policy", missing)
    with pytest.raises(SearchError, match=rf"cannot start on {socket.gethostname()}: model.name is '/models/here'"):
        ray_search.RaySearcher().start(nano().to_json(), 0)


def test_the_head_of_a_critic_is_no_weight_of_a_searcher():
    policy = prepare(nano()).policy
    with_head = Learner(policy, value_head=True).behavior_policy().model
    assert with_head.value_head is not None
    arrays = {name: np.asarray(array) for name, array in ray_search.named_arrays(with_head).items()}
    assert_equal_arrays(ray_search.with_weights(policy.model, arrays, True, "scratch"), policy.model)
    # A model with a head of its own keeps it.
    assert ray_search.with_weights(with_head, arrays, True, "scratch").value_head is not None


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
        SearchError, match=r"of another model than 'scratch', .*: .*embedding.* is float32\[9, 64\] there"
    ):
        ray_search.with_weights(model, {place: arrays[place][:9]}, False, "scratch")
    with pytest.raises(SearchError, match=r"norm.* is missing there and float32\["):
        ray_search.with_weights(model, {place: arrays[place]}, True, "scratch")
    with pytest.raises(SearchError, match=r"\.head is float32\[2\] there and missing here"):
        ray_search.with_weights(model, {".head": np.zeros(2, np.float32)}, False, "scratch")
