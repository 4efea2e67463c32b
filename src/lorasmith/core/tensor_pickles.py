"""Pickles of tensors, as torch saves them (a zip archive), read without running the code that they name.

One reader reads both archive and pickle, so that no other one can find another pickle than the one that was checked.
Opcodes are checked before anything is made: those alone that torch writes, the names of tensors alone, no keys and no
depth that take long to hash, and no more of all than the file has bytes for. Python's unpickler, which then makes the
values, calls functions of this module alone. Tensors lie on the memory-mapped file, within the bytes of their entry in
the archive, and none is larger than the file. So time, memory and stack are bounded in
this process, and a process of its own would protect from nothing more.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import open_regular
from lorasmith.core.mapped_files import MappedFile

_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in (
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Double", torch.float64),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Bool", torch.bool),
    )
}
_TENSOR, _PARAMETER, _HOOKS = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)

_MOST_PICKLE_BYTES = 64 * 2**20
_MOST_OPCODES, _SPARE_OPCODES, _BYTES_PER_OPCODE = 4_000_000, 100_000, 16
"""A tensor has some 40 opcodes, and most at least 512 bytes. Each opcode may make an object of a hundred bytes."""

_DEEPEST_TUPLE = 10  # that of a tensor has 2
_MOST_DIMENSIONS = 16
_MOST_INTEGER = 2**63
_OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "LIST", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET",
    "BINPUT", "LONG_BINPUT", "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
})  # fmt: skip
"""Those of protocol 2, which torch writes, but for those that make objects of classes."""

_CLASS, _EMPTY = -1, -2  # on the stack of the check: the class of dictionaries of hooks, and one of these


def unpickled(path: Path, error: type[LorasmithError], *, what: str, remedy: str, parameters: bool = False) -> Any:
    """The content of a torch file, tensors mapped from it and plain values, or `parameters` as tensors too.

    `what` it should be and the `remedy` are parts of messages. Raises `error` for a file that cannot be read, is
    damaged, or names anything but tensors.
    """
    try:
        content, entries = _archive(path, error, remedy)
        _check_pickle(path, content, error, remedy, parameters=parameters)
        return _Unpickler(content, MappedFile(path), entries).load()
    except error:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or 'damaged'}); {remedy}") from problem
    except Exception as problem:  # damaged archives and pickles may raise any
        raise error(f"{path} must be {what} with tensors alone, and cannot be read; {remedy}") from problem


def _archive(path: Path, error: type[LorasmithError], remedy: str) -> tuple[bytes, Mapping[str, tuple[int, int]]]:
    """The pickle of a torch file, and start and size in bytes of its storages, by key."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        is_packed = any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries)
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE_BYTES or is_packed:
            raise error(f"{path} must be one torch file, and is not; {remedy}")
        folder = pickles[0].filename.rpartition("/")[0]
        orders = [
            archive.read(entry) for entry in entries if entry.filename == f"{folder}/byteorder" and entry.file_size < 10
        ]
        if orders not in ([], [sys.byteorder.encode()]):
            raise error(f"{path} must have its bytes in the order of this computer, and has another; {remedy}")
        content = archive.read(pickles[0])
        storages = {}
        for entry in entries:
            key = entry.filename.removeprefix(f"{folder}/data/")
            if key != entry.filename:
                file.seek(entry.header_offset)
                signature, *_, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                if signature != b"PK\3\4":
                    raise ValueError("an entry has no header")
                storages[key] = entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size
        return content, storages


_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def _check_pickle(path: Path, content: bytes, error: type[LorasmithError], remedy: str, *, parameters: bool) -> None:
    """Raise `error` for a pickle that torch did not write, or that refers to more than tensors."""
    beside = os.stat(path).st_size - len(content)  # noqa: PTH116
    most = min(_MOST_OPCODES, _SPARE_OPCODES + beside // _BYTES_PER_OPCODE)
    allowed = {*_STORAGES, _TENSOR, _HOOKS, *([_PARAMETER] if parameters else [])}
    # For each value on the stack: how many tuples are nested in that tuple, itself too; `_CLASS` or `_EMPTY`; or 0.
    nesting: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}

    def refuse(fault: str) -> NoReturn:
        raise error(f"{path} must be a pickle as torch writes it, and {fault}; {remedy}")

    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if count == most:
            raise error(f"{path} must hold tensors, but its pickle is too long for {beside:,} bytes of them; {remedy}")
        if name == "GLOBAL" and argument not in allowed:
            raise error(
                f"{path} must hold tensors and plain values alone, but refers to "
                f"{str(argument).replace(' ', '.')!r}, which could run code; it is not read"
            )
        # Tuples of the same tuple twice, a few dozen levels deep, take forever to hash. No pickler writes them.
        if name == "DUP" or ("GET" in name and memo.get(argument, 0) > 0):
            refuse("repeats a tuple")
        if name == "LONG1" and not -_MOST_INTEGER <= argument < _MOST_INTEGER:
            refuse("has an integer beyond 64 bits")
        if name not in _OPCODES:
            refuse(f"has the opcode {name}")
        if "PUT" in name:
            if argument > count:  # which the unpickler would reserve memory for
                refuse("leaves out numbers")
            memo[argument] = nesting[-1]
            continue
        if name == "MARK":
            marks.append(len(nesting))
            continue
        if name == "POP" and marks and marks[-1] == len(nesting):  # it removes the mark
            marks.pop()
            continue
        below = opcode.stack_before
        is_marked = pickletools.markobject in below
        start = marks.pop() if is_marked else len(nesting) - len(below)  # of the values that are taken together
        bottom = start - below.index(pickletools.markobject) if is_marked else start
        level = 1 + max([0, *nesting[start:]]) if "TUPLE" in name else 0
        if level > _DEEPEST_TUPLE:  # hashing one of many levels overflows the stack of the process
            raise error(f"{path} must nest at most {_DEEPEST_TUPLE} tuples, and nests more; {remedy}")
        keys = {"SETITEM": nesting[-2:-1], "SETITEMS": nesting[start::2], "DICT": nesting[start::2]}.get(name, ())
        if any(key > 0 for key in keys):  # others with the same hash are easily found, and take forever to tell apart
            refuse("has a tuple as a key")
        if name == "BUILD" and nesting[bottom] != _EMPTY:  # tensors would take their state from it
            refuse("changes a value after it was made")
        if "GET" in name:
            level = memo[argument]
        elif name == "GLOBAL" and argument == _HOOKS:
            level = _CLASS
        elif name == "REDUCE" and nesting[bottom] == _CLASS:
            level = _EMPTY
        elif name in ("BUILD", "SETITEM", "SETITEMS"):
            level = nesting[bottom]
        del nesting[bottom:]
        nesting += [level] * len(opcode.stack_after)


class _Unpickler(pickle.Unpickler):
    """Makes the values of a checked pickle; storages are mapped from their entries in the archive."""

    def __init__(self, content: bytes, file: MappedFile, entries: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._file = file
        self._entries = entries
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        named = f"{module} {name}"
        return _STORAGES.get(named) or {_TENSOR: self._tensor, _PARAMETER: _parameter, _HOOKS: _no_hooks}[named]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        start, size = self._entries[key]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"no storage: {pid!r}")
        if (key, dtype) not in self._storages:
            self._storages[key, dtype] = self._file.tensor(start, dtype, (size // dtype.itemsize,))
        return self._storages[key, dtype][:count]

    def _tensor(self, storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
        if not len(size) == len(stride) <= _MOST_DIMENSIONS or min((offset, *size, *stride)) < 0:
            raise ValueError("no tensor")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 not in size and last >= storage.numel():
            raise ValueError("a tensor beyond its storage")
        if math.prod(size) * storage.itemsize > self._file.size:  # which its values are repeated to
            raise ValueError("a tensor larger than the file")
        return storage.as_strided(size, stride, storage.storage_offset() + offset)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _no_hooks() -> OrderedDict[Any, Any]:
    return OrderedDict()
