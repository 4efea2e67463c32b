"""Files that hold a base model's tensors: one contract for safetensors (fp8 ones included) and GGUF.

Tensors lie on the memory-mapped file, in the file's dtype: reading them costs no memory until they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lorasmith.core.dtypes import dtype_name
from lorasmith.core.errors import ModelError
from lorasmith.core.fp8_products import CODES
from lorasmith.core.quantization import Packed
from lorasmith.families.files.fp8 import check_formats, companions, packed_fp8, scale_name
from lorasmith.families.files.gguf import GgufFile, is_gguf
from lorasmith.formats.container import map_safetensors

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
            ModelError: a weight has an unsupported quantization.
        """


def open_tensors(*paths: Path) -> TensorFile:
    """A file, or the shards of one. Raises ModelError: one is missing, pickled, cut short or of no known format."""
    if len(paths) == 1:
        return GgufFile(paths[0]) if is_gguf(paths[0]) else _Safetensors(paths[0])
    return _Shards([open_tensors(path) for path in paths])


class _Safetensors:
    """A safetensors file; for fp8 see `families.files.fp8`."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._tensors, metadata = map_safetensors(path, error=ModelError)
        self.metadata: Mapping[str, str] = metadata
        besides = companions(self._tensors.keys())
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in self._tensors.items() if name not in besides
        }
        tensors = ((name, self._tensors[name]) for name in self.shapes)
        self.stored: Mapping[str, tuple[str, int]] = {
            name: (dtype_name(one.dtype), one.nbytes) for name, one in tensors
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor | Packed]]:
        check_formats(self._name, self._tensors, self.metadata, self._tensors.__getitem__)
        for name in names:
            tensor = self._tensors[name]
            scale = scale_name(name, self._tensors.keys())
            if scale is not None or (name.endswith(".weight") and tensor.ndim > 1):
                packed = packed_fp8(tensor, None if scale is None else self._tensors[scale], name)
                if packed is not None:
                    yield name, packed
                    continue
            yield name, tensor.float() if tensor.dtype in CODES else tensor  # vectors, which layers do not unpack


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
