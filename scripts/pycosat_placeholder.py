"""Puts a stand-in for pycosat into this Python's environment where pycosat itself cannot be built.

    .venv/bin/python scripts/pycosat_placeholder.py

reasoning-gym imports pycosat for its zebra puzzles alone, and pycosat is a C extension without wheels. Where there is
no C compiler, the stand-in lets reasoning-gym be installed, so that every other task works. It does nothing where
pycosat is installed or can be built. The Makefile runs it before it installs the package.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sysconfig
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
MODULE = '''"""Stands in for pycosat, which could not be built here."""


def solve(*_, **__):
    raise ImportError("zebra_puzzles needs pycosat: install a C compiler, then pip install --force-reinstall pycosat")


itersolve = solve
'''


def main() -> None:
    """Installs the stand-in if it is needed, and says so."""
    if not placeholder_needed():
        return
    print("No C compiler or no Python.h: reasoning-gym's zebra_puzzles will not work; all its other tasks do.")
    install_placeholder(Path(sysconfig.get_path("purelib")), pinned_version(CONSTRAINTS.read_text()))


def placeholder_needed() -> bool:
    """Whether pycosat is neither installed nor can be built: that takes a C compiler and Python's headers."""
    if importlib.util.find_spec("pycosat"):
        return False
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    return not (compiler and Path(sysconfig.get_path("include"), "Python.h").exists())


def pinned_version(constraints: str) -> str:
    """The version in the line `pycosat==VERSION` of a constraints file's text."""
    match = re.search(r"^pycosat==(\S+)", constraints, re.MULTILINE)
    if match is None:
        raise ValueError("the constraints have no line 'pycosat==VERSION'; add one")
    return match[1]


def install_placeholder(site: Path, pinned: str) -> None:
    """Writes the module and what pip needs to count it as that version of pycosat, and to uninstall it.

    Args:
        site: The environment's directory of pure Python packages.
        pinned: The version that pip is asked for; a local label makes clear that this is not the real one.
    """
    version = f"{pinned}+placeholder"
    info = site / f"pycosat-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (site / "pycosat.py").write_text(MODULE)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pycosat\nVersion: {version}\n")
    (info / "INSTALLER").write_text("make\n")
    files = ("pycosat.py", *(f"{info.name}/{name}" for name in ("METADATA", "INSTALLER", "RECORD")))
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))


if __name__ == "__main__":
    main()
