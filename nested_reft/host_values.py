"""Host values of any kind as JSON and NumPy arrays, and blocks of them that are written once and shared.

A checkpoint holds such values, and so does the file of a block. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from nested_reft.json_files import naming

# These mark the place in the JSON part where a NumPy array or a block stood. Orbax writes no empty arrays, so that of
# an empty one says all that there is to know.
_ARRAY, _EMPTY, _BLOCK = "__array__", "__empty_array__", "__block__"
_JSON = "json"  # the tensor of a block's file that holds its JSON, as bytes


@dataclass(frozen=True)
class Block:
    """Host values that never change, so that one file serves every checkpoint that has them.

    Attributes:
        name: of the file; another block has another name.
        values: dictionaries and lists of plain values and NumPy arrays; None where the file has been written.
    """

    name: str
    values: Any = None


def without_arrays(value: Any, arrays: dict[str, np.ndarray], blocks: list[Block]) -> Any:
    """The value with marks in place of what JSON cannot hold.

    Args:
        value: dictionaries, lists and tuples of plain values, NumPy arrays and blocks.
        arrays: takes up the arrays, by the names that the marks have.
        blocks: takes up the blocks.
    """
    if isinstance(value, np.ndarray):
        if not value.size:
            return {_EMPTY: [value.dtype.name, list(value.shape)]}
        name = f"array_{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, Block):
        blocks.append(value)
        return {_BLOCK: value.name}
    if isinstance(value, dict):
        return {key: without_arrays(entry, arrays, blocks) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_arrays(entry, arrays, blocks) for entry in value]
    return value


def has_arrays(value: Any) -> bool:
    """Whether a value has marks of arrays that are not empty.

    Args:
        value: what `without_arrays` returned.
    """
    if isinstance(value, dict):
        return _ARRAY in value or any(has_arrays(entry) for entry in value.values())
    return isinstance(value, list) and any(has_arrays(entry) for entry in value)


def with_arrays(value: Any, arrays: dict[str, Any]) -> Any:
    """The inverse of `without_arrays`, but that tuples are lists and blocks have no values.

    Args:
        value: what it returned.
        arrays: what it took out.
    """
    if isinstance(value, dict):
        if _ARRAY in value:
            return np.asarray(arrays[value[_ARRAY]])
        if _EMPTY in value:
            dtype, shape = value[_EMPTY]
            return np.zeros(shape, dtype)
        if _BLOCK in value:
            return Block(value[_BLOCK])
        return {key: with_arrays(entry, arrays) for key, entry in value.items()}
    return [with_arrays(entry, arrays) for entry in value] if isinstance(value, list) else value


def with_blocks(value: Any, read: Callable[[str], Any]) -> Any:
    """The value with the values of its blocks.

    Args:
        value: what `with_arrays` returned.
        read: gives the values of the block of a name.
    """
    if isinstance(value, Block):
        return Block(value.name, read(value.name))
    if isinstance(value, dict):
        return {key: with_blocks(entry, read) for key, entry in value.items()}
    return [with_blocks(entry, read) for entry in value] if isinstance(value, list) else value


def read_block(directory: Path, name: str) -> Any:
    """The values of a block, as `write_block` got them.

    Args:
        directory: where the files of blocks are.
        name: of a block whose file is known to be whole.
    """
    tensors = load(block_path(directory, name).read_bytes())
    return with_arrays(json.loads(tensors[_JSON].tobytes()), tensors)


def block_path(directory: Path, name: str) -> Path:
    """The file of a block.

    Args:
        directory: where the files of blocks are.
        name: of the block.
    """
    return directory / f"{name}.safetensors"


def write_block(directory: Path, block: Block) -> list[int]:
    """Writes the file of a block, whole or not at all.

    Args:
        directory: where the files of blocks are; made if it is not there.
        block: has values, without blocks among them. A file of its name is replaced.

    Returns:
        Size and CRC-32 of the file.
    """
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(without_arrays(block.values, arrays, []))
    # safetensors writes the memory of an array as it lies there.
    tensors = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    content = save({_JSON: np.frombuffer(text.encode(), np.uint8), **tensors})
    directory.mkdir(exist_ok=True)
    path = block_path(directory, block.name)
    partial = path.with_name(f"{path.name}.partial")
    with naming(path), partial.open("wb") as file:
        file.write(content)
        file.flush()
        # Checkpoints that come later rely on this file, also after a power cut.
        os.fsync(file.fileno())
    os.replace(partial, path)
    return [len(content), zlib.crc32(content)]
