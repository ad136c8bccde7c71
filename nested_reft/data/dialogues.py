"""Preference pairs that are written as two dialogues, as HH has them."""

from __future__ import annotations

REPLY = "\n\nAssistant:"


def dialogue_pair(chosen: str, rejected: str) -> tuple[str, str, dict[str, str]] | None:
    """The prompt, the preferred reply and the metadata of a pair; None where a text has no reply of an assistant.

    Raters compared the last replies, so the dialogues are cut there. A few published pairs part before that.

    Args:
        chosen, rejected: the whole dialogues.

    Returns:
        The metadata have `rejected`, the other reply, and `rejected_dialogue` where what comes before it differs.
    """
    prompt, reply, answer = chosen.rpartition(REPLY)
    other_prompt, other_reply, other_answer = rejected.rpartition(REPLY)
    if not (reply and other_reply):
        return None
    metadata = {"rejected": other_answer.strip()}
    if other_prompt != prompt:
        metadata["rejected_dialogue"] = other_prompt.strip()
    return prompt.strip(), answer.strip(), metadata
