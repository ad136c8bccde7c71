"""Where the configurations that ship lie. Finding them imports none of them, and no JAX."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# An installed package carries them inside; a checkout has them with the experiments.
CONFIG_DIRECTORIES = (PACKAGE / "configs", PACKAGE.parent / "experiments" / "configs")


def shipped_configs() -> dict[str, Path]:
    """The file of each configuration that ships, by name and in the order of the names."""
    # Backwards, so that of two directories that have a name the first one wins.
    files = {path.stem: path for directory in reversed(CONFIG_DIRECTORIES) for path in directory.glob("*.py")}
    return {name: files[name] for name in sorted(files) if not name.startswith("_")}


def config_names() -> list[str]:
    """Names of the configurations that ship."""
    return list(shipped_configs())
