"""Results as people read them: short text tables."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from nested_reft.untrusted import printable


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """A plain text table: the first columns to the left, the others to the right.

    Args:
        header: one title per column.
        rows: each with as many cells as the header; `str` turns them into text.
        left: how many columns are words and stand to the left.

    Returns:
        Lines without a final line end.
    """
    cells = [[printable(str(cell)) for cell in row] for row in (header, *rows)]
    # The header counts as a row, so that its words fit their columns.
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def side_by_side(texts: Mapping[str, str], width: int = 40) -> str:
    """Texts in columns under their names, such as the answers of several policies to one question.

    Args:
        texts: by name; untrusted.
        width: of a column, in characters.
    """
    # A line break stays one, and an empty line stays empty.
    columns = [
        [part for line in text.splitlines() for part in textwrap.wrap(printable(line), width) or [""]]
        for text in texts.values()
    ]
    rows = list(itertools.zip_longest(*columns, fillvalue=""))
    return table(list(texts), rows, left=len(texts))


def share(value: float | None) -> str:
    """A share with three decimals, or a dash where there is none.

    Args:
        value: from 0 to 1, or None.
    """
    return "-" if value is None else f"{value:.3f}"


def evaluation_table(before: dict[str, Any], after: dict[str, Any] | None = None) -> str:
    """Held-out accuracy by source, before and after training where both are given.

    Args:
        before: source -> accuracies, number of prompts and k of pass@k.
        after: the same after training; None shows `before` alone.
    """
    # An evaluation alone has one column of values.
    columns = [result for result in (before, after) if result is not None]
    rows = []
    for source, first in before.items():
        k = first["pass_k"]
        for name, label in (
            ("greedy_accuracy", "greedy accuracy"),
            ("sampled_accuracy", "sampled accuracy"),
            ("pass_at_k", f"pass@{k}"),
        ):
            # Without samples there is only the greedy accuracy.
            if first[name] is not None:
                rows.append(
                    [f"{source} ({first['prompts']} prompts): {label}", *(share(c[source][name]) for c in columns)]
                )
    return table(["held-out", "before", "after"] if after else ["held-out", "value"], rows)


def summary_table(summary: dict[str, Any]) -> str:
    """The table that ends a training run.

    Args:
        summary: the contents of a run's `summary.json`.
    """
    if "objective" in summary:
        return _offline_table(summary)
    left_out = f"{summary['layers'] - summary['kept_layers']} of {summary['layers']} layers"
    bridges = f"{summary['bridges']} bridges"
    # Runs of earlier versions did not count them.
    empty, steps = summary.get("empty_steps", 0), summary.get("steps")
    facts = [
        *([["steps whose updates changed nothing", f"{empty} of {steps}"]] if empty else []),
        ["full model, generated tokens/second", f"{summary['full_tokens_per_second']:.0f}"],
        [
            f"nested ({left_out} {'left out, ' + bridges if summary['bridges'] else 'skipped'}), tokens/second",
            f"{summary['nested_tokens_per_second']:.0f} ({summary['nested_speedup']:.2f}x)",
        ],
        *_step_facts(summary),
        ["effective sample size, per token (mean of steps)", share(summary["ess_token"])],
        ["effective sample size, per completion", share(summary["ess_sequence"])],
        ["KL(behavior || target), nats per token", share(summary["kl_behavior_target"])],
        ["compiled programs", summary["compilations"]],
        *_left_out(summary),
        # They add up to their total; a run that was resumed counts the time of its last process.
        *([f"seconds, {stage}", f"{seconds:.1f}"] for stage, seconds in summary["seconds"].items()),
    ]
    parts = [evaluation_table(summary["before"], summary["after"]), table(["run", "value"], facts)]
    if "reward_hacking" in summary:
        parts.append(hacking_text(summary["reward_hacking"]))
    if empty:
        learnt = "nothing was learnt" if empty == steps else f"{empty} of {steps} steps taught nothing"
        parts.append(
            f"warning: {learnt}: see `empty` and `warning` in metrics.jsonl, and train.stop_after_empty_updates"
        )
    return "\n\n".join([*parts, f"run directory: {summary['run_directory']}"])


def hacking_text(found: dict[str, Any]) -> str:
    """The learned reward beside what it should not part from, and the warning where it does.

    Args:
        found: of `reports.hacking.reward_hacking`.
    """
    titles = {"learned": "learned reward", "gold": f"gold reward ({found['gold_metric']})", "kl": "KL to the reference"}
    titles |= {"tokens": "tokens of a completion", "disagreement": "std between reward models"}
    rows = [
        [title, *(f"{value:.3f}" for value in found[name])]
        for name, title in titles.items()
        if name in found  # a run logs what it has
    ]
    size = found["window_steps"]
    text = table(["reward model", f"first {size} steps", f"last {size} steps"], rows)
    return text if found["warning"] is None else f"{text}\nwarning: {printable(found['warning'])}"


def _left_out(summary: dict[str, Any]) -> list[list[Any]]:
    """A row for the updates that were not finite, if there were any; runs of earlier versions have no count."""
    count = summary.get("nonfinite_updates", 0)
    return [["updates left out, since loss or gradient was not finite", count]] if count else []


def _offline_table(summary: dict[str, Any]) -> str:
    """The table that ends a run without rollouts."""
    rows = [
        [f"{source} ({first['examples']} examples): {name}", share(first[name]), share(summary["after"][source][name])]
        for source, first in summary["before"].items()
        for name in ("loss", "accuracy")
        if name in first
    ]
    facts = [
        ["compiled programs", summary["compilations"]],
        *_left_out(summary),
        *([f"seconds, {stage}", f"{seconds:.1f}"] for stage, seconds in summary["seconds"].items()),
    ]
    parts = [table(["held-out", "before", "after"], rows)]
    if "reward_model" in summary:
        parts.append(reward_table(summary["reward_model"]))
    parts += [table(["run", "value"], facts), f"run directory: {summary['run_directory']}"]
    return "\n\n".join(parts)


def reward_table(facts: dict[str, Any]) -> str:
    """What a reward model is worth on held-out pairs.

    Args:
        facts: of `training.reward_facts`.
    """

    def interval(each: dict[str, Any]) -> str:
        return "{} ({:.3f} to {:.3f})".format(share(each["accuracy"]), *each["accuracy_interval"])

    rows = []
    for source, report in facts["sources"].items():
        baseline = report["length_baseline"]
        correlation = report["length_correlation"]
        rows += [
            [f"{source} ({report['pairs']} pairs): accuracy (95 %)", interval(report)],
            [f"{source}: accuracy of a bet on the {baseline['bets_on']} answer", interval(baseline)],
            [f"{source}: expected calibration error", share(report["calibration"]["ece"])],
            [f"{source}: share of pairs whose longer answer it prefers", share(report["prefers_longer"])],
            [f"{source}: correlation of reward and length", "-" if correlation is None else f"{correlation:+.3f}"],
        ]
        for each in report["calibration"]["bins"]:
            title = f"{source}: right where it claims {each['claimed']:.2f} ({each['pairs']} pairs)"
            rows.append([title, share(each["right"])])
    rows.append([f"mean reward of {facts['references']} preferred answers", f"{facts['mean']:.3f}"])
    rows.append(["standard deviation of the rewards of all answers", f"{facts['std']:.3f}"])
    return table(["reward model", "held-out"], rows)


def _step_facts(summary: dict[str, Any]) -> list[list[str]]:
    """The mean time of a step, and what it would be if the full model sampled."""
    step, rollouts = summary["step_seconds"], summary["rollout_seconds"]
    if step is None or rollouts is None:
        return []
    full = step + rollouts * (summary["nested_speedup"] - 1)
    return [
        ["seconds of a step (mean)", f"{step:.1f}, of which rollouts {rollouts:.1f}"],
        ["seconds of a step if the full model sampled, at these speeds", f"{full:.1f} ({full / step:.2f}x)"],
    ]


def cost_table(costs: list[dict[str, Any]], unit: str = "chip") -> str:
    """What compiled programs cost per `unit`, and how far the bytes they move are from the floor.

    `accessed` is XLA's figure, which includes on-chip memory; `HBM` is what crosses main memory.

    Args:
        costs: dictionaries of `Cost.to_json`.
        unit: what one device is called, as `device_unit` says.
    """

    def against(floor: float | None, moved: int | float) -> str:
        # The factor says how much could be saved; where there is no floor, only the bytes are shown.
        return f"{moved / 1e9:.3f}" + ("" if floor is None else f" ({moved / floor:.2f}x)")

    rows = []
    for cost in costs:
        floor, bridged = cost["floor_bytes"], cost.get("bridged", 0)
        rows.append(
            [
                f"{cost['program']}, {cost['layers']} layers" + (f", {bridged} bridges" if bridged else ""),
                f"{cost['argument_bytes'] / 1e9:.3f}",
                f"{cost['temporary_bytes'] / 1e9:.3f}",
                f"{cost['flops'] / 1e9:.1f}",
                against(floor, cost["bytes_accessed"]),
                against(floor, cost["hbm_bytes"]),
                "" if floor is None else f"{floor / 1e9:.3f}",
            ]
        )
    return table([f"per {unit}", "arguments GB", "temporaries GB", "GFLOP", "accessed GB", "HBM GB", "floor GB"], rows)


def program_table(programs: list[dict[str, Any]], unit: str = "chip") -> str:
    """What whole programs cost per `unit`, and the least time that they take.

    Args:
        programs: dictionaries of `ProgramCost.to_json`.
        unit: what one device is called.
    """
    rows = []
    for each in programs:
        bridged, memory, seconds = each["bridged"], each["memory_bytes"], each["seconds"]
        fits = "" if memory is None else f" of {memory / 1e9:.0f}" + ("" if each["fits"] else ", too much")
        slowest = max(("flops", "hbm", "ici", "dcn"), key=lambda name: seconds[name]) if seconds else "-"
        rows.append(
            [
                f"{each['program']}, {each['layers']} layers" + (f", {bridged} bridges" if bridged else ""),
                f"{each['bytes'] / 1e9:.2f}{fits}",
                f"{each['flops'] / 1e12:.2f}",
                f"{each['hbm_bytes'] / 1e9:.1f}",
                f"{each['ici_bytes'] / 1e9:.2f}",
                f"{each['dcn_bytes'] / 1e9:.3f}",
                f"{seconds['total']:.3f}" if seconds else "-",
                slowest,
                "-" if each["mfu"] is None else f"{each['mfu']:.1%}",
            ]
        )
    header = [f"per {unit}", "GB", "TFLOP", "HBM GB", "ICI GB", "DCN GB", "seconds", "longest", "MFU"]
    return table(header, rows)


def collective_table(programs: list[dict[str, Any]], unit: str = "chip") -> str:
    """The collectives of whole programs by kind, axes of the mesh and depth of loops; the value itself is what counts.

    Args:
        programs: dictionaries of `ProgramCost.to_json`.
        unit: what one device is called.
    """
    rows = [
        [
            f"{each['program']}, {each['layers']} layers",
            found["kind"],
            " x ".join(found["over"]) or "-",
            _largest(found["of"].split()),
            found["loops"],
            f"{found['times']:.0f}",
            f"{found['bytes'] / 1e9:.3f}",
            f"{found['ici_bytes'] / 1e9:.3f}",
            f"{found['dcn_bytes'] / 1e9:.3f}",
        ]
        for each in programs
        for found in each["collectives"]
    ]
    header = [f"per {unit}", "collective", "over", "largest value", "loops", "times", "GB", "ICI GB", "DCN GB"]
    return table(header, rows, left=4)


def _largest(shapes: Sequence[str]) -> str:
    """The largest of the values that one collective sends, such as `f32[16,64]`, and how many others it sends."""
    if not shapes:
        return "-"
    largest = max(shapes, key=lambda shape: math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2]))))
    return largest if len(shapes) == 1 else f"{largest} and {len(shapes) - 1} more"


def resource_table(rows: list[dict[str, Any]]) -> str:
    """The smallest slice for each model, as a Markdown table.

    Args:
        rows: of `minimum_resources`.
    """
    lines = ["| model | trains | smallest slice | chips | mesh | GB of a chip, at least | rollout | update |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        what = [row["model"], "all parameters" if row["all_parameters"] else "adapters"]
        if row["slice"] is None:
            lines.append(f"| {' | '.join(what)} | none of {row['generation']} | | | | | |")
            continue
        sizes = {each["program"]: f"{each['bytes'] / 1e9:.1f}" for each in row["programs"]}
        mesh = " x ".join(f"{name} {size}" for name, size in row["mesh"].items() if size > 1) or "one chip"
        place = f"{row['cloud_name']} ({row['generation']}:{row['slice']})"
        lines.append(
            f"| {' | '.join(what)} | {place} | {row['chips']} | {mesh} | {row['least_bytes'] / 1e9:.1f}"
            f" | {sizes.get('rollout', '')} | {sizes.get('update', '')} |"
        )
    return "\n".join(lines)
