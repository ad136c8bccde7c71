"""What processes agree on after a step, by rows that others would have sent; `test_process_runs` has real processes."""

import json

import numpy as np
import pytest

from nested_reft import processes
from nested_reft.rewards import reward
from nested_reft.rewards.pool import Outcome
from nested_reft.rewards.reward import RewardConfig
from nested_reft.training.agreement import DivergedError, agree, digest, highest


@pytest.fixture
def three(monkeypatch):
    """This process is the first of three; the others send what is set here."""
    others: list = [None, None]
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "index", lambda: 0)
    monkeypatch.setattr(processes, "gather_rows", lambda row: np.stack([row, *map(np.uint32, others)]))
    monkeypatch.setattr(processes, "gather_text", lambda text: (text, *others))
    return others


def test_one_process_agrees_with_itself():
    assert agree("step 1", 0, False, {"loss": 3}) == (0, None)
    assert agree("step 1", 2, True, {"loss": 3}) == (2, 0)
    assert highest(True) == 1 and highest(False) == 0


def test_any_process_stops_all(three):
    """A request by a person (2) outweighs one by a machine that is taken away (1): a loop must not start it again."""
    three[:] = [[0, 0, 7], [1, 0, 7]]
    assert agree("step 1", 0, False, {"loss": 7}) == (1, None)
    assert agree("step 1", 2, False, {"loss": 7}) == (2, None)
    three[:] = [[0, 0, 7], [0, 0, 7]]
    assert agree("step 1", 0, False, {"loss": 7}) == (0, None)
    three[:] = [[0], [1]]
    assert highest(0) == 1


def test_the_first_process_that_cannot_write_is_named(three):
    three[:] = [[0, 1, 7], [0, 1, 7]]
    assert agree("step 1", 0, False, {"loss": 7}) == (0, 1)


def test_processes_that_have_parted_end(three):
    """The first thing that differs is named, because it is what the others follow from."""
    three[:] = [[0, 0, 5, 7], [0, 0, 6, 8]]
    with pytest.raises(DivergedError, match="nano, step 3: process 2 has other tokens than process 0"):
        agree("nano, step 3", 0, False, {"tokens": 5, "loss": 7})


def test_a_digest_tells_values_and_order_apart():
    a, b = np.arange(3, dtype=np.float32), np.ones(2, np.int32)
    assert digest(a, b) == digest(a.copy(), b) != digest(b, a)
    assert digest(a[::-1]) == digest(np.ascontiguousarray(a[::-1])) != digest(a)
    assert 0 <= digest(a) < 2**32


def test_each_process_checks_its_share_and_all_get_the_same(three, monkeypatch):
    """Requests 0 and 3 are this process's own; the others send theirs. A failure keeps its kind and words."""
    asked = []

    class Pool:
        def run(self, requests):
            asked.extend(requests)
            return [Outcome(0.1 + request["number"]) for request in requests]

    monkeypatch.setattr(reward, "_pool", lambda config: Pool())
    monkeypatch.setattr(processes, "agreed", lambda action: action())  # it would gather texts of its own
    three[:] = [json.dumps([[1.5, None, ""], [None, "timed_out", "too slow"]]), json.dumps([[2.5, None, ""]])]
    requests = {("accuracy", 0, number): {"number": number} for number in range(5)}
    found = reward._run(requests, RewardConfig())
    assert [request["number"] for request in asked] == [0, 3]
    assert list(found.values()) == [
        Outcome(0.1), Outcome(1.5), Outcome(2.5), Outcome(3.1), Outcome(None, "timed_out", "too slow")
    ]  # fmt: skip


def test_within_an_agreed_action_each_process_works_alone(three, monkeypatch):
    three[:] = ["", ""]
    monkeypatch.setattr(processes, "gather_text", lambda text, seconds: (text, *three))
    assert processes.shares_work()
    assert not processes.agreed(processes.shares_work)
    assert processes.shares_work()
    with pytest.raises(ZeroDivisionError):
        processes.agreed(lambda: 1 // 0)
    assert processes.shares_work()
