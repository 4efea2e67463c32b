from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorasmith.families.base import LatentFormat
from lorasmith.families.model import decode_tiled


class Enlarging:
    """An autoencoder whose pixels are copies of its latents, twice as large."""

    latent = LatentFormat(channels=3, downscale=2, scale=1.0)

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def decode_frames(self, latents: Tensor) -> Tensor:
        self.sizes.append(tuple(latents.shape[-2:]))
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (4, 1), (5, 2), (7, 3), (64, 8)])
@pytest.mark.parametrize("size", [(3, 4), (11, 9), (4, 16)])
def test_tiles_cover_each_pixel_and_are_blended(tile: int, overlap: int, size: tuple[int, int]) -> None:
    latents = torch.rand(2, 3, 2, *size)
    vae: Any = Enlarging()
    counted: list[tuple[int, int]] = []
    pixels = decode_tiled(vae, latents, tile=tile, overlap=overlap, before_tile=lambda *at: counted.append(at))
    torch.testing.assert_close(pixels, Enlarging().decode_frames(latents))
    assert counted == [(done, len(vae.sizes)) for done in range(len(vae.sizes))]
    assert all(rows <= tile and columns <= tile for rows, columns in vae.sizes)


def test_the_seam_is_a_ramp() -> None:
    class Counting(Enlarging):
        def decode_frames(self, latents: Tensor) -> Tensor:
            super().decode_frames(latents)
            return torch.full((1, 3, 1, 8, 8), float(len(self.sizes)))

    vae: Any = Counting()
    row = decode_tiled(vae, torch.zeros(1, 3, 1, 4, 6), tile=4, overlap=2)[0, 0, 0, 0]
    assert row[:4].tolist() == [1.0] * 4
    assert row[8:].tolist() == [2.0] * 4
    assert (row[4:8].diff() > 0).all()
