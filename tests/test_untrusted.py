"""What reading of untrusted content may raise, and how values of files are checked."""

import pytest
import tokenizers

from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.untrusted import MAX_LINE, BadFile, Fields, printable, reading, shown


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a is 1; allowed is 2"), "file 'x': a is 1; allowed is 2"),
        (KeyError("a"), "file 'x': damaged or not understood (KeyError: 'a')"),
        (RecursionError(), "file 'x': damaged or not understood (RecursionError)"),
        (MemoryError(), "file 'x': damaged or not understood (MemoryError)"),
        (BadFile("y is not read"), "y is not read"),  # it names its file already
        (ValueError("\x1b[2J\n"), r"file 'x': \x1b[2J\n"),
    ],
)
def test_damage_is_one_kind_of_exception_and_one_line(error, message):
    with pytest.raises(BadFile) as refusal, reading("file 'x'"):
        raise error
    assert str(refusal.value) == message
    # Which is what the command line turns into one line and exit code 2.
    with pytest.raises(BadInput), checking_input():
        raise refusal.value


@pytest.mark.parametrize("error", [FileNotFoundError("a"), PermissionError("a"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_damage_passes(error):
    with pytest.raises(type(error)) as passed, reading("file 'x'"):
        raise error
    assert passed.value is error


def test_a_panic_is_damage():
    # A library in Rust stops with an exception that is not derived from Exception.
    with pytest.raises(BadFile, match=r"damaged or not understood \(PanicException"), reading("file 'x'"):
        tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated").pre_tokenize_str("a" * 40 + "b")


def test_long_messages_keep_their_beginning_and_end():
    text = str(BadFile(f"begin {'x' * 10_000} end"))
    assert text.startswith("begin xxx") and text.endswith("xxx end") and len(text) <= MAX_LINE


@pytest.mark.parametrize(
    ("value", "text"),
    [("a\x1b", r"'a\x1b'"), (10**5000, "a int too large to show"), ("x" * 200, "'" + "x" * 119 + "...")],
    ids=("control", "digits", "long"),
)
def test_values_are_shown_short(value, text):
    assert shown(value) == text


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[2J\x9b\u202e\ud800é東") == r"a\x1b[2J\x9b\u202e\ud800é東"


@pytest.mark.parametrize("value", [None, True, 0, -1, 2**31, 10**400, 1.0, "3", [3], {}])
def test_whole_numbers_are_checked(value):
    with pytest.raises(ValueError, match=r"a\.b is .*; it must be given as a whole number from 1 to 2147483647"):
        Fields({"b": value}, "a.").whole("b", default=3)
    assert Fields({}).whole("b", default=3) == Fields({"b": 3}).whole("b") == 3


@pytest.mark.parametrize("value", [None, True, 0, -1.0, 1e-31, 1e31, 10**400, float("nan"), float("inf"), "3", [3.0]])
def test_numbers_are_checked(value):
    with pytest.raises(ValueError, match=r"a\.b is .*; it must be given as a number from 1e-30 to 1e\+30"):
        Fields({"b": value}, "a.").number("b", default=3.0)
    assert Fields({"b": 3}).number("b") == 3.0


@pytest.mark.parametrize("value", [None, 0, 1, "true", []])
def test_flags_are_checked(value):
    with pytest.raises(ValueError, match=r"b is .*; allowed are true and false"):
        Fields({"b": value}).flag("b", default=True)
    assert Fields({}).flag("b", default=True) and not Fields({"b": False}).flag("b", default=True)
