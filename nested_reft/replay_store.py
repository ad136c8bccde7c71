"""Completions that are kept after they were trained on, to be trained on again: the replay of trajectory balance.

Pure rules on a value, like those of `replay`: `add` puts a batch into the store, `without_stale` takes out what is too
old, `ready` says whether an update can go ahead, `draw` makes its groups. A draw takes nothing out.

Completions are stored by prompt. A prompt's group may join completions of several versions, plans and searchers, and
each completion says what drew it. What is decided for each group:

    with probability m           a prompt that has completions of the newest version in the store; its newest ones
    otherwise                    any prompt; completions with probability proportional to exp(reward / temperature)

Either way all prompts have their turn before one comes again. A group of newest completions takes those of older
versions where the newest version left fewer than K. A prompt with fewer than K in all has each of them once, and
repetitions fill its group. A prompt with a single completion is drawn only where every prompt of the same kind has but
one, because a group of equal completions has nothing to compare.

Source: TBA (Bartoldson et al., 2025, arXiv 2503.18929, section 4). Departures: "newest" goes by the version whose
weights sampled and not by the time of arrival, and repetitions come only after every stored completion.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from nested_reft.literals import check_whole
from nested_reft.replay import GenerationLimitError
from nested_reft.types import Prompts, Rollouts, Scored, concat, over_completions, take
from nested_reft.untrusted import MAX_WHOLE

FRUITLESS_BATCHES = 100  # in a row that leave the store as small as it was, and the wait for a prefill ends
REASONS = ("unscored", "uncounted", "unsafe", "low_reward", "long", "duplicate", "crowded", "full", "stale")
"""Why a completion is turned away or taken out: it has no reward; it does not count; `reward.safety` gave it 0 or less;
its reward is too low; it is too long; the same tokens came again; its prompt has too many newer ones; the store has; it
is too old."""


@dataclass(frozen=True)
class ReplayConfig:
    """What is kept for replay, and what an update draws of it.

    Attributes:
        capacity: completions that are kept, the newest ones; 0 trains on each group once, as it is found.
        recent_share: m, in [0, 1]: probability with which a group is made of the newest completions of a prompt
            that the newest version sampled for.
        inverse_temperature: of the softmax over rewards that chooses the completions of the other groups; 0 is uniform.
        completions_per_prompt: kept of each prompt, the newest ones.
        group_size: K, completions of a group that an update trains on; None for `rollout.group_size`, which a search
            finds of each prompt.
        prefill: completions that the store has before the first update.
        max_staleness: versions that a completion may be behind; older ones are taken out. None for no limit. New
            batches must be within it, so where searchers work ahead it is at least the age of those.
        minimum_reward: a completion with less is not kept; None for no limit.
        maximum_tokens: a longer completion is not kept; None for no limit.
    """

    capacity: int = 0
    recent_share: float | None = None
    inverse_temperature: float = 0.0
    completions_per_prompt: int = 100
    group_size: int | None = None
    prefill: int = 0
    max_staleness: int | None = None
    minimum_reward: float | None = None
    maximum_tokens: int | None = None

    def __post_init__(self):
        check_whole("replay.capacity", self.capacity, 0, MAX_WHOLE, "off")
        check_whole("replay.completions_per_prompt", self.completions_per_prompt, 2, MAX_WHOLE)
        check_whole("replay.prefill", self.prefill, 0, MAX_WHOLE)
        if self.prefill > self.capacity:
            raise ValueError(
                f"replay.prefill is {self.prefill}; allowed is 0 to replay.capacity, which is {self.capacity}"
            )
        for name, least in (("max_staleness", 0), ("maximum_tokens", 1), ("group_size", 2)):
            if getattr(self, name) is not None:
                check_whole(f"replay.{name}", getattr(self, name), least, MAX_WHOLE)
        if self.group_size is not None and not self.is_on:
            raise ValueError(
                f"replay.group_size is {self.group_size} and replay.capacity 0; without a store, an update trains on"
                " all completions that a search finds: set replay.capacity, or leave the size to rollout.group_size"
            )
        if self.is_on and self.recent_share is None:
            raise ValueError(
                f"replay.recent_share is None and replay.capacity {self.capacity}; replay needs a share from 0 to 1"
            )
        if self.recent_share is not None and not 0 <= self.recent_share <= 1:
            raise ValueError(f"replay.recent_share is {self.recent_share}; allowed is 0 to 1")
        for name in ("inverse_temperature", "minimum_reward"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"replay.{name} is {value}; allowed is a finite number")

    @property
    def is_on(self) -> bool:
        """Whether completions are kept after an update."""
        return self.capacity > 0


# One row per prompt: what choosing reads, so that a step looks at no completion but those that it moves.
_ROW = np.dtype(
    [
        ("count", np.int64),  # completions; 0 marks a row that is free
        ("newest", np.int64),  # versions
        ("oldest", np.int64),
        ("arrival", np.int64),  # of the completion that arrived first
        ("last", np.int64),  # the number of the completion that arrived last
        ("reward", np.float64),  # sums
        ("version", np.float64),
        ("drawn", bool),  # in the present round through all prompts
        ("drawn_at", np.int64),  # the newest version for which it was drawn as a recent one
    ]
)
_PromptKey = tuple[int, str, bytes]
_Key = tuple[int, str, bytes, bytes]


@dataclass(frozen=True)
class Entry:
    """The completions of one prompt.

    Attributes:
        group: one group of N completions, in the order of their arrival.
        arrival_N: the number of the batch that each came with.
        number_N: the completions' own numbers, which grow in the order of arrival.
    """

    group: Scored
    arrival_N: Int[np.ndarray, " N"]
    number_N: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Segment:
    """Completions that a checkpoint wrote together, in a file that does not change; `replay_saving` makes them.

    Attributes:
        name: of the file.
        number_M: their numbers.
        row_M: their rows.
        kept_M: False where a completion has been taken out since.
    """

    name: str
    number_M: Int[np.ndarray, " M"]
    row_M: Int[np.ndarray, " M"]
    kept_M: Bool[np.ndarray, " M"]


@dataclass(frozen=True)
class Store:
    """What is kept. No value of it changes after it was made.

    Attributes:
        entries: of each prompt, by row; None where a row is free.
        row_of: the row of each prompt.
        rows_R: what is known of each row.
        batches: that were added so far.
        begun: whether an update was drawn, so that the prefill is over.
        fruitless: batches in a row that left the store no larger.
        turned_away: completions that were not kept or taken out, by reason.
        numbered: completions that were put in so far, which is the number that the next one gets.
        saved: completions with numbers below this are in segments.
        segments: what checkpoints have written and still need.
        removed: numbers of completions that are in segments and were taken out after the last checkpoint.
    """

    entries: list[Entry | None] = field(default_factory=list)
    row_of: dict[_Key, int] = field(default_factory=dict)
    rows_R: np.ndarray = field(default_factory=lambda: np.zeros(0, _ROW))
    batches: int = 0
    begun: bool = False
    fruitless: int = 0
    turned_away: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    numbered: int = 0
    saved: int = 0
    segments: tuple[Segment, ...] = ()
    removed: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return int(self.rows_R["count"].sum())


def side_by_side(*values: np.ndarray) -> np.ndarray:
    """Completions of the same prompts, as `over_completions` joins them.

    Args:
        values: arrays `[B, G, ...]`.
    """
    return np.concatenate(values, axis=1)


def chosen(group: Scored, index_N: Int[np.ndarray, " N"]) -> Scored:
    """Those completions of one group, in that order.

    Args:
        group: one.
        index_N: which of its completions; one may come twice.
    """
    return over_completions(lambda column: column[:, index_N], group)


def _prompt_key(prompts: Prompts, row: int, tokens_P: np.ndarray) -> _PromptKey:
    """What tells a prompt of these tokens from others."""
    return int(prompts.source_B[row]), prompts.answers[row], np.asarray(tokens_P, np.int32).tobytes()


def _key(group: Scored) -> _Key:
    """What tells the prompt of one group from others. A forced prefix belongs to it: log Z is that of what follows."""
    rollouts = group.rollouts
    prompt_P = rollouts.prompt_BP[0, : rollouts.prompt_length_B[0]]
    prefix_F = rollouts.tokens_BGC[0, 0, : rollouts.forced_BG[0, 0]]
    return (*_prompt_key(group.prompts, 0, np.asarray(prompt_P)), prefix_F.tobytes())


class _Draft:
    """A store while it is changed: copies of what a change touches, so that the old value stays as it was."""

    def __init__(self, store: Store):
        self._before = store
        self.entries, self.row_of, self.rows_R = list(store.entries), dict(store.row_of), store.rows_R.copy()
        self.turned_away, self.numbered, self.removed = dict(store.turned_away), store.numbered, list(store.removed)
        self._free: Iterator[int] = iter(())  # rows that no prompt has, found when one is needed

    def store(self, **changes: Any) -> Store:
        """What it became."""
        return dataclasses.replace(
            self._before,
            entries=self.entries,
            row_of=self.row_of,
            rows_R=self.rows_R,
            turned_away=self.turned_away,
            numbered=self.numbered,
            removed=tuple(self.removed),
            **changes,
        )

    def put(self, group: Scored, per_prompt: int) -> None:
        """Adds the completions of one group behind those of its prompt."""
        key = _key(group)
        row, arrival_N = self.row_of.get(key), np.full(len(group.texts[0]), self._before.batches, np.int64)
        number_N = self.numbered + np.arange(len(arrival_N))
        self.numbered += len(arrival_N)
        old = None if row is None else self.entries[row]
        if old is not None:
            group = over_completions(side_by_side, old.group, group)
            arrival_N = np.concatenate([old.arrival_N, arrival_N])
            number_N = np.concatenate([old.number_N, number_N])
        kept_N = _last_of_equal(group.rollouts)
        self.turned_away["duplicate"] += len(arrival_N) - len(kept_N)
        self.turned_away["crowded"] += max(len(kept_N) - per_prompt, 0)
        kept_N = kept_N[-per_prompt:]
        self._note_removed(np.delete(number_N, kept_N))
        if row is None:
            row = self.row_of[key] = self._free_row()
        self.set(row, Entry(chosen(group, kept_N), arrival_N[kept_N], number_N[kept_N]))

    def keep(self, row: int, kept_N: Bool[np.ndarray, " N"], reason: str) -> None:
        """Takes the other completions out of a row."""
        entry = self.entries[row]
        assert entry is not None
        self.turned_away[reason] += int((~kept_N).sum())
        self._note_removed(entry.number_N[~kept_N])
        if kept_N.any():
            index_N = np.flatnonzero(kept_N)
            self.set(row, Entry(chosen(entry.group, index_N), entry.arrival_N[index_N], entry.number_N[index_N]))
        else:
            del self.row_of[_key(entry.group)]
            self.entries[row] = None
            self.rows_R[row] = np.zeros((), _ROW)

    def _note_removed(self, number_N: Int[np.ndarray, " N"]) -> None:
        saved_N = number_N[number_N < self._before.saved]
        if len(saved_N):
            self.removed.append(saved_N)

    def set(self, row: int, entry: Entry) -> None:
        """Puts an entry into a row, and what is known of it beside it; the marks of drawing stay."""
        self.entries[row] = entry
        version_N = entry.group.rollouts.version_BG[0]
        values = {
            "count": len(version_N),
            "newest": version_N.max(),
            "oldest": version_N.min(),
            "arrival": entry.arrival_N.min(),
            "last": entry.number_N.max(),
            "reward": entry.group.reward_BG.sum(dtype=np.float64),
            "version": version_N.sum(dtype=np.float64),
        }
        for name, value in values.items():
            self.rows_R[name][row] = value

    def _free_row(self) -> int:
        row = next(self._free, None)
        if row is None:
            # All at once, so that a batch of new prompts looks at the rows once.
            free_F = np.flatnonzero(self.rows_R["count"] == 0)
            if not len(free_F):
                # Doubling keeps the cost of growth in proportion to what is stored.
                size, more = len(self.rows_R), max(len(self.rows_R), 16)
                free_F = np.arange(size, size + more)
                self.rows_R = np.concatenate([self.rows_R, np.zeros(more, _ROW)])
                self.entries += [None] * more
            self._free = iter(free_F.tolist())
            row = next(self._free)
        self.rows_R["drawn_at"][row] = -1
        return row


def restored(entries: list[Entry | None], drawn: dict[str, np.ndarray], **fields: Any) -> Store:
    """A store of entries that were saved.

    Args:
        entries: of each row.
        drawn: of each row, the marks of drawing, by their names in `rows_R`.
        fields: the other fields of a store, without those that follow from the entries.
    """
    draft = _Draft(Store(**fields))
    draft.entries, draft.rows_R = entries, np.zeros(len(entries), _ROW)
    for row, entry in enumerate(entries):
        if entry is not None:
            draft.set(row, entry)
            draft.row_of[_key(entry.group)] = row
    for name, flags in drawn.items():
        draft.rows_R[name] = flags
    return draft.store()


def _last_of_equal(rollouts: Rollouts) -> Int[np.ndarray, " M"]:
    """The indices of one group's completions without those that come again later, in order."""
    # The length tells a completion from one that ends with padding's token.
    rows_NC = np.concatenate([rollouts.length_BG[0][:, None], rollouts.tokens_BGC[0]], axis=1)
    rows_N = np.ascontiguousarray(rows_NC[::-1]).view(f"V{rows_NC.itemsize * rows_NC.shape[1]}")[:, 0]
    _, first_M = np.unique(rows_N, return_index=True)
    return np.sort(len(rows_N) - 1 - first_M)


def add(store: Store, config: ReplayConfig, scored: Scored) -> Store:
    """The store with the completions of one batch that may be kept.

    Completions of equal tokens are kept once, with the newest version. Where there are too many, the oldest go.

    Args:
        store: it stays as it is.
        config: the rule.
        scored: B groups.
    """
    draft, before = _Draft(store), len(store)
    admitted_BG = _admitted(draft, config, scored)
    # The prefixes have been written into the tokens, so the prompts need not hold them as well.
    scored = dataclasses.replace(scored, prompts=dataclasses.replace(scored.prompts, forced=None))
    for b in np.flatnonzero(admitted_BG.any(axis=1)):
        group = take(scored, [int(b)])
        for index_N in _of_equal_prefix(group.rollouts, np.flatnonzero(admitted_BG[b])):
            draft.put(chosen(group, index_N), config.completions_per_prompt)
    _make_room(draft, config.capacity)
    found = draft.store(batches=store.batches + 1)
    return dataclasses.replace(found, fruitless=0 if len(found) > before else store.fruitless + 1)


def _admitted(draft: _Draft, config: ReplayConfig, scored: Scored) -> Bool[np.ndarray, "B G"]:
    """The completions that may be kept; the others are counted under the first reason that holds."""
    rollouts, low, high = scored.rollouts, config.minimum_reward, config.maximum_tokens
    safety_BG, nothing_BG = scored.parts.get("safety"), np.zeros_like(scored.scored_BG)
    refused = {
        "unscored": ~scored.scored_BG,
        "uncounted": ~np.asarray(rollouts.counted_BG),
        "unsafe": nothing_BG if safety_BG is None else safety_BG <= 0,
        "low_reward": nothing_BG if low is None else scored.reward_BG < low,
        "long": nothing_BG if high is None else np.asarray(rollouts.length_BG) > high,
    }
    admitted_BG = np.ones_like(scored.scored_BG)
    for reason, refused_BG in refused.items():
        draft.turned_away[reason] += int((admitted_BG & refused_BG).sum())
        admitted_BG = admitted_BG & ~refused_BG
    return admitted_BG


def _of_equal_prefix(rollouts: Rollouts, index_N: Int[np.ndarray, " N"]) -> Iterator[Int[np.ndarray, " M"]]:
    """Some completions of one group, apart by the prefix that was forced on them."""
    forced_N = rollouts.forced_BG[0, index_N]
    if not forced_N.any():
        yield index_N
        return
    tokens_NC = rollouts.tokens_BGC[0, index_N]
    prefix_NC = np.where(np.arange(tokens_NC.shape[1]) < forced_N[:, None], tokens_NC, -1)
    _, prefix_N = np.unique(prefix_NC, axis=0, return_inverse=True)
    for prefix in range(prefix_N.max() + 1):
        yield index_N[prefix_N.reshape(-1) == prefix]


def _make_room(draft: _Draft, capacity: int) -> None:
    """Takes the completions that arrived first out, prompt by prompt, until the others fit."""
    surplus = int(draft.rows_R["count"].sum()) - capacity
    if surplus <= 0:
        return
    row_R = np.flatnonzero(draft.rows_R["count"] > 0)
    arrival_R = draft.rows_R["arrival"][row_R]
    # Each turn takes out one completion at least, so only so many rows can have one, and those that are as old as the
    # last of them. A row that keeps some of its completions waits again, with the oldest that is left.
    last = np.partition(arrival_R, surplus - 1)[surplus - 1] if surplus < len(row_R) else arrival_R.max()
    is_old_R = arrival_R <= last
    waiting = list(zip(arrival_R[is_old_R].tolist(), row_R[is_old_R].tolist(), strict=True))
    heapq.heapify(waiting)
    while surplus > 0:
        first, row = heapq.heappop(waiting)
        entry = draft.entries[row]
        assert entry is not None
        # No more of them than there are too many.
        kept_N = (entry.arrival_N > first) | (np.cumsum(entry.arrival_N == first) > surplus)
        surplus -= int((~kept_N).sum())
        draft.keep(row, kept_N, "full")
        if kept_N.any():
            heapq.heappush(waiting, (int(draft.rows_R["arrival"][row]), row))


def without_stale(store: Store, config: ReplayConfig, version: int) -> Store:
    """The store without completions that are too old for the next update.

    Args:
        store: it stays as it is.
        config: the rule.
        version: of the policy that the update will train.
    """
    if config.max_staleness is None:
        return store
    oldest = version - config.max_staleness
    stale = np.flatnonzero((store.rows_R["count"] > 0) & (store.rows_R["oldest"] < oldest))
    if not len(stale):
        return store
    draft = _Draft(store)
    for row in stale.tolist():
        entry = draft.entries[row]
        assert entry is not None
        draft.keep(row, np.asarray(entry.group.rollouts.version_BG[0] >= oldest), "stale")
    return draft.store()


def ready(store: Store, config: ReplayConfig) -> bool:
    """Whether an update can go ahead: there is something to draw from and, the first time, the prefill.

    Args:
        store: `without_stale` for the update.
        config: the rule.

    Raises:
        GenerationLimitError: batch after batch left the store too small.
    """
    size = len(store)
    if size >= max(1, 0 if store.begun else config.prefill):
        return True
    if store.fruitless >= FRUITLESS_BATCHES:
        away = ", ".join(f"{reason} {count}" for reason, count in store.turned_away.items() if count)
        raise GenerationLimitError(
            f"{store.fruitless} batches in a row added nothing to the {size} completions for replay, and an update"
            f" waits for {max(1, config.prefill)} (turned away: {away}). Lower replay.prefill, or admit more"
        )
    return False


def draw(store: Store, config: ReplayConfig, key: jax.Array, num_groups: int, group_size: int) -> tuple[Scored, Store]:
    """The groups that an update trains on, and the store, which remembers whose turn it was.

    Args:
        store: `ready` for the update.
        config: the rule.
        key: PRNG key of the update.
        num_groups: B.
        group_size: K, the completions of a group.
    """
    assert config.recent_share is not None, "replay is off"
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    rows_R, newest = store.rows_R.copy(), _newest_version(store)
    stored_R = rows_R["count"] > 0
    is_recent_B = random.random(num_groups) < config.recent_share
    row_B = np.zeros(num_groups, np.int64)
    # A prompt has had its turn as a recent one if it was drawn for the version that is still the newest.
    had_turn_R = rows_R["drawn_at"] == newest
    row_B[is_recent_B] = _take_turns(
        stored_R & (rows_R["newest"] == newest), had_turn_R, rows_R["count"], random, int(is_recent_B.sum())
    )
    rows_R["drawn_at"] = np.where(had_turn_R, newest, -1)
    row_B[~is_recent_B] = _take_turns(stored_R, rows_R["drawn"], rows_R["count"], random, int((~is_recent_B).sum()))
    groups = []
    for row, is_recent in zip(row_B.tolist(), is_recent_B.tolist(), strict=True):
        entry = store.entries[row]
        assert entry is not None
        if is_recent:
            index_K = _newest_completions(entry.group, group_size, random)
        else:
            index_K = _weighed_completions(entry.group, config.inverse_temperature, group_size, random)
        groups.append(chosen(entry.group, index_K))
    return concat(groups), dataclasses.replace(store, rows_R=rows_R, begun=True)


def _newest_version(store: Store) -> int:
    return int(store.rows_R["newest"][store.rows_R["count"] > 0].max())


def _take_turns(
    pool_R: Bool[np.ndarray, " R"],
    had_turn_R: Bool[np.ndarray, " R"],
    count_R: Int[np.ndarray, " R"],
    random: np.random.Generator,
    number: int,
) -> Int[np.ndarray, " M"]:
    """Rows of a pool, none twice before all had their turn; marks them in `had_turn_R`."""
    # A group of one completion, repeated, teaches nothing.
    several_R = pool_R & (count_R > 1)
    pool_R = several_R if several_R.any() else pool_R
    found: list[int] = []
    while len(found) < number:
        waiting = np.flatnonzero(pool_R & ~had_turn_R)
        if not len(waiting):
            had_turn_R[pool_R] = False
            continue
        chosen = random.permutation(waiting)[: number - len(found)]
        had_turn_R[chosen] = True
        found += chosen.tolist()
    return np.array(found, np.int64)


def _newest_completions(group: Scored, number: int, random: np.random.Generator) -> Int[np.ndarray, " K"]:
    """Those of the newest versions, each once, and repetitions of them where there are too few."""
    # De-duplication may leave one completion of the newest version, and copies of it alone would teach nothing. The
    # sort is stable, so completions of one version go by their arrival.
    index_N = np.argsort(group.rollouts.version_BG[0], kind="stable")[-number:]
    return np.concatenate([index_N, random.choice(index_N, number - len(index_N))])


def _weighed_completions(
    group: Scored, inverse_temperature: float, number: int, random: np.random.Generator
) -> Int[np.ndarray, " K"]:
    """Drawn by the softmax of their rewards, none twice, and then repetitions where there are too few."""
    logit_N = inverse_temperature * group.reward_BG[0].astype(np.float64)
    # The largest of logits with Gumbel noise are a draw without replacement.
    index_N = np.argsort(-(logit_N + random.gumbel(size=len(logit_N))), kind="stable")[:number]
    probability_N = np.exp(logit_N - logit_N.max())
    repeated = random.choice(len(logit_N), number - len(index_N), p=probability_N / probability_N.sum())
    return np.concatenate([index_N, repeated])


def best_right(store: Store, prompts: Prompts) -> list[list[int]]:
    """The policy's own best completion of each prompt, as a reference that a rollout can start from (dataset reset).

    It is right, and of those the one with the highest reward, the latest where several have it. What was forced on it
    belongs to it.

    Args:
        store: what is kept.
        prompts: B prompts.

    Returns:
        Its tokens, the stop token included; none where the store has no right completion of two tokens or more.
    """
    rows_of = defaultdict[_PromptKey, list[int]](list)
    for key, row in store.row_of.items():
        rows_of[key[:3]].append(row)
    found = []
    for b, length in enumerate(prompts.length_B):
        rows = rows_of.get(_prompt_key(prompts, b, prompts.tokens_BP[b, :length]), [])
        entries = [store.entries[row] for row in rows]
        right = [each for entry in entries if entry is not None for each in _right_completions(entry)]
        found.append(max(right)[-1] if right else [])
    return found


def _right_completions(entry: Entry) -> Iterator[tuple[float, int, list[int]]]:
    """Reward, number and tokens of each right completion of one prompt that leaves something to force."""
    group, length_N = entry.group, entry.group.rollouts.length_BG[0]
    for index in np.flatnonzero((group.accuracy_BG[0] >= 1) & (length_N > 1)):
        tokens_C = group.rollouts.tokens_BGC[0, index, : length_N[index]]
        yield float(group.reward_BG[0, index]), int(entry.number_N[index]), tokens_C.tolist()


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds, in a few numbers.

    Attributes:
        completions, prompts: how many.
        age: mean number of versions that a completion is behind.
        reward: mean.
        turned_away: completions that were not kept or taken out since the run began, by reason.
    """

    completions: int
    prompts: int
    age: float
    reward: float
    turned_away: dict[str, int]


def summary(store: Store, version: int) -> StoreSummary:
    """The summary of a store.

    Args:
        store: at least one completion.
        version: of the policy that is trained, from which ages count.
    """
    size = len(store)
    return StoreSummary(
        completions=size,
        prompts=int((store.rows_R["count"] > 0).sum()),
        age=version - float(store.rows_R["version"].sum()) / size,
        reward=float(store.rows_R["reward"].sum()) / size,
        turned_away={reason: count for reason, count in store.turned_away.items() if count},
    )
