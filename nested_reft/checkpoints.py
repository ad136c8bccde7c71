"""Checkpoints of a run: device arrays, and host values of any kind, both written by Orbax, and sealed by checksums."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp

from nested_reft import processes
from nested_reft.host_values import (
    Block,
    block_path,
    has_arrays,
    read_block,
    with_arrays,
    with_blocks,
    without_arrays,
    write_block,
)
from nested_reft.json_files import write_json

SEAL = "checksums.json"  # of a checkpoint: size and CRC-32 of every file of its parts
_BLOCKS = "blocks"  # the directory of blocks, beside the checkpoints
# Orbax writes a checkpoint under such a name and then renames it.
_UNFINISHED = re.compile(r"(0|[1-9][0-9]{0,17})\.orbax-checkpoint-tmp(-[0-9]+)?")
# Processes of one run wait for each other at most so long; Orbax itself would take twenty minutes.
_WAIT_SECONDS = 600

logger = logging.getLogger(__name__)
# Orbax logs each error of its threads with a traceback, several times over. All of them are raised as well, and
# become one line here.
logging.getLogger("absl").addFilter(lambda record: not record.exc_info)


class CheckpointError(OSError):
    """A checkpoint could not be written."""


class DamagedCheckpointError(ValueError):
    """A checkpoint does not hold what was written, or not what is asked for."""


def checkpoint_numbers(directory: Path) -> list[int]:
    """Numbers of the complete checkpoints in a run's checkpoint directory, the newest first; reads names only.

    Args:
        directory: the run's directory for checkpoints; it need not exist.
    """
    # A checkpoint that is still being written has a longer name, so digits alone mean that it is complete. An empty
    # directory was made by somebody else.
    numbered = (path for path in directory.glob("*") if _is_number(path.name) and path.is_dir())
    return sorted((int(path.name) for path in numbered if any(path.iterdir())), reverse=True)


def damage_of(checkpoint: Path) -> str:
    """In words, the first difference between a checkpoint, with its blocks, and its seal; empty without any.

    Args:
        checkpoint: its directory.
    """
    return _damage(checkpoint, None, 0, 1)


def newest_checkpoint(directory: Path) -> int | None:
    """Number of the newest complete checkpoint in a run's checkpoint directory, or None; reads names only.

    Args:
        directory: the run's directory for checkpoints; it need not exist.
    """
    return next(iter(checkpoint_numbers(directory)), None)


@runtime_checkable
class Exchange(Protocol):
    """How a checkpoint comes together whose processes do not share a directory."""

    def begin(self, directory: Path, number: int) -> None:
        """Prepares this process's own directory for its part of a checkpoint.

        Args:
            directory: of the checkpoints.
            number: of the one that is to be written.
        """

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes, as Orbax asks it to; where all have written, their parts come together.

        Args:
            key: the place in Orbax's work.
            timeout_ms: how long to wait.
        """

    def is_together(self, number: int) -> bool:
        """Whether process 0 has all parts of a checkpoint.

        Args:
            number: of the checkpoint.
        """
        ...


class Checkpoints:
    """The newest checkpoints of one run, written in the background.

    A checkpoint appears under its final name only when it is complete, so a killed run leaves the
    previous one whole. It has three parts: device arrays, whose structure the reader knows; JSON; and the
    NumPy arrays that stood anywhere in the host's values, whose shapes nobody need know beforehand. Checksums of
    all files are written last, and compared before anything is read.

    Blocks among the host's values have files of their own, which later checkpoints share. A block is written before
    the first checkpoint that has it, and removed when no checkpoint has it any more.

    Several processes call everything together. Each writes its share of the arrays, and process 0 all else. The files
    are checked before they are read, so a checkpoint is damaged for all processes or for none: each checks a share of a
    common directory, or the whole of its own.
    """

    def __init__(self, directory: Path, keep: int, alone: bool = False, exchange: Exchange | None = None):
        """Args:
        directory: where the checkpoints are; made if it is not there.
        keep: newest ones kept, at least 1.
        alone: this process only reads, whatever others do; then the directory must be there.
        exchange: brings the parts of several processes together; None where they share the directory.

        Raises:
            ValueError: a file is in its place.
            OSError: it cannot be made.
        """
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"'{directory}' is a file; it must be the directory of the run's checkpoints")
        # Orbax asks for an absolute path.
        self._directory, self._writing, self._exchange = directory.resolve(), 0, exchange
        self._alone = alone or processes.count() == 1
        self._blocks = self._directory / _BLOCKS
        # Checksums of the blocks of the checkpoint that is being written, or was read.
        self._sealed_blocks: dict[str, list[int]] = {}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not alone,
            multiprocessing_options=_those_who_wait(self._alone),
            async_options=ocp.AsyncOptions(
                # Orbax calls it when all files of a checkpoint are there, before it gets its final name.
                post_finalization_callback=self._seal,
                # Directories that another thread fails to make would be waited for until a time limit of minutes.
                create_directories_asynchronously=False,
                timeout_secs=_WAIT_SECONDS,
                barrier_sync_fn=None if exchange is None else exchange.wait,
            ),
        )
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_names=("arrays", "host", "host_arrays")
        )

    def numbers(self) -> list[int]:
        """Numbers of the complete ones, the newest first, as process 0 sees them."""
        numbers = checkpoint_numbers(self._directory)
        return numbers if self._alone else json.loads(processes.broadcast_text(json.dumps(numbers)))

    def save(self, number: int, arrays: Any, host: dict[str, Any]) -> None:
        """Starts writing; the arrays may be donated as soon as this returns.

        Args:
            number: of the checkpoint, larger than those before.
            arrays: a pytree of device arrays.
            host: dictionaries and lists of plain values, NumPy arrays and blocks. A block has values unless the
                checkpoint before has it too.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written.
        """
        taken_out: dict[str, np.ndarray] = {}
        blocks: list[Block] = []
        plain = without_arrays(host, taken_out, blocks)
        items = {"arrays": ocp.args.PyTreeSave(arrays), "host": ocp.args.JsonSave({"number": number, "values": plain})}
        if taken_out:
            items["host_arrays"] = ocp.args.PyTreeSave(taken_out)
        # The seal of the checkpoint before has to be in place, because it goes by the number too.
        self.wait()
        self._writing = number
        try:
            if self._exchange is not None:
                self._exchange.begin(self._directory, number)
            processes.by_writer(lambda: self._write_blocks(blocks))
            # The caller has decided that it is time, so Orbax's own intervals do not count.
            self._manager.save(number, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # Orbax and its storage raise many kinds
            raise self._failed(error) from error

    def check(self) -> None:
        """Looks whether the checkpoint that was being written has failed; does not wait for it.

        Raises:
            CheckpointError: it has.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def restore_host(self, number: int, blocks: bool = False) -> dict[str, Any]:
        """Host values of a checkpoint, as `save` got them.

        Args:
            number: of the checkpoint.
            blocks: read the values of its blocks too; without them, blocks are checked no more than read.

        Raises:
            DamagedCheckpointError: it is damaged.
        """
        restored = self._restore(number, host=ocp.args.JsonRestore())["host"]
        host, arrays = restored["values"], {}
        if restored["number"] != number:  # a directory was copied or renamed
            raise DamagedCheckpointError(
                f"checkpoint {number} in '{self._directory}' was written as checkpoint {restored['number']}"
            )
        if has_arrays(host):
            arrays = self._restore(number, host_arrays=ocp.args.PyTreeRestore())["host_arrays"]
        host = with_arrays(host, arrays)
        if not blocks:
            return host
        self._sealed_blocks = _blocks_of(self._directory / str(number))
        if self._sealed_blocks:
            self._check(number, (f"../{_BLOCKS}",))

        def read(name: str) -> Any:
            if name not in self._sealed_blocks:  # its file was not checked, and need not be there
                raise DamagedCheckpointError(f"checkpoint {number} in '{self._directory}' does not seal block '{name}'")
            return read_block(self._blocks, name)

        return with_blocks(host, read)

    def restore_some(self, number: int, like: dict[str, Any]) -> dict[str, Any]:
        """Those entries of a checkpoint's device arrays that `like` has.

        Args:
            number: of the checkpoint.
            like: arrays of the same structure, shapes and placement.

        Raises:
            DamagedCheckpointError: it is damaged, or does not fit `like`.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        # A partial restore reads only what is named, and so leaves the optimizer's moments on disk.
        arrays = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
        return self._restore(number, arrays=arrays)["arrays"]

    def set_aside_after(self, number: int) -> None:
        """Renames what has a larger number, so that the run can write checkpoints of these numbers again; says so.

        What a killed process had only half written goes: nothing in it is of use, and it may be large.

        Args:
            number: of the checkpoint that the run continues from.
        """
        processes.by_writer(lambda: self._tidy_up(number))
        self._manager.reload()

    def _tidy_up(self, number: int) -> None:
        for path in self._unfinished():
            shutil.rmtree(path, ignore_errors=True)
        for path in self._blocks.glob("*.partial"):
            path.unlink(missing_ok=True)
        for path in self._directory.iterdir():
            if _is_number(path.name) and int(path.name) > number:
                aside = _free_name(path.with_name(f"{path.name}.damaged"))
                path.rename(aside)
                logger.warning("'%s' is not used; it is '%s' now", path, aside.name)

    def _unfinished(self) -> list[Path]:
        """The directories of checkpoints that are being written, or were when their process was killed."""
        return [path for path in self._directory.iterdir() if _UNFINISHED.fullmatch(path.name) and path.is_dir()]

    def _restore(self, number: int, **items: Any) -> Any:
        # Damaged files never reach Orbax, whose errors neither name them nor come alone.
        where = self._check(number, tuple(items))
        try:
            return self._manager.restore(number, args=ocp.args.Composite(**items))
        except (OSError, MemoryError, jax.errors.JaxRuntimeError):
            # A disk or a memory that fails says nothing about the checkpoint, which must keep its name.
            raise
        except Exception as error:  # Orbax raises many kinds
            raise DamagedCheckpointError(f"{where} is of another model: {_reason(error)}") from None

    def _check(self, number: int, parts: tuple[str, ...]) -> str:
        """What messages call a checkpoint, once these parts of it are known to be whole."""
        where = f"checkpoint {number} in '{self._directory}'"
        index = 0 if self._alone else processes.index()
        # Of a directory that all of them share, each process checks a share.
        share, shares = (0, 1) if self._alone or self._exchange is not None else (index, processes.count())
        damage = _damage(self._directory / str(number), parts, share, shares)
        # What one process finds, all of them hear: none may go on to read, or to the checkpoint before, alone.
        found = (damage,) if self._alone else processes.gather_text(damage)
        for process, words in enumerate(found):
            if words:
                by = f"process {process}: " if process != index else ""
                raise DamagedCheckpointError(f"{where} is damaged: {by}{words}")
        return where

    def _write_blocks(self, blocks: list[Block]) -> None:
        """Writes the blocks that are new, and removes the files of those that no checkpoint has any more."""
        before, self._sealed_blocks = self._sealed_blocks, {}
        for block in blocks:
            is_new = block.values is not None
            self._sealed_blocks[block.name] = write_block(self._blocks, block) if is_new else before[block.name]
        # Only checkpoints under their final names count, and a killed run leaves those whole.
        needed = {
            name for number in checkpoint_numbers(self._directory) for name in _blocks_of(self._directory / str(number))
        }
        paths = {block_path(self._blocks, name) for name in needed | self._sealed_blocks.keys()}
        for path in set(self._blocks.glob("*")) - paths:
            path.unlink()

    def _seal(self) -> None:
        """Writes the checksums of the checkpoint that has been written and still has its temporary name."""
        if self._exchange is not None and not self._exchange.is_together(self._writing):
            raise CheckpointError("the parts of the processes did not come together")
        unnamed = [path for path in self._unfinished() if path.name.startswith(f"{self._writing}.")]
        assert unnamed, f"no directory of checkpoint {self._writing} in '{self._directory}'"
        blocks = {f"../{block_path(Path(_BLOCKS), name)}": seal for name, seal in self._sealed_blocks.items()}
        for path in unnamed:
            parts = {name: _size_and_checksum(path / name) for name in _files_of_parts(path)}
            write_json(path / SEAL, parts | blocks)

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._writing} could not be written to '{self._directory}': {_reason(error)}"
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        # Writing goes on in the background, and a process that ended now would lose the checkpoint.
        try:
            self.wait()
        finally:
            try:
                self._manager.close()
            except Exception as error:
                raise self._failed(error) from error


def _those_who_wait(alone: bool) -> ocp.options.MultiprocessingOptions:
    """Which processes Orbax lets wait for each other: all of them, or this one for nobody."""
    if not alone or processes.count() == 1:  # Orbax makes no directory where some are named
        return ocp.options.MultiprocessingOptions()
    index = processes.index()
    return ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})


def _is_number(name: str) -> bool:
    """Whether a name is that of a checkpoint: not `²`, which is a digit too, and not `007`."""
    return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


def _free_name(path: Path) -> Path:
    """The path, with a number behind its name if there is such a file."""
    names = (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))
    return path if not os.path.lexists(path) else next(name for name in names if not os.path.lexists(name))


def _files_of_parts(checkpoint: Path) -> list[str]:
    """Every file in the parts of a checkpoint, by its path within; the files beside the parts are Orbax's own."""
    return sorted(
        str(path.relative_to(checkpoint))
        for part in checkpoint.iterdir()
        if part.is_dir()
        for path in part.rglob("*")
        if path.is_file()
    )


def _blocks_of(checkpoint: Path) -> dict[str, list[int]]:
    """Size and checksum of each block that a checkpoint has, by its name; none where that cannot be read."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return {Path(name).stem: seal for name, seal in sealed.items() if name.startswith(f"../{_BLOCKS}/")}
    # Such a checkpoint is damaged, and nothing restores it.
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _size_and_checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _damage(checkpoint: Path, parts: tuple[str, ...] | None, share: int, shares: int) -> str:
    """In words, the first difference between some parts of a checkpoint and its checksums; empty without any.

    Args:
        checkpoint: its directory.
        parts: names of the parts; None is all that the checksums name.
        share: which files are compared, from 0: each of several processes has a share of them.
        shares: how many there are.
    """
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        expected = {
            name: (size, checksum)
            for name, (size, checksum) in sealed.items()
            if parts is None or name.startswith(tuple(f"{part}/" for part in parts))
        }
    except FileNotFoundError:
        return f"it has no {SEAL}, or is of an earlier version"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{SEAL} cannot be read: {error}"
    missing = [part for part in parts or () if not any(name.startswith(f"{part}/") for name in expected)]
    if missing:
        return f"{SEAL} names no file of its part '{missing[0]}'"
    for name in sorted(expected)[share::shares]:
        size, checksum = expected[name]
        try:
            found = _size_and_checksum(checkpoint / name)
        except OSError as error:
            return f"file {name} cannot be read: {error.strerror or error}"
        if found[0] != size:
            return f"file {name} has {found[0]} bytes, and {size} were written"
        if found[1] != checksum:
            return f"file {name} does not hold what was written (checksum)"
    return ""


def _reason(error: Exception) -> str:
    """What the system said, where a storage quotes it; else the first line of an error's text, or its kind."""
    quoted = re.search(r"os_error_code='(\d+)'", str(error))
    if quoted:
        return os.strerror(int(quoted[1]))
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
