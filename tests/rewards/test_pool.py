"""Workers that hang, crash and lie: each costs its completion a score, and nothing else."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nested_reft.rewards.pool import WorkerPool

FUNCTIONS = str(Path(__file__).with_name("reward_functions.py"))


@pytest.fixture
def pool():
    pools = []

    def make(function, workers=2, limit=5.0, memory_gib=4.0):
        pools.append(WorkerPool(workers, limit, memory_gib, f"{FUNCTIONS}:{function}"))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


@pytest.fixture
def pool_of():
    pools = []

    def make(function):
        pools.append(WorkerPool(1, 5.0, 4.0, function))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


@pytest.fixture(scope="module")
def typed():
    one = WorkerPool(1, 5.0, 4.0, f"{FUNCTIONS}:typed")
    yield one
    one.close()


def request(text, **example):
    return {"kind": "function", "text": text, "example": {"answer": "7"} | example}


def test_outcomes_come_in_order_and_printing_does_no_harm(pool):
    outcomes = pool("length").run([request("x" * n) for n in range(20)])
    assert [outcome.value for outcome in outcomes] == [n / 10 for n in range(20)]


def test_each_misbehaviour_is_told_apart_and_the_others_are_scored(pool):
    texts = ["7", "hang", "8", "exit", "raise", "7", "nan", "text", "memory", "7"]
    start = time.monotonic()
    outcomes = pool("misbehave", limit=1.0).run([request(text) for text in texts])
    assert [outcome.value for outcome in outcomes] == [1, None, 0, None, None, 1, None, None, None, 1]
    failures = [None, "timed_out", None, "crashed", "failed", None, "failed", "failed", "failed", None]
    assert [outcome.failure for outcome in outcomes] == failures
    assert "exit code 3" in outcomes[3].message and "KeyError" in outcomes[4].message
    assert "returned nan; allowed is a finite number" in outcomes[6].message and "returned '1.0'" in outcomes[7].message
    assert "MemoryError" in outcomes[8].message
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("float32", 0.5),
        ("int64", 2.0),
        ("bool", 1.0),
        ("scalar array", 0.5),
        ("fraction", 0.5),
        ("decimal", 0.5),
        ("floating", 0.5),
        ("text", "returned '1.0'; allowed is a finite number"),
        ("bytes", "returned b'1.0'; allowed"),
        ("nothing", "returned None; allowed"),
        ("list", r"returned \[1.0\]; allowed"),
        ("vector", r"returned array\(\[0.5, 1. \]\); allowed"),
        ("complex", "returned 1j; allowed"),
        ("infinite", "returned inf; allowed"),
        ("infinite in float32", r"returned 1e\+308; allowed is a finite number from -1e\+16 to 1e\+16"),
        ("infinite squared", r"returned -1e\+30; allowed"),
        ("long", "returned 1000"),
        ("too long to print", "returned a value of type int; allowed"),
    ],
)
def test_numbers_of_any_kind_are_scores_and_nothing_else_is(typed, kind, value):
    (outcome,) = typed.run([request(kind)])
    if isinstance(value, float):
        assert outcome.value == value and outcome.failure is None
    else:
        assert outcome.failure == "failed" and re.search(value, outcome.message)


def test_a_function_that_exits_fails_and_its_worker_goes_on(pool):
    one = pool("leave", workers=1)
    outcomes = one.run([request("7"), request("8")])
    assert [(o.failure, o.message) for o in outcomes] == [("failed", "SystemExit: 0")] * 2
    assert len(one._alive) == 1


# The last is a module's name already: a process that is spawned would import that module.
@pytest.mark.parametrize(("name", "start"), [("mine", "fork"), ("mine", "spawn"), ("statistics", "fork")])
def test_a_file_with_a_dataclass_annotations_and_processes_of_its_own(pool_of, tmp_path, name, start):
    file = tmp_path / f"{name}.py"
    file.write_text(
        "from __future__ import annotations\n"
        "import multiprocessing\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar, NamedTuple, TypedDict, get_type_hints\n"
        "@dataclass\n"
        "class Score:\n"
        "    value: float = 0.0\n"
        "    count: ClassVar[int] = 3\n"
        "class Typed(TypedDict):\n"
        "    score: Score\n"
        "def half(score: Score) -> Score:\n"
        "    return Score(score.value / 2)\n"
        "def reward(text, example):\n"
        f"    with ProcessPoolExecutor(1, multiprocessing.get_context({start!r})) as processes:\n"
        "        assert get_type_hints(Typed)['score'] is Score\n"
        "        return processes.submit(half, Score(1.0)).result().value\n"
    )
    (outcome,) = pool_of(f"{file}:reward").run([request("7")])
    assert (outcome.value, outcome.message) == (0.5, "")


def test_a_file_of_the_working_directory_takes_no_modules_place(pool_of, tmp_path, monkeypatch):
    for module in ("inspect", "json", "sympy", "math_verify", "numpy"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write('{module} ')\n")
    # A script's directory comes before Python's own modules, too.
    (tmp_path / "scripts").mkdir()
    for module in ("enum", "inspect", "json", "typing"):
        shutil.copy(tmp_path / "inspect.py", tmp_path / "scripts" / f"{module}.py")
    (tmp_path / "my_rewards.py").write_text("def reward(text, example):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", ["", str(tmp_path), str(tmp_path / "scripts"), *sys.path]
    )  # as in a notebook, and under `python -m`
    assert [o.value for o in pool_of(f"{FUNCTIONS}:length").run([request("xx")])] == [0.2]
    # A module of the user's own that the configuration names is found there, and in a file as well.
    for function in ("my_rewards:reward", "my_rewards.py:reward"):
        assert [o.value for o in pool_of(function).run([request("xx")])] == [0.25]
    assert not (tmp_path / "executed").exists()


def test_a_killed_worker_is_replaced_and_takes_its_children_along(pool):
    one = pool("misbehave", workers=1, limit=1.0)
    assert one.run([request("spawn")])[0].failure == "timed_out"
    assert one.run([request("7")])[0].value == 1
    own = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in own.splitlines() if "sleep 60" in line and line.split()[0] == "1"]


def test_a_worker_that_dies_while_idle_costs_nothing(pool):
    one = pool("count", workers=1)
    assert [o.value for o in one.run([request("a"), request("b")])] == [1, 2]
    (worker,) = one._alive
    os.kill(worker.process.pid, 9)
    worker.process.wait()
    assert [o.value for o in one.run([request("a")])] == [1]


def test_a_worker_outlives_sigterm_and_what_its_function_starts_does_not(pool):
    """A supervisor that signals all processes must not take the rewards of the last step away."""
    one = pool("end_a_child", workers=1)
    assert one.run([request("x")])[0].value == -signal.SIGTERM
    (worker,) = one._alive
    os.kill(worker.process.pid, signal.SIGTERM)
    assert one.run([request("x")])[0].value == -signal.SIGTERM and one._alive == {worker}


def test_a_megabyte_and_broken_text_get_through(pool):
    one = pool("length", workers=1)
    assert one.run([request("x" * 1_000_000), request("\ud800\n\x00")])[0].value == 100_000
    assert one.run([request("\ud800\n\x00")])[0].value == 0.3


def test_a_closed_pool_starts_again(pool):
    one = pool("length", workers=1)
    one.run([request("x")])
    one.close()
    assert one.run([request("xx")])[0].value == 0.2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (f"{FUNCTIONS}:nothing", "AttributeError"),
        ("no_such_package.rewards:f", "ModuleNotFoundError"),
        ("no/such/file.py:f", "FileNotFoundError"),
    ],
)
def test_what_does_not_load_says_why(function, message):
    broken = WorkerPool(1, 5.0, function=function)
    assert message in (broken.check("function") or "")
    broken.close()
