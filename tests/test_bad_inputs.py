"""`scripts/bad_inputs.py` in short: a share of its inputs, and that it notices what is not clear."""

import sys

import pytest

from scripts import bad_inputs
from scripts.bad_inputs import Case, nothing_runs, try_input, verdicts


def test_bad_inputs_are_refused_by_one_clear_line():
    found = verdicts(slice(0, None, 6))
    assert len(found) > 60
    assert [(each.case.arguments, each.problem, each.message) for each in found if each.problem] == []


@pytest.mark.parametrize(
    ("raised", "problem"),
    [
        (None, "exit code 0"),
        (KeyError("x"), "a traceback"),
        (SystemExit(1), "a traceback"),
        (bad_inputs.Accepted(), "accepted"),
    ],
)
def test_what_is_not_refused_is_noticed(raised, problem, monkeypatch):
    def command(_):
        if raised is not None:
            raise raised
        return 0

    monkeypatch.setattr(bad_inputs, "command_line", command)
    assert try_input(Case(("train",), "train")).problem == problem


@pytest.mark.parametrize(
    ("printed", "problem"),
    [
        ("error: x is 1; allowed is 2", ""),
        ("error: x is 1; allowed\nis 2", "2 lines"),
        ("x is 1; allowed is 2", "1 lines"),
        ("error: y is 1; allowed is 2", "does not name x"),
        ("error: x is 1", "does not say what is allowed"),
        ("error: x is \x1b[31m; allowed is 2", "control characters"),
    ],
)
def test_what_is_not_clear_is_noticed(printed, problem, monkeypatch):
    def command(_):
        print(printed, file=sys.stderr)
        return 2

    monkeypatch.setattr(bad_inputs, "command_line", command)
    assert try_input(Case(("train",), "x")).problem == problem


def test_an_input_that_is_good_is_not_counted_as_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with nothing_runs():
        assert try_input(Case(("train", "tiny", "--train.steps", "3"), "steps")).problem == "accepted"
