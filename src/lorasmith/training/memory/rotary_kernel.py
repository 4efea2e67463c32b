"""A Triton kernel for rotary embeddings: numbers are read and written once, where torch makes fp32 copies between.

Without Triton `turned` fails. The kernel calls only what `triton.language` has built in, so that Triton's interpreter
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

BLOCK = {"block_rows": 16}
"""Rows of a program; a row is one head of one token."""

# Products are rounded before they are added, as in diffusers, where they are operations of their own.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def turned(x: Tensor, turns: Tensor, direction: float) -> Tensor:
    """x (batch, tokens, heads, features), the last stride 1, with pairs of neighbours turned; contiguous.

    turns: (tokens, features / 2) or (batch, tokens, features / 2), complex64. direction: 1, or -1 for their conjugates.
    """
    batch, tokens, heads, features = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = batch * tokens * heads
    table = torch.view_as_real(turns.contiguous())
    table_batch = table.stride(0) if turns.ndim == 3 and len(turns) > 1 else 0
    padded = 1 << (features - 1).bit_length()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():  # where Triton launches
        kernel[(-(-rows // BLOCK["block_rows"]),)](
            *(x, y, table, direction, rows, tokens, heads, *x.stride()[:3], table_batch, features, padded),
            **BLOCK,
            **LAUNCH,
        )
    return y


def _kernel(
    x,
    y,
    table,
    direction,
    rows,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    table_batch,
    features: tl.constexpr,
    padded: tl.constexpr,
    block_rows: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    head, token, sample = row % heads, row // heads % tokens, row // heads // tokens
    feature = tl.arange(0, padded)
    is_inside = (row < rows)[:, None] & (feature < features)[None, :]
    # In 64 bits: a batch of clips has more than 2³¹ numbers.
    start = sample.to(tl.int64) * x_batch + token.to(tl.int64) * x_token + head.to(tl.int64) * x_head
    given = tl.load(x + start[:, None] + feature[None, :], mask=is_inside, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(given, (block_rows, padded // 2, 2)))
    angle = sample.to(tl.int64) * table_batch + token.to(tl.int64) * features
    turns = tl.load(table + angle[:, None] + feature[None, :], mask=is_inside, other=0.0)
    real, imaginary = tl.split(tl.reshape(turns, (block_rows, padded // 2, 2)))
    imaginary *= direction
    both = tl.join(first * real - second * imaginary, second * real + first * imaginary)
    place = y + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(place, tl.reshape(both, (block_rows, padded)).to(y.dtype.element_ty), mask=is_inside)


kernel: Any = None if triton is None else triton.jit(_kernel)
