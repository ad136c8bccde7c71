r"""Mathematical answers: a completion must mark its one final answer, and that answer must equal the gold one.

A checker that searches a text for the right answer pays for listing numbers. This one reads an
answer only where the completion says that it is one: `\boxed{...}`, `<answer>...</answer>`, or a last
line `#### ...` as in GSM8K. Numbers are compared here, exactly; everything else by math-verify, which
parses LaTeX with SymPy and can take for ever, so it runs in a worker that can be killed.
"""

from __future__ import annotations

import re
from fractions import Fraction

from nested_reft.data.boxes import boxed
from nested_reft.rewards.exact_answer import parse_number

# Longer answers are hardly ever right, and their algebra may take very long.
MAX_MATH_CHARS = 300

# No tag may begin inside another, so a text of many opening tags stays quick to search.
_TAGGED = re.compile(r"<answer>((?:(?!<answer>|</answer>).)*)</answer>", re.DOTALL)
_HASHED = re.compile(r"####[ \t]*(\S.*)")
_NUMBERS_IN_A_ROW = re.compile(r"[0-9]\s+[0-9]")
# Fewer than four letters may be a product of variables, such as `abc`.
_WORDS = re.compile(r"\\text\{([^{}\\]*)\}|([A-Za-z][A-Za-z ]{3,})")


def marked_answer(text: str) -> str | None:
    r"""The one answer that a text marks as final, or None if it marks none, or several different ones.

    `<answer>\boxed{7}</answer>` is one answer; `\boxed{7} ... \boxed{8}` is none, whichever is right.

    Args:
        text: a completion without its stop token; untrusted.
    """
    tagged = [match.strip() for match in _TAGGED.findall(text)]
    # A set, because one answer that is marked twice is still one answer.
    answers = {_unboxed(answer) for answer in tagged} | set(boxed(text))
    # Only the last line counts, as in GSM8K.
    hashed = _HASHED.fullmatch(text.rstrip().rsplit("\n", 1)[-1])
    if hashed:
        answers.add(hashed.group(1))
    return answers.pop() if len(answers) == 1 else None


def compare_quickly(answer: str, gold: str) -> bool | None:
    """Whether an answer is right, where that needs no algebra; None where it does.

    Refused outright: long answers, digits of other scripts, and numbers in a row (LaTeX multiplies
    them, math-verify adds them). Words are compared as words: a parser of formulas
    would take them for products of letters, and so take anagrams for equal.

    Args:
        answer: what the completion marked; untrusted.
        gold: the gold answer.

    Returns:
        True or False where that is certain; None where math-verify has to decide.
    """
    answer, gold = answer.strip(), gold.strip()
    if len(answer) > MAX_MATH_CHARS or has_foreign_digits(answer):
        return False
    if not answer or _NUMBERS_IN_A_ROW.search(answer):
        return False
    # Equal texts are equal answers, and need no algebra.
    if answer == gold:
        return True
    number, gold_number = parse_number(answer), parse_number(gold)
    if number is not None and gold_number is not None:
        return Fraction(number) == Fraction(gold_number)
    gold_words = _words(gold)
    if gold_words is not None:
        return _words(answer) == gold_words
    return None


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

    def parse(text: str) -> list:
        # No timeouts of its own: they count as wrong, and do not stop what runs inside of C code.
        return math_verify.parse(rf"\boxed{{{text}}}", configs, fallback_mode="no_fallback", parsing_timeout=0)

    # The order matters: math-verify treats its first argument as the gold answer.
    return float(math_verify.verify(parse(gold), parse(answer), timeout_seconds=None))


def _unboxed(text: str) -> str:
    contents = boxed(text)
    return contents[0] if len(contents) == 1 and re.fullmatch(r"\\(?:boxed|fbox)\s*\{.*\}", text, re.DOTALL) else text


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text)
    return None if match is None else " ".join((match.group(1) or match.group(2) or "").casefold().split())
