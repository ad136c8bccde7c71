"""Damaged files are refused in one line; and the program that tries many would notice if they were not."""

import random
import re
import sys
import time

import pytest

from nested_reft.untrusted import BadFile
from scripts import fuzz

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of a process's memory")


@pytest.mark.parametrize("name", list(fuzz.TARGETS))
def test_a_few_damaged_inputs_of_each_kind(name, capsys):
    tally = fuzz.run([name], seed=5, first=0, cases=40, seconds=0.0)[name]
    assert not tally.failures, capsys.readouterr().out
    # Most damage is refused. Where nothing were read, every input might be refused for one and the same reason.
    assert tally.refused > 20 and tally.read > 0


def test_the_inputs_without_damage_are_read(tmp_path):
    fuzz.write_gguf(tmp_path / "model.gguf", fuzz.gguf_metadata())
    for location in (tmp_path / "model.gguf", fuzz.model_directory(tmp_path / "model")):
        found = fuzz.use_model(location)
        assert (found.num_layers, found.width, found.num_heads) == (
            fuzz.SHAPE.num_layers,
            fuzz.SHAPE.width,
            fuzz.SHAPE.num_heads,
        )


def fail(error):
    raise error


def ask_for_memory():
    try:
        bytearray(1 << 40)
    except MemoryError as error:
        raise BadFile("too large") from error


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: fail(TypeError("a bug")), "TypeError: a bug"),
        (lambda: fail(ValueError("no file")), "ValueError: no file"),  # the message names no file
        (lambda: fail(FileNotFoundError("\x1b[2J")), "not one short line"),
        (lambda: fail(FileNotFoundError("x" * 5000)), "not one short line"),
        (lambda: fail(SystemExit(0)), "SystemExit: 0"),
        (lambda: time.sleep(30), "Hang: it took longer than 1 seconds"),
        (ask_for_memory, "it asked for more memory than there is: too large"),
        (lambda: bytearray(b"x" * (50 << 20)), r"it took \d+ MB"),
    ],
)
def test_what_is_not_refused_as_it_should_be_is_reported(monkeypatch, capsys, read, message):
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "MEMORY_BYTES", 60 << 20)
    monkeypatch.setitem(fuzz.TARGETS, "broken", lambda chance, directory: read())
    assert fuzz.main(["--cases", "1", "--first", "7", "--target", "broken"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: --target broken --seed 0 --first 7 --cases 1" in printed
    assert re.search(message, printed), printed


def test_a_case_is_the_same_each_time():
    found = [fuzz.damaged_json(random.Random("5 x 3"), {"a": [1, {"b": 2}], "c": "d"}) for _ in range(2)]
    assert str(found[0]) == str(found[1]) != str({"a": [1, {"b": 2}], "c": "d"})


@pytest.mark.parametrize("arguments", ["--cases 0", "--cases -1", "--seconds 0", "--seconds nan", "--first -1"])
def test_what_would_read_nothing_is_refused(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        fuzz.main(arguments.split())
    assert f"{arguments.split()[0]}: is " in capsys.readouterr().err
