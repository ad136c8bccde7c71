"""The time limit of a pre-emption: it counts from the signal, wherever the main thread is."""

import hashlib
import os
import signal
import threading
import time

import pytest

from nested_reft.training.interrupts import Preempted, stop_requests
from nested_reft.training.preemption import save_limit

LONG = 3_000_000  # rounds of a hash: a second or more in C, which no signal breaks off


def test_the_limit_counts_while_the_main_thread_is_not_in_python():
    """A handler in Python would begin to count only after the hash."""
    ended = []
    with pytest.raises(Preempted), stop_requests(), save_limit(0.05, lambda: ended.append(time.monotonic())):
        late = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        late.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", LONG)
        finished = time.monotonic()
        late.join()  # after the block its signal would end the tests
    assert len(ended) == 1 and ended[0] < finished


def test_a_block_that_ends_in_time_is_left_alone():
    ended, began = [], time.monotonic()
    with pytest.raises(Preempted), stop_requests(), save_limit(60.0, lambda: ended.append("too late")):
        signal.raise_signal(signal.SIGTERM)
    # The block waits for the thread that counts, so the thread has ended, long before the limit.
    assert not ended and time.monotonic() - began < 30


def test_a_person_sets_no_limit():
    ended = []
    with pytest.raises(KeyboardInterrupt), stop_requests(), save_limit(0.01, lambda: ended.append("too late")):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
    assert not ended


def test_an_event_loop_goes_on_hearing_its_signals():
    """A notebook's loop has a descriptor of its own, and has it back after the block."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        with pytest.raises(Preempted), stop_requests(), save_limit(10.0, lambda: None):
            signal.raise_signal(signal.SIGTERM)
            assert os.read(reader, 8) == bytes([signal.SIGTERM])
    finally:
        assert signal.set_wakeup_fd(before) == writer
        os.close(reader)
        os.close(writer)


def test_other_threads_have_no_limit():
    ended, ran = [], []

    def run():
        with save_limit(0.0, lambda: ended.append("too late")):
            ran.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran and not ended
