"""Tables and figure of the enumerated estimators, on made-up results."""

import math

import pytest

from nested_reft.reports.estimators import best, draw_estimators, estimator_tables, frontier, regrets

HERE = {
    "scenario": "here",
    "depth": "one",
    "updates": 0,
    "kl_per_token": 0.1,
    "sampling": "nested",
    "ess": 0.5,
    "accepted": 1.0,
}


def result(estimator, direction, noise, group="weights", claimed=None, **changes):
    """An estimator of the right length, unless it says otherwise."""
    values = {"relative_bias": direction, "direction_bias": direction, "scale": 1.0, "standard_deviation": noise or 3.0}
    return HERE | {"estimator": estimator, "group": group, "claimed_scale": claimed, "noise": noise} | values | changes


RESULTS = [
    result("exact", 3e-7, 8.0, "exact", claimed=1.0),
    result("shorter", 1e-7, 8.0002, "exact", claimed=2 / 3, scale=2 / 3, relative_bias=1 / 3),
    result("middle", 0.1, 5.0),
    result("dominated", 0.2, 6.0),
    result("calm", 0.4, 2.0, "masks"),
    result("a mixture", 1e-7, 1.0, "exact", sampling="mixture", claimed=1.0),
    result("a penalty", 0.01, 1.0, "penalties"),
    result("backwards", 1.0, None, "clips", scale=-0.2),
]


def test_the_frontier_by_hand():
    """What float32 leaves of bias and noise decides nothing, so of equal estimators the first is named."""
    assert [found["estimator"] for found in frontier(RESULTS)] == ["exact", "middle", "calm"]


@pytest.mark.parametrize(
    ("groups", "name"), [(16, "calm"), (100, "calm"), (200, "middle"), (3000, "middle"), (4000, "exact")]
)
def test_the_best_by_hand(groups, name):
    """sqrt(b^2 + s^2 / n): calm has 0.16 + 4 / n, middle 0.01 + 25 / n, exact 64 / n."""
    squares = {"calm": 0.16 + 4 / groups, "middle": 0.01 + 25 / groups, "exact": 64 / groups}
    assert min(squares, key=squares.__getitem__) == name == best(RESULTS, groups)["estimator"]


def test_the_table_says_what_is_claimed_and_what_is_on_the_frontier():
    printed = estimator_tables(RESULTS)
    rows = {line[2:].split("  ")[0]: line for line in printed.splitlines()}
    assert rows["exact"].startswith("* exact") and "claimed" in rows["exact"] and "3e-07" in rows["exact"]
    assert rows["dominated"].startswith("  dominated") and "claimed" not in rows["dominated"]
    # A bias of a third beside a bare "claimed" would look like a broken claim.
    assert "claimed, times 0.667" in rows["shorter"] and "0.333" in rows["shorter"]
    assert "inf" in rows["backwards"]
    groups = [line for line in printed.splitlines() if line.startswith("-- ")]
    assert groups == ["-- exact", "-- weights", "-- masks", "-- penalties", "-- clips"]


def test_every_scenario_has_its_column_and_its_best():
    there = [
        row | {"scenario": "there", "updates": 1, "direction_bias": row["direction_bias"] / 100} for row in RESULTS
    ]
    printed = estimator_tables([*RESULTS, *there])
    row = next(line for line in printed.splitlines() if line.startswith("calm"))
    assert row.split()[1:] == ["0.40/2.0*", "0.00/2.0*"]
    assert f"calm ({math.hypot(0.4, 2 / 4):.2f})" in printed and "there" in printed


def test_what_a_fixed_choice_costs():
    """At 100 groups `calm` has sqrt(0.16 + 0.04) here, and with twice the noise sqrt(0.16 + 0.16) there."""
    there = [row | {"scenario": "there", "noise": row["noise"] and 2 * row["noise"]} for row in RESULTS]
    found = regrets([*RESULTS, *there], 100)
    here = {"calm": math.sqrt(0.2), "middle": math.sqrt(0.26), "exact": 0.8}
    elsewhere = {"calm": math.sqrt(0.32), "middle": math.sqrt(1.01), "exact": 1.6}
    for name in here:
        assert found[name] == pytest.approx([here[name] / here["calm"], elsewhere[name] / elsewhere["calm"]])
    assert next(iter(found)) == "calm" and "a mixture" not in found and "a penalty" not in found
    shown = regrets([*RESULTS, *there], 128)["middle"]
    assert f"{sum(shown) / 2:.2f}, {max(shown):.2f}" in estimator_tables([*RESULTS, *there])


def test_the_figure_is_drawn(tmp_path):
    there = [row | {"scenario": "there", "updates": 1} for row in RESULTS]
    draw_estimators([*RESULTS, *there], tmp_path / "bias.png")
    assert (tmp_path / "bias.png").read_bytes().startswith(b"\x89PNG")
