"""The strict parser: what it reads, what it refuses, and that no text makes it slow."""

import time

import pytest

from nested_reft.rewards.exact_answer import MAX_ANSWER_CHARS, exact_answer, parse_answer


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("7", "7"),
        ("7.", "7"),
        ("+7", "+7"),
        ("-7", "-7"),
        ("-0", "-0"),
        ("7.0", "7.0"),
        ("7.50.", "7.50"),
        ("007", "007"),
        ("1,000", "1000"),
        ("-12,345,678.25", "-12345678.25"),
        (" \n\t7\r\n ", "7"),
        (r"\boxed{7}", "7"),
        (r" \boxed{ -1,000.5 } ", "-1000.5"),
        ("<answer>7</answer>", "7"),
        ("<answer>\n7.\n</answer>", "7"),
        ("9" * MAX_ANSWER_CHARS, "9" * MAX_ANSWER_CHARS),
        ("2 + 3 = 5", "5"),
        ("The answer is 5.", "5"),
        ("The answer to this arithmetic problem is -1,200", "-1200"),
        ("Answer: 7", "7"),
        ("3 + 4 equals 7.", "7"),
        ("3 = 4 = 7", "7"),
        ("x" * 1_000_000 + " = 7", "7"),
    ],
)
def test_one_number_is_read(text, parsed):
    assert parse_answer(text) == parsed


REFUSED = [
    "",
    " ",
    # Several numbers: the classic hack lists them all.
    " ".join(map(str, range(1, 13))),
    "7 7",
    "7\n8",
    "7,8",
    "7.8.9",
    "<answer>7</answer><answer>8</answer>",
    r"\boxed{7} \boxed{8}",
    r"\boxed{7}8",
    "8<answer>7</answer>",
    # Words, units, expressions.
    "The answer is 7 apples",
    "The answer is 7 or 8",
    "The answer is 1 2 3 4 5 6 7",
    "= 7, 8",
    "this 7",
    "The answer is",
    "= 3 + 4",
    "7 is the answer",
    "7 apples",
    "$7",
    "7%",
    "3+4",
    "14/2",
    "2**3",
    "9^{9^{9^9}}",
    r"\boxed{9^{9^{9^9}}}",
    "(7)",
    "__import__('os')",
    # Not finite, or not plain notation.
    "NaN",
    "inf",
    "-Infinity",
    "1e5",
    "0x7",
    "1_000",
    # Malformed numbers.
    "-",
    ".",
    ".5",
    "--7",
    "+-7",
    "- 7",
    "7..",
    "7-",
    # Commas in the wrong places.
    "1,00",
    "1,0000",
    "1000,000",
    ",100",
    "1,",
    "1,,000",
    "0,123",
    "1,000,00",
    "1.000,000",
    # Wrappers that do not close, or twice.
    r"\boxed{7",
    r"\boxed{77",
    "<answer>1234567890",
    r"\boxed{<answer>7</answer>}",
    r"\boxed{7}}",
    r"\boxed{{7}}",
    r"boxed{7}",
    "\\boxed{}",
    "<answer>7",
    "7</answer>",
    "<answer></answer>",
    r"<answer>\boxed{7}</answer>",
    r"\boxed{\boxed{7}}",
    # Digits of other scripts, and signs that only look right.
    "٧",  # Arabic-Indic 7
    "７",  # fullwidth 7
    "७",  # Devanagari 7
    "²",
    "Ⅶ",
    "1٧",
    "−7",  # U+2212
    "7\u200b",  # zero-width space
    "7\x00",
    # Too long.
    "9" * (MAX_ANSWER_CHARS + 1),
]


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused(text):
    assert parse_answer(text) is None


MEGABYTE = {
    "digits": "9" * 1_000_000,
    "commas": "1" + ",000" * 250_000,
    "braces": "{" * 1_000_000,
    "boxes": r"\boxed{" * 150_000 + "7" + "}" * 150_000,
    "spaces": " " * 500_000 + "x" * 500_000,
    "answer": "<answer>" + "7 " * 500_000 + "</answer>",
}


@pytest.mark.parametrize("text", MEGABYTE.values(), ids=MEGABYTE)
def test_a_megabyte_takes_milliseconds(text):
    seconds = []
    for _ in range(3):  # The best of three: the machine may be busy.
        start = time.perf_counter()
        assert parse_answer(text) is None
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("-0", "0"),
        ("+7", "7"),
        ("7.0", "7"),
        ("7", "7.00"),
        ("1,000", "1000"),
        ("1000", "1,000"),
        ("007", "7"),
        ("0.10", "0.1"),
        (r"\boxed{7}", "7"),
    ],
)
def test_equal_values_are_right_however_written(text, answer):
    assert exact_answer(text, answer, finished=True) == {"accuracy": 1.0, "format": 1.0}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("8", "7"),
        ("-7", "7"),
        ("7.0000000000000000000000001", "7"),  # Equal as floats.
        ("9007199254740993", "9007199254740992"),  # 2^53 + 1: equal as floats.
        ("70", "7"),
    ],
)
def test_another_number_is_wrong_but_well_formed(text, answer):
    assert exact_answer(text, answer, finished=True) == {"accuracy": 0.0, "format": 1.0}


def test_text_that_is_not_a_number_earns_nothing():
    assert exact_answer("7 it is", "7", finished=True) == {"accuracy": 0.0, "format": 0.0}


def test_a_completion_that_was_cut_off_earns_nothing():
    assert exact_answer("7", "7", finished=False) == {"accuracy": 0.0, "format": 0.0}


@pytest.mark.parametrize("finished", [True, False])
def test_a_gold_answer_that_is_not_a_number_is_refused(finished):
    with pytest.raises(ValueError, match="the gold answer 'seven' is not one number; check_answers"):
        exact_answer("7", "seven", finished)
