"""The files of a run: what a resumed or refused run leaves in its logs."""

import errno
import json
import math
import os
import resource
import struct
import subprocess
from contextlib import closing

import pytest
from tensorboardX.proto import event_pb2

from nested_reft import run_lock, run_mirror
from nested_reft.run_directory import RunDirectory, read_log


def steps_of(path, name="metrics"):
    return [line["step"] for line in read_log(path / f"{name}.jsonl")]


def logged(path, steps=range(4), samples=2):
    """A closed run with these steps, and where its logs ended after step 2."""
    marks = {}
    with closing(RunDirectory(path)) as run:
        for step in steps:
            run.log_metrics(step, {"reward": 0.5})
            run.log_samples(step, [{"text": "a\nb\u2028"}] * samples if step else [])
            if step == 2:
                marks = run.marks()
    return marks


def continued(path, marks, step=2):
    """A run that goes on after step 2."""
    with closing(RunDirectory(path)) as run:
        run.continue_from(step, marks)
        run.log_metrics(step + 1, {"reward": 0.25})


@pytest.mark.parametrize("junk", [b'{"step": 4, "rew', b"\0" * 100 + b"\n", b"[" * 100_000, b"", b"\xff\n"])
def test_resuming_drops_whatever_stands_after_the_checkpoint(junk, tmp_path, caplog):
    """A kill leaves half a line, a power cut or a full disk NUL bytes."""
    marks = logged(tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(junk)
    continued(tmp_path, marks)
    assert steps_of(tmp_path) == [0, 1, 2, 3] and read_log(tmp_path / "metrics.jsonl")[3]["reward"] == 0.25
    assert read_log(tmp_path / "samples.jsonl")[-1] == {"step": 2, "text": "a\nb\u2028"}
    assert steps_of(tmp_path, "samples") == [1, 1, 2, 2]
    assert not caplog.records and not list(tmp_path.glob("*.damaged*"))


@pytest.mark.parametrize(
    ("name", "change", "message", "left"),
    [
        ("metrics", lambda lines: [lines[0], b"\0\0\n", *lines[2:]], "line 2 is no JSON object with a step", [0, 2]),
        ("metrics", lambda lines: [lines[0], b"[1]\n", *lines[2:]], "line 2 is no JSON object with a step", [0, 2]),
        ("metrics", lambda lines: [lines[0], lines[2]], "step 1 has 0 lines instead of 1", [0, 2]),
        ("metrics", lambda lines: [*lines[:2], *lines[1:]], "line 3 is of step 1 again", [0, 1, 2]),
        ("metrics", lambda lines: [], "step 0 has 0 lines instead of 1; step 1 has 0", []),
        ("metrics", lambda lines: [lines[0].replace(b"0.5", b"0.6"), *lines[1:]], "values in it were ch", [0, 1, 2]),
        ("samples", lambda lines: [lines[0], *lines[2:]], "step 1 has 1 lines instead of 2", [1, 2, 2]),
        ("samples", lambda lines: [*lines[2:4], *lines[:2]], "line 3 is of step 1 again", [2, 2]),
        ("samples", lambda lines: [*lines[:3], b"\xff\n"], "line 4 is no JSON object with a step", [1, 1, 2]),
    ],
)
def test_a_log_that_was_changed_keeps_its_good_lines_and_says_so(name, change, message, left, tmp_path, caplog):
    marks, path = logged(tmp_path), tmp_path / f"{name}.jsonl"
    damaged = b"".join(change(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(damaged)
    with closing(RunDirectory(tmp_path)) as run:
        run.continue_from(2, marks)
    assert steps_of(tmp_path, name) == left
    (record,) = caplog.records
    assert f"{name}.jsonl' is not what it was at step 2: " in record.message and message in record.message
    (kept,) = tmp_path.glob(f"{name}.jsonl.damaged-*")
    assert kept.read_bytes() == damaged and kept.name in record.message


def test_a_log_that_is_gone_is_named(tmp_path, caplog):
    marks = logged(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    continued(tmp_path, marks)
    assert steps_of(tmp_path) == [3] and "step 0 has 0 lines" in caplog.text


def test_a_log_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").mkdir()
    with closing(RunDirectory(tmp_path)) as run, pytest.raises(ValueError, match=r"samples.jsonl' is not a file that"):
        run.check_logs()


def test_one_process_at_a_time_works_on_a_run(tmp_path):
    with closing(RunDirectory(tmp_path)), pytest.raises(ValueError, match=f"run '{tmp_path}' is in use by another"):
        RunDirectory(tmp_path)
    RunDirectory(tmp_path).close()


@pytest.fixture
def without_locks(monkeypatch):
    """A network file system without locks, on which signs of life come often."""

    def fail(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", fail)
    monkeypatch.setattr(run_mirror, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_mirror, "STALE_SECONDS", 1000.0)


def test_without_locks_a_file_says_who_works_on_a_run(without_locks, tmp_path):
    """The second one sees a sign of the first; the third begins when that has ended."""
    first = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=f"run '{tmp_path}' is in use by process {os.getpid()} on host '.*'; wait"):
        RunDirectory(tmp_path)
    first.close()
    assert list(tmp_path.iterdir()) == []
    RunDirectory(tmp_path).close()


def test_without_locks_a_run_of_a_killed_process_goes_on_at_once(without_locks, tmp_path):
    done = subprocess.Popen(["true"])
    done.wait()
    (tmp_path / "in_use.json").write_text(json.dumps(run_mirror.this_process("id") | {"pid": done.pid}))
    RunDirectory(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_silent_owner_is_waited_for_and_hears_of_its_loss(without_locks, monkeypatch, tmp_path, caplog):
    beat, still = run_lock.OwnerFile.beat, []  # as on a host without network
    monkeypatch.setattr(run_lock.OwnerFile, "beat", lambda owner: still.append(owner))
    first = RunDirectory(tmp_path)
    monkeypatch.setattr(run_mirror, "STALE_SECONDS", 0.5)
    with closing(RunDirectory(tmp_path)) as second:
        assert "waiting up to 0.5 s for a sign" in caplog.text and "was not left in order by process" in caplog.text
        second.check_in_place()
        beat(still[0])
        with pytest.raises(OSError, match=f"run '{tmp_path}' was taken over"):
            first.log_metrics(1, {})
        first.close()
        assert (tmp_path / "in_use.json").exists()  # it is the second one's


def tensorboard_points(path):
    """(step, name, value) of each point on the disk, and the steps from which on earlier files are hidden."""
    points, purged = [], []
    for event in tensorboard_events(path):
        points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        purged += [event.step] * event.HasField("session_log")
    return points, purged


def tensorboard_events(path):
    for file in sorted(path.glob("events.out.tfevents*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            # A record is its length in 8 bytes, a checksum of 4, the event, and another checksum.
            (length,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event()  # pyright: ignore[reportAttributeAccessIssue] generated at import
            event.ParseFromString(data[place + 12 : place + 12 + length])
            yield event
            place += length + 16


def test_points_are_on_the_disk_when_a_step_is_logged(tmp_path):
    """Nothing is closed here, as nothing is in a process that is killed. Only numbers become points."""
    run = RunDirectory(tmp_path)
    for step in range(20):
        run.log_metrics(step, {"reward": 0.5, "unscored": 2, "left_out_layers": [1], "warning": "far"})
        points, _ = tensorboard_points(tmp_path)
        assert points[-2:] == [(step, "reward", 0.5), (step, "unscored", 2)] and len(points) == 2 * (step + 1)


def test_ages_become_a_histogram(tmp_path):
    """One completion of age 0, none of age 1 and three of age 2: their sum is 6, that of squares 12."""
    with closing(RunDirectory(tmp_path)) as run:
        run.log_metrics(1, {"reward": 0.5, "staleness_completions": [1, 0, 3]})
    values = [value for event in tensorboard_events(tmp_path) for value in event.summary.value]
    (value,) = [value for value in values if value.HasField("histo")]
    assert value.tag == "staleness_completions" and list(value.histo.bucket) == [1, 0, 3]
    assert list(value.histo.bucket_limit) == [0.5, 1.5, 2.5]
    assert (value.histo.min, value.histo.max, value.histo.num) == (0, 2, 4)
    assert (value.histo.sum, value.histo.sum_squares) == (6, 12)


def test_resuming_hides_tensorboard_points_after_the_checkpoint(tmp_path):
    marks = logged(tmp_path)
    with closing(RunDirectory(tmp_path)) as run:
        run.continue_from(2, marks)
    assert len(list(tmp_path.glob("events*"))) == 1  # a run that logs nothing gets no file
    continued(tmp_path, marks)
    points, purged = tensorboard_points(tmp_path)
    assert purged == [3] and points[-1] == (3, "reward", 0.25) and len(points) == 5


def test_logs_are_json_for_every_reader(tmp_path):
    """NaN and Infinity are no JSON."""
    with closing(RunDirectory(tmp_path)) as run:
        run.log_metrics(1, {"ratio_max": math.inf, "ess": [math.nan, 1.0]})
        run.log_samples(1, [{"reward": -math.inf}])
        run.write_summary({"ess": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "ratio_max": null, "ess": [null, 1.0]}\n'
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1, "reward": null}\n'
    assert json.loads((tmp_path / "summary.json").read_text()) == {"ess": None}


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    """The limit on the size of a file stands for the disk's; nothing else is written in the meantime."""
    with closing(RunDirectory(tmp_path)) as run:
        run.log_metrics(1, {"reward": 0.5})
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
        try:
            with pytest.raises(OSError, match=r"File too large: '.*metrics.jsonl'"):
                run.log_metrics(2, {"reward": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"st\n{"step": 2}\n', "line 2 of .*metrics.jsonl' is not JSON"),
        ('{"step": 1}\n[1]\n', "line 2 of .*metrics.jsonl' has no step"),
        ('{"reward": 1}\n', "line 1 of .*metrics.jsonl' has no step"),
        ('{"step": true}\n', "line 1 of .*metrics.jsonl' has no step"),
        ('{"step": 1}\n{"step": 2, "a": "\xff"}\n', "line 2 of .*metrics.jsonl' is not JSON"),  # no UTF-8
        ('{"step": 1}\n' + "[" * 100_000 + "\n", "line 2 of .*metrics.jsonl' is not JSON"),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(text, message, tmp_path):
    """Only a last line without its newline may be cut short."""
    with pytest.raises(ValueError, match=r"is not a run directory: it has no metrics.jsonl"):
        read_log(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "metrics.jsonl")


def test_two_runs_of_one_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    runs = [RunDirectory.create(tmp_path / "runs", "tiny", {"seed": seed}) for seed in (0, 1)]
    assert [run.path.name for run in runs] == ["tiny-20260101-120000", "tiny-20260101-120000-2"]
    for seed, run in enumerate(runs):
        assert json.loads((run.path / "config.json").read_text()) == {"seed": seed}
        assert {"python", "commit", "jax", "devices"} <= set(json.loads((run.path / "versions.json").read_text()))


def test_a_directory_that_was_moved_stops_the_run(tmp_path):
    run = RunDirectory.create(tmp_path, "x", {})
    run.log_metrics(1, {"reward": 0.5})
    run.path.rename(tmp_path / "elsewhere")
    for act in (run.marks, lambda: run.log_metrics(2, {"reward": 0.5})):
        with pytest.raises(FileNotFoundError, match=r"the run directory '.*' was moved or removed"):
            act()
    assert [line["step"] for line in read_log(tmp_path / "elsewhere" / "metrics.jsonl")] == [1]
    run.close()


def test_a_directory_in_the_summarys_place_is_refused_before_the_run(tmp_path):
    run = RunDirectory(tmp_path)
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(ValueError, match=r"summary.json' is a directory; move it away"):
        run.check_logs()
    run.close()
