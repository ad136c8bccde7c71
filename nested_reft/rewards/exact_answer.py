r"""A strict reward: the completion is one number, or ends by announcing one.

A lenient parser invites reward hacking: one that picks the last number of a text pays for
listing numbers. This one reads a number only when it is the whole completion, bare or in one
wrapper, or when it ends the completion right after `=`, `:`, `is` or `equals`. It never evaluates
anything, so no text can make it slow or run code.
"""

from __future__ import annotations

import re
from fractions import Fraction

# No answer needs more digits, and the arithmetic of huge numbers would take its time.
MAX_ANSWER_CHARS = 64

# Each part is anchored and no two repeated parts can match the same text, so matching is linear.
# [0-9] rather than \d: other scripts' digits are refused.
_NUMBER = re.compile(r"([+-]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)\.?")
_ANNOUNCED = re.compile(r"(?:[=:]|\b(?:is|equals)\b)\s{0,4}" + _NUMBER.pattern)
# Models that were trained on mathematics put answers into one of these.
_WRAPPERS = ((r"\boxed{", "}"), ("<answer>", "</answer>"))


def parse_number(text: str) -> str | None:
    r"""Reads a text that is exactly one number.

    Accepted, after stripping surrounding white space: an integer or decimal number in ASCII digits
    with an optional sign, optional thousands commas (all of them, in the right places) and an
    optional full stop at its end; bare, or wrapped once as `\boxed{7}` or `<answer>7</answer>`.
    At most `MAX_ANSWER_CHARS` characters, wrapper included.

    Args:
        text: a completion, a part of one, or a gold answer; untrusted.

    Returns:
        The number without commas, wrapper and final full stop (`"1,000."` gives `"1000"`), or None
        for any other text: several numbers, words, units, expressions, exponents, nan, inf.
    """
    text = text.strip()
    if len(text) > MAX_ANSWER_CHARS:
        return None
    for start, end in _WRAPPERS:
        if text.startswith(start) and text.endswith(end):
            text = text[len(start) : -len(end)].strip()
            break
    match = _NUMBER.fullmatch(text)
    return match.group(1).replace(",", "") if match else None


def parse_answer(text: str) -> str | None:
    """The number that a completion is, or announces at its end: `5`, `2 + 3 = 5`, `The answer is 5.`

    Only the end counts and it holds one number, so naming many earns nothing.

    Args:
        text: a completion without its stop token; untrusted.

    Returns:
        The number as `parse_number` gives it, or None.
    """
    number = parse_number(text)
    if number is not None:
        return number
    # The work is bounded, however long the completion is.
    tail = text.strip()[-MAX_ANSWER_CHARS:]
    # The last announcement that could be the end: of `3 = 4 = 7`, the 7.
    start = max(tail.rfind("="), tail.rfind(":"), tail.rfind("is"), tail.rfind("equals"))
    match = _ANNOUNCED.fullmatch(tail, start) if start >= 0 else None
    return match.group(1).replace(",", "") if match else None


def exact_answer(text: str, answer: str, finished: bool) -> dict[str, float]:
    r"""Compares a completion with the gold answer, exactly: `7.0` equals `7`, `0.1` is one tenth.

    A completion that was cut off scores zero throughout. Its text is only the start of what the
    model would have said (`12` of `123`), and paying for it would teach the model not to stop.

    Args:
        text: the completion, without its stop token; untrusted.
        answer: the gold answer, a number that `parse_number` can read.
        finished: the model stopped by itself.

    Returns:
        `accuracy`: 1.0 when the completion is or announces the gold number, else 0.0; `format`: 1.0
        when the completion is one number and nothing else, else 0.0.

    Raises:
        ValueError: the gold answer is not one number.
    """
    gold = parse_number(answer)
    if gold is None:
        raise ValueError(f"the gold answer {answer[:80]!r} is not one number; check_answers finds such examples")
    if not finished:
        return {"accuracy": 0.0, "format": 0.0}
    number = parse_answer(text)
    return {
        # Fractions compare decimals exactly; as floats, two long numbers that differ could be equal.
        "accuracy": float(number is not None and Fraction(number) == Fraction(gold)),
        "format": float(parse_number(text) is not None),
    }
