"""Bridges in a file, so that a run need not fit its own: `nested-reft fit-bridges` writes it.

The file is safetensors. Beside the bridges it holds the measured divergences of the layers. It says to which weights
and for which plan the bridges were fitted, and has a checksum of all that.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save

from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.models.fingerprint import fingerprint
from nested_reft.models.parameters import Parameters
from nested_reft.models.transformer import Transformer
from nested_reft.untrusted import BadFile, reading, shown

_DIVERGENCE, _CHECKSUM = "divergence", "checksum"


@dataclass(frozen=True)
class FittedBridges:
    """What a bridge file holds.

    Attributes:
        stack: the bridges by name, as `Bridges.stack` has them.
        divergence_L: of each layer with its bridge alone, in nats per token; zeros where it was not measured.
        model: whose weights they were fitted to, as `model_in_words` has it.
        weights: the fingerprint of these weights.
        parts: of the plan that the bridges were fitted for in sequence; None where each was fitted alone.
    """

    stack: Parameters
    divergence_L: Float[np.ndarray, " L"]
    model: str
    weights: str
    parts: tuple[int, ...] | None

    @property
    def checksum(self) -> str:
        """That of the file, which covers all that it says."""
        return sealed(*self.contents())[_CHECKSUM]

    def contents(self) -> tuple[Parameters, dict[str, str]]:
        """Arrays by name, and what is said of them, as a file has both."""
        arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in self.stack.items()}
        arrays[_DIVERGENCE] = np.asarray(self.divergence_L, np.float32)
        return arrays, {"model": self.model, "weights": self.weights, "parts": json.dumps(self.parts)}

    def check_weights(self, path: Path, weights: str, name: str) -> None:
        """Refuses bridges of other weights.

        Args:
            path: of the file, for the message.
            weights: the fingerprint of the model that they are to serve.
            name: of that model, as `model_in_words` has it.

        Raises:
            BadFile: they are of other weights.
        """
        if self.weights != weights:
            raise BadFile(
                f"nesting.bridge.file is '{path}', whose bridges are of other weights, those of {self.model}; this run"
                f" begins with those of {name}. Fit bridges to these with 'nested-reft fit-bridges'"
            )

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
    arrays, about = fitted.contents()
    # A kill while it is written must not leave half a file under the name.
    unfinished = path.with_name(f".{path.name}.unfinished")
    # What safetensors itself writes only its owner could read, whatever the umask says.
    unfinished.write_bytes(save(arrays, metadata=sealed(arrays, about)))
    unfinished.replace(path)


def sealed(arrays: Parameters, about: dict[str, str]) -> dict[str, str]:
    """What a file says of itself, with the checksum (CRC-32) of that and of its arrays.

    Args:
        arrays: by name.
        about: without a checksum.
    """
    kinds = {name: (str(value.dtype), value.shape) for name, value in arrays.items()}
    checksum = zlib.crc32(json.dumps([about, kinds], sort_keys=True).encode())
    for name in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), checksum)
    return about | {_CHECKSUM: f"{checksum:08x}"}


def load_bridges(path: Path, model: Transformer, name: str) -> FittedBridges:
    """Reads a bridge file for a model whose weights this process can read.

    Args:
        path, model: as in `read_bridges`.
        name: of the model, as `model_in_words` has it.

    Raises:
        BadFile: as in `read_bridges`, or the bridges are of other weights.
    """
    fitted = read_bridges(path, model)
    fitted.check_weights(path, fingerprint(model), name)
    return fitted


def read_bridges(path: Path, model: Transformer) -> FittedBridges:
    """Reads a bridge file for a model, and does not look at the model's weights.

    Bridges serve the weights that they were fitted to (`FittedBridges.check_weights`). A run keeps its bridges in its
    checkpoints, so they go on with it while its weights move, and the file is read at the start only.

    Args:
        path: the file.
        model: with bridges, whose shapes the file's must have.

    Raises:
        BadFile: there is no such file, it is damaged, or it is of another rank.
    """
    field, again = f"nesting.bridge.file is '{path}'", "write it again with 'nested-reft fit-bridges'"
    if not path.is_file():
        raise BadFile(f"{field}, which is no file; write it with 'nested-reft fit-bridges'")
    with reading(f"{field}, which cannot be read"), safe_open(path, framework="numpy") as stored:
        about = stored.metadata() or {}
        arrays = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is no dictionary
    written = {entry: value for entry, value in about.items() if entry != _CHECKSUM}
    if _CHECKSUM not in about:
        raise BadFile(f"{field}, which has no checksum: it is damaged or of an earlier version; {again}")
    if sealed(arrays, written) != about:
        raise BadFile(f"{field}, which is damaged: it does not hold what was written (checksum); {again}")
    found = {key: (value.dtype.name, value.shape) for key, value in arrays.items()}
    num_layers = model.config.num_layers
    shapes = {key: value.shape for key, value in model.stacked_bridges().items()} | {_DIVERGENCE: (num_layers,)}
    expected = {key: ("float32", shape) for key, shape in shapes.items()}
    if found != expected:
        raise BadFile(f"{field}, which holds {found}; this model and nesting.bridge.rank need {expected}")
    divergence_L = arrays.pop(_DIVERGENCE)
    if not all(np.isfinite(value).all() for value in (*arrays.values(), divergence_L)):
        raise BadFile(f"{field}, which holds a value that is not finite")
    if divergence_L.min() < 0:
        raise BadFile(f"{field}, whose layer {divergence_L.argmin()} has a divergence below 0, as none can be")
    parts = _parts(about.get("parts"), num_layers, field)
    return FittedBridges(arrays, divergence_L, about.get("model", ""), about.get("weights", ""), parts)


def _parts(text: str | None, num_layers: int, field: str) -> tuple[int, ...] | None:
    """The plan that bridges were fitted for, of what a file says."""
    parts: Any = ""  # which is no plan
    with contextlib.suppress(ValueError, RecursionError):
        parts = json.loads(text or "")
    is_plan = isinstance(parts, list) and [type(part) for part in parts] == [int] * num_layers
    if parts is not None and not (is_plan and set(parts) <= set(Part)):
        raise BadFile(
            f"{field}, whose plan is {shown(text)}; allowed is null, or a part for each of {num_layers} layers"
        )
    return None if parts is None else tuple(parts)


def model_in_words(name: str, seed: int, updates: int) -> str:
    """Whose weights they are, for messages.

    Args:
        name: `model.name`.
        seed: `train.seed`, which decides the weights of a model from scratch.
        updates: that they have had.
    """
    of_seed = f" with train.seed {seed}" if name == "scratch" else ""
    return f"the model '{name}'{of_seed}{f' after {updates} updates' if updates else ''}"
