"""CUDA's arithmetic on a CPU, where torch's kernels differ: a mode for tests of numbers that are the same on both."""

from __future__ import annotations

from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_DIVISIONS = (_ATEN.div.Tensor, _ATEN.div_.Tensor, _ATEN.div.Scalar, _ATEN.div_.Scalar)


class CudaDivision(TorchDispatchMode):
    """Inside the context, a tensor is divided by a number as on CUDA: times its reciprocal, rounded to fp32.

    That is `div_true_kernel_cuda` in BinaryDivTrueKernel.cu; the CPU's kernel divides.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DIVISIONS or not _is_number(args[1]) or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        inverse = torch.tensor(1.0, dtype=torch.float32) / torch.tensor(float(args[1]), dtype=torch.float32)
        product = (args[0].float() * inverse).to(args[0].dtype)
        return args[0].copy_(product) if func.__name__.startswith("div_") else product


def _is_number(divisor: object) -> bool:
    return isinstance(divisor, Number) or (isinstance(divisor, Tensor) and divisor.ndim == 0)
