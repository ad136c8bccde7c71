"""The values that flow: taking and joining groups, masks, sums with their weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.checkpoints import Checkpoints
from nested_reft.types import (
    ForcedPrefixes,
    Prompts,
    Rollouts,
    Scored,
    SearchStats,
    Weighted,
    completion_fields,
    concat,
    gradient_mask,
    take,
    valid_mask,
)

B, G, P, C, F, L = 5, 2, 3, 4, 2, 3


class Numbers:
    """Numbers and texts of which no two are equal, so that a wrong row shows in every field."""

    def __init__(self, first: int = 0):
        self.next = first

    def array(self, *shape: int, dtype=np.int32) -> np.ndarray:
        values = np.arange(self.next, self.next + np.prod(shape)).reshape(shape)
        self.next = int(values.max()) + 1
        return values.astype(dtype)

    def coin(self, *shape: int) -> np.ndarray:
        """True and False: row b is the number b + 1 in binary, least digit first."""
        digits = np.arange(1, shape[0] + 1)[:, None] >> np.arange(int(np.prod(shape[1:]))) & 1
        return digits.reshape(shape).astype(bool)

    def texts(self, count: int) -> tuple[str, ...]:
        return tuple(f"text {number}" for number in self.array(count))


def prompts(numbers: Numbers, forced: bool = True) -> Prompts:
    return Prompts(
        tokens_BP=numbers.array(B, P),
        length_B=numbers.array(B),
        source_B=numbers.array(B),
        texts=numbers.texts(B),
        answers=numbers.texts(B),
        metadata=tuple({"number": text} for text in numbers.texts(B)),
        references=(*numbers.texts(B - 1), None),
        checkers=("exact", "math", "task", "function", None),
        forced=ForcedPrefixes(numbers.array(B, G, F), numbers.array(B, G)) if forced else None,
        reference_length_B=numbers.array(B),
        reference_score_B=numbers.array(B, dtype=np.float32),
    )


def rollouts(numbers: Numbers) -> Rollouts:
    return Rollouts(
        prompt_BP=numbers.array(B, P),
        prompt_length_B=numbers.array(B),
        tokens_BGC=numbers.array(B, G, C),
        length_BG=numbers.array(B, G),
        finished_BG=numbers.coin(B, G),
        forced_BG=numbers.array(B, G),
        counted_BG=numbers.coin(B, G),
        behavior_logprob_BGC=numbers.array(B, G, C, dtype=np.float32),
        nested_BG=numbers.coin(B, G),
        full_share_BG=numbers.array(B, G, dtype=np.float32),
        part_BGL=numbers.coin(B, G, L).astype(np.int8),
        version_BG=numbers.array(B, G),
        temperature_BG=numbers.array(B, G, dtype=np.float32),
    )


def scored(numbers: Numbers) -> Scored:
    return Scored(
        prompts=prompts(numbers),
        rollouts=rollouts(numbers),
        texts=tuple(numbers.texts(G) for _ in range(B)),
        reward_BG=numbers.array(B, G, dtype=np.float32),
        accuracy_BG=numbers.array(B, G, dtype=np.float32),
        scored_BG=numbers.coin(B, G),
        parts={name: numbers.array(B, G, dtype=np.float32) for name in ("accuracy", "format")},
        stats=SearchStats(rollout_seconds=1.5, drafts_tested=4, drafts_accepted=2),
    )


KINDS = {"Prompts": prompts, "Rollouts": rollouts, "Scored": scored}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def columns(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf by its path, found by walking the fields: arrays and tuples, None where there is nothing."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in columns(part, f"{path}.{name}").items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, SearchStats):
        return {path: value}
    fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return {k: v for name, part in fields for k, v in columns(part, f"{path}.{name}").items()}


def rows_of(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


@every_kind
def test_every_field_of_these_tests_has_a_value_of_its_own(make):
    """A field that is added later, with a default, fails here until it is filled in above."""
    for value in (make(Numbers()), *([make(Numbers()).prompts, make(Numbers()).rollouts] if make is scored else [])):
        for field in dataclasses.fields(value):
            default = field.default_factory() if callable(field.default_factory) else field.default
            assert getattr(value, field.name) is not None, field.name
            assert not (isinstance(default, (tuple, dict)) and getattr(value, field.name) == default), field.name


@every_kind
def test_take_takes_the_same_rows_of_every_field(make):
    whole, rows = make(Numbers()), [3, 0, 3]
    before, after = columns(whole), columns(take(whole, rows))
    assert before.keys() == after.keys() and len(before) >= len(dataclasses.fields(whole))
    for path, column in before.items():
        if path == ".stats":
            continue
        assert len(column) == B, f"{path} has no entry per group"
        assert type(after[path]) is type(column), path
        assert rows_of(after[path]) == [rows_of(column)[row] for row in rows], path
        if isinstance(column, np.ndarray):
            assert after[path].dtype == column.dtype, path


@every_kind
def test_concat_of_takes_gives_the_original_back(make):
    whole = make(Numbers())
    for split in ([[0, 1], [2, 3, 4]], [[0], [1], [2], [3], [4]], [[0, 1, 2, 3, 4]], [[], [0, 1, 2, 3, 4]]):
        joined = columns(concat([take(whole, rows) for rows in split]))
        for path, column in columns(whole).items():
            assert path == ".stats" or rows_of(joined[path]) == rows_of(column), path


@every_kind
def test_concat_puts_one_after_the_other_in_every_field(make):
    first, second = make(Numbers()), make(Numbers(1000))
    joined = columns(concat([first, second]))
    for path, column in columns(first).items():
        if path != ".stats":
            assert rows_of(joined[path]) == rows_of(column) + rows_of(columns(second)[path]), path


def test_what_a_batch_took_to_find_does_not_outlive_it():
    """Seconds of a batch are no one's once its groups stand among others; were they kept, they would add up wrongly."""
    whole = scored(Numbers())
    assert whole.stats is not None
    assert take(whole, [0, 1, 2, 3, 4]).stats is None and concat([whole]).stats is None
    assert concat([whole, whole]).stats is None and len(concat([whole, whole])) == 2 * B


def test_device_arrays_come_to_the_host():
    on_device = jax.tree.map(jnp.asarray, rollouts(Numbers()))
    for found in (take(on_device, [1]), concat([on_device, on_device])):
        assert all(isinstance(column, np.ndarray) for column in columns(found).values())


def test_without_references_and_checkers_every_row_has_none():
    """So that batches of sources with and without them can be joined."""
    arrays = np.zeros((2, 1), np.int32), np.ones(2, np.int32), np.zeros(2, np.int32)
    plain = Prompts(*arrays, ("a", "b"), ("1", "2"), ({}, {}))
    assert plain.references == plain.checkers == (None, None) and len(plain) == 2
    told = dataclasses.replace(plain, references=("so 1", None), checkers=("math", None))
    assert concat([plain, told]).references == (None, None, "so 1", None)
    assert concat([told, plain]).checkers == ("math", None, None, None)


def test_batches_with_and_without_forced_prefixes_do_not_mix():
    with_forced, without = prompts(Numbers()), prompts(Numbers(), forced=False)
    assert take(without, [0]).forced is None and concat([without, without]).forced is None
    for mixed in ([with_forced, without], [without, with_forced]):
        with pytest.raises(ValueError, match="with and without forced prefixes; pad the ones without with length 0"):
            concat(mixed)


def test_nothing_cannot_be_joined():
    with pytest.raises(ValueError, match="concat got no batches"):
        concat([])


def test_batches_of_different_reward_parts_cannot_be_joined():
    first, second = scored(Numbers()), scored(Numbers(500))
    second = dataclasses.replace(second, parts={"accuracy": second.parts["accuracy"]})
    with pytest.raises(ValueError, match=r"concat got batches with different reward parts: .*'accuracy', 'format'"):
        concat([first, second])


def test_the_gradient_mask_by_hand():
    """Rows of 3 tokens of which 1 is forced; of 2, none forced; all forced; not counted."""
    length_BG, forced_BG = jnp.array([[3, 2, 3, 3]]), jnp.array([[1, 0, 3, 0]])
    counted_BG = jnp.array([[True, True, True, False]])
    mask_BGC = gradient_mask(length_BG, forced_BG, counted_BG, 4)
    assert mask_BGC[0].astype(int).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert valid_mask(length_BG, 4)[0].astype(int).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]


def test_sums_add_up_before_they_are_divided():
    """6 over 2 and 0 over 4: the mean is 1. A mean of means would give 1.5."""
    parts = Weighted(jnp.array(6.0), jnp.array(2.0)) + Weighted(jnp.array(0.0), jnp.array(4.0))
    assert float(parts.mean()) == 1
    assert float(Weighted(jnp.array(0.0), jnp.array(0.0)).mean()) == 0


def test_completion_fields_are_those_with_a_value_for_each_completion():
    """A mixture takes them from the component that drew each completion; a new field must not be forgotten there."""
    assert set(completion_fields()) == {
        "tokens_BGC", "length_BG", "finished_BG", "forced_BG", "counted_BG", "behavior_logprob_BGC", "nested_BG",
        "full_share_BG", "part_BGL", "version_BG", "temperature_BG",
    }  # fmt: skip


@pytest.mark.parametrize("forced", [True, False])
def test_scored_groups_come_back_from_a_checkpoint(forced, tmp_path):
    groups = scored(Numbers())
    groups = dataclasses.replace(groups, prompts=prompts(Numbers(1000), forced))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"updates": jnp.zeros(())}, {"groups": groups.to_plain()})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = columns(Scored.from_plain(checkpoints.restore_host(1)["groups"]))
    expected = columns(groups)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        assert np.array_equal(found[name], value), name
        assert not isinstance(value, np.ndarray) or found[name].dtype == value.dtype, name


def test_a_checkpoint_from_before_samples_knew_their_temperature_can_be_read():
    plain = scored(Numbers()).to_plain()
    del plain["rollouts"]["temperature_BG"]
    found = Scored.from_plain(plain).rollouts.temperature_BG
    assert found.shape == (B, G) and found.dtype == np.float32 and np.isnan(found).all()
