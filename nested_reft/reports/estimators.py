"""What the enumeration of estimators found, as tables and as a figure: bias against noise, in every scenario.

An estimator is on the *frontier* of a scenario where no other has both less direction bias and less noise. Noise is
the standard deviation after the estimate is scaled to the right length, because an optimizer's learning rate undoes
a scale. Averaged over n groups, the error of an estimator's direction is sqrt(direction bias^2 + noise^2 / n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table

Result = dict[str, Any]  # `EstimatorReport.to_json`
ZERO_BIAS = 1e-5  # what float32 leaves of no bias
# Completions that only nested rollouts give are compared; a mixture or full rollouts cost more to sample.
COMPARED = ("nested", "nested, accepted at random")
NUMBERS_OF_GROUPS = (16, 128, 1024)
MOST_SHOWN = 20.0  # noise where the figure ends; what is noisier stands on its edge
TICKS = (2, 3, 5, 10, 20)


def estimator_tables(results: Sequence[Result]) -> str:
    """All estimators in the scenario in the middle, then in every scenario, then the best of each.

    Args:
        results: of `EstimatorReport.to_json`, scenario by scenario.
    """
    scenarios = _by_scenario(results)
    names = list(scenarios)
    middle = names[len(names) // 2]
    parts = [
        f"{middle}: KL(behavior || target) {scenarios[middle][0]['kl_per_token']:.2f} nats a token\n\n"
        + _whole_table(scenarios[middle]),
        "Bias and standard deviation of one group's gradient, relative to the true gradient's length. Direction bias is"
        " what the best scaling leaves; about 1e-6 is float32. Noise is the standard deviation divided by the scale."
        " 'claimed, times s' claims the right direction and s times the right length, so its bias is 1 - s. * marks the"
        " frontier of nested rollouts: no other has both less direction bias and less noise.",
    ]
    if len(names) > 1:
        parts += [
            "In every scenario: direction bias / noise\n\n" + _all_scenarios_table(scenarios),
            "Nested rollouts of least error sqrt(direction bias^2 + noise^2 / groups)\n\n" + _best_table(scenarios),
            "Over all scenarios, the error as a multiple of the least one: mean, worst\n\n" + _regret_table(results),
        ]
    return "\n\n".join(parts)


def frontier(results: Sequence[Result]) -> list[Result]:
    """The estimators of one scenario that no other beats in both direction bias and noise, least bias first.

    Args:
        results: of one scenario.
    """
    found: list[Result] = []
    # From the least bias on, each one on the frontier has less noise than all before it.
    # Rounded, because scaled copies of one estimator differ by float32 alone.
    for result in sorted(_comparable(results), key=lambda result: (_bias(result), round(_noise(result), 3))):
        if not found or round(_noise(result), 3) < round(_noise(found[-1]), 3):
            found.append(result)
    return found


def best(results: Sequence[Result], groups: int) -> Result:
    """The estimator of one scenario with the least error of direction.

    Args:
        results: of one scenario.
        groups: that an update averages over.
    """
    return min(_comparable(results), key=lambda result: _error(result, groups))


def regrets(results: Sequence[Result], groups: int) -> dict[str, list[float]]:
    """How far each estimator is from the best of each scenario, least worst case first: what a fixed choice costs.

    Args:
        results: of all scenarios.
        groups: that an update averages over.

    Returns:
        For each comparable estimator, its error over the least error of each scenario.
    """
    found: dict[str, list[float]] = {}
    for each in _by_scenario(results).values():
        least = _error(best(each, groups), groups)
        for result in _comparable(each):
            found.setdefault(result["estimator"], []).append(_error(result, groups) / least)
    return dict(sorted(found.items(), key=lambda item: max(item[1])))


def draw_estimators(results: Sequence[Result], path: Path) -> None:
    """Bias against noise, a panel for each scenario, with the frontier marked.

    Args:
        results: of `EstimatorReport.to_json`.
        path: of the PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    make_figure = figure_maker()
    scenarios = _by_scenario(results)
    depths = list(dict.fromkeys(result["depth"] for result in results))
    ages = list(dict.fromkeys(result["updates"] for result in results))
    figure = make_figure(figsize=(3.6 * len(ages) + 3.4, 3.1 * len(depths) + 0.4), layout="constrained")
    panels = figure.subplots(len(depths), len(ages), sharex=True, sharey=True, squeeze=False)
    groups = dict.fromkeys(result["group"] for result in _comparable(results))
    colours = {group: f"C{index}" for index, group in enumerate(groups)}
    # Names would cover each other; numbers point to the list beside the panels.
    on_frontier = {result["estimator"] for each in scenarios.values() for result in frontier(each)}
    listed = [result["estimator"] for result in next(iter(scenarios.values())) if result["estimator"] in on_frontier]
    numbers = {name: index + 1 for index, name in enumerate(listed)}
    for each in scenarios.values():
        first = each[0]
        axis = panels[depths.index(first["depth"])][ages.index(first["updates"])]
        _draw_panel(axis, each, colours, numbers)
        axis.set_title(f"{first['scenario']} ({first['kl_per_token']:.2f} nats)", fontsize="small")
    for row in panels:
        row[0].set_ylabel("noise of one group")
    for axis in panels[-1]:
        axis.set_xlabel("direction bias")
    handles, labels = panels[0][0].get_legend_handles_labels()
    names = "\n".join(f"{number}  {name}" for name, number in numbers.items())
    figure.legend(handles, labels, loc="outside right upper", fontsize="small", title=f"On a frontier:\n{names}\n")
    figure.savefig(path, dpi=100)


def _draw_panel(axis: Any, results: Sequence[Result], colours: dict[str, str], numbers: dict[str, int]) -> None:
    for group, colour in colours.items():
        points = [result for result in _comparable(results) if result["group"] == group]
        axis.scatter(*_places(points), s=14, color=colour, label=group)
    mixtures = [result for result in results if result["sampling"] == "mixture" and _has_same_truth(result)]
    axis.scatter(*_places(mixtures), s=40, marker="*", color="black", label="mixture (a third of the full model)")
    line = frontier(results)
    x, y = _places(line)
    # To the right of the last one, nothing has less noise.
    axis.step(
        [*x, 1], [*y, y[-1]], where="post", color="gray", linewidth=1, zorder=0, label="frontier, nested rollouts"
    )
    for result, *place in zip(line, x, y, strict=True):
        number = str(numbers[result["estimator"]])
        axis.annotate(number, place, (-1, -9), textcoords="offset points", fontsize=7, ha="center")
    axis.set(yscale="log", xlim=(-0.05, 1.05), ylim=(1.8, 1.1 * MOST_SHOWN))
    axis.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _places(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    return [_bias(result) for result in results], [min(_noise(result), MOST_SHOWN) for result in results]


def _whole_table(results: Sequence[Result]) -> str:
    line = [result["estimator"] for result in frontier(results)]
    rows = [
        [
            f"{'*' if result['estimator'] in line else ' '} {result['estimator']}",
            _claim(result["claimed_scale"]),
            *(_small(result[name]) for name in ("relative_bias", "direction_bias")),
            f"{result['scale']:.3f}",
            f"{result['standard_deviation']:.2f}",
            f"{_noise(result):.2f}",
            f"{result['ess']:.3f}",
            f"{result['accepted']:.2f}",
        ]
        for result in results
    ]
    header = ["estimator", "unbiased?", "bias", "direction", "scale", "deviation", "noise", "ESS", "accepted"]
    return _grouped(header, rows, [result["group"] for result in results])


def _all_scenarios_table(scenarios: dict[str, list[Result]]) -> str:
    lines = [{result["estimator"] for result in frontier(results)} for results in scenarios.values()]
    rows = [
        [
            cells[0]["estimator"],
            *(
                f"{_short(_bias(cell))}/{_noise(cell):.1f}{'*' if cell['estimator'] in line else ' '}"
                for cell, line in zip(cells, lines, strict=True)
            ),
        ]
        for cells in zip(*scenarios.values(), strict=True)
    ]
    # The names of scenarios would make the columns too wide.
    titles = [f"{each[0]['kl_per_token']:.2f} nats, {each[0]['updates']}" for each in scenarios.values()]
    first = next(iter(scenarios.values()))
    legend = "; ".join(f"{title}: {name}" for title, name in zip(titles, scenarios, strict=True))
    header = ["estimator", *titles]
    return _grouped(header, rows, [result["group"] for result in first]) + f"\n\n{legend}"


def _best_table(scenarios: dict[str, list[Result]]) -> str:
    header = ["scenario", *(f"{groups} groups" for groups in NUMBERS_OF_GROUPS)]
    rows = []
    for name, results in scenarios.items():
        found = [best(results, groups) for groups in NUMBERS_OF_GROUPS]
        errors = [_error(result, groups) for result, groups in zip(found, NUMBERS_OF_GROUPS, strict=True)]
        cells = [f"{result['estimator']} ({error:.2f})" for result, error in zip(found, errors, strict=True)]
        rows.append([name, *cells])
    return table(header, rows, left=len(header))


def _regret_table(results: Sequence[Result]) -> str:
    found = [regrets(results, groups) for groups in NUMBERS_OF_GROUPS]
    rows = [
        [name, *(f"{sum(regret[name]) / len(regret[name]):.2f}, {max(regret[name]):.2f}" for regret in found)]
        for name in found[len(found) // 2]
    ]
    return table(["estimator", *(f"{groups} groups" for groups in NUMBERS_OF_GROUPS)], rows)


def _grouped(header: Sequence[str], rows: Sequence[Sequence[str]], groups: Sequence[str]) -> str:
    """One table, the rows of each group under its name."""
    order = list(dict.fromkeys(groups))
    sorted_groups = sorted(groups, key=order.index)
    # `sorted` keeps the order within a group.
    by_group = sorted(zip(groups, rows, strict=True), key=lambda pair: order.index(pair[0]))
    lines = table(header, [row for _, row in by_group]).split("\n")
    found = lines[:2]
    for index, line in enumerate(lines[2:]):
        if index == 0 or sorted_groups[index] != sorted_groups[index - 1]:
            found.append(f"-- {sorted_groups[index]}")
        found.append(line)
    return "\n".join(found)


def _by_scenario(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["scenario"], []).append(result)
    return found


def _comparable(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result["sampling"] in COMPARED and _has_same_truth(result)]


def _has_same_truth(result: Result) -> bool:
    """Whether it estimates the plain policy gradient: a penalty changes the objective."""
    return result["group"] not in ("penalties", "trajectory balance")


def _bias(result: Result) -> float:
    """The direction bias; nothing where float32 explains it."""
    return 0.0 if result["direction_bias"] < ZERO_BIAS else result["direction_bias"]


def _noise(result: Result) -> float:
    return math.inf if result["noise"] is None else result["noise"]


def _error(result: Result, groups: int) -> float:
    return math.hypot(_bias(result), _noise(result) / math.sqrt(groups))


def _small(value: float) -> str:
    """A bias; what float32 leaves is shown as such."""
    return f"{value:.0e}" if value < ZERO_BIAS else f"{value:.3f}"


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}"


def _claim(scale: float | None) -> str:
    """What an estimator claims of its expected gradient."""
    if scale is None:
        return ""
    return "claimed" if scale == 1 else f"claimed, times {scale:.3f}"
