"""Units of measurement by their names."""

from __future__ import annotations

# The names of a unit, in the singular and without the final s of `inches`.
_UNIT_NAMES = (
    ("mm", "millimeter", "millimetre"),
    ("cm", "centimeter", "centimetre"),
    ("m", "meter", "metre"),
    ("km", "kilometer", "kilometre"),
    ("in", "inch", "inche"),
    ("ft", "foot", "feet"),
    ("yd", "yard"),
    ("mi", "mile"),
    ("mg", "milligram"),
    ("g", "gram"),
    ("kg", "kilogram"),
    ("lb", "pound"),
    ("oz", "ounce"),
    ("ml", "milliliter", "millilitre"),
    ("l", "liter", "litre"),
    ("s", "sec", "second"),
    ("min", "minute"),
    ("h", "hr", "hour"),
    ("day",),
    ("week",),
    ("month",),
    ("yr", "year"),
    ("degree",),
    ("rad", "radian"),
    ("dollar",),
    ("cent",),
    ("a.m", "am"),
    ("p.m", "pm"),
    ("cup",),
    ("unit",),
)
_UNITS = {name: names[0] for names in _UNIT_NAMES for name in names}


def known_unit(name: str) -> str | None:
    """One name for all names of a unit, also of `m/s`; None for what is no unit that is known.

    Args:
        name: a word of an answer; untrusted.
    """
    name = {"mph": "mi/h", "kph": "km/h"}.get(name.lower(), name.lower())
    parts = [_UNITS.get(part) or _UNITS.get(part.removesuffix("s")) for part in name.split("/")]
    return None if None in parts else "/".join(part for part in parts if part)
