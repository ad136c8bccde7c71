"""Workers that hang, crash and lie: each costs its completion a score, and nothing else."""

import os
import subprocess
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
