"""Reward functions as users write them, good and bad; workers load this file by its path."""

import os
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np

CALLS = []


def length(text, example):
    print("a reward function may print")
    return len(text) / 10


def misbehave(text, example):
    """Hangs, crashes or fails as the completion says; otherwise 1.0 for the answer."""
    if text == "hang":
        while True:
            time.sleep(60)
    if text == "exit":
        os._exit(3)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "nan":
        return float("nan")
    if text == "text":
        return "1.0"
    if text == "memory":
        return float(len(bytearray(1 << 40)))
    if text == "spawn":
        os.system("sleep 60")
    return float(text == example["answer"])


def even(text, example):
    """Right at even lengths, which an untrained model hits often."""
    return float(len(text) % 2 == 0)


def show(text, example):
    assert example == {"answer": "7", "prompt": "3 + 4 =", "metadata": {"level": 2}, "finished": False}
    return 0.25


def count(text, example):
    """How often this worker was called: a replaced one starts from one again."""
    CALLS.append(text)
    return float(len(CALLS))


def by_first_character(text, example):
    """For a whole run: hangs on some completions and crashes on others."""
    if text[:1] in ("0", "1"):
        time.sleep(60)
    if text[:1] in ("2", "3"):
        os.abort()
    return float(len(text) % 2)


class Floating:
    """As the scalars of JAX and torch: `float` takes it, and it is no subclass of a number."""

    def __float__(self):
        return 0.5


def typed(text, example):
    """A value of the type that the completion names."""
    return {
        "float32": np.float32(0.5),
        "int64": np.int64(2),
        "bool": np.bool_(True),
        "scalar array": np.array(0.5),
        "fraction": Fraction(1, 2),
        "decimal": Decimal("0.5"),
        "floating": Floating(),
        "text": "1.0",
        "bytes": b"1.0",
        "nothing": None,
        "list": [1.0],
        "vector": np.array([0.5, 1.0]),
        "complex": 1j,
        "infinite": np.inf,
        "infinite in float32": 1e308,
        "infinite squared": -1e30,
        "long": 10**400,
        "too long to print": 10**5000,
    }[text]


def leave(text, example):
    """Ends the program as a script does."""
    sys.exit(0)


def wants_a_field(text, example):
    return float(example["gold"] == text)


def end_a_child(text, example):
    """The exit code of a program that is asked to end."""
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    return child.wait(3)
