"""The short form of `scripts/kill_loop.py`, what it compares, and how it judges an end."""

import random
import signal
from unittest.mock import Mock, call

import numpy as np
import pytest

from nested_reft.run_directory import read_log
from scripts import kill_loop
from scripts.compare_runs import differing_values
from scripts.kill_loop import MOMENTS, RANDOM, RUNS, Kill, Killed, KillLoop, report, schedule


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not_been(tmp_path):
    """In a rollout, while what is kept for replay is written, and while a checkpoint gets its checksums."""
    loop = KillLoop(tmp_path, [signal.SIGKILL], random.Random(0))
    run = loop.killed("replay", ["rollout", "buffer write", "checkpoint seal"])
    assert run.found == []
    assert [kill.verdict for kill in run.kills] == ["killed"] * 3, run.kills
    # The comparison is worth something only where there is something to compare.
    straight, _ = loop.undisturbed("replay")
    lines = read_log(straight / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(7))
    assert any(line.get("gradient_norm", 0) > 0 for line in lines)


# Nested rollouts and replay, with a reward that an untrained model earns at times.
SMALL = [
    *("tiny", "--data.prompts-per-batch", "4", "--rollout.group-size", "4", "--evaluation.samples-per-prompt", "0"),
    *("--data.sources.0.train-size", "20", "--data.sources.0.heldout-size", "8", "--evaluation.batch-size", "8"),
    *("--warm-start.steps", "0", "--optimizer.warmup-steps", "0", "--optimizer.learning-rate", "0.01"),
    *("--reward.checker", "function", "--reward.workers", "1", "--replay.capacity", "64"),
    *("--reward.function", f"{kill_loop.ROOT}/tests/rewards/reward_functions.py:even"),
    *("--replay.recent-share", "0.5", "--train.steps", "3", "--train.checkpoint-every", "1"),
]


@pytest.mark.slow
def test_a_pair_of_which_one_process_is_killed_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """The other one ends by itself, and both continue from the newest checkpoint."""
    monkeypatch.setitem(RUNS, "small", SMALL)
    loop = KillLoop(tmp_path, [signal.SIGKILL], random.Random(0), processes=2)
    run = loop.killed("small", ["update"])
    assert run.found == []
    (kill,) = run.kills
    assert kill.verdict == "killed" and kill.checkpoint is not None, kill
    straight, _ = loop.undisturbed("small")
    assert all(line["gradient_norm"] > 0 for line in read_log(straight / "metrics.jsonl")[1:])


def test_twenty_kills_take_every_moment():
    planned = schedule(20, None)
    moments = [moment for _, chosen in planned for moment in chosen]
    assert len(moments) == 20 and set(moments) == {*MOMENTS, RANDOM}
    assert {kind for kind, _ in planned} == RUNS.keys()
    assert [len(chosen) for _, chosen in schedule(7, None)] == [5, 2]
    # Without replay nothing writes a file for it.
    assert all("buffer write" not in chosen for kind, chosen in schedule(40, None) if kind != "replay")
    # A run without a kill would compare the undisturbed one with itself.
    assert schedule(2, ["buffer write"]) == [("replay", ["buffer write"])] * 2


@pytest.mark.parametrize("function", [function for function, _ in MOMENTS.values()])
def test_every_moment_is_a_function_that_exists_and_sends_at_its_call(function, monkeypatch):
    owner, name = kill_loop.owner_of(function)
    assert callable(getattr(owner, name))
    called, thread = Mock(return_value="done"), Mock()
    monkeypatch.setattr(owner, name, called)
    monkeypatch.setattr(kill_loop.threading, "Thread", thread)
    kill_loop.arm(function, 2, 0.0, [])
    started = []
    for _ in range(3):
        assert getattr(owner, name)("given", named=1) == "done"
        started.append(thread.return_value.start.call_count)
    assert started == [0, 1, 1]
    assert called.call_args_list == [call("given", named=1)] * 3


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("signals", "code", "checkpoint", "output", "verdict"),
    [
        ([KILL], -9, None, "anything", "killed"),
        ([KILL], 1, 3, "Traceback", "crashed"),
        ([KILL], 0, 6, "", "not reached"),
        ([TERM], 75, 3, "to continue: nested-reft", "killed"),
        ([TERM], 75, None, "the run ended before its first checkpoint", "killed"),
        ([TERM], 75, 3, "", "silent"),
        ([TERM], 130, 3, "to continue: ", "crashed"),
        ([TERM], -15, None, "", "killed"),
        ([TERM], -15, 3, "step 2", "crashed"),
        ([INT, INT], 130, 3, "to continue: ", "killed"),
        ([INT, TERM], 130, 3, "to continue: ", "killed"),
        ([INT], 75, 3, "to continue: ", "crashed"),
        ([INT], 130, 3, "Traceback\nto continue: ", "crashed"),
    ],
)
def test_how_a_process_may_end(signals, code, checkpoint, output, verdict):
    assert kill_loop.verdict_of(signals, code, checkpoint, output) == verdict


@pytest.mark.parametrize(
    ("verdict", "victim", "code", "output", "expected"),
    [
        ("killed", -9, -6, "", "killed"),
        ("killed", -9, 0, "", "crashed"),  # it came to an end without the other
        ("killed", -9, -9, "", "crashed"),
        ("killed", -9, 1, "Traceback", "crashed"),
        ("killed", -9, 1, "error: process 1 could not reach process 0 at coordinator 'x' within 300 s", "killed"),
        ("killed", 75, 75, "", "killed"),
        ("killed", 75, -6, "", "crashed"),
        ("not reached", 0, 0, "", "not reached"),
        ("not reached", 0, 1, "at coordinator", "crashed"),
    ],
)
def test_how_the_others_may_end(verdict, victim, code, output, expected):
    assert kill_loop.verdict_of_other(verdict, victim, code, output) == expected


def test_the_report_has_a_row_for_each_kill_and_names_what_differs():
    kill = Kill("rollout", -9, 4, "killed", "")
    runs = [
        Killed("replay", [kill, Kill("start", -9, None, "killed", "")]),
        Killed("replay", [kill], ["metrics.jsonl, line 3, loss: 1.0 and 2.0"]),
    ]
    text = report(runs, [KILL])
    assert len(text.splitlines()) == 2 + 3 + 2
    assert "none: begun again" in text and "1 differences" in text and "line 3, loss: 1.0 and 2.0" in text
    assert text.endswith("SIGKILL: 3 moments, 3 killed; 1 of 2 runs end like the one that nobody killed, bit for bit")


def test_values_are_compared_bit_for_bit_and_times_are_not():
    mine = {"loss": float("nan"), "kept": [np.arange(3)], "seconds": 1.0, "a": {"marks": 1}, "marks": {"x": 1}}
    same = {"loss": float("nan"), "kept": [np.arange(3)], "seconds": 2.0, "a": {"marks": 1}, "marks": {"x": 2}}
    assert differing_values(mine, same, "host") == []
    other = {**same, "kept": [np.arange(3.0)], "a": {"marks": 2}}
    assert differing_values(mine, other, "host") == [
        "host, a.marks: 1 and 2",
        "host, kept.0: array([0, 1, 2]) and array([0., 1., 2.])",
    ]
    assert differing_values({"a": [], "b": 1}, {"b": 1}, "host") == ["host, a: [] and 'nothing'"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--kills 0", "--kills: is 0; allowed is a whole number from 1"),
        ("--kills -1", "--kills: is -1; allowed"),
        ("--processes 0", "--processes: is 0; allowed"),
        ("--signals SIGCHLD", "invalid choice: 'SIGCHLD'"),  # which is ignored
        ("--signals SIGSTOP", "invalid choice: 'SIGSTOP'"),  # which ends nothing
        ("--moments", "--moments: expected at least one"),
    ],
)
def test_what_would_kill_nothing_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        kill_loop.main(arguments.split())
    assert message in capsys.readouterr().err
