"""Writing a LoRA a few modules at a time, for files close to the size of memory.

A LoRA that was read from a file is memory-mapped. Tensors that a layout computes from it (fused rows, factors with
alpha multiplied in) go to a temporary file beside the target and are mapped from there, because the writer needs all
tensors in order.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import OutputError
from lorasmith.core.files import ensure_folder
from lorasmith.formats.layouts.layout import Layout
from lorasmith.formats.lora_file import with_header, write_lora
from lorasmith.formats.names.model_names import ModelNames

__all__ = ["Spool", "save_streamed", "spooled"]

_PIECE_BYTES = 1 << 26  # computed at a time before they are written


def save_streamed(
    path: Path,
    state: AdapterState,
    names: ModelNames,
    layout: Layout,
    metadata: Mapping[str, str],
    *,
    form: Callable[[AdapterState], AdapterState] | None = None,
) -> None:
    """Write a LoRA atomically, with hashes over its content, holding a few modules of it at a time.

    Args:
        path: the file, or the folder for layouts that are one.
        state: the LoRA; `unknown` is not written.
        names: name table of its model.
        layout: the layout.
        metadata: the header's, without the layout's entries.
        form: applied to some modules at a time before they are written.

    Raises:
        LoraError: a tensor holds NaN or infinity.
        OutputError: the file cannot be written.
    """
    header = with_header(metadata, layout, state, names)
    companions = layout.companions(state, names)
    mapped = [tensor for weights in state.adapters.values() for tensor in weights.tensors.values()]
    mapped += [tensor for parameters in state.differences.values() for tensor in parameters.values()]
    with spooled(path.parent, mapped) as spool:
        for piece in _pieces(state, names):
            spool.add(layout.write(piece if form is None else form(piece), names))
        write_lora(path, spool.tensors(), header, companions, hashed=True)


@contextlib.contextmanager
def spooled(folder: Path, mapped: Iterable[Tensor]) -> Iterator[Spool]:
    """A temporary file in `folder` for computed tensors; `mapped` are on disk already."""
    ensure_folder(folder)
    try:
        handle, name = tempfile.mkstemp(prefix=".lora.", suffix=".spool", dir=folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}); check its permissions") from error
    try:
        with open(handle, "wb") as file:  # noqa: PTH123 - an open file has no path to open it by
            yield Spool(Path(name), file, {tensor.untyped_storage().data_ptr() for tensor in mapped})
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}); free some space and try again") from error
    finally:
        Path(name).unlink(missing_ok=True)


class Spool:
    """Tensors on disk, memory-mapped after the last one is written.

    Args:
        path, file: the temporary file, open for writing.
        kept: addresses of storages that are not copied, with all views of them.
    """

    def __init__(self, path: Path, file: BinaryIO, kept: set[int]) -> None:
        self._path, self._file, self._kept = path, file, kept
        self._there: dict[str, Tensor] = {}
        self._written: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, by key; one of a key that was written before takes its place."""
        for key, tensor in tensors.items():
            self._there.pop(key, None)
            self._written.pop(key, None)
            if not tensor.numel() or tensor.untyped_storage().data_ptr() in self._kept:
                self._there[key] = tensor
                continue
            start = self._file.seek(-self._file.tell() % _ALIGNMENT, 1)
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._written[key] = (start, tensor.dtype, tensor.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, written ones mapped from the file."""
        self._file.flush()
        if not self._written:
            return self._there
        size = self._file.tell()
        whole = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
        found = dict(self._there)
        for key, (start, dtype, shape) in self._written.items():
            raw = whole[start : start + shape.numel() * dtype.itemsize]
            found[key] = raw.view(dtype).reshape(shape)
        return found


_ALIGNMENT = 64


def _pieces(state: AdapterState, names: ModelNames) -> Iterator[AdapterState]:
    """A LoRA in parts of bounded size, modules that an original checkpoint fuses staying together."""
    groups: dict[tuple[str, str], list[ModuleRef]] = {}
    for ref in dict.fromkeys((*state.adapters, *state.differences)):
        place = names.denoiser.get(ref.path) if ref.component == DENOISER else None
        groups.setdefault((ref.component, ref.path if place is None else place.path), []).append(ref)
    piece, size = AdapterState(), 0
    for refs in groups.values():
        for ref in refs:
            if ref in state.adapters:
                piece.adapters[ref] = state.adapters[ref]
                size += sum(tensor.nbytes for tensor in state.adapters[ref].tensors.values())
            if ref in state.differences:
                piece.differences[ref] = state.differences[ref]
                size += sum(tensor.nbytes for tensor in state.differences[ref].values())
        if size >= _PIECE_BYTES:
            yield piece
            piece, size = AdapterState(), 0
    yield piece
