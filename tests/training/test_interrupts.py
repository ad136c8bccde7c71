"""Requests to stop: none is lost, none breaks into what must be finished."""

import signal
import threading
from contextlib import suppress

import pytest

from nested_reft.training.interrupts import GO_ON, LEAVE, STOP, Preempted, asked_for, finishing, stop_if, stop_requests

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers_come_back():
    # The tests may run under `nohup`, which has one of the signals ignored.
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    yield
    after = [signal.signal(number, handler) for number, handler in zip(SIGNALS, before, strict=True)]
    assert after == [signal.default_int_handler] * len(SIGNALS)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_that_nothing_has_to_answer_at_once(number, capfd):
    reached = False
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop_requested:
        assert not stop_requested()
        signal.raise_signal(number)
        assert stop_requested()
        reached = True
    # The end of the block answers what nobody had answered.
    assert reached and "stopping after the work in progress" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("numbers", "is_preemption"),
    [
        ([signal.SIGTERM], True),
        ([signal.SIGINT], False),
        ([signal.SIGHUP], False),
        ([signal.SIGTERM, signal.SIGINT], False),
        ([signal.SIGINT, signal.SIGTERM], False),
        ([signal.SIGTERM, signal.SIGTERM], True),
    ],
)
def test_only_sigterm_alone_is_a_preemption(numbers, is_preemption):
    """A restart loop would start again what a person has stopped."""
    with pytest.raises(KeyboardInterrupt) as caught, stop_requests(), finishing():
        for number in numbers:
            signal.raise_signal(number)
    assert isinstance(caught.value, Preempted) == is_preemption


@pytest.mark.parametrize(("number", "request_"), [(signal.SIGTERM, LEAVE), (signal.SIGINT, STOP)])
def test_what_was_asked_for_ends_a_run_alike_wherever_it_was_heard(number, request_):
    with suppress(KeyboardInterrupt), stop_requests() as stop_requested:
        assert asked_for(stop_requested()) == GO_ON
        signal.raise_signal(number)
        assert asked_for(stop_requested()) == request_
    stop_if(GO_ON)
    # No signal came to a process that only heard of it.
    with pytest.raises(KeyboardInterrupt) as caught:
        stop_if(request_)
    assert isinstance(caught.value, Preempted) == (request_ == LEAVE) and GO_ON < LEAVE < STOP


def test_the_second_signal_acts_at_once_whatever_its_kind():
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the second signal was not heard")


def test_a_block_may_answer_a_second_signal_in_its_own_way():
    """The command leaves at once while nothing is written; the run within it raises."""
    acted = []
    with pytest.raises(KeyboardInterrupt), stop_requests(lambda: acted.append("left")):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stop_requests():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert acted == ["left", "left"]


def test_a_second_signal_waits_for_what_must_be_finished():
    finished = False
    with pytest.raises(KeyboardInterrupt), stop_requests():
        with finishing():
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            with finishing():
                pass
            finished = True
        pytest.fail("it did not act after the block")
    assert finished


def test_one_signal_does_not_act_after_a_block_that_must_be_finished():
    reached = False
    with pytest.raises(KeyboardInterrupt), stop_requests():
        with finishing():
            signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_a_block_within_another_hears_what_came_before_it():
    heard = []
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(signal.SIGTERM)
        with stop_requests() as stop_requested:
            heard.append(stop_requested())
        heard.append("the inner block ends without an answer")
    assert heard == [True, "the inner block ends without an answer"]


def test_a_request_is_forgotten_with_its_block():
    with pytest.raises(ValueError, match="other"), stop_requests():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("other")
    with stop_requests() as stop_requested:
        assert not stop_requested()


@pytest.mark.parametrize(("number", "heard"), [(signal.SIGHUP, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_what_was_ignored_stays_ignored(number, heard):
    """`nohup` starts a program with SIGHUP ignored, and a shell one in the background with SIGINT ignored."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with suppress(KeyboardInterrupt), stop_requests() as stop_requested:
            signal.raise_signal(number)
            assert stop_requested() == heard
    finally:
        signal.signal(number, before)


def test_without_signals_and_in_other_threads_nothing_happens():
    found = []

    def run():
        with stop_requests() as stop_requested, finishing():
            found.append(stop_requested())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with finishing():
        assert found == [False]
