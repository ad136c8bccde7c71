"""What runs say together: paired by seed, task by task."""

import numpy as np
import pytest

from nested_reft.sweeps.comparison import by_task, comparison_table, differing_fields, draw_comparison, summarise
from nested_reft.sweeps.intervals import mean_over_seeds, ratio_over_seeds
from nested_reft.sweeps.sweep import compare
from tests.sweeps.results_by_hand import config, result


def runs():
    """Seeds differ by much, and the variant by 0.1 in each of them; it has one seed more."""
    full = [result("full", seed, 0.3 + 0.2 * seed) for seed in range(3)]
    return [*full, *(result("half", seed, 0.4 + 0.2 * seed, speedup=1.5) for seed in (2, 0, 1))]


def test_differences_are_paired_by_seed():
    """Unpaired, the interval of the difference would be as wide as that of the seeds, 0.3 to 0.7."""
    found = summarise([*runs(), result("half", 9, 0.0, speedup=1.5)])["variants"]
    assert found["full"]["difference"] is None and found["full"]["outcome"]["mean"] == pytest.approx(0.5)
    assert found["half"]["difference"]["mean"] == pytest.approx(0.1)
    np.testing.assert_allclose(found["half"]["difference"]["interval"], [0.1, 0.1])
    assert found["half"]["seeds"] == [2, 0, 1, 9] and found["half"]["paired_seeds"] == [2, 0, 1]
    assert [found["half"][name]["ratio"] for name in ("speed", "ideal")] == pytest.approx([1.5, 1.5])


def test_intervals_by_hand():
    """Of two values 0 and 1 a draw has both with probability 1/2, so the middle 95 % is all from 0 to 1."""
    assert mean_over_seeds([0.0, 1.0]) == {"values": [0.0, 1.0], "mean": 0.5, "interval": [0.0, 1.0]}
    assert mean_over_seeds([2.0])["interval"] == [2.0, 2.0]
    # A ratio of sums: (1 + 6) / (1 + 3), and not the mean of 1 and 2.
    assert ratio_over_seeds([1.0, 6.0], [1.0, 3.0])["ratio"] == pytest.approx(7 / 4)


def test_time_to_a_target():
    """A run goes from 0.1 to its end in 4 s, so 0.25 is halfway to 0.4: 2 s, of 3 s of the full run to 0.3."""
    one = [result("full", 0, 0.3), result("half", 0, 0.4), result("never", 0, 0.2)]
    found = summarise(one, target=0.25)["variants"]
    assert found["full"]["to_target"]["mean"] == pytest.approx(3.0) and found["full"]["to_target"]["ratio"] is None
    assert found["half"]["to_target"]["ratio"]["ratio"] == pytest.approx(2 / 3)
    assert found["never"]["to_target"]["reached"] == 0 and found["never"]["to_target"]["mean"] == 4.0
    text = comparison_table(summarise(one, target=0.25))
    assert "s to 0.25" in text and "0 of 1" in text and ".." not in text  # one seed has no interval
    assert " >4.0 " in text and " 3.0 " in text  # who never arrives needs more than the whole run
    # Where the full model never arrives, a ratio would be that of whole runs.
    found = summarise(one, target=0.35)["variants"]
    assert found["half"]["to_target"]["reached"] == 1 and found["half"]["to_target"]["ratio"] is None


def test_tasks_have_a_table_each():
    other = [result("full", 0, 0.9, config=config(source="sums2")), result("full", 0, 0.8, config=config(source="x"))]
    text, tasks, _ = compare([*runs(), *other], None, None, None)
    assert list(tasks) == ["sums", "sums2", "x"]
    assert "These runs are of 3 tasks, which have a table each" in text and text.count("paired by seed") == 3
    harder = config()
    harder["data"]["sources"][0]["task"] = "other"
    assert list(by_task([result("a", 0, 0.1), result("b", 0, 0.1, config=harder)])) == ["sums #1", "sums #2"]


def test_fields_and_commits_that_differ_are_said():
    other = config(nesting={"skip_ratio": 0.5}, train={"seed": 3, "steps": 4})
    half = [each | {"config": other} for each in runs()[3:]]
    assert differing_fields([*runs()[:3], *half]) == [("nesting.skip_ratio", ["0.0", "0.5"])]
    text, _, _ = compare([*runs()[:3], half[0] | {"versions": {"commit": "d" * 40}}], None, None, None)
    assert "nesting.skip_ratio  0.0 | 0.5" in text and "these runs are of 2 commits: cccccccccccc, dddddddddddd" in text
    assert "warning" not in compare(runs(), None, None, None)[0]


def test_a_measure_that_a_run_lacks_is_refused():
    with pytest.raises(ValueError, match="run 'runs/full-0' has no sampled_accuracy; allowed with --measure"):
        summarise(runs(), "sampled_accuracy")
    assert summarise([result("a", 0, None)])["measure"] == "reward"  # what all runs have is taken by itself


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    draw_comparison({"$a_b": (runs(), summarise(runs()))}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
