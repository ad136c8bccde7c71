"""Prints `name==lowest` for every range in setup.py, as a constraints file for pip.

    python scripts/oldest_constraints.py [--setup FILE] [EXTRA ...] > oldest.txt

`make test-oldest` installs the package with this file, so that each lower bound is a version that was tried. The
named extras are read besides `install_requires`; without a name, the extra `test` is. Packages that setup.py does not
name stay free: pip takes their newest version that goes with the rest.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

SETUP = Path(__file__).parents[1] / "setup.py"
REQUIREMENT = re.compile(r"^\s*([\w.-]+)\s*(?:>=|==)\s*([\w.]+)\s*$")


def main(arguments: list[str] | None = None) -> None:
    """Prints one line per requirement, in the order of their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", type=Path, default=SETUP, metavar="FILE", help="the setup.py to read")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="extras to read besides install_requires")
    known = parser.parse_args(arguments)
    print("\n".join(oldest_constraints(setup_arguments(known.setup), known.extras or ["test"])))


def setup_arguments(path: Path) -> dict[str, Any]:
    """What the setup.py at `path` passes to `setup`; nothing is built, and setuptools need not be installed."""
    found: dict[str, Any] = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.__dict__.update(setup=found.update, find_packages=lambda *_, **__: [])
    real = sys.modules.get("setuptools")
    sys.modules["setuptools"] = stand_in
    try:
        runpy.run_path(str(path))
    finally:
        del sys.modules["setuptools"]
        if real is not None:
            sys.modules["setuptools"] = real
    return found


def oldest_constraints(setup: dict[str, Any], extras: list[str]) -> list[str]:
    """Sorted `name==lowest` lines.

    Args:
        setup: The arguments of `setup`, as `setup_arguments` reads them.
        extras: Names of the extras whose requirements are read besides `install_requires`.

    Raises:
        ValueError: An extra is unknown, or a requirement has no lower bound.
    """
    known = setup.get("extras_require", {})
    for extra in extras:
        if extra not in known:
            raise ValueError(f"extra is {extra!r}; known are {', '.join(sorted(known))}")
    requirements = [*setup["install_requires"], *(text for extra in extras for text in known[extra])]
    return sorted({lowest(text) for text in requirements}, key=str.lower)


def lowest(requirement: str) -> str:
    """`name>=1.2` and `name==1.2` become `name==1.2`; anything else is refused."""
    match = REQUIREMENT.match(requirement)
    if match is None:
        raise ValueError(f"requirement is {requirement!r}; allowed is 'name>=version' or 'name==version'")
    return f"{match[1]}=={match[2]}"


if __name__ == "__main__":
    main()
