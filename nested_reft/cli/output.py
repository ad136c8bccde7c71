"""What commands print: names, paths and texts in it may be anybody's, so nothing reaches the terminal as control."""

from __future__ import annotations

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


def _shown(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
