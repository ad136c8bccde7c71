"""Saving the store for replay: what is new is written once, and every kept checkpoint gives its store back whole."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.checkpoints import Checkpoints, DamagedCheckpointError
from nested_reft.replay_saving import load_store, save_store
from nested_reft.replay_store import ReplayConfig, Store, add, draw, without_stale
from tests.test_replay_store import found

CONFIG = ReplayConfig(capacity=40, recent_share=0.5, inverse_temperature=1.0, completions_per_prompt=6, max_staleness=6)
ARRAYS = {"updates": jnp.zeros(())}


def steps(store: Store, versions: range) -> Store:
    """Batches with prompts that come again, equal completions, prompts that never come again, and free rows."""
    for version in versions:
        batch = found([version % 5, 100 + version], version, first=version % 3, reward=[0, 1, 2, 3])
        store = add(without_stale(store, CONFIG, version), CONFIG, batch)
        _, store = draw(store, CONFIG, jax.random.key(version), 3, 4)
    return store


def assert_same(one: Store, other: Store) -> None:
    """Every entry, row and counter is equal, bit for bit."""
    assert one.row_of == other.row_of and np.array_equal(one.rows_R, other.rows_R)
    for name in ("batches", "begun", "fruitless", "turned_away", "numbered"):
        assert getattr(one, name) == getattr(other, name), name
    assert len(one.entries) == len(other.entries)
    for left, right in zip(one.entries, other.entries, strict=True):
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            assert np.array_equal(left.arrival_N, right.arrival_N) and np.array_equal(left.number_N, right.number_N)
            pairs = (entry.group.to_plain() | {"stats": None} for entry in (left, right))
            jax.tree.map(np.testing.assert_array_equal, *pairs)


def save(checkpoints: Checkpoints, number: int, store: Store) -> Store:
    store, plain = save_store(store, f"replay-{number}")
    checkpoints.save(number, ARRAYS, {"store": plain})
    return store


def restore(path: Path, number: int) -> Store:
    with Checkpoints(path, keep=2) as checkpoints:
        return load_store(checkpoints.restore_host(number, blocks=True)["store"])


def test_every_kept_checkpoint_gives_its_store_back_and_goes_on_the_same(tmp_path):
    store, stores = Store(), {}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in range(7):
            # Two checkpoints follow each other without a step between them.
            store = steps(store, range(3 * number, 3 * number + (0 if number == 4 else 3)))
            stores[number] = store = save(checkpoints, number, store)
    for number in (5, 6):
        again = restore(tmp_path, number)
        assert_same(again, stores[number])
        assert_same(steps(again, range(40, 46)), steps(stores[number], range(40, 46)))
    # A resumed run writes on, and gives back the same as one that was never stopped.
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        again = load_store(checkpoints.restore_host(6, blocks=True)["store"])
        save(checkpoints, 7, steps(again, range(40, 42)))
    assert_same(restore(tmp_path, 7), steps(stores[6], range(40, 42)))


def test_an_empty_store_comes_back_empty(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, Store())
    assert_same(restore(tmp_path, 1), Store())
    assert not (tmp_path / "blocks").exists()


def test_a_save_writes_what_is_new_and_what_is_left_of_segments_that_are_mostly_gone():
    """A batch of two prompts has 8 completions. Prompt 1 comes again with 4 others, which crowd its first 2 out."""
    config = dataclasses.replace(CONFIG, capacity=1000, max_staleness=None)
    written = []

    def saved(store: Store) -> Store:
        store, plain = save_store(store, f"replay-{len(written)}")
        new = [block.values for block in plain["segments"] if block.values is not None]
        written.append(sum(len(values["number_M"]) for values in new))
        return store

    store = saved(add(Store(), config, found([1, 2], 0)))
    store = saved(add(store, config, found([3], 0)))
    store = saved(store)
    store = saved(add(store, config, found([1], 1, first=10)))
    assert written == [8, 4, 0, 4] and [segment.kept_M.sum() for segment in store.segments] == [6, 4, 4]
    # Four more crowd out the other 2 old ones of prompt 1, and 2 of the last segment; the first has 4 of 8 left.
    store = saved(add(store, config, found([1], 2, first=20)))
    assert written[-1] == 4 and [segment.kept_M.sum() for segment in store.segments] == [4, 4, 2, 4]
    # Prompt 2 loses 2 of its 4: less than half of the first segment is left, and moves.
    store = saved(add(store, config, found([9, 2], 3, first=10)))
    assert written[-1] == 8 + 2 and [segment.name for segment in store.segments] == [
        f"replay-{number}" for number in (1, 3, 4, 5)
    ]


def test_segments_stay_few_and_small_however_long_a_run_is():
    store, sizes = Store(), []
    for version in range(120):
        store, _ = save_store(steps(store, range(version, version + 1)), f"replay-{version}")
        sizes.append((len(store.segments), sum(len(segment.kept_M) for segment in store.segments)))
    assert max(sizes[60:]) <= max(sizes[20:60]) and max(size for _, size in sizes) <= 2 * len(store) + 8


def test_files_go_with_the_checkpoints_that_have_them(tmp_path):
    store = Store()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in range(8):
            store = save(checkpoints, number, steps(store, range(number, number + 1)))
            (tmp_path / "blocks" / "replay-99.safetensors.partial").touch()  # of a run that was killed
        save(checkpoints, 8, store)
    kept = {path.stem for path in (tmp_path / "blocks").iterdir()}
    names = {segment.name for segment in store.segments}
    # The checkpoint before the last may still have a few that the last has given up.
    assert names <= kept and len(kept) <= len(names) + 2 and "replay-99.safetensors" not in kept


def test_a_save_that_is_killed_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch):
    first = steps(Store(), range(3))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        first = save(checkpoints, 1, first)

        def killed(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoints._manager, "save", killed)  # what lies between the blocks and the checkpoint
        with pytest.raises(KeyboardInterrupt):
            save(checkpoints, 2, steps(first, range(3, 20)))
    assert (tmp_path / "blocks" / "replay-2.safetensors").exists()
    again = restore(tmp_path, 1)
    assert_same(again, first)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        again = load_store(checkpoints.restore_host(1, blocks=True)["store"])
        save(checkpoints, 2, steps(again, range(3, 5)))
    assert_same(restore(tmp_path, 2), steps(first, range(3, 5)))


def test_a_damaged_segment_is_named_and_a_reader_of_weights_never_reads_it(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, steps(Store(), range(3)))
    path = tmp_path / "blocks" / "replay-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert [block.values for block in checkpoints.restore_host(1)["store"]["segments"]] == [None]
    with pytest.raises(DamagedCheckpointError, match=r"blocks/replay-1.safetensors does not hold what was written"):
        restore(tmp_path, 1)
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"blocks/replay-1.safetensors cannot be read: No such file"):
        restore(tmp_path, 1)
