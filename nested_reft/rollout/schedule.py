"""How decoding is laid out: rows at once, slots of their caches, and when rows leave or are refilled.

Everything here is known when a program compiles, so that predictions of memory and of costs read the same numbers.
"""

from __future__ import annotations

from nested_reft.sharding import shares

COMPACT_FROM = 32  # completion tokens; shorter rollouts end before dropping finished rows could pay
COMPACTIONS = 3  # each compiles the decode step once more
GROW_FROM = 64  # completion tokens; with fewer, reading caches half empty costs less than compiling for smaller ones
REFILL_SHARE = 8  # rows are refilled when an eighth of them has ended, because each refill copies caches


def refills(rows: int, completions: int) -> bool:
    """Whether so many completions wait for rows at all.

    Args:
        rows: completions that are decoded at the same time; 0 stands for all.
        completions: B * G.
    """
    return 0 < rows < completions


def cached_tokens(
    prompts: int, group: int, prompt_tokens: int, completion_tokens: int, rows: int, forced_tokens: int = 0
) -> int:
    """Tokens whose keys and values a rollout holds at once, or has room for.

    While few of its slots are filled, a program also holds a copy of these, which does not count here.

    Args:
        prompts, group: B and G.
        prompt_tokens: P.
        completion_tokens: C.
        rows: as in `refills`.
        forced_tokens: F, slots that prefixes take.
    """
    is_refilled = refills(rows, prompts * group)
    slots = row_slots(completion_tokens, forced_tokens, is_refilled)
    if not is_refilled:
        return prompts * (prompt_tokens + group * slots)
    waiting = stocked_prompts(rows, group) * (prompt_tokens + group * forced_tokens)
    return rows * (prompt_tokens + slots) + waiting


def row_slots(completion_tokens: int, forced_tokens: int, is_refilled: bool) -> int:
    """Slots that a row's own keys and values take in the end.

    Args:
        completion_tokens: C.
        forced_tokens: F; where nothing is forced, 0.
        is_refilled: whether the row takes one completion after the other.
    """
    # Rows that are refilled begin at any slot, so one that runs needs room for one more token than it holds.
    if is_refilled:
        return max(completion_tokens, forced_tokens + 1)
    # The last token is never fed. What is sampled comes behind the slots of the prefixes, however short these are.
    return forced_tokens + completion_tokens - 1


def taken_together(rows: int) -> int:
    """Rows that take new completions at the same time, or fewer at the end.

    Args:
        rows: in all.
    """
    return max(rows // REFILL_SHARE, 1)


def stocked_prompts(rows: int, group: int) -> int:
    """Prompts that run at the same time, before their completions are handed out.

    Args:
        rows: completions that are decoded at the same time.
        group: G.
    """
    return -(-taken_together(rows) // group)


def compactions_of(batch: int, group: int, size: int) -> list[tuple[int, int]]:
    """Prompts and completions of each that decoding shrinks to, one after the other.

    Groups are halved first: their rows share a prompt, so a compacted batch copies no prompt's caches. Where devices
    share the prompts, all of them stay: a prompt that moved to another device would take its caches along.
    """
    shapes, moves = [], shares("batch") == 1
    while size >= COMPACT_FROM and len(shapes) < COMPACTIONS and batch * group >= 4 and (group > 1 or moves):
        batch, group = (batch, -(-group // 2)) if group > 1 else (-(-batch // 2), group)
        shapes.append((batch, group))
    return shapes


def cache_sizes(size: int) -> list[int]:
    """Tokens that caches hold room for, one after the other: every step reads them whole."""
    # The last token is never fed, so it needs no slot.
    last = max(size - 1, 1)
    return [-(-last // 4), -(-last // 2), last] if size >= GROW_FROM else [last]


def decode_loops(batch: int, group: int, size: int) -> list[int]:
    """Steps of each of the loops that decode a batch, in their order, where no row ends before its limit.

    Args:
        batch, group, size: B, G and C.
    """
    ends = [*cache_sizes(size)[:-1], max(size - 1, 0)]
    steps = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    # No row leaves, so the loop before the first compaction goes on to the end, and those behind it have nothing to do.
    return steps + [0] * len(compactions_of(batch, group, size))
