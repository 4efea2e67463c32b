"""A Triton kernel that transposes a matrix of bytes, such as codes in int8 and fp8.

Products of GPUs take the second matrix by columns, so that backward products need a weight's codes transposed. torch
copies them byte by byte. Here four rows of four bytes are transposed in registers, and only words of four bytes are
moved.

Without Triton `transposed` fails. The kernel calls only what `triton.language` has built in, so that Triton's
interpreter runs it if `TRITON_INTERPRET` was set when this module was imported.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations of a kernel, and knows its own alone.

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # as on Macs
    triton = None

BLOCK = {"block": 32}
"""Words of a tile in either direction, each of four bytes."""

LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def transposed(codes: Tensor) -> Tensor:
    """The transpose, contiguous, of codes (rows, columns) of a byte each: contiguous, sizes that are multiples of 4."""
    rows, columns = codes.shape
    y = torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    words, across = (one.view(torch.int32) for one in (codes, y))
    down, wide = (-(-size // (4 * BLOCK["block"])) for size in (rows, columns))
    with torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext():  # where Triton launches
        kernel[(down * wide,)](words, across, rows // 4, columns // 4, wide, **BLOCK, **LAUNCH)
    return y


def _kernel(x, y, rows, columns, wide, block: tl.constexpr):
    number = tl.program_id(0)
    row = number // wide * block + tl.arange(0, block)
    column = number % wide * block + tl.arange(0, block)
    is_inside = (row < rows)[:, None] & (column < columns)[None, :]
    here = x + 4 * row.to(tl.int64)[:, None] * columns + column[None, :]
    first = tl.load(here, mask=is_inside, other=0)
    second = tl.load(here + columns, mask=is_inside, other=0)
    third = tl.load(here + 2 * columns, mask=is_inside, other=0)
    fourth = tl.load(here + 3 * columns, mask=is_inside, other=0)
    there = y + 4 * column.to(tl.int64)[:, None] * rows + row[None, :]
    is_there = (column < columns)[:, None] & (row < rows)[None, :]
    for byte in tl.static_range(4):
        low = ((first >> 8 * byte) & 255) | (((second >> 8 * byte) & 255) << 8)
        high = ((third >> 8 * byte) & 255) | (((fourth >> 8 * byte) & 255) << 8)
        tl.store(there + byte * rows, tl.trans(low | (high << 16)), mask=is_there)


kernel: Any = None if triton is None else triton.jit(_kernel)
