"""The options that the commands of experiments share, and the checks of their values.

A command is a `main` that `command` wraps. Its parser comes from `experiment_parser`, and options that several
commands have come from here: seeds, steps, the folder of results and a JSON file.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nested_reft.cli.arguments import Parser, number, whole
from nested_reft.cli.bad_input import BadInput
from nested_reft.cli.output import complain, quiet_libraries
from nested_reft.exit_codes import BAD_INPUT, DONE, INTERRUPTED
from nested_reft.fields import from_text
from nested_reft.json_files import check_writable
from nested_reft.training.config import MAX_STEPS
from nested_reft.untrusted import shown

Main = Callable[[Sequence[str] | None], int | None]

BELOW_ONE = number("0 or more and less than 1", lambda value: 0 <= value < 1)


def command(main: Main) -> Callable[..., int]:
    """Makes a `main` return an exit code: 2 after one line where it refused its input, 130 after Ctrl-C, else its own.

    Args:
        main: parses the arguments of the command line, or those of the process where it gets None.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        quiet_libraries()
        try:
            return main(arguments) or DONE
        except BadInput as error:
            complain(f"error: {error}")
            return BAD_INPUT
        except KeyboardInterrupt:
            complain("\ninterrupted: the same command computes no kept result again")
            return INTERRUPTED

    return run


def experiment_parser(name: str, doc: str | None) -> Parser:
    """The parser of a command.

    Args:
        name: of its module, as it stands behind `experiments.`.
        doc: of its module, which its help shows.
    """
    return Parser(
        f"python -m experiments.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # What looks like an abbreviation may be a mistyped option.
        allow_abbrev=False,
    )


class Distinct(argparse.Action):
    """Takes a list that names nothing twice: a run that counted twice would narrow every interval."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Keeps the list.

        Raises:
            ArgumentError: an entry stands in it twice.
        """
        twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
        if twice is not None:
            listed = " ".join(map(str, values))
            raise argparse.ArgumentError(self, f"is {listed}, which names {twice} twice; allowed is each once")
        setattr(namespace, self.dest, values)


def add_list(parser: argparse.ArgumentParser, option: str, default: Iterable[Any], **about: Any) -> None:
    """Adds an option that takes a list of one or more different values.

    Args:
        parser: of the command.
        option: its name.
        default: the list where it is left out.
        about: further arguments of `add_argument`, such as `type` or `choices`.
    """
    keywords: dict[str, Any] = {"nargs": "+", "action": Distinct, "default": list(default)} | about
    parser.add_argument(option, **keywords)


def check_baseline(option: str, chosen: Sequence[Any], baseline: Any) -> None:
    """Refuses a list without what its other entries are compared with.

    Args:
        option: whose list it is.
        chosen: the list.
        baseline: what has to be in it.

    Raises:
        BadInput: it is not.
    """
    if baseline not in chosen:
        raise BadInput(f"{option} lacks '{baseline}', which the others are compared with")


def add_runs(
    parser: argparse.ArgumentParser, out: str, steps: int | None, seeds: int = 5, least: int = 1, multiple: int = 1
) -> None:
    """Adds `--seeds`, `--steps` and `--out` of a command that trains a run for each seed.

    Args:
        parser: of the command.
        out: the folder in `runs` where `--out` is left out.
        steps: the number where `--steps` is left out; None leaves it to the command.
        seeds: how many there are where `--seeds` is left out, from 0 on.
        least: the smallest number of steps that is allowed.
        multiple: what the steps have to be a multiple of.
    """
    add_seeds(parser, seeds)
    add_steps(parser, steps, least, multiple)
    add_out(parser, f"runs/{out}")


def add_seeds(parser: argparse.ArgumentParser, count: int = 5) -> None:
    """Adds `--seeds`.

    Args:
        parser: of the command.
        count: how many there are where it is left out, from 0 on.
    """
    add_list(parser, "--seeds", range(count), type=whole(0), help="of the runs")


def add_steps(
    parser: argparse.ArgumentParser, default: int | None, least: int = 1, multiple: int = 1, what: str = "of each run"
) -> None:
    """Adds `--steps`.

    Args:
        parser: of the command.
        default: the number where it is left out; None leaves it to the command.
        least: the smallest that is allowed.
        multiple: what it has to be a multiple of.
        what: whose steps these are, for the help.
    """
    of = f"{what}, a multiple of {multiple}" if multiple > 1 else what
    help = of if default is not None else f"{of}; left out, the task's own number"
    form = whole(least, MAX_STEPS) if multiple == 1 else multiple_of(multiple, least)
    parser.add_argument("--steps", type=form, default=default, help=help)


def multiple_of(factor: int, least: int) -> Callable[[str], int]:
    """Makes the type of an option for a number of steps.

    Args:
        factor: what it has to be a multiple of.
        least: the smallest that is allowed.
    """

    def parse(text: str) -> int:
        found = from_text(int, text)
        if not isinstance(found, int) or not least <= found <= MAX_STEPS or found % factor:
            raise argparse.ArgumentTypeError(
                f"is {shown(found)}; allowed is a multiple of {factor}, {least} or more, up to {MAX_STEPS}"
            )
        return found

    return parse


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds `--out`, the folder of results.

    Args:
        parser: of the command.
        default: the folder where it is left out.
    """
    parser.add_argument("--out", type=folder, default=Path(default), help="folder of the results, which are kept there")


def add_json(parser: argparse.ArgumentParser, what: str = "the results") -> None:
    """Adds `--json FILE`, whose value `keep_json` takes.

    Args:
        parser: of the command.
        what: what is written, for the help.
    """
    parser.add_argument("--json", type=new_file, metavar="FILE", help=f"also write {what} here")


def new_file(text: str) -> Path:
    """The type of an option that names a file to write."""
    try:
        check_writable(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def folder(text: str) -> Path:
    """The type of an option that names a folder to write to, which need not be there."""
    if not text:
        # `Path` would take it for the current folder.
        raise argparse.ArgumentTypeError("cannot write to '': name a folder")
    try:
        check_folder(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def check_folder(path: Path) -> None:
    """Refuses a folder that could not be made or written to, before the work whose results it is to hold.

    Args:
        path: the folder; nothing is made.

    Raises:
        ValueError: a file is in its place or on the way to it, or the folders that are there cannot be written to.
    """
    try:
        # Folders are made with their parents, so the nearest one that is there decides.
        nearest = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
        with tempfile.NamedTemporaryFile(dir=nearest):
            pass
    except OSError:
        raise ValueError(
            f"cannot write to '{path}': name a folder that can be written, or one that can be made"
        ) from None
