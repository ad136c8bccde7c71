"""What a run did in plain words, what its reader is warned of, and in which fields runs differ."""

from pathlib import Path

import pytest

from nested_reft.reports.run_files import RunFiles
from nested_reft.reports.summary_words import comparison_warnings, differences, summary_words, warnings
from tests.reports.runs_on_disk import line

SUMMARY = {
    "steps": 20,
    "training_seconds": 90.0,
    "full_tokens_per_second": 1000.0,
    "nested_tokens_per_second": 1500.0,
    "layers": 6,
    "kept_layers": 4,
    "before": {"a": {"prompts": 100}},
}


def run(rewards=(0.5,) * 20, heldout=(0.2, 0.2), name="run", **more) -> RunFiles:
    lines = [{"step": 0, "heldout/a": heldout[0]}]
    lines += [line(step, reward=reward + 0.01 * (step % 2)) for step, reward in enumerate(rewards, 1)]
    lines[-1] = lines[-1] | {"heldout/a": heldout[1]}
    return RunFiles(Path(name), lines, **{"summary": SUMMARY} | more)


def test_the_words_of_a_run():
    """The reward of odd steps is 0.01 more, so two steps have a mean of 0.505."""
    config, versions = {"name": "tiny", "train": {"steps": 20}}, {"device": "cpu", "devices": 8, "commit": "abc"}
    found = summary_words(run(heldout=(0.1, 0.75), config=config, versions=versions))
    assert found[0] == "tiny took 20 of 20 steps in 1.5 minutes on 8 cpu, at commit abc."
    assert found[1] == "Held-out accuracy on a went from 0.100 to 0.750 of 100 prompts, from step 0 to step 20."
    assert "mean reward went from 0.505 to 0.505 (means of the first and the last 2 steps)" in found[2]
    assert "generated 1,000 tokens a second, and 1,500 without 2 of its 6 layers: 1.50 times as many" in found[3]
    assert found[4] == "The effective sample size of tokens was 0.900 on average, and least, 0.900, at step 1."


def test_a_run_that_has_not_ended_says_so():
    for summary in ({}, SUMMARY | {"steps": 10}):
        assert "It has not ended" in summary_words(run(summary=summary))[0]
    assert summary_words(RunFiles(Path("empty")))[0].startswith("A run took 0 steps")
    cut_off = summary_words(run(summary=SUMMARY | {"steps": 30}))[0]
    assert cut_off.endswith("Its summary is of step 30: the lines of later steps are missing in metrics.jsonl.")


RISING = tuple(step / 20 for step in range(20))


@pytest.mark.parametrize(
    ("rewards", "heldout", "warned"),
    [
        (RISING, (0.20, 0.20), True),
        (RISING, (0.20, 0.25), True),  # of 100 prompts, two standard errors of the difference are 0.118
        (RISING, (0.20, 0.35), False),
        (RISING, (0.97, 0.97), False),  # there is nothing left to rise to
        ((0.5,) * 20, (0.20, 0.20), False),
        (RISING[::-1], (0.20, 0.20), False),
    ],
)
def test_a_reward_that_rises_alone_is_warned_of(rewards, heldout, warned):
    found = warnings(run(rewards, heldout))
    assert any("held-out accuracy did not rise beyond chance" in each for each in found) == warned


def test_what_went_wrong_is_counted():
    lines = [line(1, empty=True), line(2, nonfinite_updates=3, warning="too far"), line(3, ess_token=0.05)]
    found = warnings(RunFiles(Path("x"), lines, config={"train": {"ess_warning": 0.1}}))
    assert [each.split()[0] for each in found] == ["1", "3", "The", "1"]
    assert "below 0.1 in 1 of 3 steps" in found[2] and found[3].endswith("of step 2: too far.")
    hacking = {"reward_hacking": {"warning": "gold fell."}}
    assert "gold fell." in warnings(RunFiles(Path("x"), lines, summary=hacking))[0]


def test_runs_of_different_tasks_are_named():
    sums, words = ({"data": {"sources": [{"name": name}]}} for name in ("sums", "words"))
    (found,) = comparison_warnings([run(config=sums, name="one"), run(config=words, name="two")])
    assert "one has sums; two has words" in found
    assert comparison_warnings([run(config=sums), run(config=sums)]) == []
    # Questions make a task, and an objective that learns from rollouts does not.
    balance = sums | {"loss": {"kind": "trajectory_balance"}}
    assert comparison_warnings([run(config=sums), run(config=balance)]) == []
    longer = {"data": {"sources": [{"name": "sums", "min_terms": 9}]}}
    (found,) = comparison_warnings([run(config=sums), run(config=longer)])
    assert "Sources of one name have other settings." in found


def test_fields_in_which_runs_differ():
    first = {"name": "x", "loss": {"advantage": "group_std"}, "data": {"sources": [{"name": "a", "level": 1}]}}
    second = {"name": "y", "loss": {"advantage": "group_std"}, "data": {"sources": [{"name": "a", "level": 2}]}}
    rows, left_out = differences([run(config=first), run(config=second | {"seed": 3})])
    assert (rows, left_out) == ([("data.sources[0].level", ["1", "2"]), ("seed", ["-", "3"])], 0)


def test_settings_of_any_depth_end():
    deep: dict = {}
    for _ in range(900):
        deep = {"a": deep}
    assert len(differences([run(config=deep), run()])[0]) == 1
