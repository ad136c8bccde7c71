"""Opening a GGUF file, with its damage reported before anything is computed from it.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3. The package `gguf` has a reader too, which
makes an array object of each element of a metadata array: a damaged count would take all memory. Here a count
never makes more than the file's own bytes can hold.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float, UInt8

from nested_reft.untrusted import BadFile, Fields, reading

VERSIONS = (2, 3)
# The specification's number of each type of metadata, and its layout for `struct` and NumPy.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# The largest tokenizers have a quarter of a million tokens and twice as many merges.
_MAX_STRINGS = 4_000_000
_MAX_AXES = 4  # of ggml
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is still on disk.

    Attributes:
        shape: as rows of an array; GGUF itself lists the fastest axis first.
        kind: how it is quantized.
        offset: of its data, in bytes from the beginning of the file.
        data: its memory-mapped bytes, in the shape of its rows.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    data: UInt8[np.ndarray, "..."]


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: its metadata as Python values, its tensors still on disk.

    Attributes:
        path: the file.
        metadata: values by key, such as `general.architecture`; arrays of numbers as NumPy arrays.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def fields(self) -> Fields:
        """The metadata with their types checked when they are read."""
        return Fields(self.metadata)

    def require(self, key: str) -> Any:
        """The metadata value at `key`.

        Args:
            key: such as `llama.block_count`.

        Raises:
            ValueError: the file has no such key.
        """
        if key not in self.metadata:
            raise ValueError(f"it has no metadata '{key}', which is needed to read it")
        return self.metadata[key]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as rows of an array.

        Args:
            name: a tensor that the file holds, such as `output_norm.weight`.
        """
        return self.tensors[name].shape

    def dequantize(self, name: str) -> Float[np.ndarray, "..."]:
        """A tensor in float32, or in its own dtype where it is not quantized.

        Args:
            name: a tensor that the file holds, such as `output_norm.weight`.
        """
        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.kind)


def check_gguf_magic(path: Path) -> None:
    """Refuses what is certainly not a GGUF file, without parsing it.

    Args:
        path: what is said to be a GGUF file.

    Raises:
        FileNotFoundError: no such file.
        BadFile: the file does not begin as GGUF files do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file '{path}' does not exist; give the path of a .gguf file")
    with path.open("rb") as stream:
        # Four bytes tell most wrong files apart, without the time that parsing a real one takes.
        if stream.read(4) != b"GGUF":
            raise BadFile(f"'{path}' is not a GGUF file: it does not begin with the bytes 'GGUF'")


def open_gguf(path: str | Path) -> GgufFile:
    """Parses a GGUF file's metadata and maps its tensors.

    Args:
        path: the file to open; it stays open for as long as one of its tensors is in use.

    Raises:
        FileNotFoundError: no such file.
        BadFile: not a GGUF file, cut off, damaged, or with tensors of a type that is not read.
    """
    path = Path(path)
    check_gguf_magic(path)
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        metadata, tensors = _parse(data)
    except (ValueError, OverflowError) as error:
        raise BadFile(
            f"GGUF file '{path}' cannot be read ({error}); it has {len(data)} bytes: where that is cut off or damaged,"
            " fetch it again"
        ) from error
    with reading(f"GGUF file '{path}'"):
        for name, tensor in tensors.items():
            if not _is_read(tensor.kind):
                raise ValueError(f"tensor '{name}' has type {tensor.kind.name}, which is not read")
    return GgufFile(path, metadata, tensors)


class _Cursor:
    """A place in the file that moves on as values are read; the file's end is checked before each."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.place = 0

    def take(self, size: int) -> int:
        """Moves on by `size` bytes and returns where they begin."""
        begin = self.place
        if size > len(self.data) - begin:
            raise ValueError(f"{size} bytes are said to follow byte {begin}, where {len(self.data) - begin} are left")
        self.place += size
        return begin

    def scalar(self, layout: str) -> Any:
        return struct.unpack_from(f"<{layout}", self.data, self.take(struct.calcsize(f"<{layout}")))[0]

    def text(self) -> str:
        begin = self.take(self.scalar("Q"))
        return self.data[begin : self.place].decode("utf-8")

    def value(self) -> Any:
        """A metadata value, which begins with its type."""
        kind = self.scalar("I")
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        raise ValueError(f"a value has the type {kind}; allowed are 0 to 12")

    def _array(self) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            layout = np.dtype(f"<{_SCALARS[kind]}" if kind != 7 else "?")
            return np.frombuffer(self.data, layout, count, self.take(count * layout.itemsize))
        if kind != _STRING:
            raise ValueError(f"an array has elements of type {kind}; allowed are numbers and texts")
        if count > _MAX_STRINGS:
            raise ValueError(f"an array has {count} texts; allowed are up to {_MAX_STRINGS}")
        # A count that is too large meets the end of the file, because each text takes eight bytes or more.
        return [self.text() for _ in range(count)]


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(data)
    cursor.take(4)  # the magic
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; allowed are {', '.join(map(str, VERSIONS))}, little-endian")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    # Both counts end with the file, so they need no check of their own.
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"metadata '{key}' is there twice")
        try:
            metadata[key] = cursor.value()
        except ValueError as error:
            raise ValueError(f"metadata '{key}': {error}") from None
    described = [_tensor_description(cursor) for _ in range(tensor_count)]
    alignment = Fields(metadata).whole("general.alignment", default=32)
    if alignment > _MAX_ALIGNMENT:
        raise ValueError(f"general.alignment is {alignment}; allowed is up to {_MAX_ALIGNMENT}")
    begin = math.ceil(cursor.place / alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise ValueError(f"tensor '{name}' is there twice")
        tensors[name] = _tensor(data, name, shape, kind, begin + offset)
    return metadata, tensors


def _tensor_description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of one tensor."""
    name, axes = cursor.text(), cursor.scalar("I")
    if not 1 <= axes <= _MAX_AXES:
        raise ValueError(f"tensor '{name}' has {axes} axes; allowed are 1 to {_MAX_AXES}")
    shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]
    if min(shape) < 1:
        raise ValueError(f"tensor '{name}' has shape {shape}; each axis must have 1 or more")
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _tensor(data: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        rows = gguf.quant_shape_to_byte_shape(shape, quantization)
    except (ValueError, KeyError) as error:
        raise ValueError(f"tensor '{name}': {error}") from None
    size = math.prod(rows)
    # Python's integers do not overflow, so the comparison holds for any offset and shape.
    if offset + size > len(data):
        raise ValueError(f"tensor '{name}' ends at byte {offset + size}")
    return GgufTensor(shape, quantization, offset, np.frombuffer(data, np.uint8, size, offset).reshape(rows))


@cache
def _is_read(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the package can dequantize this type, tried on one block."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
