"""A Triton kernel that unpacks quantized weights: codes are read once and numbers written once.

torch has several operations for it, most of which write fp32 numbers: nf4 moves 22.6 bytes a weight, of which 2.6 are
needed.
Here a number is made in registers, in fp32 as in `core.quantization`, and rounded once to the wanted dtype.

    kind      codes                      scales                                     numbers with one scale
    int8      int8                       fp32 for each row, or one                  a row
    e4m3      fp8 e4m3                   the same                                   a row
    e5m2      fp8 e5m2                   the same                                   a row
    mxfp8     fp8 e4m3                   2^(byte − 127)                             32
    nf4       two a byte, of 16 levels   fp32                                       64
    nvfp4     two a byte, in e2m1        fp8 e4m3, times fp32 for each row, or one  16

Codes in fp8 are read as bytes, whose bits are moved into fp32, as only GPUs since Ada convert e4m3.

Without Triton `unpacked` fails. The kernel calls only what `triton.language` has built in, so that Triton's interpreter
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

BLOCK = 1024
"""Numbers of a program: eight a thread, which are stored at once in bf16."""

GROUPS = {"int8": BLOCK, "e4m3": BLOCK, "e5m2": BLOCK, "mxfp8": 32, "nf4": 64, "nvfp4": 16}
"""Numbers of a program that share a scale, by kind."""

LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def unpacked(kind: str, y: Tensor, codes: Tensor, scales: Tensor, *further: Tensor) -> Tensor:
    """y (rows, ...), in whose memory rows follow one another, with the numbers of codes in the same order.

    Args:
        kind: of the module's table.
        codes: (rows, ...), contiguous in memory as y is; of nf4 (numbers / 2,), with y (numbers,).
        scales: (rows or 1, ...) fp32; of mxfp8 and nvfp4 bytes (rows, columns / 32 or 16); of nf4 (numbers / 64, 1).
        further: of nvfp4 the scales of rows, (rows or 1, 1) fp32, and factors of columns (1, columns) fp32, if any; of
            nf4 the levels (16,) fp32.
    """
    rows = 1 if kind == "nf4" else len(y)
    columns = y.numel() // rows
    across = -(-columns // BLOCK)
    by_row = (further[0] if kind == "nvfp4" else scales) if kind != "nf4" else scales
    factors = further[1] if kind == "nvfp4" and len(further) > 1 else None
    table = further[0] if kind == "nf4" else by_row if factors is None else factors
    given = (_bytes(codes), _bytes(scales), by_row, table, y, columns, across, int(by_row.numel() > 1))
    with torch.cuda.device(y.device) if y.is_cuda else contextlib.nullcontext():  # where Triton launches
        kernel[(rows * across,)](
            *given, kind=kind, has_factors=factors is not None, block=BLOCK, group=GROUPS[kind], **LAUNCH
        )
    return y


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _kernel(
    codes,
    scales,
    scales_of_rows,
    table,
    y,
    columns,
    across,
    scale_row,
    kind: tl.constexpr,
    has_factors: tl.constexpr,
    block: tl.constexpr,
    group: tl.constexpr,
):
    number = tl.program_id(0)
    row = (number // across).to(tl.int64)
    start = number % across * block
    # Tiles of groups: a scale is read once for all numbers of it that a thread has.
    groups: tl.constexpr = block // group
    first = start + tl.arange(0, groups) * group
    column = first[:, None] + tl.arange(0, group)[None, :]
    is_inside = column < columns
    if kind == "nf4" or kind == "nvfp4":
        byte = first[:, None] // 2 + tl.arange(0, group // 2)[None, :]
        pairs = tl.load(codes + row * (columns // 2) + byte, mask=byte < columns // 2, other=0).to(tl.int32)
        code = tl.reshape(tl.join(pairs >> 4, pairs & 15), (groups, group))
    else:
        code = tl.load(codes + row * columns + column, mask=is_inside, other=0)
    if kind == "nf4":
        value = tl.load(table + code)
    elif kind == "nvfp4":
        # Of e2m1 as a function of the code's three lower bits there are three lines, which get steeper.
        size = (code & 7).to(tl.float32)
        size = tl.maximum(tl.maximum(size * 0.5, size - 2.0), size * 2.0 - 8.0)
        value = tl.where(code > 7, -size, size)
    elif kind == "int8":
        value = code.to(tl.float32)
    elif kind == "e5m2":  # the upper half of fp16
        value = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = _e4m3(code)
    if kind == "mxfp8":
        exponent = tl.load(scales + row * (columns // group) + first // group, mask=first < columns, other=0)
        exponent = exponent.to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        scale = bits.to(tl.float32, bitcast=True)[:, None]
    elif kind == "nf4":
        scale = tl.load(scales + first // group, mask=first < columns, other=0.0)[:, None]
    elif kind == "nvfp4":
        by_block = tl.load(scales + row * (columns // group) + first // group, mask=first < columns, other=0)
        scale = (_e4m3(by_block) * tl.load(scales_of_rows + row * scale_row))[:, None]
    else:
        scale = tl.load(scales_of_rows + row * scale_row)
    value *= scale
    if has_factors:
        value *= tl.load(table + column, mask=is_inside, other=0.0)
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=is_inside)


def _from_e4m3(code):
    """fp32 of bytes in e4m3, whose bits become those of a number in fp32 that is 2¹²⁰ times smaller."""
    wide = code.to(tl.int32)
    size = ((wide & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰
    size = tl.where((wide & 127) == 127, float("nan"), size)
    return tl.where(wide > 127, -size, size)


kernel: Any = None if triton is None else triton.jit(_kernel)
_e4m3: Any = None if triton is None else triton.jit(_from_e4m3)
