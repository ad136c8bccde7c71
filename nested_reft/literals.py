"""Checking fields that take one of a few names, or a whole number of a range."""

from __future__ import annotations

import numbers
from typing import Any, get_args


def check_whole(field: str, value: Any, least: int, most: int, meaning: str = "") -> None:
    """Refuses a whole number out of its range.

    Args:
        field: where the value stands in the configuration, such as `train.steps`.
        value: what stands there.
        least, most: the smallest and the largest that are allowed.
        meaning: of the smallest one, where it has one of its own.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """
    # A configuration file is Python, and may hold any value; True is an integer there, which nobody means.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{field} is {value!r}; allowed is a whole number from {least} to {most}")
    if not least <= int(value) <= most:
        shown = f"{least} ({meaning})" if meaning else least
        raise ValueError(f"{field} is {value}; allowed is {shown} or more, up to {most}")


def check_choice(field: str, value: Any, choices: Any) -> None:
    """Refuses a value that is not one of a `Literal`'s.

    Args:
        field: where the value stands in the configuration, such as `rollout.mode`.
        value: what stands there.
        choices: a `typing.Literal`.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """
    # The type itself is the list, so the message cannot fall behind it.
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; allowed are {', '.join(map(str, allowed))}")
