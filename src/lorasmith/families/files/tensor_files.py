"""Files that hold a checkpoint's tensors: one contract for safetensors (fp8 ones included) and GGUF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from lorasmith.core.errors import ModelError
from lorasmith.core.quantization import Packed
from lorasmith.families.files.fp8 import check_formats, companions, packed_fp8, scale_name
from lorasmith.families.files.gguf import GgufFile, is_gguf
from lorasmith.formats.container import check_safetensors

__all__ = ["TensorFile", "open_tensors"]


class TensorFile(Protocol):
    """A checked file of which no tensor has been read.

    Attributes:
        shapes: of the tensors that are weights, by name, in the file's order.
        metadata: what the file says of itself, as text.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def read(self, names: Iterable[str], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor | Packed]]:
        """Tensors by name; weights that are codes stay packed, all others are in `dtype`, or as they are if None.

        Raises:
            ModelError: a weight is quantized in a way that is not known here.
        """


def open_tensors(path: Path) -> TensorFile:
    """A file, by what it begins with. Raises ModelError: it is missing, pickled, cut short or of no known format."""
    return GgufFile(path) if is_gguf(path) else _Safetensors(path)


class _Safetensors:
    """A safetensors file; of those in fp8 see `families.files.fp8`."""

    def __init__(self, path: Path) -> None:
        header = check_safetensors(path, error=ModelError)
        self._path = path
        self._names = frozenset(header.tensors)
        besides = companions(self._names)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: info.shape for name, info in header.tensors.items() if name not in besides
        }
        self.metadata: Mapping[str, str] = header.metadata

    def read(self, names: Iterable[str], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor | Packed]]:
        with safe_open(self._path, framework="pt") as file:
            check_formats(self._path.name, self._names, self.metadata, file.get_tensor)
            for name in names:
                tensor: Tensor = file.get_tensor(name)
                scale = scale_name(name, self._names)
                if scale is not None or (name.endswith(".weight") and tensor.ndim > 1):
                    packed = packed_fp8(tensor, None if scale is None else file.get_tensor(scale), name, dtype)
                    if packed is not None:
                        yield name, packed
                        continue
                yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
