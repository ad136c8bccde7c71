"""`nested-reft configs`: the configurations that ship, what each one is and how long it takes."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.config_files import shipped_configs
from nested_reft.reports.tables import table

# Every configuration that ships has one such line in its docstring.
TIME_LINE = re.compile(r"^Time: (?P<time>.+?)\.?$", re.MULTILINE)


@dataclass(frozen=True)
class Description:
    """What the docstring of a configuration's file says.

    Attributes:
        name: as `nested-reft train` takes it.
        time: how long a run takes and on what; empty where the docstring has no `Time:` line.
        about: the docstring's first line.
    """

    name: str
    time: str
    about: str


def run(arguments: list[str]) -> None:
    """Prints the table of configurations."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
        found = [describe(path) for path in shipped_configs().values()]
    rows = [[each.name, each.time or "-", each.about] for each in found]
    say(table(["configuration", "time", "what it is"], rows, left=3))
    keep_json(known.json, [dataclasses.asdict(each) for each in found])


def describe(path: Path) -> Description:
    """Reads a configuration's docstring from its text: importing the file would bring JAX and all rooms along.

    Raises:
        ValueError: the file is no Python.
    """
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (SyntaxError, ValueError) as error:  # the second for what is no text
        raise ValueError(f"configuration file '{path}' cannot be read: {error}") from error
    time = TIME_LINE.search(docstring)
    return Description(path.stem, time["time"] if time else "", docstring.partition("\n")[0])


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("configs", "The configurations that ship, what each one is and how long it takes.")
    add_json(parser, "the table")
    return parser
