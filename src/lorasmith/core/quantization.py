"""Frozen weights in fewer bytes: codes and scales, from which a weight is made again whenever it is used.

    kind        codes                                         scale (fp32)                  bytes for each number
    int8        round(w / s), s = max |row| / 127             one for each output           1 + 4 / row
    fp8_e4m3    w / s in float8, s = max |row| / 448          one for each output           1 + 4 / row
    fp8_e5m2    w / s in float8, s = max |row| / 57344        one for each output           1 + 4 / row
    nf4         nearest of 16 levels, two codes a byte        max |block| of 64 numbers     0.5 + 4 / 64

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E) without the second
quantization of its scales; codes lie as in bitsandbytes, the first of a pair in the upper half. A row is what belongs
to one output of a Linear or convolution; blocks follow the weight as it lies in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCK", "NF4_LEVELS", "PACKINGS", "Packed", "packed"]

BLOCK = 64
"""Numbers that share a scale in nf4."""

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to [−1, 1], with an exact zero."""


@dataclass(frozen=True)
class Packed:
    """A weight as it is kept.

    Attributes:
        tensors: what is kept of it.
        unpack: from those tensors, on whatever device, to the weight.
    """

    tensors: tuple[Tensor, ...]
    unpack: Callable[..., Tensor]

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def weight(self) -> Tensor:
        """The weight, made anew."""
        return self.unpack(*self.tensors)


def packed(weight: Tensor, kind: str, dtype: torch.dtype) -> Packed:
    """A weight (out, ...) as `kind` of `PACKINGS` keeps it; it unpacks to `dtype` and to the same memory format."""
    return PACKINGS[kind](weight.detach(), dtype)


def _as_it_is(weight: Tensor, dtype: torch.dtype) -> Packed:
    return Packed((weight.to(dtype),), lambda tensor: tensor)


def _scaled_int8(weight: Tensor, dtype: torch.dtype) -> Packed:
    rows, scale = _by_row(weight, 127.0)
    return Packed((rows.round_().to(torch.int8), scale), functools.partial(_from_rows, dtype=dtype))


def _scaled_fp8(weight: Tensor, dtype: torch.dtype, *, code: torch.dtype) -> Packed:
    rows, scale = _by_row(weight, torch.finfo(code).max)
    return Packed((rows.to(code), scale), functools.partial(_from_rows, dtype=dtype))


def _by_row(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Rows scaled so that their largest number becomes ±`largest`, and the scales (out, 1, ...); a new tensor."""
    full = weight.float()
    scale = full.abs().amax(tuple(range(1, full.ndim)), keepdim=True) / largest
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    return (full / scale).clamp_(-largest, largest), scale


def _from_rows(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return codes.float().mul_(scale).to(dtype)


def _normal_float(weight: Tensor, dtype: torch.dtype) -> Packed:
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    laid = weight.permute(order)
    flat = F.pad(laid.float().reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    codes = torch.bucketize(flat / scale, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    pairs = codes.view(-1, 2).to(torch.uint8)
    return Packed(
        ((pairs[:, 0] << 4) | pairs[:, 1], scale),
        functools.partial(_from_levels, shape=laid.shape, order=order, dtype=dtype),
    )


def _from_levels(codes: Tensor, scale: Tensor, *, shape: torch.Size, order: list[int], dtype: torch.dtype) -> Tensor:
    pairs = F.embedding(codes.int(), _level_pairs(codes.device))
    flat = pairs.view(-1, BLOCK).mul_(scale).view(-1)[: math.prod(shape)]
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.to(dtype).view(shape).permute(back)


@functools.cache
def _level_pairs(device: torch.device) -> Tensor:
    """The two levels that a byte stands for, (256, 2) fp32."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.cartesian_prod(levels, levels)


PACKINGS: dict[str, Callable[[Tensor, torch.dtype], Packed]] = {
    "none": _as_it_is,
    "fp8_e4m3": functools.partial(_scaled_fp8, code=torch.float8_e4m3fn),
    "fp8_e5m2": functools.partial(_scaled_fp8, code=torch.float8_e5m2),
    "int8": _scaled_int8,
    "nf4": _normal_float,
}
"""How a weight can be kept, by the name that the setting has for it."""
