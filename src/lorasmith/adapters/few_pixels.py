"""Convolutions of few pixels with large weights, as matrix products.

oneDNN, torch's engine for convolutions on the CPU, reorders the weight in every call. Where it is large and the
picture small (the innermost levels of a UNet), that takes up to eight times as long as the products themselves.
Unfolding the pixels instead costs next to nothing there, and a channels-last weight is the matrix already.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

__all__ = ["convolve", "gradient", "is_worthwhile"]

_WEIGHTS_PER_PIXEL = 80_000
"""Numbers in the weight for each output pixel of the batch from which a matrix product was faster (bf16 and fp32)."""


def is_worthwhile(module: nn.Module, shape: Size, weight: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether a matrix product is faster for a convolution.

    Args:
        module: any module; only plain `nn.Conv2d` on the CPU qualifies.
        shape: of the input, (batch, channels, height, width).
        weight: of the module, or what it is computed with.
    """
    if type(module) is not nn.Conv2d or weight.device.type != "cpu" or len(shape) != 4:
        return False
    if isinstance(module.padding, str) or module.groups != 1 or module.dilation != (1, 1):
        return False
    pixels = shape[0] * shape[2] * shape[3] // (module.stride[0] * module.stride[1])
    enough = weight.numel() >= _WEIGHTS_PER_PIXEL * pixels
    return enough and weight.is_contiguous(memory_format=torch.channels_last)


def convolve(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d` for x (batch, in, height, width): (batch, out, height, width), channels-last.

    Args:
        module: supplies stride, padding and dilation.
        x: input.
        weight: (out, in, kernel height, kernel width), channels-last.
        bias: (out,), or None.
    """
    (kernel_height, kernel_width), (down, right), (top, left) = module.kernel_size, module.stride, _padding(module)
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    patches = pixels.unfold(1, kernel_height, down).unfold(2, kernel_width, right).permute(0, 1, 2, 4, 5, 3)
    y = F.linear(patches.flatten(3), _matrix(weight), bias)
    return y.permute(0, 3, 1, 2)


def gradient(module: nn.Conv2d, grad: Tensor, weight: Tensor, shape: Size) -> Tensor:
    """The gradient of the input, channels-last.

    Args:
        module, weight: as for `convolve`.
        grad: gradient of the result, (batch, out, height, width).
        shape: of the input.
    """
    (down, right), (top, left) = module.stride, _padding(module)
    batch, channels, height, width = shape
    rows, columns = grad.shape[2:]
    patches = (grad.permute(0, 2, 3, 1) @ _matrix(weight)).view(batch, rows, columns, *module.kernel_size, channels)
    # Summed up in fp32, as within a convolution.
    padded = torch.zeros(batch, height + 2 * top, width + 2 * left, channels)
    for i in range(module.kernel_size[0]):
        for j in range(module.kernel_size[1]):
            padded[:, i : i + down * rows : down, j : j + right * columns : right] += patches[:, :, :, i, j]
    return padded[:, top : top + height, left : left + width].to(grad.dtype).permute(0, 3, 1, 2)


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(module.padding, str)
    return module.padding


def _matrix(weight: Tensor) -> Tensor:
    """A channels-last weight as (out, kernel · in); a view."""
    return weight.permute(0, 2, 3, 1).flatten(1)
