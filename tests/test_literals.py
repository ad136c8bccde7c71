"""Fields that take one of a few names: every one of them is checked, and the refusal says what is allowed."""

import dataclasses
import typing
from typing import Any, Literal

import pytest

from nested_reft.literals import check_choice, check_whole
from nested_reft.training.config import load_config

Fruit = Literal["apple", "pear"]


def test_a_name_that_is_allowed_passes():
    check_choice("basket.fruit", "pear", Fruit)


@pytest.mark.parametrize("value", ["plum", "", None, "Apple"])
def test_the_refusal_names_the_field_the_value_and_what_is_allowed(value):
    with pytest.raises(ValueError) as error:
        check_choice("basket.fruit", value, Fruit)
    assert str(error.value) == f"basket.fruit is {value!r}; allowed are apple, pear"


@pytest.mark.parametrize("value", [1, 7])
def test_whole_numbers_of_the_range_pass(value):
    check_whole("basket.size", value, 1, 7)


def test_a_whole_number_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"basket.size is 0; allowed is 1 or more, up to 7"):
        check_whole("basket.size", 0, 1, 7)
    with pytest.raises(ValueError, match=r"basket.size is 8; allowed is 0 \(never\) or more, up to 7"):
        check_whole("basket.size", 8, 0, 7, "never")


@pytest.mark.parametrize("value", ["3", 2.0, True, None])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError) as error:
        check_whole("basket.size", value, 1, 7)
    assert str(error.value) == f"basket.size is {value!r}; allowed is a whole number from 1 to 7"


def parts_of(value: Any) -> list[Any]:
    """All dataclasses inside a configuration."""
    if isinstance(value, tuple):
        return [part for entry in value for part in parts_of(entry)]
    if not dataclasses.is_dataclass(value):
        return []
    fields = (getattr(value, field.name) for field in dataclasses.fields(value))
    return [value, *(part for entry in fields for part in parts_of(entry))]


def named_choices() -> dict[str, tuple[Any, str]]:
    """`Class.field` of every configuration field that takes one of a few names, with an instance to try it on."""
    found = {}
    for part in parts_of(load_config("tiny")):
        for name, hint in typing.get_type_hints(type(part)).items():
            options = [hint, *typing.get_args(hint)]
            if any(typing.get_origin(option) is Literal for option in options):
                found[f"{type(part).__name__}.{name}"] = (part, name)
    return found


@pytest.mark.parametrize("part, name", named_choices().values(), ids=named_choices().keys())
def test_every_configuration_refuses_a_name_that_it_does_not_know(part, name):
    """A configuration file is Python, so nothing but the class itself can notice a misspelt name.

    The tests' own type checks would refuse it first, so the field is set behind their back.
    """
    wrong = object.__new__(type(part))
    for field in dataclasses.fields(part):
        object.__setattr__(wrong, field.name, "nonsense" if field.name == name else getattr(part, field.name))
    with pytest.raises(ValueError, match=rf"{name} is 'nonsense'; allowed (are|is) "):
        wrong.__post_init__()
