"""Autoencoders within little memory: halves of a batch, blended tiles, and 16-bit products."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformer_models import TINY

from lorasmith.data.image_files import to_tensor
from lorasmith.families import model, tiling
from lorasmith.families.forms import LatentFormat
from lorasmith.families.locating import BUILT_IN_BASE
from lorasmith.families.model import Autoencoder, Model
from lorasmith.families.parts.autoencoders import AutoencoderKind
from lorasmith.families.tiling import decode_tiled, encode_tiled
from tests.covering import slow_except


class Enlarging:
    """An autoencoder whose pixels are copies of its latents, twice as large."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def decode_frames(self, latents: Tensor) -> Tensor:
        self.sizes.append(tuple(latents.shape[-2:]))
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (4, 1), (5, 2), (7, 3), (64, 8)])
@pytest.mark.parametrize("size", [(3, 4), (11, 9), (4, 16)])
def test_tiles_cover_each_pixel_and_are_blended(tile: int, overlap: int, size: tuple[int, int]) -> None:
    latents = torch.rand(2, 3, 2, *size)
    vae = Enlarging()
    counted: list[tuple[int, int]] = []
    pixels = decode_tiled(
        vae.decode_frames, latents, downscale=2, tile=tile, overlap=overlap, before_tile=lambda *at: counted.append(at)
    )
    torch.testing.assert_close(pixels, Enlarging().decode_frames(latents))
    assert counted == [(done, len(vae.sizes)) for done in range(len(vae.sizes))]
    assert all(rows <= tile and columns <= tile for rows, columns in vae.sizes)


def test_the_seam_is_a_ramp() -> None:
    class Counting(Enlarging):
        def decode_frames(self, latents: Tensor) -> Tensor:
            super().decode_frames(latents)
            return torch.full((1, 3, 1, 8, 8), float(len(self.sizes)))

    row = decode_tiled(Counting().decode_frames, torch.zeros(1, 3, 1, 4, 6), downscale=2, tile=4, overlap=2)[0, 0, 0, 0]
    assert row[:4].tolist() == [1.0] * 4
    assert row[8:].tolist() == [2.0] * 4
    assert (row[4:8].diff() > 0).all()


def smooth(*shape: int) -> Tensor:
    """Pixels without an edge, (1, 3, height, width)."""
    g = torch.Generator().manual_seed(0)
    return nn.functional.interpolate(torch.randn(1, 3, 6, 6, generator=g), shape, mode="bicubic").clamp(-1, 1)


KINDS = ("flux1", "flux2", "qwen-image", "wan22-5b", "hunyuan-video15")


@pytest.mark.parametrize("family", slow_except(KINDS, "flux1", "wan22-5b"))
def test_tiles_of_each_kind_of_autoencoder(family: str) -> None:
    """Where one tile is alone, there are its own latents and pixels."""
    vae = autoencoder(family)
    scale = vae.latent.downscale
    pixels = smooth(10 * scale, 8 * scale)
    sizes = {"downscale": scale, "tile": 6, "overlap": 2}
    whole = vae.encode(pixels)
    tiles = encode_tiled(vae.encode, pixels, **sizes)
    alone = vae.encode(pixels[..., : 6 * scale, -6 * scale :])
    assert tiles.shape == whole.shape
    torch.testing.assert_close(tiles[..., :4, -2:], alone[..., :4, -2:])
    pixels = vae.decode_frames(whole)
    tiles = decode_tiled(vae.decode_frames, whole, **sizes)
    alone = vae.decode_frames(whole[..., :6, -6:])
    assert tiles.shape == pixels.shape
    torch.testing.assert_close(tiles[..., : 4 * scale, -2 * scale :], alone[..., : 4 * scale, -2 * scale :])


def test_tiles_of_a_trained_autoencoder_are_near_to_the_whole(tiny: Model) -> None:
    vae = tiny.autoencoder
    path = next((BUILT_IN_BASE / "input" / "fox").glob("*.png"))
    pixels = to_tensor(Image.open(path).convert("RGB").resize((128, 128)))[None]
    sizes = {"downscale": vae.latent.downscale, "tile": 20, "overlap": 8}
    latents = vae.encode(pixels)
    assert 0 < _error(encode_tiled(vae.encode, pixels, **sizes), latents) < 0.2
    whole = vae.decode_frames(latents)
    assert 0 < _error(decode_tiled(vae.decode_frames, latents, **sizes), whole) < 0.2


@pytest.mark.parametrize("family", KINDS)
def test_each_kind_of_autoencoder_encodes_in_bf16(family: str) -> None:
    vae = autoencoder(family)
    pixels = smooth(4 * vae.latent.downscale, 4 * vae.latent.downscale)
    whole = vae.encode(pixels)
    coarse = replace(vae, dtype=torch.bfloat16).encode(pixels)
    assert coarse.dtype == torch.float32 and 0 < _error(coarse, whole) < 0.05
    torch.testing.assert_close(vae.encode(pixels), whole, rtol=0, atol=0, msg="the module is as before")


def autoencoder(family: str) -> Autoencoder:
    given = TINY[family]
    return Autoencoder(given.parts()["vae"].eval(), given.family.autoencoder.kind, family)


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Deviation as a share of that of the numbers themselves."""
    return ((ours - theirs).std() / theirs.std()).item()


@dataclass
class Small(AutoencoderKind):
    """Latents are means of 4×4 pixels, on a device with memory for few pixels."""

    name = "small"
    most: int  # pixels of a batch
    batches: list[tuple[int, ...]] = field(default_factory=list)

    def recognises(self, shapes: object) -> bool:
        return False

    channels = build = None  # type: ignore[assignment]

    def latent_format(self, vae: object) -> LatentFormat:
        return LatentFormat(3, 4, scale=1.0)

    def _room(self, batch: Tensor, pixels: int) -> None:
        self.batches.append(tuple(batch.shape))
        if pixels > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB")

    def encode(self, vae: object, pixels: Tensor) -> Tensor:
        self._room(pixels, pixels[:, 0].numel())
        return nn.functional.avg_pool2d(pixels, 4)

    def decode(self, vae: object, latents: Tensor) -> Tensor:
        self._room(latents, 16 * latents[:, 0].numel())
        return nn.functional.interpolate(latents, scale_factor=4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(tiling, "_TILE", 32)
    monkeypatch.setattr(tiling, "_OVERLAP", 8)
    kind = Small(most=2 * 32 * 32)
    monkeypatch.setattr(model, "AUTOENCODERS", {"small": kind})
    return kind


def test_a_batch_that_is_too_large_is_divided(small: Small) -> None:
    vae = Autoencoder(nn.Linear(1, 1), "small", "small")
    pixels = torch.rand(6, 3, 32, 32)
    torch.testing.assert_close(vae.encode(pixels), nn.functional.avg_pool2d(pixels, 4), rtol=0, atol=0)
    assert [shape[0] for shape in small.batches] == [6, 3, 2, 1, 3, 2, 1]


def test_a_picture_that_is_too_large_is_computed_in_tiles(small: Small) -> None:
    vae = Autoencoder(nn.Linear(1, 1), "small", "small")
    pixels = torch.rand(1, 3, 64, 48)
    with pytest.warns(UserWarning, match="Memory ran out in the autoencoder: pictures are computed in tiles of 32 px"):
        latents = vae.encode(pixels)
    torch.testing.assert_close(latents, nn.functional.avg_pool2d(pixels, 4))
    with pytest.warns(UserWarning, match="in tiles"):
        back = vae.decode(latents)
    torch.testing.assert_close(back, nn.functional.interpolate(latents, scale_factor=4))


def test_a_picture_of_a_tile_that_does_not_fit_is_an_error(small: Small) -> None:
    small.most = 100
    with pytest.raises(torch.OutOfMemoryError, match=r"8\.00 GiB"):
        Autoencoder(nn.Linear(1, 1), "small", "small").encode(torch.rand(1, 3, 32, 32))
