"""Checkpoints: host values come back as they went in, and what is damaged is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.checkpoints import Checkpoints, newest_checkpoint

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
        number, found = checkpoints.restore_host()
    assert number == 3
    return found


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
        assert_same(checkpoints.restore_host(), (1, {"step": 1, "array": array}))
        restored = checkpoints.restore_some(dict(ARRAYS))
        checkpoints.save(2, restored | {"weights": 2 * restored["weights"]}, {"step": 2, "array": array + 1})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_same(checkpoints.restore_host(), (2, {"step": 2, "array": array + 1}))
        found = checkpoints.restore_some(dict(ARRAYS))
        np.testing.assert_array_equal(found["weights"], 2 * ARRAYS["weights"])
        checkpoints.save(3, found, {"step": 3})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_same(checkpoints.restore_host(), (3, {"step": 3}))


def test_only_what_is_asked_for_is_restored(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, ARRAYS, {})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore_some({"weights": jnp.zeros((2, 3))})
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


def test_refusals(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(ValueError, match="no complete checkpoint in"):
            checkpoints.restore_host()
        checkpoints.save(4, ARRAYS, {"step": 4, "array": np.arange(3)})
    damaged = r"checkpoint 4 in .* is damaged"
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(ValueError, match=f"{damaged} or of another"):
        checkpoints.restore_some({"weights": jnp.zeros((4, 4))})
    for file in (tmp_path / "4" / "host_arrays" / "d").iterdir():
        file.write_bytes(b"")
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(ValueError, match=damaged):
        checkpoints.restore_host()
    for file in (tmp_path / "4" / "host").iterdir():
        file.write_bytes(b"")
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(ValueError, match=damaged):
        checkpoints.restore_host()
