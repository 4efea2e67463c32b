"""The safetensors container: checking a file before it is trusted, reading it, writing it.

Format (https://github.com/huggingface/safetensors): eight bytes of little-endian header length, a JSON header that
gives each tensor's dtype, shape and place, then the tensors' bytes without gaps.

The writer is our own because `safetensors.save_file` writes metadata in a random order. Here the same tensors and the
same metadata give the same file, with the tensors in the order of the reference writer, so that hashes over the body
agree with those of other programs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lorasmith.core.errors import LoraError, LorasmithError
from lorasmith.core.files import atomic_path, is_folder, open_regular
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.mapped_files import MappedFile


class TensorInfo(NamedTuple):
    """A tensor's entry in a header: dtype in safetensors' spelling (`BF16`) and shape."""

    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    """A checked header."""

    tensors: dict[str, TensorInfo]  # in the order of the file's body
    metadata: dict[str, str]
    body_start: int  # offset of the first tensor byte in the file


def check_safetensors(path: Path, error: type[LorasmithError] = LoraError) -> Header:
    """The header of a safetensors file, after checking that the file is complete and well formed.

    No tensor is read, so the check takes milliseconds for any size of the file.
    """
    path = Path(path)
    text, size = header_text(path, error)
    try:
        tensors, metadata, body_size = _parsed(text)
    except ValueError as problem:
        raise error(f"{path} has a damaged safetensors header ({problem}); get the file again") from None
    body_start = LENGTH_BYTES + len(text)
    if size != body_start + body_size:
        what = "is cut short" if size < body_start + body_size else "has bytes after its last tensor"
        raise error(
            f"{path} {what}: its header announces {body_start + body_size:,} bytes, the file has {size:,}; "
            "download or copy it again"
        )
    return Header(tensors, metadata, body_start)


def header_text(path: Path, error: type[LorasmithError] = LoraError) -> tuple[bytes, int]:
    """The JSON of a safetensors file's header, not parsed, and the file's size in bytes.

    Raises `error` as `check_safetensors` does, but for a malformed header.
    """
    if is_folder(path):
        raise error(f"{path} must be a safetensors file but is a folder; name the file inside it")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH_BYTES + 1)
            _refuse_other_formats(path, start, error)
            return _header_text(path, file, start, size, error), size
    except FileNotFoundError:
        raise error(f"{path} does not exist; check the spelling and the folder") from None
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); check its permissions") from problem


def read_safetensors(path: Path, error: type[LorasmithError] = LoraError) -> tuple[StoredTensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file, checked as `check_safetensors` does."""
    header = check_safetensors(path, error)
    try:
        return StoredTensors(MappedFile(Path(path)), header), header.metadata
    except (OSError, ValueError) as problem:  # it changed since it was checked
        raise error(
            f"{path} cannot be mapped into memory ({problem}); copy it to a local disk and try again"
        ) from problem


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, by name in the order of its body, each made when it is looked up.

    They lie on the memory-mapped file, from which they are read when they are used; where they are not aligned there,
    each lookup is a copy. Raises ValueError if the file is shorter than its header says.
    """

    def __init__(self, file: MappedFile, header: Header) -> None:
        self._file = file
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        offset = header.body_start
        for name, (spelling, shape) in header.tensors.items():
            dtype = _DTYPE[spelling]
            self._places[name] = offset, dtype, shape
            offset += math.prod(shape) * dtype.itemsize
        if offset > file.size:
            raise ValueError("it became shorter")

    def __getitem__(self, name: str) -> Tensor:
        return self._file.tensor(*self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def empty(self) -> dict[str, Tensor]:
        """Tensors of the same dtypes and shapes on the meta device, for which nothing is read."""
        return {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (_, dtype, shape) in self._places.items()
        }


def count_non_finite(tensor: Tensor) -> int:
    """Number of values that are NaN, infinite or, in fp64, larger than fp32 holds."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    # Eight-bit floats have no isfinite of their own.
    values = tensor.float() if tensor.element_size() in (1, 8) else tensor
    if all(map(math.isfinite, map(float, torch.aminmax(values)))):  # a tenth of the time of counting
        return 0
    return int((~torch.isfinite(values)).sum())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; the same content always gives the same bytes."""
    _refuse_non_finite(tensors)
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        for chunk in serialised(tensors, metadata or {}):
            file.write(chunk)


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file, piece by piece: first length and header, then one piece per tensor."""
    ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _SPELLING[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    # Captions read from odd files can hold lone surrogates, which UTF-8 cannot encode: they become question marks, so
    # that a finished run can save its LoRA.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(LENGTH_BYTES, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit
# Each ten times what the largest models have; what comes after the header's check need not be fast or safe beyond them.
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_MAX_NAME_LENGTH = 1_000
_MAX_NUMBERS = 2**48
"""Numbers in a tensor, those of dimensions of size 0 not counted."""

# Rows in the order of the reference implementation's dtype enumeration, by which it sorts the body (last comes first).
_DTYPES = (
    ("BOOL", torch.bool),
    ("U8", torch.uint8),
    ("I8", torch.int8),
    ("F8_E5M2", torch.float8_e5m2),
    ("F8_E4M3", torch.float8_e4m3fn),
    ("F8_E8M0", torch.float8_e8m0fnu),
    ("I16", torch.int16),
    ("U16", torch.uint16),
    ("F16", torch.float16),
    ("BF16", torch.bfloat16),
    ("I32", torch.int32),
    ("U32", torch.uint32),
    ("F32", torch.float32),
    ("F64", torch.float64),
    ("I64", torch.int64),
    ("U64", torch.uint64),
)
_SPELLING = {dtype: spelling for spelling, dtype in _DTYPES}
_DTYPE = dict(_DTYPES)
_SIZE = {spelling: dtype.itemsize for spelling, dtype in _DTYPES}
_ORDER = {dtype: place for place, (_, dtype) in enumerate(_DTYPES)}

_HOW_TO_CONVERT = (
    "convert it once in an environment you trust: safetensors.torch.save_file(torch.load(old, weights_only=True), new)"
)
_OTHER_FORMATS = {
    b"PK\x03\x04": f"is a pickled PyTorch file, which can run code when it is opened; {_HOW_TO_CONVERT}",
    b"\x80": f"is a pickled PyTorch file, which can run code when it is opened; {_HOW_TO_CONVERT}",
    b"GGUF": "is a GGUF file, which base models alone may be; use the safetensors version of it",
    b"version ": "is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`",
    b"<!DOCTYP": "is a web page, not a model; download the file itself",
    b"<html": "is a web page, not a model; download the file itself",
}


def _refuse_other_formats(path: Path, start: bytes, error: type[LorasmithError]) -> None:
    if len(start) <= LENGTH_BYTES:
        raise error(f"{path} is not a safetensors file: it has only {len(start)} bytes; download or copy it again")
    if start[LENGTH_BYTES:] == b"{":
        return  # a header of 128 bytes, say, begins with a pickle's first byte
    for magic, sentence in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise error(f"{path} {sentence}")
    raise error(f"{path} is not a safetensors file; use one, or convert the file to safetensors first")


def _header_text(path: Path, file: BinaryIO, start: bytes, size: int, error: type[LorasmithError]) -> bytes:
    """The header's JSON; `start` is the part of the file that has been read."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > _MAX_HEADER_BYTES:
        raise error(
            f"{path} announces a header of {length:,} bytes, more than the {_MAX_HEADER_BYTES:,} a safetensors file "
            "may have; get the file again"
        )
    if length < len(b"{}"):
        raise error(f"{path} announces a header of {length} bytes, which is none; get the file again")
    if LENGTH_BYTES + length > size:
        raise error(
            f"{path} is cut short inside its header: {LENGTH_BYTES + length:,} bytes are announced, the file has "
            f"{size:,}; download or copy it again"
        )
    return start[LENGTH_BYTES:] + file.read(length - 1)


def _parsed(text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Tensors in body order, metadata, and size of the body in bytes. Raises ValueError with the fault."""
    if text.count(b'"dtype"') > _MAX_TENSORS:
        raise ValueError(f"it has more tensors than any model, {_MAX_TENSORS:,} at most")
    try:
        header = parse_foreign_json(text)
    except ValueError as problem:
        raise ValueError(f"it {problem}") from None
    if not isinstance(header, dict):
        raise ValueError("it is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text by name")
    placed = sorted((*_placed(name, entry), name) for name, entry in header.items())
    expected = 0
    tensors = {}
    for start, end, info, name in placed:
        if start != expected:
            raise ValueError(f"the bytes of tensor {_short(name)} do not follow the tensor before it")
        tensors[name] = info
        expected = end
    return tensors, metadata, expected


def _placed(name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """Start, end and description of one tensor. Raises ValueError when they contradict each other."""
    if len(name) > _MAX_NAME_LENGTH:
        raise ValueError(f"the name of tensor {_short(name)} has more than {_MAX_NAME_LENGTH:,} characters")
    spelling = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(spelling, str) or spelling not in _SIZE:
        raise ValueError(f"tensor {_short(name)} has no known dtype")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {_short(name)} has no proper shape and place")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {_short(name)} has {len(shape):,} dimensions, and {_MAX_DIMENSIONS} are the most")
    if math.prod(filter(None, shape)) > _MAX_NUMBERS:
        raise ValueError(f"tensor {_short(name)} has a shape of more numbers than any file holds")
    start, end = offsets
    if end - start != math.prod(shape) * _SIZE[spelling]:
        raise ValueError(f"tensor {_short(name)} has a shape that does not match its bytes")
    return start, end, TensorInfo(spelling, tuple(shape))


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def _naturals(values: Any) -> TypeGuard[list[int]]:
    """Whether `values` is a list of non-negative integers of at most 63 bits."""
    return (
        isinstance(values, list)
        and set(map(type, values)) <= {int}
        and (not values or (min(values) >= 0 and max(values) < 2**63))
    )


def _refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if count := count_non_finite(tensor):
            raise LoraError(
                f"a LoRA with NaN or infinity is never written, and {name} holds {count} such values; use an earlier "
                "LoRA of the run"
            )
