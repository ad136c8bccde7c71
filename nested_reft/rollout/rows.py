"""How many rows decode at the same time, where completions wait for them (`rollout.refill`)."""

from __future__ import annotations

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
