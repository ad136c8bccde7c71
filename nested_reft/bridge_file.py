"""Bridges in a file, so that a run need not fit its own: `nested-reft fit-bridges` writes it.

The file is safetensors. Beside the bridges it holds the measured divergences of the layers, and says of which model
and for which plan the bridges are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file

from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.models.parameters import Parameters
from nested_reft.models.transformer import Transformer
from nested_reft.untrusted import BadFile, reading

_DIVERGENCE = "divergence"


@dataclass(frozen=True)
class FittedBridges:
    """What a bridge file holds.

    Attributes:
        stack: the bridges by name, as `Bridges.stack` has them.
        divergence_L: of each layer with its bridge alone, in nats per token; zeros where it was not measured.
        model: name of the model.
        parts: of the plan that the bridges were fitted for in sequence; None where each was fitted alone.
    """

    stack: Parameters
    divergence_L: Float[np.ndarray, " L"]
    model: str
    parts: tuple[int, ...] | None

    def check_plan(self, path: Path, plan: LayerPlan | None) -> None:
        """Refuses bridges that a run cannot use.

        Args:
            path: of the file, for the message.
            plan: the one plan of the run; None where plans change.

        Raises:
            BadFile: they are of another plan.
        """
        field = f"nesting.bridge.file is '{path}'"
        needed = None if plan is None else plan.host_parts(len(self.divergence_L)).tolist()
        if self.parts is not None and list(self.parts) != needed:
            # Bridges behind the first one of a plan make up for the errors of those before them.
            of_run = "this configuration draws others" if needed is None else f"this configuration's is {needed}"
            raise BadFile(f"{field}, whose bridges were fitted for another plan, {list(self.parts)}; {of_run}")
        if self.parts is None and needed is not None and Part.SKIP in needed:
            raise BadFile(
                f"{field}, whose bridges each stand in for one layer; those of nesting.bridge.kind 'per_run' have to be"
                " fitted for their plan"
            )


def save_bridges(path: Path, fitted: FittedBridges) -> None:
    """Writes a bridge file; a file that is there already is replaced, whole or not at all.

    Args:
        path: the file.
        fitted: what it is to hold.
    """
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in fitted.stack.items()}
    arrays[_DIVERGENCE] = np.asarray(fitted.divergence_L, np.float32)
    about = {"model": fitted.model, "parts": json.dumps(fitted.parts)}
    # A kill while it is written must not leave half a file under the name.
    unfinished = path.with_name(f".{path.name}.unfinished")
    save_file(arrays, unfinished, metadata=about)
    unfinished.replace(path)


def load_bridges(path: Path, model: Transformer, name: str) -> FittedBridges:
    """Reads a bridge file for a model.

    Args:
        path: the file.
        model: with bridges, whose shapes the file's must have.
        name: of the model, as `model.name` has it.

    Raises:
        BadFile: there is no such file, it is damaged, or it is of another model or rank.
    """
    field = f"nesting.bridge.file is '{path}'"
    if not path.is_file():
        raise BadFile(f"{field}, which is no file; write it with 'nested-reft fit-bridges'")
    with reading(str(path)), safe_open(path, framework="numpy") as stored:
        about = stored.metadata() or {}
        arrays = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is no dictionary
        parts = json.loads(about.get("parts", "null"))
        if parts is not None and [type(part) for part in parts] != [int] * model.config.num_layers:
            raise ValueError("its plan is not a part for each layer")
    if about.get("model") != name:
        raise BadFile(f"{field}, whose bridges are of the model '{about.get('model')}'; this one is '{name}'")
    divergence_L = arrays.pop(_DIVERGENCE, np.zeros(model.config.num_layers, np.float32))
    expected = {key: value.shape for key, value in model.stacked_bridges().items()}
    found = {key: value.shape for key, value in arrays.items()}
    if found != expected or divergence_L.shape != (model.config.num_layers,):
        raise BadFile(
            f"{field}, whose bridges have the shapes {found}; this model and nesting.bridge.rank need {expected}"
        )
    if not all(np.isfinite(value).all() for value in (*arrays.values(), divergence_L)):
        raise BadFile(f"{field}, which holds a value that is not finite")
    return FittedBridges(arrays, divergence_L, name, None if parts is None else tuple(parts))
