"""`--FIELD VALUE`: fields of a configuration that the command line replaces."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nested_reft.fields import allowed, from_text

if TYPE_CHECKING:  # JAX comes along
    from nested_reft.training.config import Config

HELP = ("-h", "--help")


def override(config: Config, words: Sequence[str]) -> Config:
    """The configuration with fields replaced by `--FIELD VALUE`, `--FIELD=VALUE`, or `--FLAG` and `--no-FLAG`.

    `--loss.preset NAME` is no field: it changes the loss as `with_preset` does, before the fields of the loss.

    Args:
        config: gives the fields, their types and their values where none is given.
        words: what is left of the command line for the fields.

    Raises:
        SystemExit: help was asked for and printed (code 0).
        ValueError: a field that is not there, or a value that cannot be; names both and what is allowed.
    """
    from nested_reft.losses.presets import preset_names
    from nested_reft.training.config import Config, with_preset

    if not set(HELP).isdisjoint(words):
        print_fields(config)
        raise SystemExit(0)
    given = list(_given(words))
    for option, values in given:
        if option == "loss.kind" and values and values[-1] != config.loss.kind:
            # The kind decides which other fields `loss` has, so it comes first; they begin at their defaults.
            config = _with_kind(config, values[-1], given)
        if option == "loss.preset":
            if not values:
                raise ValueError(f"loss.preset is given no value; allowed are names of {', '.join(preset_names())}")
            config = with_preset(config, values)
    plain = config.to_json()
    for option, values in given:
        if option == "loss.preset":
            continue
        keys, value = _replacement(config, option, values)
        part = plain
        for key in keys[:-1]:
            # A part that is None gets its defaults with the first of its fields.
            if part[key] is None:
                part[key] = {}
            part = part[key]
        part[keys[-1]] = value
    return Config.from_json(plain) if given else config


def alternatives(config: Config, words: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
    """The options of a command line, and the words of each value that they are to have in turn.

    Every word is a value of its own. Where a field takes a list, all words behind an option are one value, and the
    option is repeated for others; so it is with presets.

    Args:
        config: gives the fields and their types.
        words: what is left of the command line for the fields.

    Raises:
        ValueError: the words begin with a value.
    """
    found: dict[str, list[list[str]]] = {}
    for option, values in _given(words):
        is_one = len(values) < 2 or option == "loss.preset" or _takes_list(config, option)
        found.setdefault(f"--{option.replace('_', '-')}", []).extend(
            [values] if is_one else [[word] for word in values]
        )
    return list(found.items())


def _takes_list(config: Config, option: str) -> bool:
    """Whether a field takes a list; `override` refuses one that is not there, or is of another objective."""
    kind: Any = type(config)
    value: Any = config
    for part in option.split("."):
        names = _names(value) or _names_of(kind)
        if part not in names:
            return False
        kind, value = names[part], None if value is None else _child(value, part)
    return any(typing.get_origin(each) is tuple for each in (kind, *typing.get_args(kind)))


def _with_kind(config: Config, kind: str, given: Sequence[tuple[str, list[str]]]) -> Config:
    """The configuration with a loss of another kind and those of its fields that are given.

    Raises:
        ValueError: there is no such kind, or a field has no default and is not given.
    """
    from nested_reft.losses.registry import OBJECTIVE_CONFIGS

    loss: dict[str, Any] = {"kind": kind}
    if kind in OBJECTIVE_CONFIGS:
        hints = typing.get_type_hints(OBJECTIVE_CONFIGS[kind])
        names = {option: option.removeprefix("loss.") for option, _ in given if option.startswith("loss.")}
        loss |= {
            names[option]: _plain(hints[names[option]], values, option)
            for option, values in given
            if names.get(option) in hints and option != "loss.kind"
        }
    return type(config).from_json(config.to_json() | {"loss": loss})


def print_fields(config: Config) -> None:
    """Prints the help of every field.

    Args:
        config: gives the fields and their values where none is given.

    Raises:
        SystemExit: always, with code 0.
    """
    import tyro  # it takes half a second, and only the help needs it

    tyro.cli(
        type(config),
        default=config,
        args=["--help"],
        prog="nested-reft train CONFIG",
        # A field may be one of several dataclasses. Its kind is that of the default, not a word on the command line.
        config=(tyro.conf.AvoidSubcommands,),
    )


def field_options(value: Any, prefix: str = "") -> Iterator[str]:
    """Every option that `override` takes for a configuration, without its dashes.

    Args:
        value: a configuration or a part of one.
        prefix: where the part stands, with its dot.
    """
    for name in _names(value):
        inner = _child(value, name)
        if _names(inner):
            yield from field_options(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}".replace("_", "-")


def _given(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Options without their dashes and with underscores, and the words that follow each."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            found.append((option.replace("-", "_"), [value] if equals else []))
        elif not found:
            raise ValueError(
                f"{word!r} is no option of the command; allowed are --FIELD VALUE, and the name of a configuration as"
                " the first word, without --resume"
            )
        else:
            found[-1][1].append(word)
    yield from found


def _replacement(config: Config, option: str, words: list[str]) -> tuple[list[Any], Any]:
    """The keys that lead to a field in the JSON form, and the value that the words give it."""
    keys: list[Any] = []
    value, kind = config, type(config)
    *_, last = parts = option.split(".")
    for part in parts:
        names = _names(value) or _names_of(kind)
        negated = part.removeprefix("no_")
        if part not in names and part is last and names.get(negated) is bool and not words:
            return [*keys, negated], False
        if part not in names:
            raise ValueError(_unknown(config, option))
        kind = names[part]
        value = None if value is None else _child(value, part)
        keys.append(int(part) if part.isdigit() else part)
    inner = _names(value) or _names_of(kind)
    if inner or (value is not None and isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])):
        listed = ", ".join(f"--{option}.{name}".replace("_", "-") for name in inner)
        raise ValueError(f"{option} has fields of its own; allowed are {listed}")
    return keys, _plain(kind, words, option)


def _plain(kind: Any, words: list[str], option: str) -> Any:
    """The plain value that words give a field; what does not fit is left to `fields.read`."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        parts = typing.get_args(inner) if typing.get_origin(inner) is tuple else (inner,)
        if len(words) % len(parts):
            raise ValueError(f"{option} is {' '.join(words)!r}; allowed are {len(parts)} words for each entry")
        flat = [from_text(parts[index % len(parts)], word) for index, word in enumerate(words)]
        return flat if len(parts) == 1 else [flat[i : i + len(parts)] for i in range(0, len(flat), len(parts))]
    if kind is bool and not words:
        return True
    if len(words) != 1:
        given = f"{' '.join(words)!r}, which are {len(words)} words" if words else "given no value"
        raise ValueError(f"{option} is {given}; allowed {allowed(kind)}")
    return from_text(kind, words[0])


def _names(value: Any) -> dict[str, Any]:
    """The fields inside a value and their types; empty where it has none."""
    if dataclasses.is_dataclass(value):
        return typing.get_type_hints(type(value))
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return {str(index): type(entry) for index, entry in enumerate(value)}
    return {name: int for name in value} if isinstance(value, dict) else {}


def _names_of(kind: Any) -> dict[str, Any]:
    """The fields of a part that is None."""
    parts = [option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)]
    return typing.get_type_hints(parts[0]) if len(parts) == 1 else {}


def _child(value: Any, name: str) -> Any:
    if isinstance(value, tuple):
        return value[int(name)]
    return value[name] if isinstance(value, dict) else getattr(value, name)


def _unknown(config: Config, option: str) -> str:
    """The refusal of an option that is no field, with the nearest ones."""
    options = list(field_options(config))
    wanted = option.replace("_", "-")
    # A field that stands elsewhere is nearer than one whose name is alike.
    moved = [each for each in options if each.rpartition(".")[2] == wanted.rpartition(".")[2]]
    near = moved or difflib.get_close_matches(wanted, options, n=3)
    hint = f"did you mean {' or '.join(f'--{each}' for each in near[:3])}?" if near else "--help lists what is allowed"
    return f"--{wanted} is no option of the command and no field of the configuration; {hint}"
