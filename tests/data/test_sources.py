"""Sources: distinct, disjoint, deterministic, bounded; and each refusal."""

import dataclasses
import logging
import os
import subprocess
import sys

import pytest

from nested_reft.data import tasks
from nested_reft.data.sources import TaskSource, load_source

reasoning_gym = pytest.importorskip("reasoning_gym", reason="needs the optional package reasoning-gym")

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
NUM_ONE_DIGIT = 200  # 10 x 10 pairs, plus or minus.


def one_digit(**changes) -> TaskSource:
    source = TaskSource("one_digit", "chain_sum", ONE_DIGIT, train_size=50, heldout_size=20, seed=3)
    return dataclasses.replace(source, **changes)


def questions(examples):
    return [example.question for example in examples]


def test_examples_are_labelled_and_their_answers_are_right():
    train, heldout = load_source(one_digit())
    assert (len(train), len(heldout)) == (50, 20)
    for example in train + heldout:
        assert example.source == "one_digit"
        assert example.reference is None
        left, sign, right = example.metadata["expression"].split()
        assert example.metadata["expression"] in example.question
        assert int(example.answer) == int(left) + (int(right) if sign == "+" else -int(right))


def test_a_text_stands_for_a_list_of_characters():
    parameters = ONE_DIGIT | {"operators": "+", "allow_parentheses": 0}
    train, _ = load_source(one_digit(task="basic_arithmetic", parameters=parameters))
    for example in train:
        left, sign, right = example.metadata["expression"].split()
        assert sign == "+" and int(example.answer) == int(left) + int(right)


def test_train_and_heldout_are_disjoint_and_distinct_even_when_they_use_the_task_up(caplog):
    # 60 + 140 are all 200 questions: independent draws of these sizes would share about 42.
    with caplog.at_level(logging.WARNING):
        train, heldout = load_source(one_digit(train_size=140, heldout_size=60))
    assert not set(questions(train)) & set(questions(heldout))
    assert len(set(questions(train))) == len(train) == 140
    assert len(set(questions(heldout))) == len(heldout) == 60
    assert not caplog.records


def test_heldout_is_served_first_and_train_gets_the_rest_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        train, heldout = load_source(one_digit(train_size=1000, heldout_size=60))
    assert (len(train), len(heldout)) == (NUM_ONE_DIGIT - 60, 60)
    (record,) = caplog.records
    message = "source 'one_digit': 140 distinct train questions instead of the 1000 asked for"
    assert message in record.getMessage()


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(ValueError, match=r"heldout_size is 500, and all 200 distinct questions .*lower heldout_size"):
        load_source(one_digit(heldout_size=500))


def test_same_configuration_gives_the_same_lists_and_another_seed_other_ones():
    assert load_source(one_digit()) == load_source(one_digit())
    train, heldout = load_source(one_digit())
    other_train, other_heldout = load_source(one_digit(seed=4))
    assert questions(train) != questions(other_train)
    assert questions(heldout) != questions(other_heldout)
    # reasoning-gym seeds question i with seed + i: unhashed seeds would only shift the list by one.
    assert questions(heldout)[1:] != questions(other_heldout)[:-1]


def test_heldout_does_not_depend_on_the_training_size():
    assert load_source(one_digit(train_size=1))[1] == load_source(one_digit(train_size=100))[1]


def test_training_does_not_shift_with_the_heldout_size():
    # Of about 1.6e8 questions, five and fifty held-out ones meet the fifty of training with odds of 2e-5.
    wide = {"min_terms": 2, "max_terms": 2, "min_digits": 4, "max_digits": 4}
    trains = [load_source(one_digit(parameters=wide, heldout_size=size))[0] for size in (5, 50)]
    assert trains[0] == trains[1]


def test_lists_do_not_depend_on_the_hash_seed():
    code = (
        "from nested_reft.data.sources import *; print(load_source(TaskSource('a', 'chain_sum',"
        f" {ONE_DIGIT}, 50, 20, 3)))"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1


def test_draws_are_bounded_for_a_task_that_repeats_itself(monkeypatch):
    drawn = []

    class Repeating:
        def __getitem__(self, index):
            drawn.append(index)
            return {"question": "1 + 1 =", "answer": "2", "metadata": {}}

    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda *args, **kwargs: Repeating())
    with pytest.raises(ValueError, match="1 distinct questions"):
        load_source(one_digit(heldout_size=5, train_size=5))
    assert len(drawn) == tasks._max_draws(5) + tasks._max_draws(5 + 1)


def test_levels_are_the_tasks_own_and_parameters_come_first():
    # chain_sum's scale: 2 to 12 terms, 1 to 10 digits.
    for level, terms, digits in ((0, 2, 1), (1, 3, 2), (10, 12, 10)):
        train, _ = load_source(one_digit(parameters={}, level=level))
        for example in train:
            numbers = [n for n in example.metadata["expression"].split() if n.isdigit()]
            assert len(numbers) == terms and {len(n) for n in numbers} == {digits}
    train, _ = load_source(one_digit(parameters={"min_terms": 2, "max_terms": 2}, level=1))
    assert all(len(example.metadata["expression"].split()) == 3 for example in train)


@pytest.mark.parametrize("level", [-1, 11])
def test_a_level_that_the_task_lacks_is_refused(level):
    with pytest.raises(ValueError, match=f"data.sources.one_digit.level is {level}; 'chain_sum' allows 0 to 10"):
        load_source(one_digit(level=level))


def test_unknown_task_is_refused_with_close_names():
    with pytest.raises(ValueError, match=r"data.sources.one_digit.task is 'chain_sums'.*chain_sum"):
        load_source(one_digit(task="chain_sums"))
    with pytest.raises(ValueError, match=r"'qqqqqq'.* did you mean one of: ab, .*\.\.\."):  # nothing is close
        load_source(one_digit(task="qqqqqq"))


def test_unknown_parameter_is_refused_with_the_allowed_ones():
    with pytest.raises(
        ValueError, match=r"data.sources.one_digit.parameters names 'min_term'; .*max_digits.*min_terms"
    ) as refusal:
        load_source(one_digit(parameters={"min_term": 2}))
    allowed = str(refusal.value).split("allows: ")[1].split(", ")
    assert "seed" not in allowed and "size" not in allowed


@pytest.mark.parametrize("name", ["seed", "size"])
def test_parameters_may_not_replace_the_seed_or_the_size(name):
    with pytest.raises(ValueError, match=f"data.sources.one_digit.parameters names '{name}'"):
        load_source(one_digit(parameters={name: 1}))


def test_refused_parameter_value_says_why():
    with pytest.raises(ValueError, match="'chain_sum' refuses it: max_terms must be >= min_terms"):
        load_source(one_digit(parameters={"min_terms": 3, "max_terms": 2}))


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"source 'one_digit' .*pip install reasoning-gym"):
        load_source(one_digit())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "data.sources.N.name is empty"),
        ({"train_size": 0}, "data.sources.one_digit.train_size is 0; allowed is 1 or more"),
        ({"heldout_size": -1}, "data.sources.one_digit.heldout_size is -1; allowed is 1 or more"),
        ({"seed": -1}, "data.sources.one_digit.seed is -1; allowed is 0 or more"),
    ],
)
def test_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        one_digit(**changes)
