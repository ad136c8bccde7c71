"""From questions to prompts: what the model reads before it answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nested_reft.data.examples import Example, about
from nested_reft.prompt_format import PromptFormat, PromptTokenizer

logger = logging.getLogger(__name__)

TooLong = Literal["refuse", "drop"]


@dataclass(frozen=True)
class EncodedExample:
    """An example and its prompt.

    Attributes:
        example: where the prompt came from.
        tokens: the prompt's token ids.
        text: the prompt as the model reads it.
    """

    example: Example
    tokens: list[int]
    text: str


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PromptTokenizer,
    prompt: PromptFormat,
    max_prompt_tokens: int,
    too_long: TooLong = "refuse",
    field: str = "data.prompt",
) -> list[EncodedExample]:
    """Writes and tokenizes the prompt of each example.

    Args:
        examples: at least one.
        tokenizer: turns messages into text, and text into ids.
        prompt: how prompts are written.
        max_prompt_tokens: longest prompt allowed. Cutting one would change the question.
        too_long: `refuse` a longer prompt, or `drop` such examples with a warning that counts them.
        field: where `prompt` stands in the configuration, for messages.

    Returns:
        The examples with their prompts, in order.

    Raises:
        ValueError: no examples, or none left; a template field that an example does not have; or a
            prompt too long or empty.
    """
    if not examples:
        raise ValueError("encode_examples got no examples; every source needs at least one")
    encoded = []
    for example in examples:
        text = prompt.write(prompt.fill(example, field), tokenizer)
        with about(example):
            encoded.append(EncodedExample(example, prompt.encode(text, tokenizer), text))
    # What is dropped goes first, so that the check below is about what stays.
    if too_long == "drop":
        encoded = _drop_too_long(encoded, max_prompt_tokens)
    _check_lengths(encoded, max_prompt_tokens)
    return encoded


def _drop_too_long(encoded: list[EncodedExample], max_prompt_tokens: int) -> list[EncodedExample]:
    kept = [e for e in encoded if len(e.tokens) <= max_prompt_tokens]
    source, dropped = encoded[0].example.source, len(encoded) - len(kept)
    if not kept:
        raise ValueError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, and all {dropped} prompts of source '{source}' are longer;"
            f" the shortest has {min(len(e.tokens) for e in encoded)} tokens"
        )
    if dropped:
        logger.warning(
            "source '%s': %d of %d prompts dropped, because they are longer than data.max_prompt_tokens, which is %d",
            source,
            dropped,
            len(encoded),
            max_prompt_tokens,
        )
    return kept


def check_demonstrations(prompt: PromptFormat, heldout: Sequence[Example], field: str = "data.prompt") -> None:
    """Refuses demonstrations that give away the answer to a held-out question.

    Args:
        prompt: the format whose demonstrations are checked.
        heldout: the examples that evaluation asks.
        field: name of the format in the configuration, for messages.

    Raises:
        ValueError: a demonstration asks what a held-out example asks.
    """
    # Demonstrations hold the user's whole message, so held-out questions are filled in before they are compared.
    shown = {asked for asked, _ in prompt.demonstrations}
    for example in heldout:
        if prompt.fill(example, field) in shown:
            raise ValueError(
                f"{field}.demonstrations holds {prompt.fill(example)!r}, which is a held-out question of source"
                f" '{example.source}'; show another one"
            )


def _check_lengths(encoded: Sequence[EncodedExample], max_prompt_tokens: int) -> None:
    longest = max(encoded, key=lambda e: len(e.tokens))
    if len(longest.tokens) > max_prompt_tokens:
        raise ValueError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, but the longest prompt of source"
            f" '{longest.example.source}' has {len(longest.tokens)} tokens; raise it to at least"
            f" {len(longest.tokens)}, or set data.too_long to drop (question: {longest.example.question[:80]!r})"
        )
    # Completions are predicted from a prompt's last token, so there must be one.
    shortest = min(encoded, key=lambda e: len(e.tokens))
    if not shortest.tokens:
        raise ValueError(f"a prompt of source '{shortest.example.source}' has no tokens: {shortest.text!r}")
