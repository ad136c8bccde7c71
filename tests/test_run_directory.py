"""The files of a run: what a resumed or refused run leaves in its logs."""

from unittest.mock import MagicMock

from nested_reft.run_directory import RunDirectory


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
    assert [line["step"] for line in resumed.read_metrics()] == [0, 1, 2, 3]


def test_resuming_drops_tensorboard_points_after_the_checkpoint(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda path, purge_step: made.append(purge_step) or MagicMock())
    fresh, resumed = RunDirectory(tmp_path), RunDirectory(tmp_path)
    resumed.drop_after(2)
    assert made == []  # a run that cannot be restored gets no events file
    for run in (fresh, resumed):
        run.log_metrics(3, {"reward": 0.25})
    assert made == [None, 3]


def test_a_run_that_logged_nothing_gets_no_events_file_by_closing(tmp_path):
    RunDirectory(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]
