"""Faster products of Linear layers, where a processor has faster kernels than those that torch calls."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.adapters.frozen_layer import Products
from lorasmith.core.quantization import Packed


def faster_products(device: torch.device, dtype: torch.dtype) -> Products | None:
    """Products in `dtype` on a device that are faster than torch's own, if there are any."""
    is_fp32 = device.type == "cpu" and dtype == torch.float32
    return OneDnnProducts() if is_fp32 and _mkl_lacks_avx512() else None


@functools.cache
def _mkl_lacks_avx512() -> bool:
    """Whether this is a processor of AMD with AVX-512, which MKL uses on Intel's alone."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    described = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (described.read_text() if described.exists() else platform.processor())


class OneDnnProducts:
    """By oneDNN, which multiplies fp32 matrices with AVX-512 on all processors that have it."""

    def forward(
        self, weight: Packed | Tensor, x: Tensor, bias: Tensor | None, shared: dict[object, Any] | None = None
    ) -> Tensor:
        return _product(x, _plain(weight), bias)

    def backward(self, weight: Packed | Tensor, grad: Tensor) -> Tensor:
        return _product(grad, _plain(weight).t(), None)


_ROWS = 16
"""Rows from which it is faster. Their number is rounded up to a multiple: each has kernels of its own, half a MB."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count < _ROWS:
        return F.linear(x, weight, bias)
    if count % _ROWS:
        rows = F.pad(rows, (0, 0, 0, -count % _ROWS))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product[:count].view(*x.shape[:-1], -1)


def _plain(weight: Packed | Tensor) -> Tensor:
    return weight.weight() if isinstance(weight, Packed) else weight
