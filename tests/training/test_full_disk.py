"""A disk that is full or read-only in the middle of a run: one error, and the last checkpoint is whole.

A limit on the size of files stands for a full disk: every write beyond it fails, whoever makes it, in this process.
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nested_reft.checkpoints import CheckpointError, newest_checkpoint
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.training.runs import MOVING, assert_equal_arrays, comparable, nano, trainer

CONFIG = nano(
    loss=MOVING, optimizer__learning_rate=0.01, evaluation__samples_per_prompt=0, evaluation__every_steps=100
)  # fmt: skip


@contextmanager
def limited() -> Iterator[None]:
    """Gives the process back the files that it may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit(size: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    run = trainer(CONFIG, tmp_path_factory.mktemp("whole"))
    run.run()
    return run


def assert_resumes_as(whole: Trainer, path) -> None:
    """The run goes on from its last checkpoint and ends as the other one."""
    run = trainer(CONFIG, path, resume=True)
    run.run()
    assert_equal_arrays(run.state.learner.state, whole.state.learner.state)
    logs = [read_log(of / "metrics.jsonl") for of in (path, whole.run_directory.path)]
    assert [comparable(line) for line in logs[0]] == [comparable(line) for line in logs[1]]


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_ends_the_run_and_its_last_checkpoint_is_whole(what, whole, tmp_path):
    """Checkpoints come after steps 2 and 4, so the limit of step 3 meets the log of step 4 or the checkpoint after."""

    def on_step(found):
        if found.number == 3:
            run.checkpoints.wait()  # the one of step 2 may still be on its way
            # Logs of a few steps are smaller than 300 kB, and the arrays of a checkpoint larger.
            size = (tmp_path / "samples.jsonl").stat().st_size
            limit(300_000 if what == "checkpoint" else size + 10)

    with limited():
        run = Trainer(prepare(CONFIG), RunDirectory(tmp_path), on_step).open()
        expected = CheckpointError if what == "checkpoint" else OSError
        with pytest.raises(
            expected, match="checkpoint 4 .*File too large" if what == "checkpoint" else "samples.jsonl"
        ):
            run.run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 2 and not (tmp_path / "summary.json").exists()
    assert_resumes_as(whole, tmp_path)


def test_a_directory_that_becomes_read_only_ends_the_run(whole, tmp_path, monkeypatch):
    """`chmod` stops no administrator, so the calls that make directories and replace files fail here."""

    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def on_step(found):
        if found.number == 3:
            run.checkpoints.wait()  # the one of step 2 may still be on its way
            for name in ("mkdir", "rename", "replace"):
                monkeypatch.setattr(os, name, read_only)

    run = Trainer(prepare(CONFIG), RunDirectory(tmp_path), on_step).open()
    with pytest.raises(CheckpointError, match=r"checkpoint 4 could not be written .*Read-only file system"):
        run.run()
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "checkpoints") == 2
    assert_resumes_as(whole, tmp_path)
