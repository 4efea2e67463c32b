"""Decoding of large latents in tiles that overlap, in less memory than the whole takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from lorasmith.families.model import Autoencoder

__all__ = ["decode_tiled"]


def decode_tiled(
    autoencoder: Autoencoder,
    latents: Tensor,
    *,
    tile: int,
    overlap: int,
    before_tile: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Pixels of latents, decoded in square tiles that are blended linearly where they overlap.

    Args:
        autoencoder: active, on its device.
        latents: (batch, channels, [frames,] height, width), its own.
        tile: side of a tile in latents, at least 1.
        overlap: of neighbouring tiles in latents, less than `tile`.
        before_tile: called before each tile with (tiles done, number of tiles).

    Returns:
        (batch, 3, frames, height, width) in [−1, 1], fp32, on the CPU. Latents of one tile are decoded as a whole.
    """
    height, width = latents.shape[-2:]
    scale = autoencoder.latent.downscale
    places = list(product(_starts(height, tile, overlap), _starts(width, tile, overlap)))
    total = torch.zeros(0)
    weight = torch.zeros(height * scale, width * scale)
    for done, (top, left) in enumerate(places):
        before_tile(done, len(places))
        pixels = autoencoder.decode_frames(latents[..., top : top + tile, left : left + tile])
        if not done:
            total = torch.zeros(*pixels.shape[:3], height * scale, width * scale)
        rows, columns = pixels.shape[-2:]
        ramp = torch.outer(_ramp(rows, overlap * scale), _ramp(columns, overlap * scale))
        area = (..., slice(top * scale, top * scale + rows), slice(left * scale, left * scale + columns))
        total[area] += pixels * ramp
        weight[area] += ramp
    return total / weight


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """First latents of the tiles that cover a length; the last tile ends with it."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(length: int, overlap: int) -> Tensor:
    """(length,) weights that rise from the edges to 1 over the overlap; the sum of tiles is divided by theirs."""
    distance = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
