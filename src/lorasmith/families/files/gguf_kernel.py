"""A Triton kernel that unpacks GGUF's blocks: bytes are read once and numbers written once.

A block of a K-quant has 256 numbers in 8 or 16 parts with scales of a few bits, others 32 numbers with one scale. The
layouts are those of ggml (`ggml-quants.h`), and numbers are computed in fp32 in the order of diffusers' functions.

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

NUMBERS = 1024
"""Numbers of a program."""

LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def unpacked(kind: str, parts: int, size: int, size_bytes: int, codes: Tensor, y: Tensor) -> Tensor:
    """y (numbers,) with the numbers of codes, contiguous bytes: blocks of `size` in `parts`, of `size_bytes` each."""
    blocks = y.numel() // size
    with torch.cuda.device(y.device) if y.is_cuda else contextlib.nullcontext():  # where Triton launches
        kernel[(-(-y.numel() // NUMBERS),)](
            *(codes, y, blocks),
            kind=kind,
            parts=parts,
            width=size // parts,
            size_bytes=size_bytes,
            numbers=NUMBERS,
            **LAUNCH,
        )
    return y


def _kernel(
    codes,
    y,
    blocks,
    kind: tl.constexpr,
    parts: tl.constexpr,
    width: tl.constexpr,
    size_bytes: tl.constexpr,
    numbers: tl.constexpr,
):
    size: tl.constexpr = parts * width
    block = tl.program_id(0).to(tl.int64) * (numbers // size) + tl.arange(0, numbers // size)
    is_inside = block < blocks
    here = codes + block * size_bytes
    # Tiles of blocks, parts and numbers of a part.
    part = tl.arange(0, parts)
    n = part[:, None] * width + tl.arange(0, width)[None, :]
    of_part, inside_part = here[:, None] + part[None, :] * 0, is_inside[:, None]
    of_number, inside = here[:, None, None] + n[None, :, :] * 0, is_inside[:, None, None]
    if kind == "Q4_K" or kind == "Q5_K":
        # Six bits for each scale and minimum: of the first four parts in bytes 4 to 11, of the others four bits in
        # bytes 12 to 15, and two above those of the first ones.
        is_first, fourth = (part < 4)[None, :], (part % 4)[None, :]
        scale_byte = tl.load(of_part + 4 + fourth, mask=inside_part, other=0).to(tl.int32)
        least_byte = tl.load(of_part + 8 + fourth, mask=inside_part, other=0).to(tl.int32)
        both = tl.load(of_part + 12 + fourth, mask=inside_part, other=0).to(tl.int32)
        scale = tl.where(is_first, scale_byte & 63, (both & 15) | ((scale_byte >> 2) & 48))
        least = tl.where(is_first, least_byte & 63, (both >> 4) | ((least_byte >> 2) & 48))
        by = _half(here, is_inside)[:, None] * scale.to(tl.float32)
        offset = _half(here + 2, is_inside)[:, None] * least.to(tl.float32)
        start: tl.constexpr = 16 if kind == "Q4_K" else 48
        byte = tl.load(of_number + (start + n // 64 * 32 + n % 32)[None, :, :], mask=inside, other=0).to(tl.int32)
        q = (byte >> (n // 32 % 2 * 4)[None, :, :]) & 15
        if kind == "Q5_K":
            high = tl.load(of_number + (16 + n % 32)[None, :, :], mask=inside, other=0).to(tl.int32)
            q |= ((high >> (n // 32)[None, :, :]) & 1) << 4
        value = by[:, :, None] * q.to(tl.float32) - offset[:, :, None]
    elif kind == "Q6_K":
        scale = _signed(tl.load(of_part + 192 + part[None, :], mask=inside_part, other=0))
        by = _half(here + 208, is_inside)[:, None] * scale
        low = tl.load(of_number + (n // 128 * 64 + n % 64)[None, :, :], mask=inside, other=0).to(tl.int32)
        high = tl.load(of_number + (128 + n // 128 * 32 + n % 32)[None, :, :], mask=inside, other=0).to(tl.int32)
        q = (low >> (n // 64 % 2 * 4)[None, :, :]) & 15
        q |= ((high >> (n // 32 % 4 * 2)[None, :, :]) & 3) << 4
        value = by[:, :, None] * (q - 32).to(tl.float32)
    elif kind == "Q3_K":
        low = tl.load(of_part + 96 + (part % 8)[None, :], mask=inside_part, other=0).to(tl.int32)
        high = tl.load(of_part + 104 + (part % 4)[None, :], mask=inside_part, other=0).to(tl.int32)
        scale = ((low >> (part // 8 * 4)[None, :]) & 15) | (((high >> (part // 4 * 2)[None, :]) & 3) << 4)
        by = _half(here + 108, is_inside)[:, None] * (scale - 32).to(tl.float32)
        byte = tl.load(of_number + (32 + n // 128 * 32 + n % 32)[None, :, :], mask=inside, other=0).to(tl.int32)
        mask = tl.load(of_number + (n % 32)[None, :, :], mask=inside, other=0).to(tl.int32)
        q = (byte >> (n // 32 % 4 * 2)[None, :, :]) & 3
        q -= (((mask >> (n // 32)[None, :, :]) & 1) ^ 1) << 2
        value = by[:, :, None] * q.to(tl.float32)
    elif kind == "Q2_K":
        both = tl.load(of_part + part[None, :], mask=inside_part, other=0).to(tl.int32)
        by = _half(here + 80, is_inside)[:, None] * (both & 15).to(tl.float32)
        offset = _half(here + 82, is_inside)[:, None] * (both >> 4).to(tl.float32)
        byte = tl.load(of_number + (16 + n // 128 * 32 + n % 32)[None, :, :], mask=inside, other=0).to(tl.int32)
        q = (byte >> (n // 32 % 4 * 2)[None, :, :]) & 3
        value = by[:, :, None] * q.to(tl.float32) - offset[:, :, None]
    else:
        by = _half(here, is_inside)[:, None, None]
        if kind == "Q8_0":
            value = by * _signed(tl.load(of_number + (2 + n)[None, :, :], mask=inside, other=0))
        else:
            has_offset: tl.constexpr = kind == "Q4_1" or kind == "Q5_1"
            has_high: tl.constexpr = kind == "Q5_0" or kind == "Q5_1"
            high_at: tl.constexpr = 4 if has_offset else 2
            low_at: tl.constexpr = high_at + 4 if has_high else high_at
            byte = tl.load(of_number + (low_at + n % 16)[None, :, :], mask=inside, other=0).to(tl.int32)
            q = (byte >> (n // 16 * 4)[None, :, :]) & 15
            if has_high:
                high = tl.load(of_number + (high_at + n // 8)[None, :, :], mask=inside, other=0).to(tl.int32)
                q |= ((high >> (n % 8)[None, :, :]) & 1) << 4
            if has_offset:
                value = by * q.to(tl.float32) + _half(here + 2, is_inside)[:, None, None]
            else:
                value = by * (q - (16 if has_high else 8)).to(tl.float32)
    place = y + block[:, None, None] * size + n[None, :, :]
    tl.store(place, value.to(y.dtype.element_ty), mask=inside)


def _half_at(pointer, is_inside):
    """A number in fp16, which begins at any byte, in fp32."""
    low = tl.load(pointer, mask=is_inside, other=0).to(tl.uint16)
    high = tl.load(pointer + 1, mask=is_inside, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


def _signed_byte(byte):
    return byte.to(tl.int8, bitcast=True).to(tl.float32)


kernel: Any = None if triton is None else triton.jit(_kernel)
_half: Any = None if triton is None else triton.jit(_half_at)
_signed: Any = None if triton is None else triton.jit(_signed_byte)
