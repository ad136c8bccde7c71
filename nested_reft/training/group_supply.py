"""Where an update's groups come from: what was just found, or a store that is kept for replay.

Both supplies are rules without a state of their own. Their buffer belongs to the run's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from nested_reft import replay, replay_store
from nested_reft.replay import Buffer, DynamicSamplingConfig
from nested_reft.replay_store import ReplayConfig, Store, StoreSummary
from nested_reft.training.config import Config
from nested_reft.types import Scored


@dataclass(frozen=True)
class FreshGroups:
    """Every update trains on groups that were found for it; dynamic sampling may pass over some.

    Attributes:
        config: of dynamic sampling.
        num_groups: B.
    """

    config: DynamicSamplingConfig
    num_groups: int

    def load(self, plain: Any) -> Buffer:
        """The buffer of a checkpoint; an empty one without."""
        return Buffer() if plain is None else Buffer.from_plain(plain)

    def without_stale(self, buffer: Buffer, version: int) -> Buffer:
        """The buffer as it is, which holds nothing from before."""
        return buffer

    def add(self, buffer: Buffer, scored: Scored) -> Buffer:
        """See `replay.add`."""
        return replay.add(buffer, scored)

    def ready(self, buffer: Buffer, num_found: int) -> bool:
        """See `replay.ready`."""
        return replay.ready(buffer, self.config, self.num_groups)

    def draw(self, buffer: Buffer, key: jax.Array) -> tuple[Scored, Buffer]:
        """See `replay.draw`."""
        return replay.draw(buffer, self.config, self.num_groups)

    def summary(self, buffer: Buffer, version: int) -> StoreSummary | None:
        """None: nothing is kept."""
        return None


@dataclass(frozen=True)
class StoredGroups:
    """What is found goes into a store, from which every update draws.

    Attributes:
        config: of the store.
        num_groups, group_size: B and K.
    """

    config: ReplayConfig
    num_groups: int
    group_size: int

    def load(self, plain: Any) -> Store:
        """The store of a checkpoint; an empty one without."""
        return Store() if plain is None else Store.from_plain(plain)

    def without_stale(self, buffer: Store, version: int) -> Store:
        """See `replay_store.without_stale`."""
        return replay_store.without_stale(buffer, self.config, version)

    def add(self, buffer: Store, scored: Scored) -> Store:
        """See `replay_store.add`."""
        return replay_store.add(buffer, self.config, scored)

    def ready(self, buffer: Store, num_found: int) -> bool:
        """See `replay_store.ready`. Every step searches at least once, whatever is stored."""
        return num_found > 0 and replay_store.ready(buffer, self.config)

    def draw(self, buffer: Store, key: jax.Array) -> tuple[Scored, Store]:
        """See `replay_store.draw`."""
        return replay_store.draw(buffer, self.config, key, self.num_groups, self.group_size)

    def summary(self, buffer: Store, version: int) -> StoreSummary | None:
        """See `replay_store.summary`."""
        return replay_store.summary(buffer, version)


def group_supply(config: Config) -> Any:
    """The supply of a configuration.

    Args:
        config: with a replay of some capacity, groups come from a store.

    Returns:
        `FreshGroups` or `StoredGroups`; each knows the buffer that is its own.
    """
    size = config.data.prompts_per_batch
    if config.replay.is_on:
        return StoredGroups(config.replay, size, config.rollout.group_size)
    return FreshGroups(config.dynamic_sampling, size)
