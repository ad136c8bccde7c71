"""Answer lengths against skipped layers: tables by hand, and what is refused."""

import numpy as np
import pytest

from experiments import answer_lengths
from experiments.answer_lengths import GROUP, Answers, length_row, position_row, report


def answers(lengths, ratio=0.0, size=4):
    length_N = np.array(lengths)
    log_ratio_NC = np.where(np.arange(size) < length_N[:, None], ratio, 0.0)
    return Answers(length_N, length_N < size, log_ratio_NC)


def test_lengths_are_paired_by_prompt():
    full, nested = answers([1] * GROUP + [3] * GROUP), answers([2] * GROUP + [4] * GROUP)
    row = length_row("nested", nested, full)
    assert (row["tokens"], row["longer"], row["interval"], row["ended"]) == (3.0, 1.0, [1.0, 1.0], 0.5)
    assert length_row("full", full, full) == {
        "policy": "full", "tokens": 2.0, "longer": None, "interval": None, "ended": 1.0,
    }  # fmt: skip


def test_weights_are_followed_along_the_answer():
    """Two completions whose first tokens cost 0.5 nats each; the third token of one of them costs 1.5."""
    log_ratio_NC = np.array([[-0.5, -0.5, -1.5, 0.0], [-0.5, -0.5, 0.0, 0.0]])
    row = position_row("nested", Answers(np.array([3, 2]), np.array([True, True]), log_ratio_NC), [2, 3, 4])
    assert row["kl"] == [0.5, 1.5, None]
    weight = np.exp(-1.5)
    expected = (1 + weight) ** 2 / (1 + weight**2) / 2
    np.testing.assert_allclose(row["ess"], [1.0, expected, expected])


def test_the_tables_name_stretches_of_positions():
    full, nested = answers([4] * GROUP), answers([2] * GROUP, -0.25)
    text = report(
        [length_row("full", full, full), length_row("nested", nested, full)], [position_row("nested", nested, [2, 4])]
    )
    assert "KL 1-2  KL 3-4  ESS of 2  ESS of 4" in text
    assert "-2.0 (-2.0 to -2.0)" in text and "0.250       -     1.000     1.000" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "10"], "--prompts is 10; allowed are multiples of 16"),
        (["--ratios", "1"], "--ratios is 1.0; allowed is 0 or more and less than 1"),
        (["--config", "tiny"], "--config is 'tiny', whose nesting.choice is 'uniform'; allowed are those with"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message, capsys):
    assert answer_lengths.main(options) == 2
    assert message in capsys.readouterr().err
