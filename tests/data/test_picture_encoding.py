from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.data import picture_encoding
from lorasmith.data.crops import Framing
from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.data.framed_pictures import FramedPicture
from lorasmith.training.batches import sample_index
from tests.data.encoder_cases import Encoder, add, three_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return three_pictures(tmp_path)


@pytest.mark.parametrize("batch_pixels", [0, 64 * 64, 10**6])
def test_pictures_of_one_size_share_a_batch(folder: Path, batch_pixels: int) -> None:
    for number in range(4, 9):
        add(folder, f"{number}.png", (100, 100), (number, 0, 0), "a dog")
    encoder, plain = Encoder(), Encoder()
    data = encoder.encode(folder, batch_pixels=batch_pixels)
    assert sorted(shape[0] for shape in encoder.shapes) == ([1, 1, 6] if batch_pixels == 10**6 else [1] * 8)
    for one, other in zip(data.samples, plain.encode(folder).samples, strict=True):
        assert one.name == other.name and torch.equal(one.latents, other.latents)


def test_a_batch_that_is_too_large_is_halved(folder: Path) -> None:
    for number in range(4, 9):
        add(folder, f"{number}.png", (100, 100), (number, 0, 0), "a dog")
    encoder = Encoder()
    plain, sizes = encoder.image, []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise MemoryError
        return plain(pixels)

    encoder.image = encode  # type: ignore[method-assign]
    assert len(encoder.encode(folder, batch_pixels=10**6).samples) == 8
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 3, 3, 6]


@given(
    st.lists(st.tuples(st.integers(16, 400), st.integers(16, 400)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(0, 100),
)
@settings(max_examples=15)
def test_every_image_is_in_one_bucket_and_once_in_an_epoch(sizes: list[tuple[int, int]], batch: int, seed: int) -> None:
    sizes = [(w, h) for w, h in sizes if max(w, h) <= 8 * min(w, h)] or [(64, 64)]
    images = tuple(ImageFile(Path(f"{n}.png"), w, h, "", "none", digest=f"{n:064}") for n, (w, h) in enumerate(sizes))

    def read(image: ImageFile, digest: str, framings: list[Framing], *rest: object, **options: object) -> object:
        return [FramedPicture(torch.zeros(3, one.height, one.width), None) for one in framings]

    with patch.object(picture_encoding, "framed", read):
        data = Encoder().encode(FolderScan(images, (), (), ()))
        with patch.object(picture_encoding, "_READERS", 1):
            alone = Encoder().encode(FolderScan(images, (), (), ()))
    assert [one.name for one in data.samples] == [f"{n}.png" for n in range(len(sizes))]
    for sample, (width, height) in zip(data.samples, sizes, strict=True):
        rows, columns = (4 * side for side in sample.latents.shape[-2:])
        assert rows * columns <= 64**2 and rows % 16 == columns % 16 == 0
        # Beyond 4:1, the longest bucket of this resolution and step is the nearest.
        assert abs(math.log(columns / rows) - math.log(width / height)) < max(
            0.5, abs(math.log(width / height)) - math.log(16) + 0.01
        )
    draws = len(sizes) * 3
    order = [sample_index(draw, len(sizes), seed) for draw in range(draws)]
    for epoch in range(3):
        assert sorted(order[epoch * len(sizes) : (epoch + 1) * len(sizes)]) == list(range(len(sizes)))
    assert order == [sample_index(draw, len(sizes), seed) for draw in range(draws)]
    assert [one.digest for one in alone.samples] == [one.digest for one in data.samples]
