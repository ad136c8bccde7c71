r"""Mathematical answers: a completion must mark its one final answer, and that answer must equal the gold one.

A checker that searches a text for the right answer pays for listing numbers. This one reads an
answer only where the completion says that it is one: `\boxed{...}`, `<answer>...</answer>`, or a last
line `#### ...` as in GSM8K. Numbers are compared here, exactly; everything else by math-verify, which
parses LaTeX with SymPy and can take for ever, so it runs in a worker that can be killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

from nested_reft.data.boxes import boxed
from nested_reft.rewards.notation import (
    differ_in_notation,
    exact_value,
    for_verifier,
    has_variables,
    measures,
    number,
    percentage,
    plain,
    ratio,
    without_units,
    words,
)

# Longer answers are hardly ever right, and their algebra may take very long.
MAX_MATH_CHARS = 300

# No tag may begin inside another, so a text of many opening tags stays quick to search.
_TAGGED = re.compile(r"<answer>((?:(?!<answer>|</answer>).)*)</answer>", re.DOTALL)
_HASHED = re.compile(r"####[ \t]*(\S.*)")
# So many ways to write one answer is what nobody does; it bounds the work on a text of a million boxes.
_MAX_MARKED = 8
# Operations that leave something to calculate. A fraction in lowest terms, a mixed number and a power of ten with a
# factor are how numbers are written, and are taken out before.
_FRACTION = re.compile(
    r"\\frac\{?(-?[0-9]{1,18})\}?\{?(-?[0-9]{1,18})\}?|(?<![0-9.])([0-9]{1,18})/([0-9]{1,18})(?![0-9.])"
)
_POWER_OF_TEN = re.compile(r"(?<=[0-9])(?:\\times|\\cdot|\*)\s?10\^\{?-?[0-9]+\}?")
_OPERATION = re.compile(
    r"[+*/!^]|(?<=[^=(,{])-|[0-9)]\(|\\(?:times|cdot|div|pm|mp|frac|sqrt|d?binom|log|ln|exp|sum|prod)"
)


def marked_answer(text: str) -> str | None:
    r"""The one answer that a text marks as final, or None if it marks none, or several different ones.

    `<answer>\boxed{7}</answer>` is one answer; `\boxed{7} ... \boxed{8}` is none, whichever is right.

    Args:
        text: a completion without its stop token; untrusted.
    """
    tagged = [match.strip() for match in _TAGGED.findall(text)]
    # Only the last line counts, as in GSM8K.
    hashed = _HASHED.fullmatch(text.rstrip().rsplit("\n", 1)[-1])
    found = [_unboxed(answer) for answer in (*tagged, *([hashed.group(1)] if hashed else []))] + boxed(text)
    # An answer that is marked twice is still one answer, also where one of them has a thousands comma.
    if not found or len(set(found)) > _MAX_MARKED:
        return None
    return found[0] if len({one_form(answer) for answer in found}) == 1 else None


def compare_quickly(answer: str, gold: str) -> bool | None:
    r"""Whether an answer is right, where that needs no algebra; None where it does.

    Words are compared as words: a parser of formulas would take them for products of letters, and so take
    anagrams for equal. Of a percentage the sign may be missing: 50 % is 0.5, and questions that ask for a
    percentage are answered by 50 as well. Wrong without a look are long answers and those in digits of other scripts.

    Args:
        answer: what the completion marked; untrusted.
        gold: the gold answer.

    Returns:
        True or False where that is certain; None where math-verify has to decide.
    """
    answer, gold = answer.strip(), gold.strip()
    # Equal texts are equal answers, however long and in whatever script.
    if answer == gold:
        return bool(answer)
    if not answer or len(answer) > MAX_MATH_CHARS or len(gold) > MAX_MATH_CHARS or has_foreign_digits(answer):
        return False
    equal = _equal_numbers(answer, gold)
    if equal is not None:
        return equal
    if plain(answer) == plain(gold):
        return True
    for reading in (words, ratio):
        found = reading(gold)
        if found is not None:
            return reading(answer) == found
    several = measures(gold)
    if several is not None:
        # One unit of all of them may be left out.
        return measures(answer) == several or (len(set(several[1])) == 1 and plain(answer) == ",".join(several[0]))
    return False if differ_in_notation(answer, gold) else None


def is_unevaluated(answer: str, gold: str) -> bool:
    r"""Whether an answer leaves something to calculate where the gold answer is one number: `12 \times 37` for 444.

    Numbers as they are written are evaluated: `\frac{7}{2}`, `3\frac{1}{2}`, `2 \times 10^5`, `5\text{ cm}^2`. A
    fraction that can be reduced is not. Of `12 \times 37 = 444` the right side counts.

    Args:
        answer: what the completion marked; untrusted.
        gold: the gold answer.
    """
    if max(len(answer), len(gold)) > MAX_MATH_CHARS:
        return False
    gold = _FRACTION.sub(_reduced, without_units(gold))
    if gold.strip("-") and number(gold) is None:
        return False
    text = _POWER_OF_TEN.sub("", without_units(answer.rsplit("=", 1)[-1]))
    return _OPERATION.search(_FRACTION.sub(_reduced, text)) is not None


def has_foreign_digits(text: str) -> bool:
    """Whether a text holds digits or numbers of other scripts; Python, and so many a verifier, reads them.

    Args:
        text: an answer; untrusted.
    """
    return any(c.isnumeric() and not c.isascii() for c in text)


def verify_math(answer: str, gold: str) -> float:
    """1.0 where math-verify takes an answer for equal to the gold one, else 0.0; may never return.

    Args:
        answer: what the completion marked; untrusted.
        gold: the gold answer. Both are LaTeX without a box around them.
    """
    import math_verify  # optional, and slow to import

    configs = [math_verify.LatexExtractionConfig()]
    variables = has_variables(gold)

    def parse(text: str) -> list:
        # No timeouts of its own: they count as wrong, and do not stop what runs inside of C code.
        text = rf"\boxed{{{for_verifier(text, variables)}}}"
        return math_verify.parse(text, configs, fallback_mode="no_fallback", parsing_timeout=0)

    gold_parsed = parse(gold)
    # The order matters: math-verify treats its first argument as the gold answer.
    return float(
        math_verify.verify(
            gold_parsed, parse(answer), float_rounding=_decimal_places(gold_parsed), timeout_seconds=None
        )
    )


def _equal_numbers(answer: str, gold: str) -> bool | None:
    """Whether two numbers are equal, exactly; of one percentage the sign may be missing. None for anything else."""
    values = [number(answer), number(gold)]
    if None not in values:
        return values[0] == values[1]
    percents = [percentage(answer), percentage(gold)]
    if None not in percents:
        return percents[0] == percents[1]
    percent = percents[0] if percents[1] is None else percents[1]
    value = exact_value(gold if percents[1] is None else answer)
    return None if value is None or percent is None else value in (percent, percent / 100)


def _decimal_places(gold: list[Any]) -> int:
    """Places to round to: six, or as many as give the smallest number of the gold answer six digits.

    math-verify rounds decimals to a fixed number of places, where all of 1e-7, 2e-7 and 0 are equal.
    """
    values = []
    for found in gold:
        for part in (found, *getattr(found, "args", ())):
            try:
                values.append(abs(float(part.evalf())))
            except (AttributeError, TypeError, ValueError, OverflowError):  # a set, a variable, text
                continue
    smallest = min((value for value in values if 0 < value < math.inf), default=1.0)
    return max(6, 5 - math.floor(math.log10(smallest)))


def one_form(answer: str) -> Hashable:
    """Equal for answers that are written differently and are one: `1,000` and `1000`, `Yes` and its `\\text`."""
    if len(answer) > MAX_MATH_CHARS:
        return answer
    value = number(answer)
    return plain(answer) if value is None else value


def _unboxed(text: str) -> str:
    contents = boxed(text)
    whole = re.fullmatch(r"(\$?)\\(?:boxed|fbox)\s{0,4}\{.*\}\1\.?", text, re.DOTALL)
    return contents[0] if len(contents) == 1 and whole else text


def _reduced(fraction: re.Match[str]) -> str:
    """Nothing for a fraction in lowest terms, which is a number; otherwise the fraction itself, which is a division."""
    above, below = (int(part) for part in fraction.groups() if part is not None)
    return "" if abs(below) > 1 and math.gcd(above, below) == 1 else fraction.group()
