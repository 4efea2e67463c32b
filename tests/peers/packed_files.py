"""Files with packed weights, as ComfyUI reads them, and the weights that they stand for by the plain formulas.

Nothing here is fast, and nothing is shared with the package: codes are decoded bit by bit, rotations are products with
whole matrices, and places in tiles are counted out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GROUP = 16
"""Inputs that `convrot` rotates together."""

Files = tuple[dict[str, Tensor], Tensor]
"""Tensors by the last part of their name, and the weight in fp32."""

E2M1 = [
    (1 - 2 * (c >> 3)) * (0.5 * (c & 1) if not c & 6 else (1 + 0.5 * (c & 1)) * 2.0 ** ((c >> 1 & 3) - 1))
    for c in range(16)
]


def described(**said: object) -> Tensor:
    """What `comfy_quant` of a layer holds."""
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def pack(kind: str, weight: Tensor) -> Files:
    """A weight (out, in) packed as a kind."""
    return KINDS[kind](weight.float())


def write(path: Path, tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Write a checkpoint whose matrices are packed as a kind; returns the tensors that it stands for."""
    file: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        file[name] = meant[name] = tensor.contiguous()
        if tensor.ndim == 2:
            stem = name.removesuffix("weight")
            packed, meant[name] = pack(kind, tensor)
            file |= {f"{stem}{leaf}": one.contiguous() for leaf, one in packed.items()}
    save_file(file, path)
    return meant


def _fp8(weight: Tensor) -> Files:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    said = described(format="float8_e4m3fn")
    return {"weight": codes, "weight_scale": scale, "comfy_quant": said}, codes.float() * scale


def _int8(weight: Tensor) -> Files:
    scale = weight.abs().max() / 127
    codes = (weight / scale).round().to(torch.int8)
    said = described(format="int8_tensorwise")
    return {"weight": codes, "weight_scale": scale, "comfy_quant": said}, codes.float() * scale


def _int8_rows(weight: Tensor) -> Files:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    said = described(format="int8_tensorwise")
    return {"weight": codes, "weight_scale": scale, "comfy_quant": said}, codes.float() * scale


def _convrot(weight: Tensor) -> Files:
    quarter = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    rotation = torch.block_diag(*[torch.kron(quarter, quarter) / 4] * (weight.shape[1] // GROUP))
    files, meant = _int8_rows(weight @ rotation)
    said = described(format="int8_tensorwise", convrot=True, convrot_groupsize=GROUP)
    return files | {"comfy_quant": said}, meant @ rotation


def _nvfp4(weight: Tensor) -> Files:
    rows, width = weight.shape
    blocks = weight.reshape(rows, -1, 16)
    scale = weight.abs().max() / (6 * 448)
    block_scale = (blocks.abs().amax(2) / 6 / scale).to(torch.float8_e4m3fn)
    total = block_scale.float() * scale
    levels = torch.tensor(E2M1)
    nearest = (blocks.unsqueeze(-1) / total.clamp(min=1e-30)[..., None, None] - levels).abs().argmin(-1)
    meant = (levels[nearest] * total.unsqueeze(-1)).reshape(rows, width)
    pairs = nearest.reshape(rows, -1, 2)
    return {
        "weight": (pairs[..., 0] * 16 + pairs[..., 1]).to(torch.uint8),
        "weight_scale": _tiled(block_scale),
        "weight_scale_2": scale,
        "input_scale": torch.tensor(3.0),
        "comfy_quant": described(format="nvfp4"),
    }, meant


def _nvfp4_smoothed(weight: Tensor) -> Files:
    """The layer multiplies its input by factors of its own, which the weight is divided by."""
    factors = 1 + torch.arange(weight.shape[1]) % 5 / 4
    files, meant = _nvfp4(weight / factors)
    return files | {"pre_quant_scale": factors}, meant * factors


def _mxfp8(weight: Tensor) -> Files:
    rows, width = weight.shape
    blocks = weight.reshape(rows, -1, 32)
    exponent = (blocks.abs().amax(2) / 448).log2().ceil()
    codes = (blocks * (2.0**-exponent).unsqueeze(-1)).to(torch.float8_e4m3fn)
    meant = (codes.float() * (2.0**exponent).unsqueeze(-1)).reshape(rows, width)
    scales = _tiled((exponent + 127).to(torch.uint8)).view(torch.float8_e8m0fnu)
    said = described(format="mxfp8")
    return {"weight": codes.reshape(rows, width), "weight_scale": scales, "comfy_quant": said}, meant


def rounded(kind: str, matrix: Tensor) -> Tensor:
    """A matrix (n, k) whose rows are packed each by itself, as activations are."""
    return torch.cat([pack(kind, row.unsqueeze(0))[1] for row in matrix])


def _tiled(scales: Tensor) -> Tensor:
    """Scales of blocks in tiles of 128 × 4, of which each is 32 × 16 in memory."""
    rows, columns = (-(-size // tile) * tile for size, tile in zip(scales.shape, (128, 4), strict=True))
    data = torch.zeros(rows * columns, dtype=torch.uint8)
    r, c = torch.meshgrid(*(torch.arange(size) for size in scales.shape), indexing="ij")
    tile = (r // 128) * (columns // 4) + c // 4
    data[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales.view(torch.uint8)
    return data.view(scales.dtype).reshape(rows, columns)


KINDS: dict[str, Callable[[Tensor], Files]] = {
    "fp8": _fp8,
    "int8": _int8,
    "int8 by row": _int8_rows,
    "int8 with ConvRot": _convrot,
    "nvfp4": _nvfp4,
    "nvfp4 with factors": _nvfp4_smoothed,
    "mxfp8": _mxfp8,
}

ROUNDING = {
    "fp8": 0.04,
    "int8": 0.02,
    "int8 by row": 0.01,
    "int8 with ConvRot": 0.01,
    "nvfp4": 0.13,
    "nvfp4 with factors": 0.13,
    "mxfp8": 0.04,
}
"""Error of a weight (RMS) by kind, at most."""
