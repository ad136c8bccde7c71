"""The clock of a run: stages add up to the time that passed, and compiling counts once."""

import io
import time

from tqdm import tqdm

from nested_reft.training.clock import Clock, advance


def test_stages_add_up():
    """Times 0 to 100 by hand; 7 seconds of the training and 2 of the evaluation inside it were compiling."""
    time, compiled = [0.0], [0.0]
    clock = Clock(lambda: compiled[0], lambda: time[0])
    time[0] = 5
    with clock.stage("training"):
        time[0], compiled[0] = 25, 7
        with clock.stage("evaluation"):
            time[0], compiled[0] = 35, 9
        time[0] = 95
    time[0] = 100
    # 20 - 7 and 60 seconds of training, 10 - 2 of evaluation; a sum with nested stages counted twice would be 110.
    expected = {"compiling": 9.0, "training": 73.0, "evaluation": 8.0, "other": 10.0, "total": 100.0}
    assert clock.seconds() == expected


def test_programs_that_compile_side_by_side_take_no_more_than_the_time_that_passed():
    time, compiled = [0.0], [0.0]
    clock = Clock(lambda: compiled[0], lambda: time[0])
    time[0], compiled[0] = 3, 8
    assert clock.seconds() == {"compiling": 3.0, "other": 0.0, "total": 3.0}


def test_a_stage_that_fails_ends():
    time = [0.0]
    clock = Clock(lambda: 0.0, lambda: time[0])
    try:
        with clock.stage("training"):
            time[0] = 2
            raise ValueError
    except ValueError:
        time[0] = 3
    assert clock.seconds() == {"training": 2.0, "compiling": 0.0, "other": 1.0, "total": 3.0}


def test_the_time_left_does_not_follow_from_the_first_step():
    """The first step takes 0.3 seconds and the second 0.02: counted together, they are 6 a second."""
    with tqdm(initial=5, total=10, file=io.StringIO(), mininterval=0) as bar:
        time.sleep(0.3)
        advance(bar, "first", timed=False)
        assert bar.n == 6 and bar.format_dict["elapsed"] < 0.1
        time.sleep(0.02)
        advance(bar, "second", timed=True)
        shown = bar.format_dict
        assert bar.n == 7 and (shown["n"] - shown["initial"]) / shown["elapsed"] > 12
        assert shown["rate"] is None or shown["rate"] > 12
