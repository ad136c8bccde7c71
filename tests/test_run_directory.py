"""The files of a run: what a resumed or refused run leaves in its logs."""

import json
from unittest.mock import MagicMock

import pytest

from nested_reft.run_directory import RunDirectory, read_log


def test_resuming_drops_log_lines_after_the_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    for step in range(4):
        run.log_metrics(step, {"reward": 0.5})
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing
    resumed = RunDirectory(tmp_path)
    resumed.drop_after(2)
    resumed.log_metrics(3, {"reward": 0.25})
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[3]["reward"] == 0.25


def test_samples_are_dropped_with_the_metrics_of_their_step(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2):
        run.log_samples(step, [{"text": "a\nb\u2028"}, {"text": '"'}])
    run.drop_after(1)
    assert read_log(tmp_path / "samples.jsonl") == [{"step": 1, "text": "a\nb\u2028"}, {"step": 1, "text": '"'}]


def test_resuming_drops_tensorboard_points_after_the_checkpoint(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda path, purge_step: made.append(purge_step) or MagicMock())
    fresh, resumed = RunDirectory(tmp_path), RunDirectory(tmp_path)
    resumed.drop_after(2)
    assert made == []  # a run that cannot be restored gets no events file
    for run in (fresh, resumed):
        run.log_metrics(3, {"reward": 0.25})
    assert made == [None, 3]


def test_only_numbers_become_tensorboard_points(tmp_path, monkeypatch):
    writer = MagicMock()
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda path, purge_step: writer)
    RunDirectory(tmp_path).log_metrics(1, {"reward": 0.5, "unscored": 2, "skipped_layers": [1], "warning": "far"})
    assert [call.args for call in writer.add_scalar.call_args_list] == [("reward", 0.5, 1), ("unscored", 2, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"st\n{"step": 2}\n', "line 2 of .*metrics.jsonl' is not JSON"),
        ('{"step": 1}\n[1]\n', "line 2 of .*metrics.jsonl' has no step"),
        ('{"reward": 1}\n', "line 1 of .*metrics.jsonl' has no step"),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(text, message, tmp_path):
    """Only a last line without its newline may be cut short."""
    with pytest.raises(ValueError, match=r"is not a run directory: it has no metrics.jsonl"):
        read_log(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "metrics.jsonl")


def test_two_runs_of_one_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    runs = [RunDirectory.create(tmp_path / "runs", "tiny", {"seed": seed}) for seed in (0, 1)]
    assert [run.path.name for run in runs] == ["tiny-20260101-120000", "tiny-20260101-120000-2"]
    for seed, run in enumerate(runs):
        assert json.loads((run.path / "config.json").read_text()) == {"seed": seed}
        assert {"python", "commit", "jax", "devices"} <= set(json.loads((run.path / "versions.json").read_text()))


def test_a_run_that_logged_nothing_gets_no_events_file_by_closing(tmp_path):
    RunDirectory(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]
