"""What the user gave and cannot work; kept apart so that `main` imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(Exception):
    """What the user gave cannot work: refused before training, with nothing written."""


@contextmanager
def checking_input() -> Iterator[None]:
    """Turns errors of the preparations, which the user can mend, into `BadInput`: one line, exit code 2.

    Raises:
        BadInput: the block raised a ValueError, an OSError or an ImportError.
    """
    try:
        yield
    # These are what refusals raise: a value, a file, an optional package. Anything else is a bug and keeps its
    # traceback.
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(str(error)) from error
