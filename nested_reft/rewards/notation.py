r"""How a mathematical answer is written: the same answer in LaTeX, as text, with units, with grouped digits.

A parser of formulas takes `Yes` for a product of three letters and `10\,080` for a list of two numbers.
So what is notation and no mathematics is decided here, before or instead of algebra.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from nested_reft.rewards.exact_answer import parse_number
from nested_reft.rewards.units import known_unit

_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|[mh]box|emph|underline|operatorname)"
    r"\s{0,4}\{([^{}]*)\}"
)
# Wrappers in wrappers are unwrapped from the inside, a layer at a time.
_MAX_DEPTH = 4
_SPACE = r"(?:\s|\\[,;:! ]|~|\\q?quad(?![A-Za-z]))"
_SPACES = re.compile(rf"{_SPACE}+")
_DELIMITERS = ((r"$$", r"$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))

# Digits in groups of three, as TeX sets them: `10\,080`, `10{,}080`, `10\!,\!080`, `10 080`.
_GROUP = rf"(?:\{{,\}}|(?:\\!)?,\\!|{_SPACE})"
_GROUPED = re.compile(rf"(?<![0-9.])[1-9][0-9]{{0,2}}(?:{_GROUP}[0-9]{{3}})+(?![0-9])")
_NUMBERS_IN_A_ROW = re.compile(rf"[0-9]{_SPACE}+[0-9]")
# `1e-5` is how programs and JSON write it; LaTeX would read Euler's number. Larger exponents have no use.
_SCIENTIFIC = re.compile(r"([+-]?[0-9]{1,64}(?:\.[0-9]{1,64})?)[eE]([+-]?[0-9]{1,3})")
_MIXED = re.compile(rf"(?<![0-9.])([0-9]+){_SPACE}+([0-9]+)/([0-9]+)(?![0-9./])")
_FRACTION = re.compile(r"(-?)(?:(?:([0-9]+) ?)?\\frac\{?([0-9]+)\}?\{?([0-9]+)\}?|(?:([0-9]+) )?([0-9]+)/([0-9]+))")
_MULTIPLIERS = {
    "dozen": "12",
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
}
_MULTIPLIER = re.compile(
    rf"(?<=[0-9}}]){_SPACE}*(?:\\(?:text|mbox)\{{\s*)?({'|'.join(_MULTIPLIERS)})s?(?![A-Za-z])\s*\}}?"
)
_PERCENT = re.compile(rf"(?<=[0-9}}]){_SPACE}*(?:\\(?:text|mbox)\{{\s*percent\s*\}}|percent(?![A-Za-z]))")

_FUNCTION = re.compile("arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|sec|csc|cot|log|ln|exp|max|min|gcd|lcm|det|sqrt|infinity")
_UNIT = re.compile(r"([0-9})]|\\[a-z]+(?= ))\s?((?:square |sq |cubic )?)([A-Za-z][A-Za-z./]*)(?:\^\{?([23])\}?)?$")
_BARE_UNIT = re.compile(r"(?<=[0-9}])\s*(?<!\\)([A-Za-z]{3,})\.?$")
# The letters and pairs that math-verify may take for a unit; longer runs it takes only where they are one.
_LAST_LETTERS = re.compile(r"(?:(?<=[0-9}\s])|(?<=\\[,;:! ]))([cdghlmost]|[a-z]{2})$")
_NOUN = re.compile(
    rf"(?:[0-9}})]|\\circ|\\pi){_SPACE}*\\(?:text|mbox|mathrm)\{{{_SPACE}*([A-Za-z]+)\.?{_SPACE}*\}}(?:\^\{{?[23]\}}?)?\.?$"
)
_REPEATING = re.compile(r"([0-9]{1,20})\.([0-9]{0,20})\\overline\{([0-9]{1,20})\}")
_BASE = re.compile(r"[0-9A-Za-z]_\{?([0-9]+)\}?$")
_RATIO = re.compile(r"[0-9]+(?::[0-9]+){2,}")


def plain(text: str) -> str:
    r"""The text without what only typesets it: wrappers such as `\text{...}`, delimiters, spaces, grouped digits.

    Two answers of equal plain text are equal. Spaces stay where they part letters or digits.

    Args:
        text: an answer, at most a few hundred characters long; untrusted.
    """
    text = _without_delimiters(text.translate({0x2212: "-"}).strip())
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).replace(r"\varnothing", r"\emptyset")
    for _ in range(_MAX_DEPTH):
        text = _WRAPPER.sub(r"\1", text)
    text = _SPACES.sub(" ", ungrouped(text)).strip().removesuffix(".")
    return re.sub(r" ?(?<![A-Za-z0-9 ]) ?| (?![A-Za-z0-9])", "", text)


def ungrouped(text: str) -> str:
    r"""The text with `10\,080`, `10{,}080` and `10 080` as 10080; plain commas stay, since they also part lists."""
    return _GROUPED.sub(lambda match: re.sub(_GROUP, "", match.group()), text)


def number(text: str) -> Fraction | None:
    r"""The value of a text that is one decimal number, exactly; `1e-05` is one too. None for anything else.

    Args:
        text: an answer; untrusted.
    """
    # Most numbers need no second look.
    found = parse_number(text) or parse_number(plain(text))
    if found is not None:
        return Fraction(found)
    scientific = _SCIENTIFIC.fullmatch(plain(text))
    return scientific and Fraction(scientific.group(1)) * Fraction(10) ** int(scientific.group(2))


def percentage(text: str) -> Fraction | None:
    r"""The number in front of a percent sign, `50\%` or `50%`; None for anything else.

    Args:
        text: an answer; untrusted.
    """
    found = re.fullmatch(r"(.+?) ?\\?%", plain(_PERCENT.sub("%", text)))
    return None if found is None else exact_value(found.group(1))


def exact_value(text: str) -> Fraction | None:
    r"""The value of a decimal number, a fraction or a mixed number, exactly; None for anything else.

    Args:
        text: an answer; untrusted.
    """
    value = number(text)
    found = _FRACTION.fullmatch(plain(text)) if value is None else None
    if found is None:
        return value
    sign, *parts = found.groups()
    whole, above, below = (int(part or 0) for part in (parts[:3] if parts[1] else parts[3:]))
    return None if not below else (-1 if sign else 1) * (whole + Fraction(above, below))


def measures(text: str) -> tuple[list[str], list[str]] | None:
    r"""The numbers and the units of several measures, `3\text{ hours }45\text{ minutes}`; None for anything else.

    math-verify reads the first of them alone.

    Args:
        text: an answer; untrusted.
    """
    text = plain(text)
    numbers = re.findall(r"[0-9]+(?:\.[0-9]+)?", text)
    units = [run for run in re.findall("[A-Za-z]+", text) if run not in ("and", "or", "by")]
    if len(numbers) < 2 or not re.fullmatch("[0-9][0-9A-Za-z ,.]*", text):
        return None
    # Runs that may be products of variables are none, but for `cm` and its like.
    known = [known_unit(unit) for unit in units]
    if not any(len(unit) > 1 and (name or not _is_symbol(unit)) for unit, name in zip(units, known, strict=True)):
        return None
    return numbers, [name or unit.lower() for unit, name in zip(units, known, strict=True)]


def ratio(text: str) -> list[Fraction] | None:
    """A ratio of three numbers or more, `6:8:10`, as multiples of its first number; None for anything else.

    Args:
        text: an answer; untrusted.
    """
    if not _RATIO.fullmatch(plain(text)):
        return None
    parts = [Fraction(part) for part in plain(text).split(":")]
    return [part / parts[0] for part in parts] if parts[0] else parts


def words(text: str) -> str | None:
    r"""The words of an answer that is text and no formula, in one form; None for a formula.

    Two or three letters in alphabetical order, such as `abc` or `xy`, are a product of variables. Words
    hardly ever are in that order, and anagrams of them are no equal answers.

    Args:
        text: an answer; untrusted.
    """
    text = plain(text)
    if not re.fullmatch(r"\(?[A-Za-z][A-Za-z ,.'-]*\)?", text):
        return None
    # Beside a sign that may be an operator, short runs of letters are variables.
    least = 2 if re.fullmatch(r"[A-Za-z ,]+", text) else 4
    if not any(len(run) >= least and not _is_symbol(run) for run in re.findall("[A-Za-z]+", text)):
        return None
    return text.strip("().").casefold()


def differ_in_notation(answer: str, gold: str) -> bool:
    r"""Whether two answers differ in what algebra does not see, and are unequal for that.

    That is: numbers in a row (LaTeX multiplies them, math-verify adds them), known units (`5 cm`, `5 m`),
    the base of a number, braces against round or square brackets, words whose letters changed places, and what
    is counted (`5\text{ pens}`, `5\text{ books}`). What only one of them has, such as a unit, makes no difference.

    Args:
        answer: what the completion marked; untrusted.
        gold: the gold answer.
    """
    if _NUMBERS_IN_A_ROW.search(_MIXED.sub("", ungrouped(answer))):
        return True
    texts = plain(answer), plain(gold)
    for reading in (_unit, _base, _bracket):
        found = [reading(text) for text in texts]
        if None not in found and found[0] != found[1]:
            return True
    return _is_anagram(answer, gold) or _nouns_differ(answer, gold)


def has_variables(text: str) -> bool:
    r"""Whether an answer has letters that are variables and no units: `3 + 2t` and `5m`, but not `5 m` or `5cm`.

    Args:
        text: an answer; untrusted.
    """
    bare = re.sub(r"\\[A-Za-z]+", " ", _WRAPPER.sub("", text)).strip()
    measure = re.fullmatch(r"[-+]?[0-9.,]+(\s*)([A-Za-z]+)", bare)
    if measure and known_unit(measure.group(2)) and (measure.group(1) or len(measure.group(2)) > 1):
        return False
    return re.search("[A-Za-z]", bare) is not None


def for_verifier(text: str, variables: bool = False) -> str:
    r"""The text as math-verify reads it rightly: `10\,080` as 10080, `1e-5` as a power of ten, `3 1/2` as a sum.

    Args:
        text: an answer in LaTeX; untrusted.
        variables: a letter at the end is a variable, also one that could be a unit.
    """
    text = ungrouped(_without_delimiters(text.strip()))
    whole = _WRAPPER.fullmatch(text)
    # A number in a wrapper is a number; words stay in theirs, which keeps them from being products.
    if whole and re.match(r"\s*[-+.$\\0-9]", whole.group(1)):
        text = whole.group(1)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _MULTIPLIER.sub(lambda match: rf"\times {_MULTIPLIERS[match.group(1)]}", text)
    # A unit of three letters or more is no product of variables.
    text = _BARE_UNIT.sub(lambda m: rf"\text{{ {m.group(1)}}}" if known_unit(m.group(1)) else m.group(), text)
    # math-verify takes letters at the end for units, and drops them: the `t` of `3 + 2t`. In braces it keeps them.
    last = _LAST_LETTERS.search(text)
    if last and (not known_unit(last.group(1)) or (variables and len(last.group(1)) == 1)):
        text = f"{text[: last.start(1)]}{{{last.group(1)}}}"
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", _PERCENT.sub(r"\\%", text))
    return re.sub(rf"(?<![A-Za-z0-9.]){_SCIENTIFIC.pattern}(?![A-Za-z0-9])", r"\1\\times 10^{\2}", text)


def without_units(text: str) -> str:
    r"""The plain text without units, in wrappers or known to be units, and without the signs of degrees and money.

    Args:
        text: an answer; untrusted.
    """
    text = plain(re.sub(rf"{_WRAPPER.pattern}(?:\^\{{?[23]\}}?)?|\\[$%]|%|\^\{{?\\circ\}}?", "", for_verifier(text)))
    return text if _unit(text) is None else _UNIT.sub(r"\1", text)


def _repeating_fraction(match: re.Match[str]) -> str:
    r"""A repeating decimal, `0.1\overline{6}`, as the fraction that it is."""
    whole, start, period = match.groups()
    # Of x = a.bccc..., 10^|bc| x - 10^|b| x is an integer.
    above = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{above}}}{{{10 ** len(start + period) - 10 ** len(start)}}}"


def _without_delimiters(text: str) -> str:
    for start, end in _DELIMITERS:
        if len(text) > len(start + end) and text.startswith(start) and text.endswith(end) and text[-2] != "\\":
            return text[len(start) : -len(end)].strip()
    return text


def _is_symbol(run: str) -> bool:
    """Whether a run of letters is the name of a function or a product of variables."""
    # No product has the letters e, i or o, which are constants or look like zero.
    product = len(run) <= 3 and run.islower() and run == "".join(sorted(set(run))) and not set(run) & set("eio")
    return product or _FUNCTION.fullmatch(run) is not None


def _unit(text: str) -> tuple[str, str] | None:
    found = _UNIT.search(text)
    if found is None:
        return None
    _, power, name, exponent = found.groups()
    known = known_unit(name)
    written = {"square ": "2", "sq ": "2", "cubic ": "3"}.get(power)
    return None if known is None else (known, exponent or written or "1")


def _base(text: str) -> str | None:
    found = _BASE.search(text)
    return found and found.group(1)


def _bracket(text: str) -> bool | None:
    """True for a set in braces, False for round or square brackets, None for neither."""
    if "," not in text or not text.startswith(("\\{", "(", "[")):
        return None
    return text.startswith("\\{")


def _nouns_differ(answer: str, gold: str) -> bool:
    """Whether both end in a word in a wrapper, and the words are different; known units are compared before."""
    found = [_NOUN.search(text) for text in (answer, gold)]
    if found[0] is None or found[1] is None:
        return False
    first, second = (match.group(1).casefold() for match in found if match)
    if known_unit(first) and known_unit(second):
        return False
    # An abbreviation has the first letter of its word, and a plural has the beginning of its singular.
    letters = 1 if min(len(first), len(second)) <= 3 else 3
    return first[:letters] != second[:letters]


def _is_anagram(answer: str, gold: str) -> bool:
    """Whether the bare words of both are of the same letters and yet not the same words."""
    runs = [Counter(_bare_words(text)) for text in (answer, gold)]
    letters = [sorted("".join(found.elements())) for found in runs]
    return runs[0] != runs[1] and letters[0] == letters[1]


def _bare_words(text: str) -> list[str]:
    text = re.sub(r"\\[A-Za-z]+", " ", _WRAPPER.sub(" ", text)).casefold()
    return [run for run in re.findall("[a-z]{4,}", text) if not _FUNCTION.fullmatch(run) and list(run) != sorted(run)]
