r"""Marked answers: what counts as the final one, and what is decided without algebra."""

import random
import time

import pytest

from nested_reft.rewards.math_answer import (
    MAX_MATH_CHARS,
    compare_quickly,
    is_unevaluated,
    marked_answer,
    verify_math,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{7}.", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("<answer> 7 </answer> done", "7"),
        (r"<answer>\boxed{7}</answer>", "7"),
        (r"<answer>$\boxed{7}$</answer>", "7"),
        ("<answer>$7$</answer> \\boxed{7}", "$7$"),  # formulas are marked by dollars, and the answer is one
        ("2 + 3 = 5\n#### \\boxed{5}", "5"),
        ("\\boxed{1,000}\n#### 1000", "1000"),
        ("\\boxed{1{,}000}\n#### 1000.0", "1000.0"),
        ("\\boxed{\\text{Yes}}\n#### Yes", "Yes"),
        ("\\boxed{1,000}\n#### 1001", None),
        ("\\boxed{1,000} <answer>100</answer>\n#### 1000", None),
        ("2 + 5 = 7\n#### 7", "7"),
        ("2 + 5 = 7\n#### 7\n\n", "7"),
        (r"\boxed{7} and again \boxed{7}", "7"),
        # None, or not one.
        ("7", None),
        ("the answer is 7", None),
        ("#### 7\nno, 8", None),
        (r"\boxed{7} \boxed{8}", None),
        (r"\boxed{7} <answer>8</answer>", None),
        ("<answer>7</answer><answer>8</answer>", None),
        ("<answer>7<answer>8</answer>", "8"),
        (r"\boxed{7", None),
        ("<answer>7", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_one_marked_answer(text, answer):
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("7", "7", True),
        ("7.0", "7", True),
        ("1,000", "1000", True),
        ("7.0000001", "7", False),  # math-verify rounds to six places
        ("8", "7", False),
        ("", "7", False),
        ("1 2 3", "6", False),  # LaTeX multiplies, math-verify adds
        ("٧", "7", False),
        ("7²", "49", False),
        ("九", "九", True),  # as the gold answer has it
        ("9" * 400, "9" * 400, True),
        ("9" * 400, "9" * 399, False),
        (r"1\,2\,3", "6", False),
        (r"10\,080", "10080", True),
        ("10 080", "10080", True),
        ("1e-05", "0.00001", True),
        ("e-5", "0.00001", None),
        ("e-5", "1e-05", None),
        ("ABC", "CAB", False),
        ("oN", "No", False),
        ("no", "No", True),
        ("yx", "xy", None),  # a product of variables
        ("x", "X", None),
        (r"\sin x", "sin x", None),
        ("50", r"50\%", True),
        ("0.5", r"50\%", True),
        (r"50\%", "0.5", True),
        (r"0.5\%", r"50\%", False),
        ("0.5", "50", False),
        ("9" * (MAX_MATH_CHARS + 1), "7", False),
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        ("Monday", r"\text{Monday}", True),
        (r"\text{ monday }", r"\text{Monday}", True),
        ("dayMon", r"\text{Monday}", False),  # the same product of letters
        (r"\frac{14}{2}", "7", None),
        ("x+1", "1+x", None),
    ],
)
def test_what_needs_no_algebra(answer, gold, right):
    assert compare_quickly(answer, gold) is right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{14}{2}", "7", True),
        ("x+1", "1+x", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("2,1", r"\{1,2\}", True),
        ("1,2,3", "3", False),
        ("2 or 3", "3", False),
        ("{{{{", "3", False),
        (r"10\,080 x", "10080 x", True),
        ("3 1/2", r"\frac{7}{2}", True),
        ("31/2", "3 1/2", False),
        ("0.0000002", "10^{-7}", False),  # equal when rounded to six places
        ("0.0000001", "10^{-7}", True),
        ("0.333333", r"\frac{1}{3}", True),
        ("e-5", "1e-5", False),
        (r"10^{-5}", "1e-5", True),
        (r"\frac{1}{", r"\frac{1}{2}", False),
    ],
)
def test_math_verify_decides_the_rest(answer, gold, right):
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    assert verify_math(answer, gold) == float(right)


@pytest.mark.parametrize(
    ("answer", "gold", "unevaluated"),
    [
        (r"12 \times 37", "444", True),
        (r"12 \cdot 37", "444", True),
        ("12*37", "444", True),
        ("(12)(37)", "444", True),
        ("12(37)", "444", True),
        ("500-56", "444", True),
        (r"\text{5}+2", "7", True),
        (r"\frac{14}{2}", "7", True),
        ("14/4", "3.5", True),
        (r"\sqrt{49}", "7", True),
        ("5!", "120", True),
        ("2^3", "8", True),
        ("2+3", r"\$5", True),
        ("10/2", r"5\text{ cm}", True),
        (r"3+\frac12", r"\frac{7}{2}", True),
        # How numbers are written.
        ("-7", "-7", False),
        (r"12\times 37=444", "444", False),
        ("x=444", "444", False),
        (r"\frac72", "3.5", False),
        ("7/2", "3.5", False),
        (r"-\frac{1}{2}", "-0.5", False),
        (r"\frac{-1}{2}", "-0.5", False),
        (r"3\frac{1}{2}", "3.5", False),
        (r"2 \times 10^5", "200000", False),
        ("2e5", "200000", False),
        (r"3\text{ million}", "3000000", False),
        ("1{,}000", "1000", False),
        (r"5\text{ km/h}", "5", False),
        (r"5\text{ cm}^2", "5", False),
        (r"90^\circ", "90", False),
        (r"\$5", "5", False),
        # The gold answer is no number.
        ("x*y", "xy", False),
        ("1+x", "x+1", False),
    ],
)
def test_arithmetic_that_is_yet_to_be_done_is_told_from_numbers(answer, gold, unevaluated):
    assert is_unevaluated(answer, gold) is unevaluated


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        r"\boxed{" * 150_000 + "7" + "}" * 150_000,
        r"\boxed{" * 150_000,
        "}" * 1_000_000,
        "<answer>" * 120_000,
        "<answer>" + "7 " * 500_000 + "</answer>",
        "#" * 1_000_000,
        "#### " * 200_000,
        "\n" * 500_000 + "####" + " " * 500_000,
        "".join(rf"\boxed{{{n}}}" for n in range(70_000)),
    ],
    ids=lambda text: text[:12],
)
def test_a_megabyte_takes_no_time(text):
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        answer = marked_answer(text)
        assert answer is None or not compare_quickly(answer, "7")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_no_text_is_an_error_and_each_equals_itself():
    """The comparison runs in the training process, on whatever a model writes."""
    parts = [
        *(
            r"\text{",
            r"\boxed{",
            "{",
            "}",
            "$",
            r"\(",
            r"\frac",
            "1/0",
            "0:1:2",
            "1e999",
            "1e-999",
            "9" * 70,
            "1",
            "23",
        ),
        *(
            "456",
            "{,}",
            r"\,",
            r"\!",
            "~",
            " ",
            ".",
            ",",
            "%",
            r"\%",
            "cm",
            "x",
            "No",
            "and",
            "million",
            "percent",
            "_2",
        ),
        *("^2", r"\{", "(", "]", "=", "-", "\u2212", "\u0667", "\x00", "\ud800", "\\", r"\times", "####", "<answer>"),
    ]
    draw = random.Random(0)
    for _ in range(400):
        text, gold = ("".join(draw.choices(parts, k=draw.randint(1, 20))) for _ in range(2))
        assert compare_quickly(text, gold) in (True, False, None)
        assert compare_quickly(text, text) is bool(text.strip())
        assert is_unevaluated(text, gold) in (True, False)
        marked_answer(text)
