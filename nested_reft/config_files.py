"""Where the configurations that ship lie, and how files of the user's own are loaded. None of it imports JAX."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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


def load_module(path: Path, name: str) -> ModuleType:
    """Executes a Python file as a module that belongs to no package.

    Args:
        path: the file.
        name: of the module; one that is imported already is replaced.

    Raises:
        ImportError: the name of the file does not end as that of a Python file.
        BaseException: whatever the file itself raises.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{path}' cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, postponed annotations and pickle look a module up by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
