"""When a run's log says that a reward model is exploited, by hand."""

import pytest

from nested_reft.reports.hacking import reward_hacking


def lines(learned, gold=None, **others):
    """Ten steps: `value` or (first, last), in a straight line between them."""

    def at(value, step):
        first, last = value if isinstance(value, tuple) else (value, value)
        return first + (last - first) * step / 9

    found = []
    for step in range(10):
        line = {"step": step + 1, "reward/model": at(learned, step)}
        line |= {} if gold is None else {"accuracy": gold[step]}
        found.append(line | {name: at(value, step) for name, value in others.items()})
    return [{"step": 0}, *found]


RISING = [0.1 * step for step in range(10)]
OVER = [0.0, 0.0, 0.4, 0.4, 0.8, 0.9, 0.5, 0.4, 0.2, 0.3]


def test_a_gold_reward_that_falls_while_the_learned_one_rises():
    """Windows of two steps: the best is 5 and 6, with 0.85; the last has 0.25."""
    found = reward_hacking(lines((0.0, 9.0), OVER, completion_kl=(0.0, 9.0)), "accuracy")
    assert found is not None and found["window_steps"] == 2
    assert found["gold_best"] == pytest.approx(0.85) and found["gold_best_step"] == 6
    assert found["gold"] == [0.0, pytest.approx(0.25)] and found["learned"] == [0.5, 8.5]
    assert found["kl"] == [pytest.approx(0.5), pytest.approx(8.5)]
    assert found["warning"].startswith(
        "the gold reward (accuracy) fell from 0.85 around step 6 to 0.25, while the learned reward went from 4.5 to"
        " 8.5: the policy exploits the reward model. Raise the KL penalty"
    )


@pytest.mark.parametrize(
    ("learned", "gold"),
    [
        ((0.0, 9.0), RISING),
        ((9.0, 0.0), OVER),  # the learned reward fell as well, so nothing was exploited
        ((0.0, 9.0), [0.0, 0.0, 0.5, 0.9, 0.4, 1.0, 0.3, 0.9, 0.2, 0.9]),  # within its noise
    ],
)
def test_no_warning_without_a_sign(learned, gold):
    found = reward_hacking(lines(learned, gold), "accuracy")
    assert found is not None and found["warning"] is None


def test_a_gold_reward_that_is_zero_at_its_best():
    """A mean of 0 counts: it is the best of a reward of 0 and less, and what nothing is above when all are 0."""
    found = reward_hacking(lines((0.0, 9.0), [0.0] * 5 + [-1.0] * 5), "accuracy")
    assert found is not None and (found["gold_best"], found["gold_best_step"]) == (0.0, 2)
    assert found["warning"].startswith("the gold reward (accuracy) fell from 0 around step 2 to -1")
    never = reward_hacking(lines((0.0, 9.0), [0.0] * 10), "accuracy")
    assert never is not None and never["gold_best"] == 0 and never["warning"] is None


def test_without_gold_length_and_disagreement_are_signs():
    long = {"completion_tokens": (10.0, 20.0), "reward/model_std": (0.1, 0.1)}
    found = reward_hacking(lines((0.0, 1.0), **long), None)
    assert found is not None and "the length of completions went from 10.6 to 19.4" in found["warning"]
    assert "disagreement" not in found["warning"] and "No gold reward says whether" in found["warning"]
    apart = reward_hacking(lines((0.0, 1.0), **{"reward/model_std": (0.1, 0.3)}), None)
    assert apart is not None and "the reward models' disagreement went from" in apart["warning"]
    calm = reward_hacking(lines((0.0, 1.0), completion_tokens=(10.0, 12.0)), None)
    worse = reward_hacking(lines((1.0, 0.0), **long), None)
    assert calm is not None and calm["warning"] is None and worse is not None and worse["warning"] is None


def test_a_run_without_a_reward_model_has_none():
    assert reward_hacking([{"step": 0}, {"step": 1, "reward": 1.0, "accuracy": 1.0}], "accuracy") is None
