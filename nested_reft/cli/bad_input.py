"""What the user gave and cannot work; kept apart so that `main` imports nothing heavy."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from nested_reft.exit_codes import LateError

# How JAX begins when JAX_PLATFORMS names what is not here.
NO_BACKEND = re.compile("Unable to initialize backend|Unknown backend")


# Errors of a device that no input causes: it is full, over its quota, or broken.
OF_DEVICES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class MachineError(Exception):
    """The machine failed, whatever the user gave."""


class BadInput(Exception):
    """What the user gave cannot work: refused before training, with nothing written."""


@contextmanager
def checking_input() -> Iterator[None]:
    """Turns errors of the preparations, which the user can mend, into `BadInput`: one line, exit code 2.

    Raises:
        BadInput: the block raised what refusals raise.
        MachineError: a device is full or broken, so that the same words would work on another one.
    """
    try:
        yield
    # No input caused that whoever read the output went away, or that another process is late.
    except (BrokenPipeError, LateError):
        raise
    except OSError as error:
        # Errors of our own have that of the system as their cause.
        if {error.errno, getattr(error.__cause__, "errno", None)} & set(OF_DEVICES):
            raise MachineError(_of_system(error)) from error
        raise BadInput(_of_system(error)) from error
    # A value or an optional package; the last two come from values that no check foresaw, too deep or too large.
    # Anything else is a bug and keeps its traceback.
    except (ValueError, ImportError, RecursionError, OverflowError) as error:
        raise BadInput(str(error)) from error
    except RuntimeError as error:
        if not NO_BACKEND.match(str(error)):
            raise
        raise BadInput(f"JAX finds no device: {error}") from error


def _of_system(error: OSError) -> str:
    """An error of the operating system with its file; our own refusals have words already."""
    if error.strerror is None:
        return str(error)
    reason = error.strerror
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += "; free space there, then start again"
    return f"'{error.filename}' cannot be used: {reason}" if error.filename is not None else reason
