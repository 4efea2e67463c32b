"""Pickles of tensors, as torch saves them, read without running the code that they name.

torch reads them with `weights_only`, which runs none, and memory-mapped, where no tensor reaches beyond the file. Even
this reader calls more functions than tensors need, some of which allocate what a file asks for, so the names in a
pickle are checked first, and only those of tensors pass.
"""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import open_regular

_ALLOWED = re.compile(
    r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch (Float|Half|BFloat16|Double|Long|Int|Bool)Storage"
)
"""Globals that a pickle may name: tensors, and the empty dictionary of hooks that each has."""

_PARAMETER = "torch._utils _rebuild_parameter"

_MOST_PICKLE_BYTES = 64 * 2**20
_SPARE_OPCODES, _BYTES_PER_OPCODE = 100_000, 16
"""A tensor has some 40 opcodes, and most at least 512 bytes. Each opcode may make an object of a hundred bytes."""

_DEEPEST_TUPLE = 10  # that of a tensor has 2
_REFUSED = frozenset({
    "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "FROZENSET", "MEMOIZE",
})  # fmt: skip
"""Opcodes that import functions and classes, and those of protocols that torch does not write."""


def unpickled(path: Path, error: type[LorasmithError], *, what: str, remedy: str, parameters: bool = False) -> Any:
    """The content of a torch file (a zip archive), tensors mapped from it and plain values, or `parameters` too.

    `what` it should be and the `remedy` are parts of messages. Raises `error` for a file that cannot be read, is
    damaged, or names anything but tensors.
    """
    try:
        _check_pickle(path, error, remedy, parameters=parameters)
        # Mapped, a tensor whose size a file exaggerates is refused instead of read from beyond its bytes.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except error:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or 'damaged'}); {remedy}") from problem
    except Exception as problem:  # torch's reader raises whatever the damage leads to
        raise error(f"{path} must be {what} with tensors alone, and cannot be read; {remedy}") from problem


def _check_pickle(path: Path, error: type[LorasmithError], remedy: str, *, parameters: bool) -> None:
    """Raise `error` for a file that torch did not write, or whose pickle refers to more than tensors.

    Damaged archives and pickles may raise any other exception.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [one for one in entries if one.filename.rpartition("/")[2] == "data.pkl"]
        is_packed = any(one.compress_type or one.file_size != one.compress_size for one in entries)
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE_BYTES or is_packed:
            raise error(f"{path} must be one torch file, and is not; {remedy}")
        content = archive.read(pickles[0])
        beside = os.fstat(file.fileno()).st_size - len(content)
    most = _SPARE_OPCODES + beside // _BYTES_PER_OPCODE
    nesting: list[int] = []  # for each value on the stack: 0, or how many tuples are nested in that tuple, itself too
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count == most:
            raise error(f"{path} must hold tensors, but its pickle is too long for {beside:,} bytes of them; {remedy}")
        name = opcode.name
        is_tensor = name == "GLOBAL" and (_ALLOWED.fullmatch(str(argument)) or (parameters and argument == _PARAMETER))
        if name in _REFUSED and not is_tensor:
            shown = str(argument).replace(" ", ".") if name == "GLOBAL" else name
            raise error(
                f"{path} must hold tensors and plain values alone, but refers to {shown!r}, which could run code; "
                "it is not read"
            )
        # Tuples of the same tuple twice, a few dozen levels deep, take forever to hash. No pickler writes them.
        if name == "DUP" or ("GET" in name and memo[argument]):
            raise error(f"{path} must be a pickle as torch writes it, and repeats a tuple; {remedy}")
        if "PUT" in name:
            memo[argument] = nesting[-1]
        elif name == "MARK":
            marks.append(len(nesting))
        else:
            below = opcode.stack_before
            marked = pickletools.markobject in below
            start = marks.pop() if marked else len(nesting) - len(below)
            level = 1 + max(nesting[start:], default=0) if "TUPLE" in name else 0
            if level > _DEEPEST_TUPLE:  # hashing one of many levels overflows the stack of the process
                raise error(f"{path} must nest at most {_DEEPEST_TUPLE} tuples, and nests more; {remedy}")
            del nesting[start - (below.index(pickletools.markobject) if marked else 0) :]
            nesting += [level] * len(opcode.stack_after)
