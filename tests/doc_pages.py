"""What tests of the documentation share: its pages, their blocks of code, and the words of messages in them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(place: str) -> str:
    """The text of a page, by its place in the checkout."""
    return (ROOT / place).read_text(encoding="utf-8")


def pages() -> list[str]:
    """The place of every page that a reader may come to."""
    places = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments" / "results").glob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in places)


def blocks(text: str) -> list[tuple[str, str]]:
    """What stands behind the opening of each block of code, and what is in the block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every command of the blocks of a page, in one line each and without comments."""
    lines = "".join(block for _, block in blocks(text)).replace("\\\n", " ").splitlines()
    found = (re.match(r"(?:[A-Z_]+=\S+ )*((?:nested-reft|python -m|make) .*?)(?: +#.*)?$", line) for line in lines)
    return [match[1].strip() for match in found if match]


@cache
def _said() -> str:
    files = [*(ROOT / "nested_reft").rglob("*.py"), *(ROOT / "scripts" / "tpu").glob("*.*")]
    # Parts of a message on lines of their own become one.
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))


def fragments(quoted: list[str], filled_in: str) -> set[str]:
    """The pieces of quoted messages that stand in the code word for word, if the quotes are right.

    Args:
        quoted: messages as a page shows them.
        filled_in: a pattern of what a message fills in.
    """
    found = {fragment.strip(" ,;:") for text in quoted for fragment in re.split(filled_in, text)}
    return {fragment for fragment in found if len(fragment) > 8}


def unsaid(pieces: set[str]) -> list[str]:
    """Those of the pieces that no message in the code has."""
    return sorted(piece for piece in pieces if piece not in _said())
