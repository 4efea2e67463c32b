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
"""Heads of a block, of one token or of several."""

# Products are rounded before they are added, as they are by torch's own kernels.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """x (batch, tokens, heads, features), the last stride 1, with neighbours turned by `direction` times their angles.

    cos, sin: (tokens, features) fp32, equal for neighbours. direction: 1 or -1. The result is contiguous.
    """
    batch, tokens, heads, features = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = batch * tokens * heads
    padded = 1 << (features - 1).bit_length()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():  # where Triton launches
        kernel[(-(-rows // BLOCK["block_rows"]),)](
            *(x, y, cos.contiguous(), sin.contiguous(), direction, rows, tokens, heads, *x.stride()[:3]),
            *(features, padded),
            **BLOCK,
            **LAUNCH,
        )
    return y


def _kernel(
    x,
    y,
    cos,
    sin,
    direction,
    rows,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    features: tl.constexpr,
    padded: tl.constexpr,
    block_rows: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    head, token, sample = row % heads, row // heads % tokens, row // heads // tokens
    feature, pair = tl.arange(0, padded), 2 * tl.arange(0, padded // 2)
    is_row = (row < rows)[:, None]
    is_inside, is_pair = is_row & (feature < features)[None, :], is_row & (pair < features)[None, :]
    # In 64 bits: a batch of clips has more than 2³¹ numbers.
    start = sample.to(tl.int64) * x_batch + token.to(tl.int64) * x_token + head * x_head
    given = tl.load(x + start[:, None] + feature[None, :], mask=is_inside, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(given, (block_rows, padded // 2, 2)))
    angle = token[:, None] * features + pair[None, :]
    c = tl.load(cos + angle, mask=is_pair, other=0.0)
    s = tl.load(sin + angle, mask=is_pair, other=0.0) * direction
    both = tl.reshape(tl.join(first * c - second * s, second * c + first * s), (block_rows, padded))
    place = y + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(place, both.to(y.dtype.element_ty), mask=is_inside)


kernel: Any = None if triton is None else triton.jit(_kernel)
