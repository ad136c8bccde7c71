"""What a sweep is made of: every combination once, by a name that no other configuration has."""

from pathlib import Path

import pytest

from nested_reft.cli.overrides import alternatives
from nested_reft.sweeps.grid import combinations, grid
from tests.training.runs import nano


def test_every_word_is_a_value_and_a_list_is_one():
    """Layers are a field that takes a list, presets are given together, and an option may come again."""
    words = ["--nesting.skip-ratio", "0", "0.2", "--nesting.layers", "2", "3", "--nesting.layers", "4"]
    words += ["--loss.preset", "dapo", "token-tis"]
    assert alternatives(nano(), [*words, "--train.remat"]) == [
        ("--nesting.skip-ratio", [["0"], ["0.2"]]),
        ("--nesting.layers", [["2", "3"], ["4"]]),
        ("--loss.preset", [["dapo", "token-tis"]]),
        ("--train.remat", [[]]),
    ]


def test_combinations_name_what_varies():
    found = combinations([("--a.b", [["1"], ["2"]]), ("--flag", [[]]), ("--c", [["x"], ["y", "z"]])])
    assert [label for label, _ in found] == ["a.b 1, c x", "a.b 1, c y z", "a.b 2, c x", "a.b 2, c y z"]
    assert found[3][1] == ["--a.b", "2", "--flag", "--c", "y", "z"]
    assert combinations([]) == [("", [])]
    with pytest.raises(ValueError, match="the overrides make 14641 combinations; allowed are at most 10000"):
        combinations([(f"--{name}", [[str(value)] for value in range(11)]) for name in "abcd"])


def test_runs_of_a_seed_follow_each_other_and_have_names_of_their_own():
    variants = [("full", nano()), ("ratio 0.4, one", nano(nesting__skip_ratio=0.4))]
    runs = grid(variants, [3, 5], Path("out"))
    assert [(run.labels["label"], run.labels["seed"]) for run in runs] == [
        ("full", 3), ("ratio 0.4, one", 3), ("full", 5), ("ratio 0.4, one", 5),
    ]  # fmt: skip
    assert runs[1].config.train.seed == 3 and runs[1].config.name == "nano-ratio_0.4_one-seed3"
    # A run of more steps has a result of its own, and the same run the same one.
    longer = grid([("full", nano(train__steps=5))], [3], Path("out"))[0]
    assert longer.file != runs[0].file and longer.config.name == runs[0].config.name
    assert grid(variants, [3], Path("out"))[0].file == runs[0].file
    with pytest.raises(ValueError, match="'full' is asked for twice"):
        grid([variants[0], variants[0]], [0], Path("out"))
