"""Checkpoints: host values come back as they went in, and what is damaged is refused."""

import errno
import logging
import os
import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft import processes
from nested_reft.checkpoints import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpointError,
    checkpoint_numbers,
    newest_checkpoint,
)
from nested_reft.host_values import Block

ARRAYS = {"weights": jnp.arange(6.0).reshape(2, 3), "updates": jnp.zeros((), jnp.int32)}


def assert_same(found, expected) -> None:
    """Plain values are equal; arrays have the same values, dtype and shape, and are NumPy's own."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert isinstance(found, type(expected)) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected and type(found) is type(expected)


def round_trip(path, host):
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(3, ARRAYS, host)
    with Checkpoints(path, keep=1) as checkpoints:
        return checkpoints.restore_host(3)


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.5, -2.0], np.float32),
        np.array([np.pi, np.nan, np.inf]),  # float64: a detour over JAX would round it to float32
        np.array([2**40, -1], np.int64),  # int32 would wrap it to 0
        np.array([[True, False], [False, False]]),
        np.array(7, np.int32),
        np.zeros((0,), np.float64),
        np.zeros((3, 0, 2), np.int64),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_a_numpy_array_comes_back_with_its_dtype_and_shape(array, tmp_path):
    assert_same(round_trip(tmp_path, {"value": array}), {"value": array})


def test_arrays_may_stand_anywhere_among_plain_values(tmp_path):
    host = {
        "step": 2,
        "seconds": 0.1 + 0.2,
        "name": "__array__",
        "nothing": None,
        "division": [[{"name": "a", "examples": [0, 2]}], []],
        "buffer": {"batches": [{"reward": np.ones((2, 2), np.float32)}, {"reward": np.zeros((1, 2), np.float32)}]},
        "rows": [np.arange(3), [np.array([True])], 5],
        "empty": {},
    }
    assert_same(round_trip(tmp_path, host), host)


def test_host_values_without_any_array(tmp_path):
    assert_same(round_trip(tmp_path, {"step": 1}), {"step": 1})


def test_a_tuple_comes_back_as_a_list(tmp_path):
    """JSON has no tuples; whoever needs one makes it."""
    assert_same(round_trip(tmp_path, {"pair": (1, np.arange(2))}), {"pair": [1, np.arange(2)]})


def test_what_was_restored_can_save_again(tmp_path):
    """A resumed run reads each part once; its next checkpoints have all of them, or fewer."""
    array = np.array([2**40], np.int64)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, ARRAYS, {"step": 1, "array": array})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_same(checkpoints.restore_host(1), {"step": 1, "array": array})
        restored = checkpoints.restore_some(1, dict(ARRAYS))
        checkpoints.save(2, restored | {"weights": 2 * restored["weights"]}, {"step": 2, "array": array + 1})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_same(checkpoints.restore_host(2), {"step": 2, "array": array + 1})
        found = checkpoints.restore_some(2, dict(ARRAYS))
        np.testing.assert_array_equal(found["weights"], 2 * ARRAYS["weights"])
        checkpoints.save(3, found, {"step": 3})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_same(checkpoints.restore_host(3), {"step": 3})


def test_only_what_is_asked_for_is_restored(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, ARRAYS, {})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore_some(0, {"weights": jnp.zeros((2, 3))})
    assert list(found) == ["weights"]
    np.testing.assert_array_equal(found["weights"], ARRAYS["weights"])


def test_the_newest_are_kept(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (0, 2, 5):
            checkpoints.save(number, ARRAYS, {"number": number})
        checkpoints.save(7, ARRAYS, {"number": 7})
    assert newest_checkpoint(tmp_path) == 7
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [5, 7]


def test_what_is_no_checkpoint_is_none(tmp_path):
    """`²` is a digit; an empty directory was made by somebody else."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (0, 3):
            checkpoints.save(number, ARRAYS, {"number": number})
    for name in ("²", "999", "007", "-1", "1e3", "9.orbax-checkpoint-tmp", "5_copy"):
        (tmp_path / name).mkdir()
    (tmp_path / "77").write_text("")
    assert checkpoint_numbers(tmp_path) == [3, 0]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.set_aside_after(0)
        # Numbers that were taken are free again, and the newest ones are kept, not those that were set aside.
        for number in (3, 4):
            checkpoints.save(number, ARRAYS, {"number": number})
    assert checkpoint_numbers(tmp_path) == [4, 3]
    assert {"3.damaged", "77.damaged", "999.damaged", "²", "007", "5_copy"} < {path.name for path in tmp_path.iterdir()}


def test_another_model_is_refused(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, ARRAYS, {})
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(DamagedCheckpointError, match=r"checkpoint 4 in .* is of another model: "),
    ):
        checkpoints.restore_some(4, {"weights": jnp.zeros((4, 4))})


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    """Otherwise the run would go on from an older checkpoint, and set the good one aside."""

    def fails(*args, **named):
        raise OSError(5, "Input/output error")

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, ARRAYS, {})
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(OSError, match="Input/output error"):
        monkeypatch.setattr(checkpoints._manager, "restore", fails)
        checkpoints.restore_some(4, ARRAYS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(4, ARRAYS, {"step": 4, "array": np.arange(3)})
    return directory


def flip(path):
    """Changes one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def to_directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "flipped": (flip, "does not hold what was written"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, and"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes, and"),
    "gone": (lambda path: path.unlink(), "cannot be read: No such file"),
    "a directory": (to_directory, "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["arrays/ocdbt.process_0/d/*", "arrays/_METADATA", "host/metadata", "host_arrays/d/*"])
def test_a_damaged_file_is_named(damage, file, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    act, message = DAMAGES[damage]
    for path in sorted((tmp_path / "copy" / "4").glob(file)):
        act(path)
    name = file.replace("*", r"\w+")
    with Checkpoints(tmp_path / "copy", keep=1) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match=rf"checkpoint 4 in .* is damaged: file {name} .*{message}"):
            checkpoints.restore_some(4, dict(ARRAYS))
            checkpoints.restore_host(4)
        # A part that is whole can be read beside one that is not.
        if not file.startswith("arrays"):
            checkpoints.restore_some(4, dict(ARRAYS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it has no checksums.json"),
        ("", "checksums.json cannot be read: Expecting value"),
        ("[]", "checksums.json cannot be read"),
        ('{"host/metadata": 3}', "checksums.json cannot be read"),
        ('{"host/metadata": ["a"]}', "checksums.json cannot be read"),
        ("{}", "checksums.json names no file of its part 'host'"),
    ],
)
def test_damaged_checksums_are_damage(text, message, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    seal = tmp_path / "copy" / "4" / "checksums.json"
    seal.unlink() if text is None else seal.write_text(text)
    with Checkpoints(tmp_path / "copy", keep=1) as checkpoints, pytest.raises(DamagedCheckpointError, match=message):
        checkpoints.restore_host(4)


def test_a_file_in_the_place_of_the_directory_ends_at_once(tmp_path):
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, keep=1)
    directory.rmdir()
    directory.write_text("")
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"checkpoint 8 could not be written to .*: .*Not a directory"):
        checkpoints.save(8, ARRAYS, {})
    with pytest.raises(ValueError, match=r"checkpoints' is a file; it must be"):
        Checkpoints(directory, keep=1)
    checkpoints.close()
    # A thread that waits for its time limit would keep the process.
    assert time.monotonic() - started < 10
    assert not [thread.name for thread in threading.enumerate() if "save" in thread.name]


def test_a_full_disk_is_said_once_and_without_tracebacks(tmp_path, caplog, capfd, monkeypatch):
    """It fails where no caller waits: in the thread that writes, with the last file of a checkpoint."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, ARRAYS, {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr("nested_reft.checkpoints.write_json", full)
            checkpoints.save(2, ARRAYS, {})
            with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be written .*No space left on dev"):
                checkpoints.wait()
    assert checkpoint_numbers(tmp_path) == [1]
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not errors and "Traceback" not in capfd.readouterr().err


def full(path, value):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.fixture
def second(monkeypatch):
    """This process is the second of two; the first says what is set here, one text after the other."""
    said: list[str] = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "gather_text", lambda text, *_: (said.pop(0), text))
    return said


def test_a_checkpoint_that_is_damaged_for_one_process_is_so_for_all(second, whole, tmp_path):
    """Each compares a share of the files, so damage is found once, and the other process hears of it."""
    shutil.copytree(whole, tmp_path / "copy")
    files = sorted(path for path in (tmp_path / "copy" / "4" / "host").rglob("*") if path.is_file())
    if len(files) == 1:
        pytest.skip("this version of Orbax writes one file, which cannot be shared out")
    with Checkpoints(tmp_path / "copy", keep=1) as checkpoints:
        second[:] = ["file x is not there"]
        with pytest.raises(DamagedCheckpointError, match=r"checkpoint 4 in .* is damaged: process 0: file x is not th"):
            checkpoints.restore_some(4, dict(ARRAYS))
        found = 0
        for path in files:
            content = path.read_bytes()
            path.write_bytes(b"other")
            second[:] = ["", ""]
            try:
                checkpoints._check(4, ("host",))
            except DamagedCheckpointError as error:
                assert "process" not in str(error)
                found += 1
            path.write_bytes(content)
        assert 0 < found < len(files)
    # Whoever reads alone compares all of them, and asks nobody.
    files[0].write_bytes(b"other")
    second.clear()
    with Checkpoints(tmp_path / "copy", keep=1, alone=True) as checkpoints:
        assert checkpoints.numbers() == [4]
        with pytest.raises(DamagedCheckpointError, match="is damaged: file host/"):
            checkpoints.restore_host(4)


def test_the_first_process_lists_checkpoints_and_changes_files(second, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "5").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path / "copy", keep=1) as checkpoints:
        second[:] = ["[7, 4]"]
        assert checkpoints.numbers() == [7, 4]
        second[:] = [""]
        checkpoints.set_aside_after(4)
        assert sorted(tmp_path.rglob("*")) == before
        # What it could not do fails on all, before they wait for each other in a save.
        second[:] = ["OSError\nno room"]
        with pytest.raises(CheckpointError, match=r"checkpoint 8 could not be written to .*: process 0: no room"):
            checkpoints.save(8, ARRAYS, {"block": Block("new", {"a": 1})})
        assert not (tmp_path / "copy" / "blocks" / "new.safetensors").exists()
