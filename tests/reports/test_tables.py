"""The tables that commands print."""

import pytest

from nested_reft.reports.tables import side_by_side, summary_table

SUMMARY = {
    "before": {},
    "after": {},
    "layers": 30,
    "kept_layers": 21,
    "bridges": 4,
    "full_tokens_per_second": 400.0,
    "nested_tokens_per_second": 500.0,
    "nested_speedup": 1.25,
    "step_seconds": 10.0,
    "rollout_seconds": 4.0,
    "ess_token": 0.9,
    "ess_sequence": 0.5,
    "kl_behavior_target": 0.1,
    "compilations": 3,
    "seconds": {"training": 1.0},
    "run_directory": "runs/x",
}


@pytest.mark.parametrize(
    ("bridges", "words"), [(4, "9 of 30 layers left out, 4 bridges"), (0, "9 of 30 layers skipped")]
)
def test_the_summary_compares_nested_with_full(bridges, words):
    found = summary_table(SUMMARY | {"bridges": bridges})
    assert f"nested ({words}), tokens/second" in found
    # 10 seconds, of which 4 are rollouts: those of the full model take 5.
    assert "10.0, of which rollouts 4.0" in found and "11.0 (1.10x)" in found


def test_a_summary_without_times_leaves_them_out():
    assert "seconds of a step" not in summary_table(SUMMARY | {"step_seconds": None})


def test_texts_stand_side_by_side_with_their_own_line_breaks():
    found = side_by_side({"full": "one two three\n\nfour", "nested": "one\x1b[2J"}, width=8)
    assert found.splitlines() == [
        "full     nested",
        "-------  --------",
        "one two  one\\x1b[",
        "three    2J",
        "",
        "four",
    ]
