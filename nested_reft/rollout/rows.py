"""How many rows decode at the same time, where completions wait for them (`rollout.refill`)."""

from __future__ import annotations

REFILL_SHARE = 8  # one of so many rows has ended before the ended ones take what waits: each time costs some copying


def refills(rows: int, completions: int) -> bool:
    """Whether so many completions wait for rows at all.

    Args:
        rows: completions that are decoded at the same time; 0 stands for all.
        completions: B * G.
    """
    return 0 < rows < completions


def cached_tokens(prompts: int, group: int, prompt_tokens: int, fed_tokens: int, rows: int) -> int:
    """Tokens whose keys and values a rollout holds at once.

    Args:
        prompts, group: B and G.
        prompt_tokens: P.
        fed_tokens: of each completion that pass through the model, C - 1.
        rows: as in `refills`.
    """
    if not refills(rows, prompts * group):
        return prompts * (prompt_tokens + group * fed_tokens)
    return rows * (prompt_tokens + fed_tokens) + stocked_prompts(rows, group) * prompt_tokens


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
