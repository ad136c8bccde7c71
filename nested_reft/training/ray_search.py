"""Searchers as actors of a Ray cluster, on this machine or on many.

The learner puts each version of the weights into Ray's object store once, and every host fetches it once. An actor that
joins late begins with the orders that wait then. One that dies is replaced, and its order is carried out again.

`RAY_ADDRESS` names the cluster; without it and without a cluster on this machine, a run starts one of its own. On other
hosts, `nested_reft` must be installed and the files that the configuration names must be there.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import signal
import socket
import threading
import time
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int8, UInt32

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import place_as, to_host
from nested_reft.training.config import Config
from nested_reft.training.learner import Learner
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.search_pool import (
    Order,
    SearcherLost,
    SearchError,
    ThreadedPool,
    at_temperature,
    with_sync_seconds,
)
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import Setup, initial_policy
from nested_reft.types import Prompts, Scored, take

POLL_SECONDS = 0.5  # between looks at whether the pool was closed; a result is seen at once


def _ray() -> Any:
    """Ray itself, which is optional and takes a second to import."""
    return importlib.import_module("ray")


class RaySearcher:
    """What runs in a process of the cluster: a `Searcher`, and the policy whose weights the learner sends."""

    def start(self, config: dict[str, Any], shared_prefix: int) -> int:
        """Makes the policy of the configuration.

        Args:
            config: of the run, as `Config.to_json` gives it.
            shared_prefix: leading tokens that all prompts have in common.

        Returns:
            The number of the process.

        Raises:
            SearchError: what the configuration names is not on this host.
        """
        self._config = Config.from_json(config)
        self._searcher = Searcher(
            self._config.rollout, self._config.reward, shared_prefix, self._config.measures_mismatch
        )
        try:
            # Weights come from a learner's behavior policy, so they go into one.
            self._policy = Learner(initial_policy(self._config), self._config.rollout.weights).behavior_policy()
        except (ValueError, ImportError, OSError) as error:
            raise SearchError(f"a searcher cannot start on {socket.gethostname()}: {error}") from error
        self._held = list[str]()
        return os.getpid()

    def search(
        self,
        weights: list[Any],
        version: int,
        prompts: Prompts,
        part_L: Int8[np.ndarray, " L"],
        key_data: UInt32[np.ndarray, " K"],
        temperature: float | None,
    ) -> Scored:
        """Carries an order out.

        Args:
            weights: references to dictionaries of arrays by name, which together are the weights.
            version: of the policy.
            prompts: what is asked.
            part_L: the plan, as `LayerPlan.of_parts` takes it.
            key_data: of the PRNG key.
            temperature: of the order.
        """
        started = time.monotonic()
        held = [reference.hex() for reference in weights]
        if held != self._held:
            new = [reference for reference in weights if reference.hex() not in self._held]
            given = {name: array for part in _ray().get(new) for name, array in part.items()}
            model = with_weights(self._policy.model, given, whole=not self._held, name=self._config.model.name)
            self._policy, self._held = dataclasses.replace(self._policy, model=model, version=version), held
        sync_seconds = time.monotonic() - started
        key = jax.random.wrap_key_data(jnp.asarray(key_data))
        policy = at_temperature(self._policy, temperature)
        return with_sync_seconds(self._searcher.search(policy, prompts, LayerPlan.of_parts(part_L), key), sync_seconds)


def named_arrays(model: Transformer) -> dict[str, jax.Array]:
    """What sampling reads of a model: its arrays by their places in it, but for the head of a critic.

    Args:
        model: any, also a copy in fewer bits.
    """
    found = {jax.tree_util.keystr(path): array for path, array in jax.tree.leaves_with_path(model)}
    return {name: array for name, array in found.items() if "value_head" not in name}


def with_weights(model: Transformer, given: dict[str, np.ndarray], whole: bool, name: str) -> Transformer:
    """The model with other values in some of its arrays.

    Args:
        model: of the searcher; its arrays say where the new ones are placed.
        given: new arrays by name.
        whole: whether they must be all arrays of the model.
        name: of the model, for the message.

    Raises:
        SearchError: the arrays are of another model.
    """
    own = named_arrays(model)
    missing = own.keys() - given.keys() if whole else ()
    for place in (*sorted(given), *sorted(missing)):
        here, there = (_shape(arrays.get(place)) for arrays in (own, given))
        if here != there:
            raise SearchError(
                f"the learner's weights are of another model than '{name}', which the searcher on"
                f" {socket.gethostname()} has: {place} is {there} there and {here} here. Start both with the same files"
            )
    leaves = [
        place_as(given.get(jax.tree_util.keystr(path), array), array.sharding)
        for path, array in jax.tree.leaves_with_path(model)
    ]
    return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(model), leaves))


def _shape(array: Any) -> str:
    return "missing" if array is None else f"{array.dtype}{list(array.shape)}"


class _Weights:
    """The learner's weights in the object store: what never changes once, and the rest once for each version."""

    def __init__(self):
        self._fixed: Any = None
        self._latest: tuple[weakref.ref[Policy], Any] | None = None

    def of(self, policy: Policy) -> list[Any]:
        """References to the weights of a policy, which is not held."""
        if self._latest is None or self._latest[0]() is not policy:
            arrays = named_arrays(policy.model)
            # Adapters and bridges change where there are adapters; without any, everything does.
            has_adapters = any("_lora_" in name for name in arrays)
            changing = {name for name in arrays if not has_adapters or "_lora_" in name or "bridges" in name}
            if self._fixed is None:
                self._fixed = _put(arrays, arrays.keys() - changing)
            self._latest = weakref.ref(policy), _put(arrays, changing)
        return [self._fixed, self._latest[1]]


def _put(arrays: dict[str, jax.Array], names: set[str]) -> Any:
    return _ray().put({name: to_host(arrays[name]) for name in sorted(names)})


class RaySite:
    """One actor."""

    def __init__(self, setup: tuple[dict[str, Any], int], search: SearchConfig, closed: Any):
        """Starts an actor, and waits until the cluster has room for it.

        Args:
            setup: what `RaySearcher.start` takes.
            search: says what Ray reserves.
            closed: an event that is set when the pool closes.

        Raises:
            SearcherLost: it died, or the pool was closed.
        """
        self._closed = closed
        resources = {"TPU": search.tpus_per_searcher} if search.tpus_per_searcher else None
        options = _ray().remote(RaySearcher).options(num_cpus=0, num_gpus=search.gpus_per_searcher, resources=resources)
        self._actor = options.remote()
        try:
            self.pid = self._result(self._actor.start.remote(*setup))
        except BaseException:
            self.close()
            raise

    def search(self, work: tuple[Any, ...]) -> Scored:
        """Sends an order to the actor and waits for its result.

        Args:
            work: what `RaySearcher.search` takes.

        Raises:
            SearcherLost: the actor died, or the pool was closed.
        """
        scored = self._result(self._actor.search.remote(*work))
        # Arrays that Ray returns lie in its object store. Taking rows copies them, so that the store can let go.
        return dataclasses.replace(take(scored, range(len(scored))), stats=scored.stats)

    def close(self) -> None:
        """Ends the actor's process."""
        _ray().kill(self._actor)

    def _result(self, reference: Any) -> Any:
        while not _ray().wait([reference], timeout=POLL_SECONDS)[0]:
            if self._closed.is_set():
                raise SearcherLost("the pool was closed")
        try:
            return _ray().get(reference)
        except _ray().exceptions.RayTaskError as error:
            # What the searcher raised, as if it had been raised here.
            raise error.cause from error
        except _ray().exceptions.RayError as error:
            raise SearcherLost(str(error).strip().splitlines()[0]) from error


class RayPool(ThreadedPool):
    """Searchers of a cluster; one that this run started ends with it."""

    def __init__(self, setup: Setup):
        """Args:
        setup: what the run starts from.
        """
        config = setup.config
        self._owns_cluster, self._weights = _connect(), _Weights()
        start = config.to_json(), setup.data.shared_prefix
        super().__init__(lambda _, closed: RaySite(start, config.search, closed), config.search)

    def submit(self, order: Order) -> None:
        """Gives an order to the next searcher that is free.

        Its weights go into the object store at once, so the learner gets their buffers back before its next update.
        """
        prompts = order.prompts
        if prompts.forced is not None:
            prompts = dataclasses.replace(prompts, forced=to_host(prompts.forced))
        work = (
            self._weights.of(order.policy),
            order.policy.version,
            prompts,
            order.plan.host_parts(order.policy.num_layers),
            np.asarray(jax.random.key_data(order.key)),
            order.temperature,
        )
        self._give(order.number, work)

    def close(self) -> None:
        """Ends the actors, and leaves the cluster; one that this run started ends."""
        try:
            super().close()
        finally:
            if self._owns_cluster:
                _ray().shutdown()


def _connect() -> bool:
    """Joins the cluster that `RAY_ADDRESS` names or this machine has, or else starts one.

    Returns:
        False where this process had joined one before; whoever did that leaves it as well.
    """
    if _ray().is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    _ray().init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    # Ray puts its own in place, and a run has one that writes a checkpoint first.
    if is_main and handler is not None:
        signal.signal(signal.SIGTERM, handler)
    return True
