"""The simulation of searching ahead: its times by hand, its ages as those of real runs."""

import json

import numpy as np
import pytest

from experiments.async_sizing import Replay, Times, main, measured_and_predicted, simulate
from nested_reft.training.search_config import SearchConfig


def times(sample: float, update: float, steps: int, lag: int, sync: float = 0.0) -> Times:
    return Times(np.full(steps + lag, sample), np.full(steps, update), sync)


@pytest.mark.parametrize(
    ("search", "sample", "seconds", "waited"),
    [
        # One after the other: 4 x (3 + 1).
        (SearchConfig(), 3.0, 16.0, 12.0),
        (SearchConfig(backend="thread"), 3.0, 16.0, 12.0),
        # The searcher never stands still, and the last update follows its fourth batch: 4 x 3 + 1.
        (SearchConfig(lag=1, backend="thread"), 3.0, 13.0, 9.0),
        # The learner samples two batches before its first update, and one before each of the others: 5 x 3 + 4.
        (SearchConfig(lag=1), 3.0, 19.0, 15.0),
        # Three searchers find more than the learner can take: it waits for the first batch alone.
        (SearchConfig(lag=3, backend="thread", searchers=3), 2.0, 6.0, 2.0),
    ],
)
def test_four_steps_by_hand(search, sample, seconds, waited):
    found = simulate(times(sample, 1.0, 4, search.lag), search)
    assert (found.seconds, found.waited) == (seconds, waited)
    assert found.learner_busy == pytest.approx(4 / seconds)


def test_weights_are_fetched_once_per_version():
    """Of steps 0 and 2: half a second each time, on the learner's way."""
    found = simulate(times(3.0, 1.0, 4, 0, sync=0.5), SearchConfig(sync_every=2, backend="thread"))
    assert found.seconds == 17.0 and found.searchers_busy == pytest.approx(13 / 17)


@pytest.mark.parametrize(
    ("lag", "sync_every", "ages"), [(2, 1, [0, 1, 2, 2, 2, 2]), (0, 3, [0, 1, 2, 0, 1, 2]), (1, 2, [0, 1, 2, 1, 2, 1])]
)
def test_ages_are_those_of_the_trainer(lag, sync_every, ages):
    """The same table as in the tests of `training.orders`."""
    search = SearchConfig(lag=lag, sync_every=sync_every, backend="thread")
    assert simulate(times(1.0, 1.0, 6, lag), search).staleness_T == ages


def test_a_checkpoint_waits_for_all_that_is_under_way():
    """Three batches of 2 s are ordered at once, one more in the second step, and the learner starts after 2 s.

    Without checkpoints, the two steps end at 5. The first checkpoint waits from 3 until the other two are there, at 4
    and 6. Then batch 3 is ordered, the second update ends at 7, and the second checkpoint waits for batch 3 until 8.
    """
    search = SearchConfig(lag=2, backend="thread", searchers=1)
    found = simulate(times(2.0, 1.0, 2, search.lag), search, checkpoint_every=1)
    assert (found.seconds, found.waited) == (8.0, 2.0 + 3.0 + 1.0)
    assert simulate(times(2.0, 1.0, 2, search.lag), search).seconds == 5.0
    # Their age is the same.
    assert found.staleness_T == [0, 1]


def test_a_store_makes_what_is_trained_on_older():
    """Batches of two steps are kept. From the second step on, half of the groups are 0 or 1 steps old."""
    found = simulate(times(3.0, 1.0, 4, 0), SearchConfig(), replay=Replay(kept=2, recent_share=0.5))
    assert found.trained_age == pytest.approx(3 * 0.5 * 0.5 / 4) and found.staleness_T == [0, 0, 0, 0]
    assert found.seconds == 16.0


def test_the_first_update_waits_for_the_prefill():
    """Three batches in turns, then one for each update: 6 x 3 + 4 seconds."""
    search = SearchConfig()
    found = simulate(times(3.0, 1.0, 4, 2), search, replay=Replay(kept=3, recent_share=0.0, prefill=3))
    assert (found.seconds, found.waited) == (22.0, 18.0)
    # Versions 0 0 0, then 0 0 1, 0 1 2 and 1 2 3.
    assert found.trained_age == pytest.approx((0 + 2 / 3 + 1 + 1) / 4)


@pytest.mark.slow
def test_a_real_run_is_predicted():
    """The learner samples in turns, and each of three batches waits half a second for its judge."""
    found = measured_and_predicted("tiny", 3, 0.5, SearchConfig())
    assert found["seconds"] == pytest.approx(found["predicted seconds"], rel=0.1) and found["seconds"] > 1.5
    for who in ("searchers busy", "learner busy"):
        assert found[who] == pytest.approx(found[f"predicted {who}"], abs=0.1)
    assert found["searchers busy"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; allowed is a whole number from 1"),
        (["--sample-seconds", "-1"], "--sample-seconds is -1.0; allowed is more than 0, up to 1e6"),
        (["--update-seconds", "0"], "--update-seconds is 0.0; allowed is more than 0"),
        (["--sync-seconds", "nan"], "--sync-seconds is nan; allowed is 0 to 1e6"),
        (["--recent-share", "2"], "--recent-share is 2.0; allowed is 0 to 1"),
        (["--spread", "100"], "--spread is 100.0; allowed is 0 to 3"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0; allowed is a whole number from 1"),
        (["--check", "tinny"], "configuration 'tinny' is unknown"),
        (["--json", "nowhere/file.json"], "cannot write 'nowhere/file.json'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_table_has_every_number_of_searchers(capsys, tmp_path):
    """Eight seconds of sampling to one of learning: eight searchers would be enough if all batches took as long."""
    file = tmp_path / "sizes.json"
    assert main(["--sample-seconds", "8", "--update-seconds", "1", "--spread", "0", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["sizes"]) == 36
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    busy = {int(row[0]): float(row[4]) for row in rows}
    assert list(busy) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert busy[1] == pytest.approx(1 / 8, abs=0.01) and busy[4] == pytest.approx(1 / 2, abs=0.01) and busy[16] >= 0.99
    assert all(int(row[7]) == int(row[1]) + int(row[2]) - 1 for row in rows)
