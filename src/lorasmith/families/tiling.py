"""Autoencoders in tiles, which take less memory than a picture at once.

Tiles are blended linearly where they overlap. Norms and attention of an autoencoder see one tile alone, so that colours
may differ slightly from those of the whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from lorasmith.core.allocator import is_out_of_memory

_TILE, _OVERLAP = 768, 128
"""Side and overlap of tiles in pixels, where memory has run out."""


def within_memory(
    whole: Callable[[Tensor], Tensor], batch: Tensor, in_tiles: Callable[..., Tensor], *, downscale: int, pixels: int
) -> Tensor:
    """`whole(batch)`; where memory runs out, that of each half, and of a single picture `in_tiles`.

    `in_tiles` is `encode_tiled` or `decode_tiled`, `downscale` pixels per latent, `pixels` those of a picture. One of
    at most a tile's raises the error, as pictures that a CPU encodes side by side do, which are then encoded alone.
    """
    try:
        return whole(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or (len(batch) == 1 and pixels <= _TILE**2):
            raise
    # outside of `except`, where the error's frames no longer hold memory
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if len(batch) > 1:
        halves = batch.tensor_split(2)
        return torch.cat(
            [within_memory(whole, halve, in_tiles, downscale=downscale, pixels=pixels) for halve in halves]
        )
    warnings.warn(
        f"Memory ran out in the autoencoder: pictures are computed in tiles of {_TILE} px, and may differ slightly.",
        stacklevel=4,
    )
    return in_tiles(whole, batch, downscale=downscale, tile=_TILE // downscale, overlap=_OVERLAP // downscale)


def encode_tiled(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, *, downscale: int, tile: int, overlap: int
) -> Tensor:
    """Latents of pixels, encoded in square tiles of `tile` latents that are blended linearly over `overlap`.

    `encode` returns latents for pixels (batch, 3, [frames,] height, width), `downscale` times as long on each side.
    """
    size = (pixels.shape[-2] // downscale, pixels.shape[-1] // downscale)
    side = tile * downscale

    def tile_at(top: int, left: int) -> Tensor:
        top, left = top * downscale, left * downscale
        return encode(pixels[..., top : top + side, left : left + side])

    return _blended(tile_at, _places(size, tile, overlap), size, overlap, scale=1)


def decode_tiled(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    *,
    downscale: int,
    tile: int,
    overlap: int,
    before_tile: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Pixels of latents, decoded as `encode_tiled` encodes.

    latents: (batch, channels, [frames,] height, width), the autoencoder's own. `before_tile` receives (tiles done, all
    tiles).
    """
    places = _places((latents.shape[-2], latents.shape[-1]), tile, overlap)

    def tile_at(top: int, left: int) -> Tensor:
        before_tile(places.index((top, left)), len(places))
        return decode(latents[..., top : top + tile, left : left + tile])

    return _blended(tile_at, places, (latents.shape[-2], latents.shape[-1]), overlap, scale=downscale)


def _blended(
    tile_at: Callable[[int, int], Tensor],
    places: list[tuple[int, int]],
    size: tuple[int, int],
    overlap: int,
    *,
    scale: int,
) -> Tensor:
    """The tiles that `tile_at` returns for their places in latents, `scale` numbers for each latent, as one tensor."""
    height, width = size[0] * scale, size[1] * scale
    total, weight = torch.zeros(0), torch.zeros(height, width)
    for top, left in places:
        first = tile_at(top, left)
        if not total.numel():
            total = torch.zeros(*first.shape[:-2], height, width)
        rows, columns = first.shape[-2:]
        ramp = torch.outer(_ramp(rows, overlap * scale), _ramp(columns, overlap * scale))
        area = (..., slice(top * scale, top * scale + rows), slice(left * scale, left * scale + columns))
        total[area] += first * ramp
        weight[area] += ramp
    return total / weight


def _places(size: tuple[int, int], tile: int, overlap: int) -> list[tuple[int, int]]:
    """First latents of the tiles that cover a picture; the last ones end with it."""

    def starts(length: int) -> list[int]:
        return [0] if length <= tile else [*range(0, length - tile, tile - overlap), length - tile]

    return list(product(starts(size[0]), starts(size[1])))


def _ramp(length: int, overlap: int) -> Tensor:
    """(length,) weights that rise from the edges to 1 over the overlap; the sum of tiles is divided by theirs."""
    distance = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
