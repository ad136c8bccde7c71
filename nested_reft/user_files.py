"""Python files of the user's own: configurations and reward functions, loaded by their path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


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
