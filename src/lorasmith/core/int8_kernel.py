"""A Triton kernel for products of int8 matrices with scales of rows and columns.

    y = (a · row scales) (b · column scales) + bias + factor · part second + total
        a (n, k), b (k, m), sums in int32, y in the wanted dtype; part (n, rank) and second (rank, m) of a LoRA

Scales are multiplied, and what is added is added, while the sums are in registers, so that no matrix of int32 is
stored, and y is written once. b may be in row or in column order. Tensor cores take it in columns: in rows it is stored
to shared memory byte by byte in the loop, and products are slower than in bf16.

Without Triton `product` fails. The kernel calls only what `triton.language` has built in, so that Triton's
interpreter runs it if `TRITON_INTERPRET` was set when this module was imported.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton evaluates annotations of a kernel, and knows its own alone.

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # as on Macs
    triton = None

BLOCK_ROWS = (16, 64, 128)
"""Rows of a block: the least that holds all, or the most."""

BLOCK = {"block_columns": 128, "block_inner": 64, "group": 8}
"""Columns and summed numbers of a block, few enough for the shared memory of all GPUs; blocks of rows that follow one
another on the same columns, which are then in the cache."""

LAUNCH = {"num_warps": 8, "num_stages": 4, "enable_fp_fusion": False}

HOPPER_BLOCK = {**BLOCK, "block_columns": 256, "block_inner": 128}
"""Compute capability 9.0, whose tensor cores are twice as fast beside a cache that is not: a block of 128 × 128 reads
1/64 byte an operation, 9 TB/s at 1200 TOP/s, one of 128 × 256 three quarters of it. It has 228 KB of shared memory."""

HOPPER_LAUNCH = {**LAUNCH, "num_stages": 3}


def product(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    narrow: tuple[Tensor, Tensor, float] | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """`(a · scale_a) (b · scale_b)` for a (n, k), scale_a (n, 1), b (k, m) in any order, scale_b (1, m) or (1, 1).

    Args:
        bias: (m,), is added.
        narrow: part (n, rank), second (rank, m) and a factor, whose product is added.
        total: (n, m) contiguous in `dtype`, is added, and written.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    y = torch.empty(rows, columns, dtype=dtype, device=a.device) if total is None else total
    block_rows = next((size for size in BLOCK_ROWS if rows <= size), BLOCK_ROWS[-1])
    block, launch = tiles(a.device, block_rows)
    blocks = -(-rows // block_rows) * -(-columns // block["block_columns"])
    scale_b = scale_b.expand(1, columns)
    narrow = None if narrow is None or narrow[2] == 0 else narrow
    part, second, factor = narrow or (scale_a, scale_b, 1.0)
    sizes = (rows, columns, inner, a.stride(0), a.stride(1), b.stride(0), b.stride(1), scale_b.stride(1))
    given = (
        *(a, b, y, scale_a, scale_b, scale_a if bias is None else bias.contiguous(), part, second),
        *(*sizes, part.shape[1], *part.stride(), *second.stride(), factor, 1 / factor),
    )
    fixed = {
        "has_bias": bias is not None,
        "has_total": total is not None,
        "block_rank": 0 if narrow is None else padded_rank(part.shape[1]),
        "block_rows": block_rows,
        **block,
    }
    if a.is_cuda and not torch.compiler.is_compiling():
        with torch.cuda.device(a.device):  # Triton launches on the current device; compiled code sets it itself
            kernel[(blocks,)](*given, **fixed, **launch)
    else:
        kernel[(blocks,)](*given, **fixed, **launch)
    return y


def padded_rank(rank: int) -> int:
    """The least size of a block that tensor cores take."""
    return max(16, 1 << (rank - 1).bit_length())


@functools.cache
def tiles(device: torch.device, block_rows: int) -> tuple[Mapping[str, int], Mapping[str, Any]]:
    """Sizes of blocks, and how they are launched, on a device."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    # With few rows more blocks keep more processors busy.
    return (HOPPER_BLOCK, HOPPER_LAUNCH) if is_hopper and block_rows == BLOCK_ROWS[-1] else (BLOCK, LAUNCH)


def _kernel(
    a,
    b,
    y,
    scale_a,
    scale_b,
    bias,
    part,
    second,
    rows,
    columns,
    inner,
    a_row,
    a_inner,
    b_inner,
    b_column,
    scale_column,
    rank,
    part_row,
    part_rank,
    second_rank,
    second_column,
    factor,
    inverse,
    has_bias: tl.constexpr,
    has_total: tl.constexpr,
    block_rank: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_inner: tl.constexpr,
    group: tl.constexpr,
):
    down = (rows + block_rows - 1) // block_rows
    across = (columns + block_columns - 1) // block_columns
    number = tl.program_id(0)
    first = number // (group * across) * group
    height = min(down - first, group)
    within = number % (group * across)
    row = (first + within % height) * block_rows + tl.arange(0, block_rows)
    column = within // height * block_columns + tl.arange(0, block_columns)
    summed = tl.arange(0, block_inner)
    is_row, is_column = row < rows, column < columns
    # In 64 bits: a long clip in a wide layer has more than 2³¹ numbers.
    a_here = a + row.to(tl.int64)[:, None] * a_row + summed[None, :] * a_inner
    b_here = b + summed.to(tl.int64)[:, None] * b_inner + column.to(tl.int64)[None, :] * b_column
    sums = tl.full((block_rows, block_columns), 0, dtype=tl.int32)
    for start in range(0, inner, block_inner):
        is_summed = summed < inner - start
        left = tl.load(a_here, mask=is_row[:, None] & is_summed[None, :], other=0)
        right = tl.load(b_here, mask=is_summed[:, None] & is_column[None, :], other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        a_here += block_inner * a_inner
        b_here += block_inner * b_inner
    scaled = sums.to(tl.float32) * tl.load(scale_a + row, mask=is_row, other=0.0)[:, None]
    scaled *= tl.load(scale_b + column * scale_column, mask=is_column, other=0.0)[None, :]
    if has_bias:
        scaled += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    is_inside = is_row[:, None] & is_column[None, :]
    place = y + row.to(tl.int64)[:, None] * columns + column[None, :]
    if block_rank > 0:
        inside = tl.arange(0, block_rank)
        is_rank = inside < rank
        left_here = part + row.to(tl.int64)[:, None] * part_row + inside[None, :] * part_rank
        right_here = second + inside.to(tl.int64)[:, None] * second_rank + column.to(tl.int64)[None, :] * second_column
        left = tl.load(left_here, mask=is_row[:, None] & is_rank[None, :], other=0.0)
        right = tl.load(right_here, mask=is_rank[:, None] & is_column[None, :], other=0.0)
        # Added to the same registers, as two matrices of a block's size would not fit.
        scaled = tl.dot(left, right, scaled * inverse, input_precision="ieee") * factor
    if has_total:
        scaled += tl.load(place, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(place, scaled.to(y.dtype.element_ty), mask=is_inside)


kernel: Any = None if triton is None else triton.jit(_kernel)
