"""Checkpoints of a run: device arrays, and host values of any kind, both written by Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# These mark the place in the JSON part where a NumPy array stood. Orbax writes no empty arrays, so that of an
# empty one says all that there is to know.
_ARRAY, _EMPTY = "__array__", "__empty_array__"


def newest_checkpoint(directory: Path) -> int | None:
    """Number of the newest complete checkpoint in a run's checkpoint directory, or None; reads names only.

    Args:
        directory: the run's directory for checkpoints; it need not exist.
    """
    # A checkpoint that is still being written has a longer name, so digits alone mean that it is complete.
    numbers = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    return max(numbers, default=None)


class Checkpoints:
    """The newest checkpoints of one run, written in the background.

    A checkpoint appears under its final name only when it is complete, so a killed run leaves the
    previous one whole. It has three parts: device arrays, whose structure the reader knows; JSON; and the
    NumPy arrays that stood anywhere in the host's values, whose shapes nobody need know beforehand.
    """

    def __init__(self, directory: Path, keep: int):
        """Args:
        directory: where the checkpoints are; made if it is not there.
        keep: newest ones kept, at least 1.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        # Orbax asks for an absolute path.
        self._manager = ocp.CheckpointManager(
            directory.resolve(), options=options, item_names=("arrays", "host", "host_arrays")
        )

    def save(self, number: int, arrays: Any, host: dict[str, Any]) -> None:
        """Starts writing; the arrays may be donated as soon as this returns.

        Args:
            number: of the checkpoint, larger than those before.
            arrays: a pytree of device arrays.
            host: dictionaries and lists of plain values and NumPy arrays.
        """
        taken_out: dict[str, np.ndarray] = {}
        plain = _without_arrays(host, taken_out)
        items = {"arrays": ocp.args.PyTreeSave(arrays), "host": ocp.args.JsonSave(plain)}
        if taken_out:
            items["host_arrays"] = ocp.args.PyTreeSave(taken_out)
        # The caller has decided that it is time, so Orbax's own intervals do not count.
        self._manager.save(number, args=ocp.args.Composite(**items), force=True)

    def restore_host(self) -> tuple[int, dict[str, Any]]:
        """Number and host values of the newest checkpoint, as `save` got them.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        number, restored = self._restore(host=ocp.args.JsonRestore())
        host, arrays = restored["host"], {}
        if _has_arrays(host):
            arrays = self._restore(host_arrays=ocp.args.PyTreeRestore())[1]["host_arrays"]
        return number, _with_arrays(host, arrays)

    def restore_some(self, like: dict[str, Any]) -> dict[str, Any]:
        """Those entries of the newest checkpoint's device arrays that `like` has.

        Args:
            like: arrays of the same structure, shapes and placement.

        Raises:
            ValueError: there is no checkpoint, it is damaged, or it does not fit `like`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        # A partial restore reads only what is named, and so leaves the optimizer's moments on disk.
        arrays = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
        return self._restore(arrays=arrays)[1]["arrays"]

    def _restore(self, **items: Any) -> tuple[int, Any]:
        number = self._manager.latest_step()
        if number is None:
            raise ValueError(f"no complete checkpoint in '{self._manager.directory}'")
        try:
            return number, self._manager.restore(number, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and its storage raise many kinds
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"checkpoint {number} in '{self._manager.directory}' is damaged or of another model: {reason}"
            ) from None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is on disk."""
        # Writing goes on in the background, and a process that ended now would lose the checkpoint.
        self._manager.wait_until_finished()
        self._manager.close()


def _without_arrays(value: Any, taken_out: dict[str, np.ndarray]) -> Any:
    """The value with every NumPy array replaced by a mark, and put into `taken_out` under the mark's name."""
    if isinstance(value, np.ndarray):
        if not value.size:
            return {_EMPTY: [value.dtype.name, list(value.shape)]}
        name = f"array_{len(taken_out)}"
        taken_out[name] = value
        return {_ARRAY: name}
    if isinstance(value, dict):
        return {key: _without_arrays(entry, taken_out) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(entry, taken_out) for entry in value]
    return value


def _has_arrays(value: Any) -> bool:
    if isinstance(value, dict):
        return _ARRAY in value or any(_has_arrays(entry) for entry in value.values())
    return isinstance(value, list) and any(_has_arrays(entry) for entry in value)


def _with_arrays(value: Any, arrays: dict[str, Any]) -> Any:
    """The inverse of `_without_arrays`."""
    if isinstance(value, dict):
        if _ARRAY in value:
            return np.asarray(arrays[value[_ARRAY]])
        if _EMPTY in value:
            dtype, shape = value[_EMPTY]
            return np.zeros(shape, dtype)
        return {key: _with_arrays(entry, arrays) for key, entry in value.items()}
    return [_with_arrays(entry, arrays) for entry in value] if isinstance(value, list) else value
