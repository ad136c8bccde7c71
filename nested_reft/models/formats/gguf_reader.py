"""Opening a GGUF file, with its damage reported before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: its metadata as Python values, its tensors still on disk.

    Attributes:
        path: the file.
        metadata: values by key, such as `general.architecture`.
        tensors: memory-mapped, quantized tensors by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def require(self, key: str) -> Any:
        """The metadata value at `key`.

        Args:
            key: such as `llama.block_count`.

        Raises:
            ValueError: the file has no such key.
        """
        if key not in self.metadata:
            raise ValueError(f"GGUF file '{self.path}' has no metadata '{key}', which is needed to read it")
        return self.metadata[key]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as rows of an array; GGUF itself lists the fastest axis first.

        Args:
            name: a tensor that the file holds, such as `output_norm.weight`.
        """
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def dequantize(self, name: str) -> Float[np.ndarray, "..."]:
        """A tensor in float32, or in its own dtype where it is not quantized.

        Args:
            name: a tensor that the file holds, such as `output_norm.weight`.
        """
        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def check_gguf_magic(path: Path) -> None:
    """Refuses what is certainly not a GGUF file, without parsing it.

    Args:
        path: what is said to be a GGUF file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not begin as GGUF files do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file '{path}' does not exist; give the path of a .gguf file")
    with path.open("rb") as stream:
        # Four bytes tell most wrong files apart, without the time that parsing a real one takes.
        if stream.read(4) != b"GGUF":
            raise ValueError(f"'{path}' is not a GGUF file: it does not begin with the bytes 'GGUF'")


def open_gguf(path: str | Path) -> GgufFile:
    """Parses a GGUF file's metadata and maps its tensors.

    Args:
        path: the file to open; it stays open for as long as one of its tensors is in use.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, cut off, or damaged.
    """
    path = Path(path)
    check_gguf_magic(path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        # A cut-off file can parse and only run out in its last tensor's data.
        if any(tensor.data.nbytes != tensor.n_bytes for tensor in reader.tensors):
            raise ValueError("tensor data ends early")
    # The reader does not check lengths itself: damage shows as whatever its indexing raises.
    except (ValueError, LookupError, OverflowError) as error:
        raise ValueError(
            f"GGUF file '{path}' is cut off or damaged ({error}); it has"
            f" {path.stat().st_size} bytes: compare with its source and fetch it again"
        ) from error
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
