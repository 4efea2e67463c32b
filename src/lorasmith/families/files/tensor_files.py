"""Files that hold a base model's tensors: one contract for safetensors (packed ones included) and GGUF.

Tensors lie on the memory-mapped file, in the file's dtype: reading them costs no memory until they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import Packed
from lorasmith.families.files.gguf import GgufFile, is_gguf
from lorasmith.families.files.packed_weights import PackedWeights
from lorasmith.formats.container import read_safetensors

__all__ = ["TensorFile", "open_tensors"]


class TensorFile(Protocol):
    """A checked file; tensors are read by `read`.

    Attributes:
        shapes: of the tensors that are weights, by name, in the file's order.
        stored: number format (`bf16`, `Q4_K`) and size in bytes of the same tensors, without their scales.
        metadata: text entries of the header.
    """

    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, tuple[str, int]]
    metadata: Mapping[str, str]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        """Tensors by name, in the file's dtype; quantized weights stay packed.

        Raises:
            ModelError: a packed weight is damaged or of an unsupported kind.
        """


def open_tensors(*paths: Path) -> TensorFile:
    """A file, or the shards of one.

    Raises:
        ModelError: one is missing, pickled, cut short or of no known format, or its weights are packed in none.
    """
    if len(paths) == 1:
        return GgufFile(paths[0]) if is_gguf(paths[0]) else _Safetensors(paths[0])
    return _Shards([open_tensors(path) for path in paths])


class _Safetensors:
    """A safetensors file; for packed weights see `families.files.packed_weights`."""

    def __init__(self, path: Path) -> None:
        tensors, metadata = read_safetensors(path, error=ModelError)
        self.metadata: Mapping[str, str] = metadata
        self._weights = PackedWeights(path.name, tensors, metadata)
        self.shapes: Mapping[str, tuple[int, ...]] = self._weights.shapes
        self.stored: Mapping[str, tuple[str, int]] = {
            name: (self._weights.format_of(name), tensors[name].nbytes) for name in self.shapes
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        return ((name, self._weights.read(name)) for name in names)


class _Shards:
    """Several files that hold one model."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self._file_of = {name: file for file in files for name in file.shapes}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: file.shapes[name] for name, file in self._file_of.items()}
        self.stored: Mapping[str, tuple[str, int]] = {name: file.stored[name] for name, file in self._file_of.items()}
        self.metadata: Mapping[str, str] = files[0].metadata

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        for name in names:
            yield from self._file_of[name].read([name])
