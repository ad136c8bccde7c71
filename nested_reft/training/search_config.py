"""How far searching runs ahead of learning, and who searches: the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import jax

from nested_reft.literals import check_choice, check_whole
from nested_reft.rollout.sampling import MAX_TEMPERATURE, MIN_TEMPERATURE

Backend = Literal["inline", "thread", "ray"]
MOST = 2**16  # orders, searchers or steps; far beyond what helps


@dataclass(frozen=True)
class SearchConfig:
    """Searching ahead of the learner. A batch is at most `lag + sync_every - 1` steps old when it comes to the learner.

    Attributes:
        lag: generation batches that are under way beside the one that the learner waits for. 0 samples each batch just
            before its update.
        sync_every: k, steps from one set of weights that the searchers get to the next.
        backend: who samples. `inline` is the learner itself, in turns with its updates; `thread` are threads of this
            process, on the devices that `mesh` leaves free or else on the same ones; `ray` are processes of a Ray
            cluster. What they find does not depend on it.
        searchers: how many work side by side.
        timeout_seconds: the longest wait for a batch or for a searcher that starts, after which the run ends.
        max_replacements: searchers that may die in one process before the run ends. Each one is replaced and its batch
            is sampled again.
        gpus_per_searcher, tpus_per_searcher: what Ray reserves for each.
        temperatures: of the batches, which take turns in them (mixed exploration). Importance weights correct for that,
            since a sample keeps the log-probabilities that it was drawn with. Trajectory balance has none and scores
            all samples at `rollout.sampling.temperature`. Empty takes that one for all.
        skip_ratios: of the batches' plans, which take turns in them as well: some batches nest deeper than others. 0 is
            the full model. Each one compiles. Empty takes `nesting.skip_ratio` for all.
    """

    lag: int = 0
    sync_every: int = 1
    backend: Backend = "inline"
    searchers: int = 1
    timeout_seconds: float = 3600.0
    max_replacements: int = 16
    gpus_per_searcher: float = 0.0
    tpus_per_searcher: float = 0.0
    temperatures: tuple[float, ...] = ()
    skip_ratios: tuple[float, ...] = ()

    def __post_init__(self):
        check_choice("search.backend", self.backend, Backend)
        check_whole("search.lag", self.lag, 0, MOST)
        check_whole("search.sync_every", self.sync_every, 1, MOST)
        check_whole("search.searchers", self.searchers, 1, MOST)
        check_whole("search.max_replacements", self.max_replacements, 0, MOST)
        if not (math.isfinite(self.timeout_seconds) and 0 < self.timeout_seconds <= 1e6):
            raise ValueError(f"search.timeout_seconds is {self.timeout_seconds}; allowed is more than 0, up to 1e6")
        for name in ("gpus_per_searcher", "tpus_per_searcher"):
            value = getattr(self, name)
            if not 0 <= value <= MOST:
                raise ValueError(f"search.{name} is {value}; allowed is 0 to {MOST}")
            if value and self.backend != "ray":
                raise ValueError(
                    f"search.{name} is {value}; with search.backend '{self.backend}' allowed is 0: only Ray reserves"
                )
        for temperature in self.temperatures:
            if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
                raise ValueError(
                    f"search.temperatures holds {temperature}; allowed is {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
                )
        for ratio in self.skip_ratios:
            if not 0 <= ratio < 1:
                raise ValueError(f"search.skip_ratios holds {ratio}; allowed is 0 <= skip_ratio < 1")
        # With fewer orders than searchers, some of them would never work.
        most = 1 if self.backend == "inline" else self.lag + 1
        if self.searchers > most:
            raise ValueError(
                f"search.searchers is {self.searchers}; with backend '{self.backend}' and lag {self.lag}, allowed is 1"
                f" to {most}: "
                + ("the learner itself samples" if self.backend == "inline" else "lag + 1 batches are under way")
            )

    @property
    def makes_stale(self) -> bool:
        """Whether groups may be older than the policy that trains on them."""
        return self.lag > 0 or self.sync_every > 1


def check_backend(config: SearchConfig, mesh_devices: int = 1) -> None:
    """Refuses a backend that is not installed, and threads for which there are no devices.

    Args:
        config: names the backend.
        mesh_devices: of the learner's mesh.

    Raises:
        ImportError: says how to install it.
        ValueError: several threads would run programs of several devices on the same ones.
    """
    # Such programs wait for each other on every device. Two of them that begin in another order on each never end.
    places = (jax.local_device_count() - mesh_devices) // mesh_devices
    if config.backend == "thread" and mesh_devices > 1 and config.searchers > places:
        raise ValueError(
            f"search.searchers is {config.searchers} with backend 'thread', and a mesh of {mesh_devices} devices"
            f" (all axes of `mesh`); each thread needs as many of its own, and of {jax.local_device_count()} here"
            f" the learner leaves room for {places}. Allowed is at most that; or use backend 'inline' or 'ray'"
        )
    if config.backend == "ray" and find_spec("ray") is None:
        raise ImportError(
            "search.backend is 'ray', which is not installed: pip install 'nested_reft[ray]', or use backend 'thread'"
        )
