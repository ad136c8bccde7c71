"""Reinforcement fine-tuning of language models with nested, layer-skipping rollouts.

    import nested_reft as nr

    run = nr.train(nr.load_config("tiny"))
    run.metrics()["accuracy"]
    nr.Policy.load(run).sample("123 =")

Names are imported when they are first used, so that importing the package stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The table takes the place of imports: most of these modules bring JAX along, which takes seconds.
_PUBLIC = {
    "Completion": "nested_reft.rollout.policy",
    "Config": "nested_reft.training.config",
    "LayerPlan": "nested_reft.layer_plan",
    "LiveCurves": "nested_reft.reports.live_curves",
    "Policy": "nested_reft.rollout.policy",
    "Run": "nested_reft.api",
    "StepRecord": "nested_reft.training.record",
    "config_names": "nested_reft.config_files",
    "evaluate": "nested_reft.api",
    "load_config": "nested_reft.training.config",
    "presets": "nested_reft.losses.presets",
    "train": "nested_reft.api",
}
"""Public name -> the module that defines it, or that it is."""

__all__ = [
    "Completion",
    "Config",
    "LayerPlan",
    "LiveCurves",
    "Policy",
    "Run",
    "StepRecord",
    "__version__",
    "config_names",
    "evaluate",
    "load_config",
    "presets",
    "train",
]

# Type checkers and editors follow imports and not `__getattr__`.
if TYPE_CHECKING:
    from nested_reft.api import Run, evaluate, train
    from nested_reft.config_files import config_names
    from nested_reft.layer_plan import LayerPlan
    from nested_reft.losses import presets
    from nested_reft.reports.live_curves import LiveCurves
    from nested_reft.rollout.policy import Completion, Policy
    from nested_reft.training.config import Config, load_config
    from nested_reft.training.record import StepRecord


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nested_reft' has no attribute '{name}'; it has {', '.join(_PUBLIC)}")
    # Python calls this only for names that the module does not have yet.
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
