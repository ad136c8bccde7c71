"""`nested-reft sweep`: trains a grid of configurations, overrides and seeds, and compares the runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nested_reft.cli.arguments import INNER_SHARE, add_json, check_json, command_parser, keep_json, local_file, whole
from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.cli.output import complain, say
from nested_reft.cli.overrides import HELP, alternatives, override
from nested_reft.cli.train import RUNS
from nested_reft.exit_codes import FAILED
from nested_reft.json_files import check_writable
from nested_reft.paths import local_only
from nested_reft.run_directory import versions
from nested_reft.sweeps.grid import combinations, grid
from nested_reft.sweeps.kept import Wanted
from nested_reft.sweeps.results import OUTCOMES
from nested_reft.sweeps.sweep import Missing, changes, compare, run_sweep
from nested_reft.training.compatibility import check_start
from nested_reft.training.config import Config, load_config, with_absolute_paths

SHOWN_MISSING = 20  # runs
FIGURE = "comparison.png"


def run(arguments: list[str]) -> None:
    """Trains what is not kept, prints the table and draws the figure."""
    # Names come first; argparse would take the values of an override that follows for them.
    count = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    names, parser = arguments[:count], _parser()
    known, words = parser.parse_known_args(arguments[count:])
    if not set(HELP).isdisjoint(words):
        parser.print_help()
        return
    with checking_input():
        stems = [os.path.basename(name).removesuffix(".py") for name in names]
        out = known.out or local_only(os.path.join(RUNS, "-".join(["sweep", *stems])), "the folder of the sweep")
        wanted = _wanted(names, words, known.seeds, out)
        check_json(known.json)
        if not known.report_only:
            out.mkdir(parents=True, exist_ok=True)
            check_writable(out / FIGURE)
        changed = changes(wanted, out)
    if changed:
        complain(f"warning: {changed}")
    try:
        results, missing = run_sweep(wanted, out, known.report_only)
    except KeyboardInterrupt:
        complain("\nto continue: the same command; finished runs are kept, and the one in progress has a checkpoint")
        raise
    say_missing(missing, len(wanted))
    if not results:
        raise BadInput(f"no run of the sweep in '{out}' has a result")
    with checking_input():
        text, tasks, no_figure = compare(results, known.measure, known.target, out / FIGURE)
    say(text)
    say(f"\nno figure: {no_figure}" if no_figure else f"\nfigure: {out / FIGURE}")
    say(f"runs: {out}")
    keep_json(known.json, {"versions": versions(), "tasks": tasks, "missing": [vars(each) for each in missing]})
    if missing and not known.report_only:
        raise SystemExit(FAILED)


def say_missing(missing: list[Missing], of: int) -> None:
    """Names the runs without a result.

    Args:
        missing: these runs.
        of: how many were asked for.
    """
    if missing:
        complain(f"warning: {len(missing)} of {of} runs are missing")
    for each in missing[:SHOWN_MISSING]:
        complain(f"  {each.run}: {each.reason}")
    if len(missing) > SHOWN_MISSING:
        complain(f"  and {len(missing) - SHOWN_MISSING} more")


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """Adds what says how runs are compared.

    Args:
        parser: of the command.
    """
    meanings = "; ".join(f"{name}: {measure.meaning}" for name, measure in OUTCOMES.items())
    parser.add_argument("--measure", choices=OUTCOMES, help=f"what to compare by, by default the first of {meanings}")
    parser.add_argument("--target", type=INNER_SHARE, metavar="A", help="also seconds until the accuracy A is reached")
    add_json(parser, "the table")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "sweep CONFIG ...",
        "Trains every combination of configurations, values of --FIELD and seeds, and compares the runs. `--FIELD A B`"
        " makes runs with A and runs with B; repeat the option for a field that takes a list. The same command"
        " continues a sweep, and several processes may work on one: each takes runs that no other has.",
        compiles=True,
    )
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=[0, 1, 2], help="of the runs; 0 1 2 by default")
    parser.add_argument("--out", type=local_file, metavar="DIR", help=f"folder, by default {RUNS}/sweep-CONFIG")
    parser.add_argument("--report-only", action="store_true", help="compute nothing; say what is missing")
    add_comparison(parser)
    return parser


def _wanted(names: list[str], words: list[str], seeds: list[int], out: Path) -> list[Wanted]:
    """The runs of the sweep, each checked as far as that needs no model.

    Raises:
        ValueError: a configuration, field or value cannot be, or something is asked for twice.
    """
    if not names:
        raise ValueError("sweep needs the name of a configuration as its first word; `nested-reft configs` lists them")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds is {' '.join(map(str, seeds))}; allowed is each once")
    variants = list[tuple[str, Config]]()
    for name in names:
        config = load_config(name)
        for label, chosen in combinations(alternatives(config, words)):
            # Several names are told apart in the table, and one alone stands above it.
            parts = [config.name] * (len(names) > 1 or not label) + [label] * bool(label)
            changed = with_absolute_paths(override(config, chosen), Path.cwd())
            if changed.train.seed != config.train.seed:
                raise ValueError(f"train.seed is {changed.train.seed}; allowed is --seeds, which sets it for every run")
            check_start(changed)
            variants.append((", ".join(parts), changed))
    return grid(variants, seeds, out)
