"""Reading configurations from plain values: every field is checked against its type, and a refusal names the field.

Values come from JSON, from Python and, as text, from the command line. All go through `read`, so a mistake has one
message wherever it is made.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from nested_reft.untrusted import MAX_WHOLE, shown

Chooser = Callable[[str, dict[str, Any]], type]
"""From a field and its values to the member of a union that they describe."""


class UnknownField(ValueError):
    """A name that no field has.

    Attributes:
        field: the name, with where it stands.
    """

    def __init__(self, field: str, names: typing.Iterable[str]):
        super().__init__(f"{field} is no field of the configuration; allowed are {', '.join(names)}")
        self.field = field


def read(kind: Any, value: Any, field: str = "", choosers: Mapping[Any, Chooser] | None = None) -> Any:
    """A value of a field's type from plain values.

    Whole numbers stand for numbers too, and lists for tuples. Nothing else is converted: True is no number, and "3" is
    none either.

    Args:
        kind: a dataclass or the type of a field.
        value: what JSON can hold.
        field: where the value stands, for messages; empty for a whole configuration.
        choosers: for each union of dataclasses, what finds the member.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """
    choosers = choosers or {}
    if kind in choosers:
        kind = choosers[kind](field, _object(value, field))
    for option in _options(kind):
        if dataclasses.is_dataclass(option) and value is not None:
            return _read_object(option, _object(value, field), field, choosers)
        if typing.get_origin(option) is tuple:
            return _read_tuple(option, value, field, choosers)
        if typing.get_origin(option) in (dict, Mapping):
            return {
                name: read(get_args(option)[1], entry, f"{field}.{name}", choosers)
                for name, entry in _object(value, field).items()
            }
    fitting = [option for option in _options(kind) if _fits(option, value)]
    _check(bool(fitting), kind, value, field)
    return float(typing.cast(Any, value)) if fitting[0] is float else value


def from_text(kind: Any, text: str) -> Any:
    """A word of the command line as the plain value that it stands for; the word itself where it stands for none.

    Args:
        kind: the type of its field.
        text: the word.
    """
    options = _options(kind)
    if type(None) in options and text in ("None", "none"):
        return None
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    # Longer integers than this are out of every range, and Python refuses to read them.
    if int in options and re.fullmatch(r"[+-]?[0-9]{1,400}", text):
        return int(text)
    if float in options:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def allowed(kind: Any, value: Any = None) -> str:
    """What a field takes, in words that follow `allowed`.

    Args:
        kind: the type of the field.
        value: what was refused; the range of a number is named only where another number was given.
    """
    options = _options(kind)
    choices = [str(choice) for option in options if typing.get_origin(option) is Literal for choice in get_args(option)]
    others = [_allowed_word(option, value) for option in options if typing.get_origin(option) is not Literal]
    if choices and set(others) <= {"None"}:
        return f"are {', '.join([*choices, *others])}"
    return f"is {' or '.join([*choices, *others])}"


def _allowed_word(option: Any, value: Any) -> str:
    # The range is named only where it is what was missed.
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if option is int:
        return "a whole number" + (f" of at most {MAX_WHOLE}, whatever its sign" if is_whole else "")
    if option is float:
        return "a finite number" if is_whole or type(value) is float else "a number"
    if dataclasses.is_dataclass(option) or option is dict or typing.get_origin(option) in (dict, Mapping):
        return "an object with its fields by name"
    if typing.get_origin(option) is tuple:
        return "a list"
    return {bool: "True or False", str: "a text", type(None): "None"}[option]


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _fits(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option)
    # A bool is an int in Python, but nobody means the number.
    if option is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which NaN is not
    return type(value) is option and (option is not int or abs(value) <= MAX_WHOLE)


def _read_object(kind: Any, value: dict[str, Any], field: str, choosers: Mapping[Any, Chooser]) -> Any:
    prefix = f"{field}." if field else ""
    hints = typing.get_type_hints(kind)
    declared = {entry.name: entry for entry in dataclasses.fields(kind)}
    for name in value:
        if name not in declared:
            raise UnknownField(prefix + str(name), declared)
    for name, entry in declared.items():
        has_default = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
        if name not in value and not has_default:
            raise ValueError(f"{prefix}{name} is missing and has no default; allowed {allowed(hints[name])}")
    return kind(**{name: read(hints[name], entry, prefix + name, choosers) for name, entry in value.items()})


def _read_tuple(kind: Any, value: Any, field: str, choosers: Mapping[Any, Chooser]) -> tuple[Any, ...]:
    _check(isinstance(value, list | tuple), kind, value, field)
    inner = get_args(kind)
    # `tuple[X, ...]` has any length, and `tuple[X, Y]` its own.
    if inner[-1] is ...:
        inner = inner[:1] * len(value)
    if len(value) != len(inner):
        raise ValueError(f"{field} is {shown(value)}; allowed is a list of {len(inner)} entries")
    return tuple(
        read(each, entry, f"{field}.{_label(entry, index)}", choosers)
        for index, (each, entry) in enumerate(zip(inner, value, strict=True))
    )


def _label(entry: Any, index: int) -> str:
    """What an entry of a list is called: sources are known by their names, which are unique."""
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else str(index)


def _object(value: Any, field: str) -> dict[str, Any]:
    _check(isinstance(value, dict), dict, value, field)
    return value


def _check(fits: bool, kind: Any, value: Any, field: str) -> None:
    if not fits:
        raise ValueError(f"{field or 'the configuration'} is {shown(value)}; allowed {allowed(kind, value)}")
