"""`nested-reft compare`: finished runs, or those of a sweep, side by side."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from nested_reft.cli.arguments import check_json, command_parser, keep_json, local_file
from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.cli.output import say
from nested_reft.cli.sweep import add_comparison, say_missing
from nested_reft.json_files import check_writable, differences
from nested_reft.reports.run_files import at, read_run
from nested_reft.run_directory import versions
from nested_reft.run_mirror import local_run
from nested_reft.sweeps.comparison import BESIDE
from nested_reft.sweeps.kept import Result
from nested_reft.sweeps.results import run_result
from nested_reft.sweeps.sweep import MANIFEST, Missing, compare, read_sweep
from nested_reft.untrusted import shown

MOST_NAMED = 3  # differing fields that still make a label
LONGEST_VALUE = 40  # characters of one in it


def run(arguments: list[str]) -> None:
    """Prints the tables, and draws the figure where one is asked for."""
    known = _parser().parse_args(arguments)
    results, missing = list[Result](), list[Missing]()
    with checking_input():
        check_json(known.json)
        if known.figure is not None:
            check_writable(known.figure)
        alone = list[Result]()
        for source in known.runs:
            path = local_run(source)
            if (path / MANIFEST).is_file():
                found, lacking = read_sweep(path)
                results += found
                missing += lacking
                continue
            result = _result(path)
            if isinstance(result, Missing):
                missing.append(result)
            else:
                alone.append(result)
        results += labelled(alone)
    results, repeated = without_repeats(results)
    say_missing([*missing, *repeated], len(results) + len(missing) + len(repeated))
    if not results:
        raise BadInput("none of these runs has a result that could be compared")
    with checking_input():
        text, tasks, no_figure = compare(results, known.measure, known.target, known.figure)
    say(text)
    if known.figure is not None:
        say(f"\nno figure: {no_figure}" if no_figure else f"\nfigure: {known.figure}")
    keep_json(known.json, {"versions": versions(), "tasks": tasks, "missing": [vars(each) for each in missing]})


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "compare",
        "Finished runs side by side: the mean of each configuration over its seeds, differences from the first one"
        " paired by seed, and the fields in which they differ. Runs of different tasks get a table each.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or the folder of a sweep")
    parser.add_argument("--figure", type=local_file, metavar="FILE", help="also draw curves and outcomes as a PNG file")
    add_comparison(parser)
    return parser


def _result(path: Path) -> Result | Missing:
    """What a run directory holds, where the run has ended."""
    files = read_run(path)
    if not files.config or not files.summary or files.summary.get("steps") not in (None, files.steps):
        steps = at(files.config, "train", "steps")
        if not files.config:
            why = "its config.json cannot be read"
        elif files.steps == steps:
            why = "it has no summary.json that can be read"
        else:
            why = f"it has not ended: {files.steps} of {steps} steps"
        return Missing(str(path), why)
    seed = at(files.config, "train", "seed")
    return {"config": files.config, "seed": seed if type(seed) is int else 0} | run_result(path)


def labelled(results: list[Result]) -> list[Result]:
    """The runs with labels: those that differ in seed and name alone have one, which says how it differs from others.

    Args:
        results: with `config` and `run_directory`.
    """
    groups = dict[str, list[Result]]()
    for result in results:
        groups.setdefault(json.dumps(_without(result["config"]), sort_keys=True), []).append(result)
    firsts = [group[0] for group in groups.values()]
    names = list(
        dict.fromkeys(
            name
            for other in firsts[1:]
            for name, _, _ in differences(_without(firsts[0]["config"]), _without(other["config"]))
        )
    )
    found, used = list[Result](), set[str]()
    for group in groups.values():
        config, label = group[0]["config"], os.path.basename(group[0]["run_directory"])
        values = [_value(config, name) for name in names]
        if 0 < len(names) <= MOST_NAMED and all(len(value) <= LONGEST_VALUE for value in values):
            label = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        elif not names and isinstance(config.get("name"), str):
            label = config["name"]
        while label in used:
            label += " again"
        used.add(label)
        found += [result | {"label": label} for result in group]
    return found


def without_repeats(results: list[Result]) -> tuple[list[Result], list[Missing]]:
    """The first run of each label and seed; another one would count its seed twice.

    Args:
        results: with `label` and `seed`.
    """
    kept, repeated = dict[tuple[str, int, str], Result](), list[Missing]()
    for result in results:
        key = (result["label"], result["seed"], json.dumps(_without(result["config"]), sort_keys=True))
        if key in kept:
            first = kept[key].get("run_directory")
            repeated.append(Missing(str(result.get("run_directory")), f"it repeats configuration and seed of {first}"))
        else:
            kept[key] = result
    return list(kept.values()), repeated


def _without(config: dict) -> dict:
    """A configuration without what tells the runs of one variant apart."""
    train = config.get("train")
    plain = {name: value for name, value in config.items() if name not in BESIDE}
    if isinstance(train, dict):
        plain["train"] = {name: value for name, value in train.items() if f"train.{name}" not in BESIDE}
    return plain


def _value(config: dict, name: str) -> str:
    value = at(config, *name.split("."))
    return value if isinstance(value, str) else shown(value)
