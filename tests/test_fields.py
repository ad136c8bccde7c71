"""Reading plain values into dataclasses: what is converted, what is refused, and with which words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from nested_reft.fields import UnknownField, allowed, from_text, read


@dataclass(frozen=True)
class Inner:
    count: int
    share: float = 0.5


@dataclass(frozen=True)
class Other:
    word: str


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...] = ()
    either: Inner | Other | None = None
    fruit: Literal["apple", "pear"] = "apple"
    perhaps: Literal["a"] | None = None
    flag: bool = False
    limit: int | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    named: Mapping[str, int | str] = field(default_factory=dict)
    mixed: tuple[bool | int | str, ...] = ()


CHOOSERS = {Inner | Other | None: lambda field, value: Other if "word" in value else Inner}


def test_everything_is_read():
    value = {
        "inner": {"count": 3, "share": 1},
        "many": [{"count": 1}],
        "either": {"word": "x"},
        "fruit": "pear",
        "flag": True,
        "pairs": [["a", "b"]],
        "sizes": {"x": 2},
        "named": {"x": 2, "y": "+"},
        "mixed": [True, 1, "1"],
    }
    found = read(Outer, value, choosers=CHOOSERS)
    assert found == Outer(
        inner=Inner(3, 1.0),
        many=(Inner(1),),
        either=Other("x"),
        fruit="pear",
        flag=True,
        pairs=(("a", "b"),),
        sizes={"x": 2},
        named={"x": 2, "y": "+"},
        mixed=(True, 1, "1"),
    )
    # A whole number stands for a number, and True does not become 1.
    assert type(found.inner.share) is float and found.mixed[0] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flag": 1}, "flag is 1; allowed is True or False"),
        ({"flag": "true"}, "flag is 'true'; allowed is True or False"),
        ({"inner": {"count": True}}, "inner.count is True; allowed is a whole number"),
        ({"inner": {"count": "3"}}, "inner.count is '3'; allowed is a whole number"),
        ({"inner": {"count": 2.0}}, "inner.count is 2.0; allowed is a whole number"),
        (
            {"inner": {"count": 2**31}},
            "inner.count is 2147483648; allowed is a whole number of at most 2147483647, whatever its sign",
        ),
        ({"inner": {"count": 10**5000}}, "inner.count is a int too large to show; allowed is a whole number of at"),
        ({"inner": {"count": 1, "share": "0.5"}}, "inner.share is '0.5'; allowed is a number"),
        ({"inner": {"count": 1, "share": True}}, "inner.share is True; allowed is a number"),
        (
            {"inner": {"count": 1, "share": float("nan")}},
            "inner.share is nan; allowed is a finite number",
        ),
        ({"inner": {"count": 1, "share": 10**400}}, "inner.share is 1000"),
        ({"inner": {"cuont": 1}}, "inner.cuont is no field of the configuration; allowed are count, share"),
        ({"inner": {}}, "inner.count is missing and has no default; allowed is a whole number"),
        ({"inner": None}, "inner is None; allowed is an object with its fields by name"),
        ({"fruit": "plum"}, "fruit is 'plum'; allowed are apple, pear"),
        ({"perhaps": "b"}, "perhaps is 'b'; allowed are a, None"),
        ({"limit": "x"}, "limit is 'x'; allowed is a whole number or None"),
        ({"many": {"count": 1}}, "many is {'count': 1}; allowed is a list"),
        ({"many": [1]}, "many.0 is 1; allowed is an object with its fields by name"),
        ({"pairs": [["a"]]}, "pairs.0 is ['a']; allowed is a list of 2 entries"),
        ({"sizes": {"x": None}}, "sizes.x is None; allowed is a whole number"),
        ({"named": {"x": None}}, "named.x is None; allowed is a whole number or a text"),
        ({"mixed": [None]}, "mixed.0 is None; allowed is True or False or a whole number or a text"),
    ],
)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError) as error:
        read(Outer, {"inner": {"count": 1}} | changes, choosers=CHOOSERS)
    assert str(error.value).startswith(message) and len(str(error.value)) < 300


def test_what_is_no_object():
    with pytest.raises(ValueError, match="the configuration is 3; allowed is an object"):
        read(Outer, 3)


def test_an_unknown_field_says_where_it_stands():
    with pytest.raises(UnknownField) as error:
        read(Outer, {"inner": {"count": 1, "x": 2}})
    assert error.value.field == "inner.x"


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "12", 12),
        (int, "-1", -1),
        (int, "1.5", "1.5"),
        (int, "1" * 500, "1" * 500),
        (float, "1e-3", 0.001),
        (float, "x", "x"),
        (bool, "True", True),
        (bool, "false", False),
        (bool, "1", "1"),
        (str, "12", "12"),
        (str, "None", "None"),
        (int | None, "None", None),
        (bool | int | str, "7", 7),
        (Literal["a"] | None, "None", None),
    ],
)
def test_words_of_the_command_line(kind, text, value):
    found = from_text(kind, text)
    assert found == value and type(found) is type(value)


def test_what_is_allowed_in_words():
    assert allowed(int | None) == "is a whole number or None"
    assert allowed(Literal["a", "b"]) == "are a, b"
