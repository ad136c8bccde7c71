"""What the arguments of several commands share: parsers, checks, `--json`, overrides of fields."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeVar

import tyro

from nested_reft.json_files import check_writable, write_json

# A dataclass of configuration. It is no `Config` because naming that type would import JAX with this module.
Fields = TypeVar("Fields")


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command's own options."""
    # The help of `train` comes with that of the fields, so `train` prints both itself.
    has_help = not command.startswith("train")
    # No abbreviations: what looks like one may be a mistyped override, which tyro has to see and refuse.
    return argparse.ArgumentParser(
        f"nested-reft {command}", description=description, allow_abbrev=False, add_help=has_help
    )


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--json FILE`, which also writes what the command prints."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"also write {what} here")


def check_json(path: Path | None) -> None:
    """Refuses a `--json FILE` that could not be written, before the work whose results it is to hold."""
    if path is not None:
        check_writable(path)


def keep_json(path: Path | None, value: Any) -> None:
    """Writes the results to `--json FILE` where it was given."""
    if path is not None:
        write_json(path, value)


def check_seed(seed: int) -> None:
    """Refuses a `--seed` that does not fit the PRNG keys."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed is {seed}; allowed is 0 to {2**31 - 1}")


def override(config: Fields, overrides: list[str]) -> Fields:
    """The configuration with fields replaced by `--FIELD VALUE`.

    Raises:
        SystemExit: a field or value that cannot be read, after tyro has explained it (code 2); or help (code 0).
        ValueError: a value that the configuration refuses.
    """
    return tyro.cli(
        type(config),
        default=config,
        args=overrides,
        prog="nested-reft train CONFIG",
        # A field may be one of several dataclasses. Its kind is that of the default, not a word on the command line.
        config=(tyro.conf.AvoidSubcommands,),
    )
