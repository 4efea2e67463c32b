"""Matrix products in fp8 of packed weights with activations or gradients, which are rounded to fp8.

    forward     x Wᵀ = sx · (x / sx) Cᵀ · s            x / sx in e4m3, one sx for each row of x
    backward    g W  = sg · ((g ∘ s) / sg) C           in e5m2, one sg for each row of g ∘ s

where a packed weight W (out, in) is codes C times a scale s for each output or for all of them (`core.quantization`).
In the backward product s is along the summed dimension, so it is multiplied into the gradient first. Gradients need
range more than precision, so they are in e5m2 (Micikevicius et al. 2022, arXiv:2209.05433), unless the weight is:
hardware has no product of e5m2 with e5m2.

`torch._scaled_mm` needs the second matrix in column order and sizes that are multiples of 16, so the backward product
makes a temporary copy of the codes. Support of scales per row depends on GPU and version (often only with results in
bf16), so it is tried once; without it the scales are multiplied afterwards.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lorasmith.core.quantization import Packed

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)  # dtypes of the weights

MULTIPLE = 16  # of which a weight's sizes must be multiples


def has_fp8_products(device: torch.device) -> bool:
    """Whether a device multiplies in fp8: NVIDIA GPUs of compute capability 8.9 (Ada) or later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Products:
    """The products of a Linear layer whose packed weight has fp8 codes and an fp32 scale."""

    def forward(self, weight: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + b` of x (..., in), in its dtype."""
        codes, scale = weight.tensors
        rows, row_scale = _rounded(x.reshape(-1, x.shape[-1]), torch.float8_e4m3fn)
        y = _product(rows, row_scale, codes.t(), scale.reshape(1, -1), x.dtype, fast=True)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(codes))

    def backward(self, weight: Packed, grad: Tensor) -> Tensor:
        """`grad W` of grad (..., out), in its dtype."""
        codes, scale = weight.tensors
        flat = grad.reshape(-1, grad.shape[-1])
        if per_output := scale.numel() > 1:
            flat = flat * scale.reshape(1, -1)
        kind = torch.float8_e4m3fn if codes.dtype == torch.float8_e5m2 else torch.float8_e5m2
        rows, row_scale = _rounded(flat, kind)
        columns = codes.t().contiguous().t()
        left = scale.new_ones(1, 1) if per_output else scale.reshape(1, 1)
        return _product(rows, row_scale, columns, left, grad.dtype, fast=False).view(*grad.shape[:-1], codes.shape[1])


def _rounded(rows: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (n, k) in fp8, scaled so that each maximum is the format's, and the scales (n, 1) in fp32."""
    largest = torch.finfo(kind).max
    scale = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32) / largest
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
    return (rows / scale).clamp_(-largest, largest).to(kind), scale


def _product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """`(a · scale_a) (b · scale_b)` for a (n, k), scale_a (n, 1), b (k, m) in columns, scale_b (1, m) or (1, 1).

    `fast` lets the GPU accumulate in fewer bits, which forward products tolerate.
    """
    scaled = next((one for one in (dtype, torch.bfloat16) if _scales_rows(a.device, a.dtype, b.dtype, one)), None)
    if scaled is not None:
        scale_b = scale_b.expand(1, b.shape[1]).contiguous()
        y = torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=scaled, use_fast_accum=fast)
        return y.to(dtype)
    one = scale_a.new_ones(())
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # the sums would overflow fp16
    y = torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=wide, use_fast_accum=fast)
    return y.mul_(scale_a).mul_(scale_b).to(dtype)


@functools.cache
def _scales_rows(device: torch.device, a: torch.dtype, b: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a device supports scales per row with these formats, with correct results."""
    left, right = (torch.ones(MULTIPLE, MULTIPLE, device=device).to(kind) for kind in (a, b))
    scale = torch.arange(1.0, MULTIPLE + 1, device=device)
    rows, columns = scale.reshape(-1, 1), scale.reshape(1, -1)
    try:
        y = torch._scaled_mm(left, right.t(), scale_a=rows, scale_b=columns, out_dtype=dtype)
    except RuntimeError:  # not supported
        return False
    return bool(torch.allclose(y.float(), MULTIPLE * rows * columns, rtol=0.01))
