"""Checkpoints of a run: arrays by Orbax, everything else as JSON beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def newest_checkpoint(directory: Path) -> int | None:
    """Step of the newest complete checkpoint in a run's checkpoint directory, or None; reads names only.

    Args:
        directory: the run's directory for checkpoints; it need not exist.
    """
    # A checkpoint that is still being written has a longer name, so digits alone mean that it is complete.
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    return max(steps, default=None)


class Checkpoints:
    """The newest checkpoints of one run, written in the background.

    A checkpoint appears under its final name only when it is complete, so a killed run leaves the
    previous one whole.
    """

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        # Orbax asks for an absolute path.
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options, item_names=("arrays", "host"))

    def save(self, step: int, arrays: Any, host: dict[str, Any]) -> None:
        """Starts writing; the arrays may be donated as soon as this returns.

        Args:
            step: the training step; it names the checkpoint.
            arrays: a tree of device arrays.
            host: everything else, as JSON-able values.
        """
        arguments = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host))
        # The caller has decided that it is time, so Orbax's own intervals do not count.
        self._manager.save(step, args=arguments, force=True)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]]:
        """The newest checkpoint.

        Args:
            like: arrays of the same structure, shapes and placement.

        Returns:
            Its step, its arrays and its JSON part.

        Raises:
            ValueError: there is none, it is damaged, or it does not fit `like`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        step, restored = self._restore(arrays=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
        return step, restored["arrays"], restored["host"]

    def restore_some(self, like: dict[str, Any]) -> dict[str, Any]:
        """Those entries of the newest checkpoint's arrays that `like` has.

        Args:
            like: some entries of the saved tree, with the shapes and placements that are wanted.

        Returns:
            The entries, with the structure of `like`.

        Raises:
            ValueError: there is none, it is damaged, or it does not fit `like`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        # A partial restore reads only what is named, and so leaves the optimizer's moments on disk.
        arrays = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
        return self._restore(arrays=arrays)[1]["arrays"]

    def _restore(self, **items: Any) -> tuple[int, Any]:
        step = self._manager.latest_step()
        if step is None:
            raise ValueError(f"no complete checkpoint in '{self._manager.directory}'")
        try:
            return step, self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and its storage raise many kinds
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"checkpoint {step} in '{self._manager.directory}' is damaged or of another model: {reason}"
            ) from None

    def close(self) -> None:
        """Waits until everything is on disk."""
        # Writing goes on in the background, and a process that ended now would lose the checkpoint.
        self._manager.wait_until_finished()
        self._manager.close()
