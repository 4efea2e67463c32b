"""A Triton kernel that rounds rows to int8 or fp8, each with a scale of its own, and reads them twice.

    scale  = max |x · factors| · (1 / largest number of the format)   fp32, as in `core.quantization`
    codes  = x · factors / scale                                   rounded to the nearest, ties to even

torch takes six operations for it, most of which write an fp32 matrix. Every step is rounded as there, and a NaN is in
the scale of its row.

Without Triton `rounded` fails. The kernel calls only what `triton.language` has built in, so that Triton's interpreter
runs it if `TRITON_INTERPRET` was set when this module was imported.
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

BLOCK = {"block": 1024}
"""Numbers of a row at a time."""

LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def rounded(rows: Tensor, kind: torch.dtype, largest: float, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (n, k) of any strides, times factors (k,) fp32, in a format up to `largest`; scales (n, 1) fp32."""
    count, columns = rows.shape
    codes = torch.empty(count, columns, dtype=kind, device=rows.device)
    scales = torch.empty(count, 1, device=rows.device)
    given = rows if factors is None else factors.contiguous()
    with torch.cuda.device(rows.device) if rows.is_cuda else contextlib.nullcontext():  # where Triton launches
        kernel[(count,)](
            *(rows, given, codes, scales, columns, *rows.stride(), largest, 1 / largest),
            has_factors=factors is not None,
            is_int8=kind == torch.int8,
            **BLOCK,
            **LAUNCH,
        )
    return codes, scales


def _kernel(
    x,
    factors,
    codes,
    scales,
    columns,
    x_row,
    x_column,
    largest,
    inverse,
    has_factors: tl.constexpr,
    is_int8: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    most = tl.full((block,), 0.0, dtype=tl.float32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        values = _values(x + row * x_row, factors, column, columns, x_column, has_factors)
        most = tl.maximum(most, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    scale = tl.reduce(most, 0, _larger) * inverse
    scale = tl.maximum(scale, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)  # of a row of zeros
    tl.store(scales + row, scale)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        values = tl.div_rn(_values(x + row * x_row, factors, column, columns, x_column, has_factors), scale)
        # With 1.5 · 2²³ the last bit of a number is 1.
        values = (values + 12582912.0) - 12582912.0 if is_int8 else tl.minimum(tl.maximum(values, -largest), largest)
        tl.store(codes + row * columns + column, values.to(codes.dtype.element_ty), mask=column < columns)


def _values_of(row, factors, column, columns, x_column, has_factors: tl.constexpr):
    inside = column < columns
    values = tl.load(row + column.to(tl.int64) * x_column, mask=inside, other=0.0).to(tl.float32)
    if has_factors:
        values *= tl.load(factors + column, mask=inside, other=0.0)
    return values


def _larger_of(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


kernel: Any = None if triton is None else triton.jit(_kernel)
_larger: Any = None if triton is None else triton.jit(_larger_of)
_values: Any = None if triton is None else triton.jit(_values_of)
