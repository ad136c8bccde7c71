"""Where an update's groups come from: what was just found, or a store that is kept for replay.

One set of rules for the two kinds of buffer. A run has a `Store` where `replay.capacity` is set, and a `Buffer`
otherwise; every rule takes one and gives the next.
"""

from __future__ import annotations

from typing import Any

import jax

from nested_reft import replay, replay_store
from nested_reft.replay import Buffer
from nested_reft.replay_saving import load_store, save_store
from nested_reft.replay_store import Store, StoreSummary
from nested_reft.training.config import Config
from nested_reft.types import Scored


def empty_buffer(config: Config) -> Buffer | Store:
    """The buffer of a run that has found nothing yet.

    Args:
        config: of the run.
    """
    return Store() if config.replay.is_on else Buffer()


def loaded_buffer(config: Config, plain: Any) -> Buffer | Store:
    """The buffer of a checkpoint.

    Args:
        config: of the run.
        plain: what `saved_buffer` returned, after a way through a checkpoint.
    """
    return load_store(plain) if config.replay.is_on else Buffer.from_plain(plain)


def saved_buffer(buffer: Buffer | Store, name: str) -> tuple[Buffer | Store, Any]:
    """What a checkpoint holds of a buffer; of a store only what is new.

    Args:
        buffer: it stays as it is.
        name: that no checkpoint of the run has had.

    Returns:
        The buffer, which knows what has been written, and host values for `Checkpoints.save`.
    """
    return save_store(buffer, name) if isinstance(buffer, Store) else (buffer, buffer.to_plain())


def without_stale(buffer: Buffer | Store, config: Config, version: int) -> Buffer | Store:
    """The buffer without what is too old for the next update; only a store holds anything from before.

    Args:
        buffer: it stays as it is.
        config: of the run.
        version: of the policy that the update will train.
    """
    return replay_store.without_stale(buffer, config.replay, version) if isinstance(buffer, Store) else buffer


def add(buffer: Buffer | Store, config: Config, scored: Scored) -> Buffer | Store:
    """The buffer with one batch more.

    Args:
        buffer: it stays as it is.
        config: of the run.
        scored: the batch.
    """
    return replay_store.add(buffer, config.replay, scored) if isinstance(buffer, Store) else replay.add(buffer, scored)


def ready(buffer: Buffer | Store, config: Config, num_found: int) -> bool:
    """Whether an update can go ahead. Every step searches at least once, whatever is stored.

    Args:
        buffer: `without_stale` for the update.
        config: of the run.
        num_found: batches that were searched since the last update.

    Raises:
        GenerationLimitError: it cannot, and more batches would not help.
    """
    if isinstance(buffer, Store):
        return num_found > 0 and replay_store.ready(buffer, config.replay)
    return replay.ready(buffer, config.dynamic_sampling, config.data.prompts_per_batch)


def draw(buffer: Buffer | Store, config: Config, key: jax.Array) -> tuple[Scored, Buffer | Store]:
    """The groups to train on, and the buffer after them.

    Args:
        buffer: `ready` for the update.
        config: of the run.
        key: PRNG key of the update; only a store draws at random.
    """
    num_groups = config.data.prompts_per_batch
    if isinstance(buffer, Store):
        return replay_store.draw(buffer, config.replay, key, num_groups, config.trained_group_size)
    return replay.draw(buffer, config.dynamic_sampling, num_groups)


def summary(buffer: Buffer | Store, version: int) -> StoreSummary | None:
    """What is kept for replay; None without a store.

    Args:
        buffer: after the draw.
        version: of the policy that is trained, from which ages count.
    """
    return replay_store.summary(buffer, version) if isinstance(buffer, Store) else None
