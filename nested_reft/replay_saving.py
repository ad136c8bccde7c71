"""Saving the store for replay: a checkpoint writes what is new, and says what of the old is still there.

Completions are written once, in segments. A segment is a block: a file that never changes and that later checkpoints
share. Beside the segments a checkpoint holds one bit for each of their completions, and the marks of each row.

A segment of which more than half is gone is given up: what is left of it is written anew, with the next segment. So
files hold at most about twice what the store does. No more completions are written again than were removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from nested_reft.host_values import Block
from nested_reft.replay_store import REASONS, Entry, Segment, Store, chosen, restored, side_by_side
from nested_reft.types import Scored, completion_columns, concat, over_completions, take, with_completions

_MARKS = ("drawn", "drawn_at")  # of a row, which do not follow from its completions
_FIELDS = ("batches", "begun", "fruitless", "numbered", "saved")  # of a store, plain values


def save_store(store: Store, name: str) -> tuple[Store, dict[str, Any]]:
    """What a checkpoint holds of a store.

    Args:
        store: it stays as it is.
        name: of the segment that is written now; no other has had it.

    Returns:
        The store, which now knows what has been written, and host values for `Checkpoints.save`.
    """
    segments, given_up = list[Segment](), list[Segment]()
    for segment in _without_removed(store):
        (segments if 2 * segment.kept_M.sum() >= len(segment.kept_M) else given_up).append(segment)
    blocks = [Block(segment.name) for segment in segments]
    moved_M = np.concatenate([np.zeros(0, np.int64), *(segment.number_M[segment.kept_M] for segment in given_up)])
    moved_row_M = np.concatenate([np.zeros(0, np.int64), *(segment.row_M[segment.kept_M] for segment in given_up)])
    new_R = np.flatnonzero((store.rows_R["count"] > 0) & (store.rows_R["last"] >= store.saved))
    row_R = np.union1d(new_R, moved_row_M)
    if len(row_R):
        segment, values = _written(store, name, row_R, moved_M)
        segments.append(segment)
        blocks.append(Block(name, values))
    store = dataclasses.replace(store, saved=store.numbered, segments=tuple(segments), removed=())
    kept = [segment.kept_M for segment in segments]
    plain = {
        "segments": blocks,
        "size_S": [len(kept_M) for kept_M in kept],
        "kept": np.packbits(np.concatenate([np.zeros(0, bool), *kept])),
        "marks": {mark: store.rows_R[mark] for mark in _MARKS},
        "turned_away": dict(store.turned_away),
    }
    return store, plain | {field: getattr(store, field) for field in _FIELDS}


def _without_removed(store: Store) -> list[Segment]:
    if not store.removed:
        return list(store.segments)
    removed = np.sort(np.concatenate(store.removed))
    return [
        dataclasses.replace(segment, kept_M=segment.kept_M & ~np.isin(segment.number_M, removed))
        for segment in store.segments
    ]


def _written(
    store: Store, name: str, row_R: Int[np.ndarray, " R"], moved_M: Int[np.ndarray, " M"]
) -> tuple[Segment, dict[str, Any]]:
    """A segment of the new completions of some rows and of those that move, and the values of its block."""
    groups, numbers, arrivals = list[Scored](), list[np.ndarray](), list[np.ndarray]()
    for row in row_R.tolist():
        entry = store.entries[row]
        assert entry is not None
        index_N = np.flatnonzero((entry.number_N >= store.saved) | np.isin(entry.number_N, moved_M))
        groups.append(chosen(entry.group, index_N))
        numbers.append(entry.number_N[index_N])
        arrivals.append(entry.arrival_N[index_N])
    number_M = np.concatenate(numbers)
    row_M = np.repeat(row_R, [len(number_N) for number_N in numbers])
    values = {
        "number_M": number_M,
        "row_M": row_M,
        "arrival_M": np.concatenate(arrivals),
        # All completions side by side: few large arrays, however many prompts there are. Each prompt comes with its
        # first completion once more.
        "row_R": row_R,
        "prompts": concat([chosen(group, np.zeros(1, np.int64)) for group in groups]).to_plain(),
        "completions": over_completions(side_by_side, *groups).to_plain(),
    }
    return Segment(name, number_M, row_M, np.ones(len(number_M), bool)), values


def load_store(plain: dict[str, Any]) -> Store:
    """The store that `save_store` took apart.

    Args:
        plain: the host values that it returned, after a way through a checkpoint: all blocks have their values.
    """
    ends = np.cumsum(plain["size_S"], dtype=np.int64)
    kept = np.split(np.unpackbits(plain["kept"], count=int(ends[-1]) if len(ends) else 0).astype(bool), ends[:-1])
    segments = tuple(
        Segment(block.name, block.values["number_M"], block.values["row_M"], kept_M)
        # A split has one part where there is nothing to split.
        for block, kept_M in zip(plain["segments"], kept, strict=False)
    )
    marks = plain["marks"]
    return restored(
        _entries(segments, [block.values for block in plain["segments"]], len(marks["drawn"])),
        marks,
        segments=segments,
        turned_away=dict.fromkeys(REASONS, 0) | plain["turned_away"],  # earlier versions had fewer
        **{field: plain[field] for field in _FIELDS},
    )


def _entries(segments: Sequence[Segment], values: Sequence[dict[str, Any]], num_rows: int) -> list[Entry | None]:
    """The completions that are still there, by row."""
    entries: list[Entry | None] = [None] * num_rows
    if not segments:
        return entries
    row_M = np.concatenate([segment.row_M for segment in segments])
    number_M = np.concatenate([segment.number_M for segment in segments])
    arrival_M = np.concatenate([value["arrival_M"] for value in values])
    # Rows one after the other, and in each row the order of arrival.
    order_M = np.lexsort((number_M, row_M))
    order_M = order_M[np.concatenate([segment.kept_M for segment in segments])[order_M]]
    columns = completion_columns(
        over_completions(side_by_side, *(Scored.from_plain(value["completions"]) for value in values))
    )
    columns = {name: column[:, order_M] for name, column in columns.items()}
    prompts = concat([Scored.from_plain(value["prompts"]) for value in values])
    # A row may have been another prompt's before, and the later segment has its present one.
    index_of = {row: index for index, row in enumerate(np.concatenate([value["row_R"] for value in values]).tolist())}
    row_R, start_R = np.unique(row_M[order_M], return_index=True)
    for row, start, end in zip(row_R.tolist(), start_R, [*start_R[1:], len(order_M)], strict=True):
        # Copies, so that no row keeps all the others in memory.
        own = {name: column[:, start:end].copy() for name, column in columns.items()}
        group = with_completions(take(prompts, [index_of[row]]), own)
        index_N = order_M[start:end]
        entries[row] = Entry(group, arrival_M[index_N], number_M[index_N])
    return entries
