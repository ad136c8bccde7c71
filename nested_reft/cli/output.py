"""What commands print: names, paths and texts in it may be anybody's, so nothing reaches the terminal as control."""

from __future__ import annotations

import logging
import sys

from nested_reft.untrusted import printable


def say(text: str = "") -> None:
    """Prints lines, as a result.

    Args:
        text: one line or more.
    """
    print(_shown(text))


def complain(text: str) -> None:
    """Prints lines, as what went wrong.

    Args:
        text: one line or more.
    """
    print(_shown(text), file=sys.stderr)


def quiet_libraries() -> None:
    """Keeps what Orbax and JAX report through absl to their errors; a program that imports the package decides itself.

    Orbax logs each error of its threads with a traceback, several times over. All of them are raised as well, and
    become one line of the command.
    """
    absl = logging.getLogger("absl")
    absl.setLevel(logging.ERROR)
    absl.addFilter(_has_no_traceback)  # the same one a second time changes nothing


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _shown(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
