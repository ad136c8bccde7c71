"""Which charts one run or several have: a chart for each thing that a run measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nested_reft.reports.charts import Chart, Curve, Heatmap, Number, Panel, spread, wilson
from nested_reft.reports.run_files import Line, RunFiles, at, finite
from nested_reft.reports.run_metrics import CURRICULUM, SOURCE_METRICS, SPEEDS, curriculum_sources, names_with, series

SHARE = (0.0, 1.0)
AGES = "staleness_completions"  # counts of trained completions, by age
MOST_COLUMNS, MOST_ROWS = 160, 48  # of a heatmap
MOST_LAYERS, MOST_AGE = 1000, 10_000  # indices above these are no measurements
COLOURS = 8
SMOOTHED = "Dots are steps, and the line is their running mean."


@dataclass(frozen=True)
class Quantity:
    """Metrics that share a panel.

    Attributes:
        label: of the axis.
        metrics: their names.
        limits: of the axis; None lets the data decide.
    """

    label: str
    metrics: Sequence[str]
    limits: tuple[Number, Number] | None = None


# Name of the file, title, and panels of each plain chart.
PLAIN: tuple[tuple[str, str, tuple[Quantity, ...]], ...] = (
    ("speed", "Speed of sampling and learning, without steps that compile", (Quantity("tokens / second", SPEEDS),)),
    (
        "weights",
        "Effective sample size and weights",
        (
            Quantity("effective sample size (share)", ("ess_token", "ess_sequence", "ess_weight"), SHARE),
            Quantity(
                "weight, and ratio of target to behavior",
                ("weight_mean", "ratio_quantile_95", "ratio_quantile_50", "ratio_quantile_05"),
            ),
            Quantity("divergence (nats / token)", ("kl_behavior_target", "reference_kl", "self_distillation_kl")),
        ),
    ),
    (
        "completions",
        "Length and entropy of the completions",
        (
            Quantity("tokens of a completion", ("completion_tokens",)),
            Quantity("ended with a stop token (share)", ("finished",), SHARE),
            Quantity("entropy (nats / token)", ("entropy",)),
        ),
    ),
    (
        "resets",
        "Rollouts that began inside a reference",
        (
            Quantity("right answers (share)", ("reset/accuracy", "reset/free_accuracy"), SHARE),
            Quantity("of completions, and of references (share)", ("reset/share", "reset/coverage"), SHARE),
        ),
    ),
    (
        "replay",
        "Age of the completions that were trained on, and of those that are kept",
        (
            Quantity("versions", ("staleness_mean", "staleness_max", "replay/age")),
            Quantity("reward of those that are kept", ("replay/reward",)),
        ),
    ),
    (
        "searchers",
        "Searchers: their work, and the learner's wait for them",
        (
            Quantity("at work (share of their time)", ("searchers_busy",), SHARE),
            Quantity("seconds / step", ("search_wait_seconds", "sync_seconds")),
        ),
    ),
    (
        "offline",
        "Training without rollouts",
        (
            Quantity("loss (nats)", ("cross_entropy",)),
            Quantity("pairs ordered right (share)", ("pair_accuracy",), SHARE),
            Quantity("score of preferred answers and of the others", ("chosen_score", "rejected_score")),
        ),
    ),
    ("update", "Size of the updates", (Quantity("norm of the gradient, before clipping", ("gradient_norm",)),)),
)


def run_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """The charts of some runs: of one run each panel compares its metrics, of several each panel compares runs.

    Args:
        runs: one or more.
    """
    charts = [_learning(runs), *_parts(runs)]
    plain = {name: _plain(runs, name, title, quantities) for name, title, quantities in PLAIN}
    charts += [plain.pop("speed"), plain.pop("weights")]
    charts += _each(runs, "layers", _layers) + _each(runs, "curriculum", _curriculum)
    charts += [plain.pop("replay"), *_each(runs, "ages", _ages), *plain.values()]
    return [chart for chart in charts if chart.panels]


def heldout_prompts(run: RunFiles, source: str) -> int | None:
    """How many held-out prompts a source has; None where no file says it.

    Args:
        run: that evaluated them.
        source: its name.
    """
    for when in ("after", "before"):
        count = at(run.summary, when, source, "prompts") or at(run.summary, when, source, "examples")
        if type(count) is int and 0 < count < 10**9:
            return count
    return None


def _learning(runs: Sequence[RunFiles]) -> Chart:
    """Held-out accuracy, and the reward beside the accuracy of the samples."""
    panels = _heldout(runs)
    note = ["Bars are 95 % intervals of the held-out share over its prompts."] if _has_bars(panels) else []
    losses = _panels(runs, [Quantity("held-out loss", names_with(_all_lines(runs), "heldout_loss/"))])
    accuracy = _curves(runs, "accuracy", 0)
    reward = [] if all(_is_same(run, "reward", "accuracy") for run in runs) else _curves(runs, "reward", 1)
    if len(runs) > 1:
        # The colour says which run it is, so the dashes have to say which quantity.
        reward = [replace(curve, dashed=True) for curve in reward]
    # A reward on the scale of a share can share its axis too.
    if any(not 0 <= value <= 1 for curve in reward for value in curve.values):
        right = [replace(curve, right=True) for curve in reward]
        both = Panel("accuracy of the samples (share)", [*accuracy, *right], SHARE, "mean reward") if accuracy else None
        both = both or Panel("mean reward", reward)
    else:
        label = "accuracy of the samples" + (" and mean reward" if reward else " (share)")
        both = Panel(label, [*accuracy, *reward], SHARE)
    note += [SMOOTHED] if both.curves else []
    return Chart("learning", "What was learnt", " ".join(note), [*panels, *([both] if both.curves else []), *losses])


def _heldout(runs: Sequence[RunFiles]) -> list[Panel]:
    """One panel of all sources of a run, or of several runs one for each source."""
    names, label = names_with(_all_lines(runs), "heldout/"), "held-out accuracy (share)"
    if len(runs) == 1:
        curves = [_heldout_curve(runs[0], name, position, name) for position, name in enumerate(names)]
        return [Panel(label, curves, SHARE)] if names else []
    return [
        Panel(
            f"{name}: {label}",
            [
                _heldout_curve(run, name, index, run.name)
                for index, run in enumerate(runs)
                if series(run.lines, name)[0]
            ],
            SHARE,
        )
        for name in names
    ]


def _heldout_curve(run: RunFiles, name: str, number: int, label: str) -> Curve:
    steps, values = series(run.lines, name)
    count = heldout_prompts(run, name.removeprefix("heldout/"))
    shares = all(0 <= value <= 1 for value in values)
    bars = [wilson(value, count) for value in values] if count is not None and shares else None
    # Evaluations are few, so each is shown and none is averaged away.
    return Curve(label, number % COLOURS, steps, values, bars, smooth=False, dashed=number >= COLOURS)


def _has_bars(panels: Sequence[Panel]) -> bool:
    return any(curve.bars for panel in panels for curve in panel.curves)


def _parts(runs: Sequence[RunFiles]) -> list[Chart]:
    """The components of the reward; those that only repeat the accuracy are left out."""
    names = [
        name
        for name in names_with(_all_lines(runs), "reward/")
        if not all(_is_same(run, name, "accuracy") for run in runs)
    ]
    return [
        Chart("parts", "Parts of the reward, before their weights", SMOOTHED, _panels(runs, [Quantity("mean", names)]))
    ]


def _plain(runs: Sequence[RunFiles], name: str, title: str, quantities: Sequence[Quantity]) -> Chart:
    return Chart(name, title, SMOOTHED, _panels(runs, quantities))


def _panels(runs: Sequence[RunFiles], quantities: Sequence[Quantity]) -> list[Panel]:
    """A panel for each quantity of one run; of several runs a panel for each metric."""
    panels = list[Panel]()
    for quantity in quantities:
        if len(runs) == 1:
            found = [curve for position, name in enumerate(quantity.metrics) for curve in _curves(runs, name, position)]
            panels.append(Panel(quantity.label, found, quantity.limits))
        else:
            panels += [
                Panel(
                    f"{name}: {quantity.label}" if len(quantity.metrics) > 1 else quantity.label, found, quantity.limits
                )
                for name in quantity.metrics
                if (found := _curves(runs, name, 0, with_name=False))
            ]
    return [panel for panel in panels if panel.curves]


def _curves(runs: Sequence[RunFiles], name: str, colour: int, with_name: bool = True) -> list[Curve]:
    """One metric of each run that logged it."""
    found = list[Curve]()
    for index, run in enumerate(runs):
        steps, values = series(run.lines, name)
        if steps:
            label = _label(runs, run, name if with_name else "")
            # The colours repeat after some runs, and dashes tell the second round from the first.
            number = index if len(runs) > 1 else colour
            found.append(Curve(label, number % COLOURS, steps, values, dashed=number >= COLOURS))
    return found


def _label(runs: Sequence[RunFiles], run: RunFiles, name: str) -> str:
    return name if len(runs) == 1 else f"{run.name}: {name}" if name else run.name


def _each(runs: Sequence[RunFiles], name: str, draw: Callable[[RunFiles], Chart | None]) -> list[Chart]:
    """A chart of each run that has one; of several runs their names tell them apart."""
    found = [(index, run, draw(run)) for index, run in enumerate(runs)]
    return [
        chart
        if len(runs) == 1
        else Chart(f"{name}-{index + 1}", f"{run.name}: {chart.title}", chart.note, chart.panels)
        for index, run, chart in found
        if chart is not None
    ]


def _layers(run: RunFiles) -> Chart | None:
    """Which layers the rollouts left out; nothing of a run of the full model."""
    rows = [
        (line["step"], _indices(line.get("left_out_layers"), MOST_LAYERS)) for line in run.lines if line["step"] > 0
    ]
    if not any(layers for _, layers in rows):
        return None
    counts = [finite(at(run.summary, "layers")), finite(at(run.config, "model", "shape", "num_layers"))]
    known = next((int(count) for count in counts if count is not None and 0 < count <= MOST_LAYERS), 0)
    most = max(known, 1 + max(layer for _, layers in rows for layer in layers))
    cells = _cells([(step, dict.fromkeys(layers, 1.0)) for step, layers in rows])
    note = (
        "The darker a cell, the larger the share of its steps that left the layer out, replaced it by a bridge, or ran"
    )
    return Chart(
        "layers",
        "Layers that the rollouts left out",
        f"{note} a part of it.",
        [Panel("layer", heatmap=Heatmap(cells, most))],
    )


def _ages(run: RunFiles) -> Chart | None:
    """How old the trained completions were; nothing where they were always fresh."""
    rows = list[tuple[int, dict[int, Number]]]()
    for line in run.lines:
        counts = line.get(AGES)
        counts = [finite(count) or 0.0 for count in counts[:MOST_AGE]] if isinstance(counts, list) else []
        if sum(counts) > 0:
            rows.append((line["step"], {age: count / sum(counts) for age, count in enumerate(counts) if count > 0}))
    oldest = max((age for _, shares in rows for age in shares), default=0)
    if oldest == 0:
        return None
    size = oldest // MOST_ROWS + 1
    binned = list[tuple[int, dict[int, Number]]]()
    for step, shares in rows:
        together = dict[int, Number]()
        for age, share in shares.items():
            together[age // size] = together.get(age // size, 0.0) + share
        binned.append((step, together))
    heatmap = Heatmap(_cells(binned), oldest // size + 1, size)
    note = "The darker a cell, the larger the share of the step's completions that had this age."
    return Chart(
        "ages", "Ages of the completions that were trained on", note, [Panel("versions behind", heatmap=heatmap)]
    )


def _curriculum(run: RunFiles) -> Chart | None:
    """Why each source was drawn; one source leaves nothing to choose."""
    names = curriculum_sources(run.lines)
    if len(names) < 2:
        return None
    panels = list[Panel]()
    for metric, label in SOURCE_METRICS.items():
        found = [(index, name, *series(run.lines, f"{CURRICULUM}{name}/{metric}")) for index, name in enumerate(names)]
        curves = [
            # Only the reward is noisy; the rest is what the curriculum computed.
            Curve(name, index % COLOURS, steps, values, smooth=metric == "reward", dashed=index >= COLOURS)
            for index, name, steps, values in found
            if steps
        ]
        if curves:
            panels.append(Panel(label, curves, SHARE if metric == "probability" else None))
    return Chart("curriculum", "Curriculum: why each source was drawn, and what came of it", "", panels)


def _cells(rows: Sequence[tuple[int, dict[int, Number]]]) -> list[tuple[Number, Number, int, Number]]:
    """The cells of a heatmap, with neighbouring steps joined where there are many."""
    edges = spread(len(rows) + 1, MOST_COLUMNS + 1)
    cells = list[tuple[Number, Number, int, Number]]()
    for start, end in itertools.pairwise(edges):
        joined, total = rows[start:end], dict[int, Number]()
        for _, shares in joined:
            for row, share in shares.items():
                total[row] = total.get(row, 0.0) + share
        ends = joined[0][0], joined[-1][0]
        cells += [(*ends, row, share / len(joined)) for row, share in sorted(total.items())]
    return cells


def _indices(value: object, most: int) -> list[int]:
    found = value if isinstance(value, list) else []
    return [index for index in found if type(index) is int and 0 <= index < most]


def _is_same(run: RunFiles, name: str, other: str) -> bool:
    return series(run.lines, name) == series(run.lines, other)


def _all_lines(runs: Sequence[RunFiles]) -> list[Line]:
    return [line for run in runs for line in run.lines]
