"""Formats in which files for ComfyUI pack the weight of a layer, and the weights that their codes stand for.

    format              codes                         scales                                   weight
    fp8                 float8_e4m3fn, float8_e5m2    one, or one for each output              code · scale
    int8                int8                          one, or one for each output              code · scale
    int8 with ConvRot   int8                          one, or one for each output              (code · scale) H / √G
    nvfp4               e2m1, two in a byte           e4m3 for each 16 inputs, and one fp32    code · block · scale
    mxfp8               float8_e4m3fn                 a power of two for each 32 inputs        code · 2^(e − 127)

H rotates each group of G inputs: the Kronecker power of a Hadamard matrix of order 4. It is symmetric and, with √G, its
own inverse. All formats are packed row by row of the weight, so that rows of a `Packed` are packed too; scales of
blocks, which files store in tiles, are untiled for that. fp8 and int8 are `core.quantization.scaled_codes`.

Tiles are those of cuBLAS (https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout), mxfp8 and e2m1 those of
the OCP Microscaling specification (2023).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.core.quantization import Packed, level_pairs

__all__ = ["MXFP8_BLOCK", "NVFP4_BLOCK", "mxfp8", "nvfp4", "rotated_int8", "tiled_size", "untiled"]

NVFP4_BLOCK = 16
"""Inputs that share a scale in nvfp4."""

MXFP8_BLOCK = 32
"""Inputs that share a scale in mxfp8."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_LEVELS = (*_E2M1, *(-level for level in _E2M1))
"""Numbers of the 4-bit float by its code; the upper half are the negative ones."""

_TILE = (128, 4)


def rotated_int8(codes: Tensor, scale: Tensor, group: int) -> Packed:
    """A weight in int8 whose inputs were rotated in groups (ConvRot).

    Args:
        codes: (out, in), int8.
        scale: (out, 1) or (1, 1), fp32.
        group: inputs rotated together, a power of 4 that divides `in`.
    """
    return Packed((codes, scale), functools.partial(_from_rotated, group=group), torch.float32, codes.shape)


def nvfp4(codes: Tensor, blocks: Tensor, scale: Tensor, smoothing: Tensor | None = None) -> Packed:
    """A weight in nvfp4.

    Args:
        codes: (out, in / 2), uint8, the first of two in the upper half.
        blocks: (out, in / 16), float8_e4m3fn.
        scale: (1, 1), fp32.
        smoothing: (1, in), fp32, by which the layer multiplies its input, and so the columns of the weight; or None.
    """
    tensors = (codes, blocks, scale) if smoothing is None else (codes, blocks, scale, smoothing)
    return Packed(tensors, _from_nvfp4, torch.float32, torch.Size((len(codes), 2 * codes.shape[1])))


def mxfp8(codes: Tensor, exponents: Tensor) -> Packed:
    """A weight in mxfp8.

    Args:
        codes: (out, in), float8_e4m3fn.
        exponents: (out, in / 32), uint8.
    """
    # As bytes: products of fp8 codes (`core.fp8_products`) take scales of rows, which these are not.
    return Packed((codes.view(torch.uint8), exponents), _from_mxfp8, torch.float32, codes.shape)


def tiled_size(rows: int, columns: int) -> int:
    """Number of scales in a file for a matrix of rows × columns of them, which is padded to whole tiles."""
    return math.prod(_TILE[i] * -(-size // _TILE[i]) for i, size in enumerate((rows, columns)))


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales of blocks (rows, columns) from the tiles of a file.

    A tile has 128 rows and 4 columns; its row r is stored in place r mod 32 and there in quarter r div 32.

    Args:
        scales: as many bytes as `tiled_size` says, in any shape.
        rows, columns: of the result.
    """
    height, width = -(-rows // _TILE[0]), -(-columns // _TILE[1])
    tiles = scales.reshape(height, width, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height * _TILE[0], width * _TILE[1])[:rows, :columns].contiguous()


def _from_rotated(codes: Tensor, scale: Tensor, *, group: int, dtype: torch.dtype) -> Tensor:
    # Sums of codes are integers that every fp32 product computes exactly, so only the scale is rounded.
    sums = codes.float().reshape(-1, group) @ _rotation(group, codes.device)
    return sums.view(codes.shape).mul_(scale / math.sqrt(group)).to(dtype)


def _from_nvfp4(codes: Tensor, blocks: Tensor, scale: Tensor, *smoothing: Tensor, dtype: torch.dtype) -> Tensor:
    pairs = F.embedding(codes.int(), level_pairs(_E2M1_LEVELS, codes.device))
    weight = pairs.view(len(codes), -1, NVFP4_BLOCK).mul_((blocks.float() * scale).unsqueeze(-1)).view(len(codes), -1)
    for factor in smoothing:
        weight = weight.mul_(factor)
    return weight.to(dtype)


def _from_mxfp8(codes: Tensor, exponents: Tensor, *, dtype: torch.dtype) -> Tensor:
    scale = F.embedding(exponents.int(), _powers(codes.device))
    numbers = codes.view(torch.float8_e4m3fn).float().view(len(codes), -1, MXFP8_BLOCK)
    return numbers.mul_(scale).view(codes.shape).to(dtype)


@functools.cache
def _rotation(group: int, device: torch.device) -> Tensor:
    """H of a group, (group, group) of ±1 in fp32."""
    quarter = (1 - 2 * torch.eye(4, device=device)).flip(1)
    rotation = quarter
    while len(rotation) < group:
        rotation = torch.kron(rotation, quarter)
    return rotation


@functools.cache
def _powers(device: torch.device) -> Tensor:
    """2^(e − 127) for each byte e, (256, 1) fp32; 255 is not a number."""
    powers = torch.ldexp(torch.ones(256, device=device), torch.arange(256, device=device) - 127)
    powers[255] = torch.nan
    return powers.unsqueeze(1)
