"""Files and texts that somebody else wrote: what is wrong with one is told in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MAX_WHOLE = 2**31 - 1
# Beyond these, float32 rounds to infinity or to zero where numbers are multiplied.
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e30
MAX_SHOWN_CHARACTERS = 120
MAX_LINE = 1000


class BadFile(ValueError):
    """A file that somebody else wrote cannot be used. Its message is one short line that is safe to print."""

    def __init__(self, message: str):
        line = printable(message)
        # Libraries repeat what they could not read, which may be most of a file. The end says what to do.
        super().__init__(line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 200]} ... {line[-195:]}")


def printable(text: str) -> str:
    """Untrusted text made safe to show: control characters, which a terminal would obey, as escapes.

    Args:
        text: untrusted.
    """
    # A terminal would obey escape sequences in what a model wrote.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value for a message: its `repr`, cut where it is long.

    Args:
        value: untrusted.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses to write out integers of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns whatever the parsing of untrusted content raises into `BadFile`.

    Parsers check what they can name. This catches the rest: libraries raise many kinds of
    exception for damage, and no list of them is complete. Only parsing belongs in the block.

    Args:
        where: the file, for the message.

    Raises:
        BadFile: the block raised an exception other than `BadFile` or an OSError.
    """
    try:
        yield
    # A missing or unreadable file is told from damaged content; its message is complete.
    except (BadFile, OSError):
        raise
    except ValueError as error:  # what checks raise; its message is a sentence
        raise BadFile(f"{where}: {error}") from error
    except Exception as error:
        raise BadFile(f"{where}: {_damage(error)}") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise BadFile(f"{where}: {_damage(error)}") from error


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust stopped; its error is not derived from Exception.

    Args:
        error: what was raised.
    """
    return type(error).__name__ == "PanicException"


def _damage(error: BaseException) -> str:
    text = str(error)[: 2 * MAX_SHOWN_CHARACTERS]
    return f"damaged or not understood ({type(error).__name__}{': ' if text else ''}{text})"


@dataclass(frozen=True)
class Fields:
    """Values that a file gives by name, with their types checked when they are read.

    Attributes:
        values: by name, of any type.
        prefix: put before each name in messages.
    """

    values: Mapping[str, Any]
    prefix: str = ""

    def get(self, name: str) -> Any:
        """The value as it stands; None where there is none."""
        return self.values.get(name)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number.

        Args:
            name: of the field.
            default: taken where the field is absent; None where it must be given.
            least: the smallest that is allowed.

        Raises:
            ValueError: the value is another one.
        """
        value = self.values.get(name, default)
        # True is an int to `isinstance`, and a number in quotes would only fail later on.
        if type(value) is not int or not least <= value <= MAX_WHOLE:
            raise self.refused(name, f"it must be given as a whole number from {least} to {MAX_WHOLE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number.

        Args:
            name: of the field.
            default: taken where the field is absent; None where it must be given.

        Raises:
            ValueError: the value is another one.
        """
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not MIN_NUMBER <= value <= MAX_NUMBER:
            raise self.refused(name, f"it must be given as a number from {MIN_NUMBER:g} to {MAX_NUMBER:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or False.

        Raises:
            ValueError: the value is another one.
        """
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self.refused(name, "allowed are true and false")
        return value

    def text(self, name: str) -> str | None:
        """A text, or None where there is none.

        Raises:
            ValueError: the value is of another type.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.refused(name, "allowed is a text")
        return value

    def refused(self, name: str, allowed: str) -> ValueError:
        """The error that refuses a field's value.

        Args:
            name: of the field.
            allowed: what is allowed, in words.
        """
        return ValueError(f"{self.prefix}{name} is {shown(self.values.get(name))}; {allowed}")
