"""What the arguments of several commands share: parsers, checks, `--json`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nested_reft.cli.bad_input import BadInput
from nested_reft.fields import from_text
from nested_reft.json_files import check_writable, write_json
from nested_reft.paths import local_only
from nested_reft.program_cache import NO_CACHE
from nested_reft.untrusted import shown


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        """Turns a message of argparse into the words of other refusals.

        Raises:
            BadInput: always.
        """
        # argparse writes `argument --seed: ` before the message of a type.
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        if message.startswith("unrecognized arguments"):
            options = ", ".join(option for action in self._actions for option in action.option_strings)
            message += f"; allowed are {options}"
        raise BadInput(message)


def command_parser(
    command: str, description: str, compiles: bool = False, has_help: bool = True
) -> argparse.ArgumentParser:
    """The parser of a command's own options.

    Args:
        command: as it is typed after `nested-reft`.
        description: one sentence for its help.
        compiles: whether it runs programs that are worth keeping; such a command has `--no-compilation-cache`.
        has_help: whether `--help` prints this parser's help and nothing else.
    """
    # No abbreviations: what looks like one may be a mistyped override, which has to be seen and refused.
    parser = Parser(f"nested-reft {command}", description=description, allow_abbrev=False, add_help=has_help)
    if compiles:
        # `nested_reft.command` reads it, because JAX reads the setting when it is imported.
        parser.add_argument(NO_CACHE, action="store_true", help="compile everything anew, and keep nothing of it")
    return parser


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number.

    Args:
        least: the smallest that is allowed.
        most: the largest; the default is the largest that 32 bits hold.
    """

    def parse(text: str) -> int:
        number = from_text(int, text)
        if not isinstance(number, int) or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"is {shown(number)}; allowed is a whole number from {least} to {most}")
        return number

    return parse


def number(range_in_words: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of an option that takes a number.

    Args:
        range_in_words: what follows `allowed is`.
        fits: whether a number is in that range.
    """

    def parse(text: str) -> float:
        value = from_text(float, text)
        if not isinstance(value, float) or not fits(value):
            raise argparse.ArgumentTypeError(f"is {shown(value)}; allowed is {range_in_words}")
        return value

    return parse


# The type of an option that takes an accuracy to reach.
INNER_SHARE = number("more than 0 and less than 1", lambda value: 0 < value < 1)


def local_file(text: str) -> Path:
    """The type of an option that names what a command writes.

    Args:
        text: as it was typed.
    """
    if not text.strip():  # the working directory, to `Path`
        raise argparse.ArgumentTypeError(f"is '{text}'; allowed is a local path")
    try:
        return local_only(text, "")
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"is {shown(text)}; allowed is a local path, since gs:// serves --runs, --resume and what is read"
        ) from None


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--json FILE`, which also writes what the command prints.

    Args:
        parser: of the command.
        what: the results in words, for the help.
    """
    parser.add_argument("--json", type=local_file, metavar="FILE", help=f"also write {what} here")


def check_out(path: Path, suffix: str) -> None:
    """Refuses a place for `--out` that cannot be written, or that has a name of something else.

    Args:
        path: as it was given.
        suffix: that its name must have. A file that took the place of a run's own, or of a device, could not be undone.

    Raises:
        ValueError: names the path and what is allowed.
    """
    if path.suffix != suffix:
        raise ValueError(f"--out is '{path}'; allowed is a name that ends in {suffix}")
    check_writable(path)


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
