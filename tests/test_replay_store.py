"""The store for replay: what it keeps, in whose turn it draws, and that it stays as it is at any number of steps."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from nested_reft.replay import GenerationLimitError
from nested_reft.replay_store import (
    FRUITLESS_BATCHES,
    ReplayConfig,
    Store,
    add,
    best_right,
    draw,
    ready,
    summary,
    without_stale,
)
from nested_reft.types import Scored
from tests.scored_groups import TOKENS, scored, texts_of

UNIFORM = ReplayConfig(capacity=10_000, recent_share=0.0)
RECENT = dataclasses.replace(UNIFORM, recent_share=1.0)


def found(numbers, version: int, group: int = 4, first: int = 0, reward=None) -> Scored:
    """Groups of the prompts `numbers`, whose completions are told apart by their first token: `first` and up."""
    shape = (len(numbers), group)
    batch = scored(np.zeros(shape), reward_BG=np.zeros(shape) if reward is None else np.broadcast_to(reward, shape))
    tokens_BGC = np.zeros((*shape, TOKENS), np.int32)
    tokens_BGC[..., 0] = first + np.arange(group)
    names = tuple(str(number) for number in numbers)
    return dataclasses.replace(
        batch,
        prompts=dataclasses.replace(batch.prompts, answers=names, texts=names),
        texts=tuple(tuple(f"{name}:{first + g}" for g in range(group)) for name in names),
        rollouts=dataclasses.replace(
            batch.rollouts,
            prompt_BP=np.array(numbers, np.int32)[:, None] + np.zeros((1, 3), np.int32),
            tokens_BGC=tokens_BGC,
            version_BG=np.full(shape, version, np.int32),
        ),
    )


def store_of(*batches: Scored, config: ReplayConfig = UNIFORM) -> Store:
    store = Store()
    for batch in batches:
        store = add(store, config, batch)
    return store


def draws(store: Store, config: ReplayConfig, steps: int, groups: int, size: int):
    """Several draws, one after the other."""
    for step in range(steps):
        drawn, store = draw(store, config, jax.random.key(step), groups, size)
        yield drawn


def test_every_field_of_a_completion_comes_out_as_it_went_in():
    """Completions of one prompt and two versions, all distinguishable, so a field of another one would show."""
    batches = []
    for version in (3, 5):
        batch = found([7, 8], version, first=10 * version)
        rollouts, code_BG = batch.rollouts, np.arange(8).reshape(2, 4) + 10 * version
        fields = {
            "length_BG": 1 + code_BG % 4,
            "finished_BG": code_BG % 2 == 0,
            "nested_BG": code_BG % 3 == 0,
            "behavior_logprob_BGC": np.broadcast_to(-code_BG[..., None], (2, 4, TOKENS)).astype(np.float32),
            "full_share_BG": code_BG.astype(np.float32),
            "part_BGL": np.broadcast_to(code_BG[..., None], (2, 4, 2)).astype(np.int8),
        }
        values = {"reward_BG": code_BG + 0.5, "accuracy_BG": code_BG + 0.25, "parts": {"accuracy": code_BG * 2.0}}
        batches.append(dataclasses.replace(batch, rollouts=dataclasses.replace(rollouts, **fields), **values))
    store = store_of(*batches)
    (drawn,) = draws(store, UNIFORM, 1, 2, 8)
    assert sorted(drawn.prompts.texts) == ["7", "8"] and drawn.rollouts.version_BG.tolist() != [[3] * 8] * 2
    seen = set()
    for b in range(2):
        for g in range(8):
            row, rollouts = int(drawn.prompts.texts[b]) - 7, drawn.rollouts
            version, code = int(rollouts.version_BG[b, g]), int(drawn.reward_BG[b, g] - 0.5)
            batch, slot = batches[(3, 5).index(version)], (row, code - 10 * version - 4 * row)
            assert rollouts.prompt_BP[b].tolist() == [7 + row] * 3 and drawn.texts[b][g] == batch.texts[row][slot[1]]
            for name in ("tokens_BGC", *[f.name for f in dataclasses.fields(rollouts) if "_BG" in f.name]):
                expected, value = getattr(batch.rollouts, name)[slot], getattr(rollouts, name)[b, g]
                assert np.array_equal(value, expected), name
            assert drawn.accuracy_BG[b, g] == code + 0.25 and drawn.parts["accuracy"][b, g] == 2 * code
            seen.add((row, code))
    assert len(seen) == 16


def test_equal_completions_are_kept_once_with_the_newest_version_and_the_oldest_go_first():
    """Prompt 1 has completions 0 to 3, then 2 to 5: 2 and 3 came again. At five of a prompt, 0 is one too many."""
    config = dataclasses.replace(UNIFORM, completions_per_prompt=5)
    store = store_of(found([1], 0), found([1], 1, first=2), config=config)
    group = store.entries[0].group
    assert group.texts[0] == ("1:1", "1:2", "1:3", "1:4", "1:5")
    assert group.rollouts.version_BG.tolist() == [[0, 1, 1, 1, 1]]
    assert (store.turned_away["duplicate"], store.turned_away["crowded"]) == (2, 1)


def test_a_longer_completion_with_the_same_tokens_is_another_one():
    """Token 0 is a token like any other: the length alone tells `5 0` from `5`."""
    batch = found([1], 0, group=2)
    tokens_BGC = np.zeros_like(batch.rollouts.tokens_BGC)
    rollouts = dataclasses.replace(batch.rollouts, tokens_BGC=tokens_BGC, length_BG=np.array([[1, 2]], np.int32))
    assert len(store_of(dataclasses.replace(batch, rollouts=rollouts))) == 2


def test_the_whole_store_drops_what_arrived_first_and_no_more_than_it_must():
    config = dataclasses.replace(UNIFORM, capacity=9)
    store = store_of(found([1, 2], 0), found([3], 0, first=50), config=config)
    assert len(store) == 9 and texts_of(store)[0] == "1:3" and store.turned_away["full"] == 3
    store = add(store, config, found([1], 1, first=70))
    # The last old one of prompt 1 goes, and three of prompt 2; the new ones of prompt 1 stay.
    assert texts_of(store) == ["1:70", "1:71", "1:72", "1:73", "2:3", "3:50", "3:51", "3:52", "3:53"]
    store = add(store, config, found([4, 5], 2, first=80))
    assert texts_of(store) == ["1:73", *(f"{p}:{80 + g}" for p in (4, 5) for g in range(4))]
    assert summary(store, 2).prompts == 3


def test_what_goes_is_the_oldest_row_by_row():
    """Against the rule in one line: the smallest by arrival, row and place in the row. Rows mix five arrivals."""
    random, roomy = np.random.default_rng(0), dataclasses.replace(UNIFORM, capacity=10**6)
    store = Store()
    for number in range(5):
        prompts = random.permutation(12)[:7].tolist()
        store = add(store, roomy, found(prompts, number, group=3, first=10 * number))
    batch = found([3, 20], 5, first=90)
    whole = add(store, roomy, batch)
    order = sorted(
        (int(arrival), row, place, text)
        for row, entry in enumerate(whole.entries)
        if entry is not None
        for place, (arrival, text) in enumerate(zip(entry.arrival_N, entry.group.texts[0], strict=True))
    )
    for capacity in (len(whole) - 1, 60, 31, 8, 1):
        kept = add(store, dataclasses.replace(UNIFORM, capacity=capacity), batch)
        assert texts_of(kept) == sorted(text for *_, text in order[len(order) - capacity :])
        assert kept.turned_away["full"] == len(whole) - capacity


def test_what_is_refused_is_counted_under_its_reason():
    """Of six completions one has no score, one does not count, one has too little reward and one is too long."""
    config = dataclasses.replace(UNIFORM, minimum_reward=0.5, maximum_tokens=4)
    batch = found([1], 0, group=6, reward=[1, 1, 0.25, 1, 0.5, 1])
    rollouts = dataclasses.replace(
        batch.rollouts,
        counted_BG=np.array([[False, False, True, True, True, True]]),
        length_BG=np.array([[4, 4, 4, 5, 4, 1]], np.int32),
    )
    scored_BG = np.array([[False, True, True, True, True, True]])
    store = add(Store(), config, dataclasses.replace(batch, rollouts=rollouts, scored_BG=scored_BG))
    assert texts_of(store) == ["1:4", "1:5"]
    assert summary(store, 0).turned_away == {"unscored": 1, "uncounted": 1, "low_reward": 1, "long": 1}


def test_what_is_not_safe_is_not_kept():
    batch = found([1], 0)
    batch = dataclasses.replace(batch, parts=batch.parts | {"safety": np.array([[1, 0, -1, 0.5]], np.float32)})
    store = add(Store(), UNIFORM, batch)
    assert texts_of(store) == ["1:0", "1:3"] and summary(store, 0).turned_away == {"unsafe": 2}


def test_completions_of_another_forced_prefix_are_another_prompts():
    """log Z is that of what follows the prefix, so prefixes are never mixed in a group."""
    batch = found([1], 0)
    tokens_BGC = batch.rollouts.tokens_BGC.copy()
    tokens_BGC[0, :, :2] = [[5, 1], [5, 2], [6, 1], [5, 3]]
    forced_BG = np.array([[1, 1, 1, 0]], np.int32)
    rollouts = dataclasses.replace(batch.rollouts, tokens_BGC=tokens_BGC, forced_BG=forced_BG)
    store = store_of(dataclasses.replace(batch, rollouts=rollouts))
    groups = sorted(entry.group.texts[0] for entry in store.entries if entry is not None)
    assert groups == [("1:0", "1:1"), ("1:2",), ("1:3",)]
    # Two prompts differ by their answers too.
    other_answer = dataclasses.replace(batch, prompts=found([2], 0).prompts)
    assert summary(store_of(batch, other_answer), 0).prompts == 2


def test_stale_completions_go_by_the_version_that_sampled_and_not_by_arrival():
    config = dataclasses.replace(UNIFORM, max_staleness=2)
    # A searcher that was cut off delivers version 1 after version 4.
    store = store_of(found([1, 2], 4), found([1], 1, first=50), config=config)
    assert without_stale(store, config, 3) is store
    fresh = without_stale(store, config, 4)
    assert len(fresh) == 8 and fresh.turned_away["stale"] == 4 and len(store) == 12
    assert not len(without_stale(fresh, config, 7)) and without_stale(fresh, config, 7).row_of == {}


def test_recent_groups_are_of_the_newest_version_where_it_found_enough():
    """Completions of an older version come in only where there are too few: here there are four of each prompt.

    A store that went by arrival would take the late completions of version 1.
    """
    late = found([1, 2, 3], 1, first=90)
    store = store_of(found([1, 2], 1), found([2, 3], 2, first=10), late, config=RECENT)
    for drawn in draws(store, RECENT, 20, 2, 3):
        assert (drawn.rollouts.version_BG == 2).all() and set(drawn.prompts.texts) == {"2", "3"}
        assert {text.split(":")[1] for texts in drawn.texts for text in texts} == {"11", "12", "13"}


def test_a_recent_group_is_filled_from_older_versions_before_anything_is_repeated():
    """Version 1 found one text four times, which leaves one of it. Copies of it alone would have no variance.

    The others are the last of version 0, though a batch of it came late. With five completions, one is repeated.
    """
    same = found([1], 1, first=9)
    tokens_BGC = np.full_like(same.rollouts.tokens_BGC, 9)
    same = dataclasses.replace(
        same, texts=(("1:9",) * 4,), rollouts=dataclasses.replace(same.rollouts, tokens_BGC=tokens_BGC)
    )
    store = store_of(found([1], 0, group=2), same, found([1], 0, group=2, first=5), config=RECENT)
    (drawn,) = draws(store, RECENT, 1, 1, 4)
    assert sorted(drawn.texts[0]) == ["1:1", "1:5", "1:6", "1:9"]
    (drawn,) = draws(store, RECENT, 1, 1, 6)
    assert len(drawn.texts[0]) == 6 and set(drawn.texts[0]) == {"1:0", "1:1", "1:5", "1:6", "1:9"}


def test_the_share_of_recent_groups_is_m():
    config = dataclasses.replace(UNIFORM, recent_share=0.7)
    store = store_of(*(found(range(10 * version, 10 * version + 10), version) for version in range(10)))
    recent = sum((drawn.rollouts.version_BG[:, 0] == 9).sum() for drawn in draws(store, config, 10, 50, 2))
    # 0.7, and of the others a tenth: 0.73 of 500, with a standard deviation of 10.
    assert abs(recent - 0.73 * 500) < 4 * 10


def test_uniform_draws_are_even_over_prompts_and_uniform_over_completions():
    """Chi-square over 5 completions of each of 6 prompts, two versions among them; 24 degrees of freedom."""
    store = store_of(found(range(6), 0, group=2), found(range(6), 1, group=3, first=2))
    counts = np.zeros((6, 5))
    for drawn in draws(store, UNIFORM, 75, 8, 2):
        for name, texts in zip(drawn.prompts.texts, drawn.texts, strict=True):
            assert len(set(texts)) == 2  # none twice
            for text in texts:
                counts[int(name), int(text.split(":")[1])] += 1
    # Prompts take turns, so their shares are equal and not only in expectation.
    assert (counts.sum(axis=1) == 200).all()
    # Pairs without replacement vary less than single draws, by 3 / 4.
    assert ((counts - 40) ** 2 / 40).sum() < 43  # 99 % of chi-square with 24 degrees of freedom; expected are 18


def test_rewards_choose_by_their_softmax():
    """Rewards 0, 1, 2 at inverse temperature 1: a first draw has 0.09, 0.24, 0.67."""
    config = dataclasses.replace(UNIFORM, inverse_temperature=1.0)
    store = store_of(found([1], 0, group=3, reward=[0, 1, 2]))
    first = [texts[0] for drawn in draws(store, config, 40, 5, 1) for texts in drawn.texts]
    shares = [first.count(f"1:{g}") / 200 for g in range(3)]
    np.testing.assert_allclose(shares, np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum(), atol=0.1)
    # A sharp one takes the best and then the second best.
    sharp = dataclasses.replace(config, inverse_temperature=100.0)
    assert all(drawn.texts == (("1:2", "1:1"),) for drawn in draws(store, sharp, 20, 1, 2))


@pytest.mark.parametrize("config", [UNIFORM, RECENT])
def test_a_short_group_has_each_completion_once_and_then_repetitions(config):
    """A prompt with one completion waits for as long as there are others; alone, it is drawn."""
    store = store_of(found([1], 0, group=1), found([2], 0, group=3))
    for drawn in draws(store, config, 10, 2, 5):
        assert drawn.prompts.texts == ("2", "2") and all(len(set(texts)) == 3 for texts in drawn.texts)
    (drawn,) = draws(store_of(found([1], 0, group=1)), config, 1, 1, 4)
    assert drawn.texts == (("1:0",) * 4,)


def test_every_prompt_has_its_turn_before_one_comes_again():
    store = store_of(found(range(7), 0))
    for config in (UNIFORM, RECENT):
        names = [name for drawn in draws(store, config, 7, 3, 2) for name in drawn.prompts.texts]
        assert [sorted(names[at : at + 7]) for at in (0, 7, 14)] == [[str(n) for n in range(7)]] * 3
    # A new version begins a round of its own.
    _, store = draw(store, RECENT, jax.random.key(0), 5, 2)
    newer = add(store, RECENT, found(range(7), 1, first=9))
    assert len({*draw(newer, RECENT, jax.random.key(1), 7, 2)[0].prompts.texts}) == 7


def test_an_update_waits_for_the_prefill_once():
    config = dataclasses.replace(UNIFORM, prefill=8, max_staleness=0)
    store = store_of(found([1], 0), config=config)
    assert not ready(Store(), config) and not ready(store, config)
    store = add(store, config, found([2], 0))
    assert ready(store, config)
    _, store = draw(store, config, jax.random.key(0), 1, 2)
    store = add(without_stale(store, config, 1), config, found([1], 1))
    assert len(store) == 4 and ready(store, config)


def test_a_wait_that_nothing_ends_is_refused():
    config = dataclasses.replace(UNIFORM, prefill=8, minimum_reward=0.5)
    store = Store()
    for _ in range(FRUITLESS_BATCHES):
        assert not ready(store, config)
        store = add(store, config, found([1], 0))
    with pytest.raises(
        GenerationLimitError, match=r"100 batches in a row added nothing .*waits for 8 .*low_reward 400"
    ):
        ready(store, config)


def test_adding_and_drawing_leave_the_old_value_as_it_was():
    config = dataclasses.replace(UNIFORM, capacity=8)
    store = store_of(found([1, 2], 0), config=config)
    before = (texts_of(store), store.rows_R.copy(), dict(store.turned_away))
    add(store, config, found([3], 1))
    draw(store, config, jax.random.key(0), 2, 2)
    assert (texts_of(store), dict(store.turned_away)) == (before[0], before[2])
    assert np.array_equal(store.rows_R, before[1])


def test_a_long_run_is_flat_in_time_and_size():
    """Prompts that never come again pass through the store: their rows are used again."""
    config = dataclasses.replace(UNIFORM, recent_share=0.5, max_staleness=40)
    store, times, sizes, key = Store(), [], [], jax.random.key(0)
    for step in range(400):
        batch = found([step], step, group=2)
        started = time.perf_counter()
        store = add(without_stale(store, config, step), config, batch)
        _, store = draw(store, config, key, 1, 2)
        times.append(time.perf_counter() - started)
        sizes.append((len(store), len(store.rows_R), len(store.entries), len(store.row_of)))
    assert sizes[-1] == sizes[50] == (82, 64, 64, 41)
    assert np.median(times[-100:]) < 3 * np.median(times[50:150])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": 10, "prefill": 11}, r"replay.prefill is 11; allowed is 0 to replay.capacity, which is 10"),
        ({"prefill": 1}, r"replay.prefill is 1; allowed is 0 to replay.capacity, which is 0"),
        ({"capacity": -1}, r"replay.capacity is -1; allowed is 0 \(off\) or more"),
        ({"capacity": 4, "recent_share": None}, r"replay.recent_share is None and replay.capacity 4; replay needs"),
        ({"recent_share": 1.5}, r"replay.recent_share is 1.5; allowed is 0 to 1"),
        ({"group_size": 4}, r"replay.group_size is 4 and replay.capacity 0; without a store"),
        ({"capacity": 4, "group_size": 1}, r"replay.group_size is 1; allowed is 2 or more"),
        ({"completions_per_prompt": 1}, r"replay.completions_per_prompt is 1; allowed is 2 or more"),
        ({"max_staleness": -1}, r"replay.max_staleness is -1; allowed is 0 or more"),
        ({"maximum_tokens": 0}, r"replay.maximum_tokens is 0; allowed is 1 or more"),
        ({"inverse_temperature": float("inf")}, r"replay.inverse_temperature is inf; allowed is a finite number"),
        ({"minimum_reward": float("nan")}, r"replay.minimum_reward is nan; allowed is a finite number"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        ReplayConfig(**{"recent_share": 0.5} | fields)


def test_the_best_right_completion_by_hand():
    """Of prompt 7: completion 3 has the highest reward and is wrong; 1 and 2 are right and alike, and 2 came later.
    Prompt 8 has no right one. Prompt 9 has one of a single token, which leaves nothing to force."""
    batch = found([7, 8, 9], 1, reward=[1.0, 2.0, 2.0, 5.0])
    right_BG = np.array([[True, True, True, False], [False] * 4, [False, True, False, False]])
    length_BG = np.where(np.arange(3)[:, None] == 2, 1, 3) + np.zeros((3, 4), np.int32)
    batch = dataclasses.replace(
        batch,
        accuracy_BG=right_BG.astype(np.float32),
        prompts=dataclasses.replace(batch.prompts, tokens_BP=np.asarray(batch.rollouts.prompt_BP)),
        rollouts=dataclasses.replace(batch.rollouts, length_BG=length_BG),
    )
    store = store_of(batch)
    assert best_right(Store(), batch.prompts) == [[], [], []]
    assert best_right(store, batch.prompts) == [[2, 0, 0], [], []]
    # What began with a prefix is stored apart, and is a completion of the same prompt.
    rollouts = dataclasses.replace(batch.rollouts, forced_BG=np.ones((3, 4), np.int32))
    better = dataclasses.replace(batch, reward_BG=batch.reward_BG + 1, rollouts=rollouts)
    assert best_right(add(store, UNIFORM, better), batch.prompts) == [[2, 0, 0], [], []]
    first = np.arange(4) == np.zeros((3, 1))
    better = dataclasses.replace(better, reward_BG=batch.reward_BG + 9 * first)
    assert best_right(add(store, UNIFORM, better), batch.prompts) == [[0, 0, 0], [], []]
    # Another source has prompts of its own.
    other = dataclasses.replace(batch.prompts, source_B=batch.prompts.source_B + 1)
    assert best_right(store, other) == [[], [], []]
