"""Samples as plain text: which fit, which are worth a look, and that none of them can pass for another."""

import json

import pytest

from nested_reft.cli.main import main
from nested_reft.reports.samples import evenly_chosen, sample_text, verdict, worth_a_look
from tests.reports.runs_on_disk import ATTACKS, line, sample, write_run


@pytest.fixture
def run(tmp_path):
    samples = [
        sample(1, "four"),
        sample(1, "5", source="b", accuracy=0.0, reward=0.25),
        sample(2, "Four is it"),
        sample(3, "", source="b", accuracy=None, reward=0.0),
        sample(4, "6", accuracy=0.0, reward=-1.0),
    ]
    return write_run(tmp_path / "run", [line(1)], samples)


def printed(run, capsys, *options) -> list[str]:
    assert main(["samples", str(run), *options]) == 0
    return [text for text in capsys.readouterr().out.splitlines() if text.startswith("sample | ")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["four", "5", "Four is it", "", "6"]),
        (["--step", "2"], ["Four is it"]),
        (["--step", "2-3"], ["Four is it", ""]),
        (["--source", "b"], ["5", ""]),
        (["--right"], ["four", "Four is it"]),
        (["--wrong"], ["5", "6"]),
        (["--unscored"], [""]),
        (["--least-reward", "0", "--most-reward", "0.5"], ["5", ""]),
        (["--text", "FOUR"], ["four", "Four is it"]),
        (["--last", "2"], ["", "6"]),
        (["--wrong", "--last", "1"], ["6"]),
    ],
)
def test_filters(options, expected, run, capsys):
    assert printed(run, capsys, *options) == [f"sample | {text}" for text in expected]


def test_twenty_are_shown_unless_all_are_asked_for(tmp_path, capsys):
    write_run(tmp_path, [line(1)], [sample(step, str(step)) for step in range(1, 31)])
    assert printed(tmp_path, capsys)[0] == "sample | 11"
    assert len(printed(tmp_path, capsys, "--last", "0", "--json", str(tmp_path / "out.json"))) == 30
    assert len(json.loads((tmp_path / "out.json").read_text())) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "5-3"], "--step is '5-3'; allowed is a step, such as 10, or two, such as 10-20"),
        (["--step", "x"], "--step is 'x'"),
        (["--source", "c"], "--source is 'c'; the samples of this run have sums, b"),
        (["--right", "--wrong"], "not allowed with argument"),
        (["--least-reward", "nan"], "allowed is a number that is finite"),
        (["--last", "-1"], "allowed is a whole number from 0"),
    ],
)
def test_refusals(options, message, run, capsys):
    assert main(["samples", str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_refused_and_a_run_without_samples_says_so(tmp_path, capsys):
    assert main(["samples", str(tmp_path)]) == 2
    write_run(tmp_path, [line(1)])
    assert main(["samples", str(tmp_path)]) == 0
    found = capsys.readouterr()
    assert "warning: There is no samples.jsonl." in found.err and "0 of 0 samples" in found.out


def test_what_a_model_wrote_cannot_act_on_a_terminal_or_look_like_a_heading(tmp_path, capsys):
    forged = "4\n--- step 9, version 9, sums, right"
    write_run(tmp_path, [line(1)], [sample(1, text, source="\x1b[2J") for text in (*ATTACKS, forged)])
    assert main(["samples", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(shown) and "\\u202e" in shown and "\\x1b[31m" in shown
    assert sum(text.startswith("--- ") for text in shown.splitlines()) == 5


def test_verdicts_of_earlier_logs():
    """They have the accuracy as a part of the reward, or none."""
    old = {"step": 1, "reward": 1.0}
    assert [verdict(old | {"parts": {"accuracy": share}}) for share in (1.0, 0)] == ["right", "wrong"]
    assert verdict(old) == verdict(old | {"parts": 3}) == verdict(old | {"accuracy": "x"}) == "unknown"
    assert "sample | None" not in sample_text(old)


def test_worth_a_look():
    """The best rewarded wrong one, the shortest of what was sampled, and the heaviest; the same text only once."""
    samples = [
        sample(1, "a", accuracy=0.0, reward=0.9, tokens=9),
        sample(2, "b", accuracy=0.0, reward=0.1, tokens=5, forced_tokens=4),
        sample(3, "c", mean_weight=7.0, tokens=4),
        sample(4, "a", accuracy=0.0, reward=0.9, tokens=9),
    ]
    found = {title: [each["text"] for each in shown] for title, _, shown in worth_a_look(samples)}
    assert found["Wrong, and best rewarded"] == ["a", "b"]
    assert found["Shortest"] == ["b", "c", "a"]
    assert found["Heaviest"][0] == "c"


def test_chosen_samples_are_of_whole_steps_over_the_run():
    samples = [sample(step) for step in range(1, 101) for _ in range(8)]
    chosen = [each["step"] for each in evenly_chosen(samples, 80)]
    assert len(chosen) == 80 and chosen[0] == 1 and chosen[-1] == 100 and all(chosen.count(s) == 8 for s in chosen)
    assert len(evenly_chosen([sample(1)] * 50, 10)) == 10 and len(evenly_chosen(samples, 800)) == 800
