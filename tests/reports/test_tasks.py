"""Which runs learn the same thing."""

from nested_reft.reports.tasks import task_of
from tests.sweeps.results_by_hand import config


def test_tasks_are_told_by_their_questions():
    one = task_of(config())
    assert one[0] == "sums" and one == task_of(config(name="b", nesting={"skip_ratio": 0.5}))
    more = config()
    more["data"]["sources"][0]["train_size"] = 99
    assert task_of(more) == one
    assert task_of(config(loss={"kind": "trajectory_balance"})) == one  # its accuracy is of the same questions
    assert task_of(config(loss={"kind": "dpo"}))[0] == "sums (dpo)"  # and this one of pairs
    harder = config()
    harder["data"]["sources"][0]["task"] = "basic_arithmetic"
    assert task_of(harder) != one
    assert task_of({"data": {"sources": "?"}})[0] == "no source"
