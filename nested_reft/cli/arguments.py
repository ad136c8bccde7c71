"""What the arguments of several commands share: parsers, checks, `--json`, overrides of fields."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from nested_reft.json_files import check_writable, write_json

if TYPE_CHECKING:  # JAX comes along
    from nested_reft.training.config import Config


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command's own options.

    Args:
        command: as it is typed after `nested-reft`.
        description: one sentence for its help.
    """
    # The help of `train` comes with that of the fields, so `train` prints both itself.
    has_help = not command.startswith("train")
    # No abbreviations: what looks like one may be a mistyped override, which tyro has to see and refuse.
    return argparse.ArgumentParser(
        f"nested-reft {command}", description=description, allow_abbrev=False, add_help=has_help
    )


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--json FILE`, which also writes what the command prints.

    Args:
        parser: of the command.
        what: the results in words, for the help.
    """
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"also write {what} here")


def check_json(path: Path | None) -> None:
    """Refuses a `--json FILE` that could not be written, before the work whose results it is to hold."""
    if path is not None:
        check_writable(path)


def keep_json(path: Path | None, value: Any) -> None:
    """Writes the results to `--json FILE` where it was given.

    Args:
        path: the file; None where the option was not given.
        value: JSON-able.
    """
    if path is not None:
        write_json(path, value)


def check_seed(seed: int) -> None:
    """Refuses a `--seed` that does not fit the PRNG keys.

    Raises:
        ValueError: the seed is negative, or 2^31 or more.
    """
    # Keys are made from 32-bit integers with a sign.
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed is {seed}; allowed is 0 to {2**31 - 1}")


def override(config: Config, overrides: list[str]) -> Config:
    """The configuration with fields replaced by `--FIELD VALUE`.

    Args:
        config: gives the fields, their types and their values where none is given.
        overrides: the words of the command line that are left for the fields.

    Raises:
        SystemExit: a field or value that cannot be read, after tyro has explained it (code 2); or help (code 0).
        ValueError: a value that the configuration refuses.
    """
    kind = _value_of("--loss.kind", overrides)
    if kind is not None:
        from nested_reft.training.config import with_objective

        # The kind decides which other fields `loss` has, so it comes first.
        config = with_objective(config, kind)
    return tyro.cli(
        type(config),
        default=config,
        args=overrides,
        prog="nested-reft train CONFIG",
        # A field may be one of several dataclasses. Its kind is that of the default, not a word on the command line.
        config=(tyro.conf.AvoidSubcommands,),
    )


def _value_of(option: str, words: list[str]) -> str | None:
    """The value that the command line gives an option, in one word or two; None where it gives none."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.removeprefix(option + "=")
    return None
