from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import DataError
from lorasmith.data.dataset import EncodedDataset, Sample, encode_folder
from lorasmith.data.folder import scan_folder
from lorasmith.families.base import Conditioning

CONDITIONING = Conditioning({"context": torch.zeros(1, 3, 2)}, "a dog")


class Encoder:
    """Stands for a model: latents are the pixels' 4×4 means, conditioning the length of the caption."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(pixels.shape))
        return torch.nn.functional.avg_pool2d(pixels, 4).to(torch.bfloat16)

    def text(self, text: str) -> Conditioning:
        self.texts.append(text)
        return Conditioning({"context": torch.full((1, 1, 1), float(len(text)))}, text)

    def encode(self, folder: Path, **options) -> EncodedDataset:
        options = {"resolution": 64, "multiple": 16, **options}
        return encode_folder(scan_folder(folder), encode_image=self.image, encode_text=self.text, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size, colour, caption in (
        ("1.png", (100, 100), "white", "a dog"),
        ("2.png", (200, 100), "black", "a cat"),
        ("3.png", (50, 100), "red", "a dog"),
    ):
        Image.new("RGB", size, colour).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    return tmp_path


def test_encodes_images_at_their_buckets(folder: Path) -> None:
    encoder = Encoder()
    dataset = encoder.encode(folder)
    assert encoder.shapes == [(1, 3, 64, 64), (1, 3, 48, 80), (1, 3, 80, 48)]
    assert [sample.name for sample in dataset.samples] == ["1.png", "2.png", "3.png"]
    assert [tuple(sample.latents.shape) for sample in dataset.samples] == [(3, 16, 16), (3, 12, 20), (3, 20, 12)]
    assert all(sample.latents.dtype == torch.float32 for sample in dataset.samples)
    assert dataset.samples[0].latents.eq(1).all() and dataset.samples[1].latents.eq(-1).all()
    red = torch.tensor([1.0, -1.0, -1.0])
    assert torch.equal(dataset.samples[2].latents.mean((1, 2)), red)


def test_identical_captions_are_encoded_once(folder: Path) -> None:
    encoder = Encoder()
    samples = encoder.encode(folder).samples
    assert encoder.texts == ["a dog", "a cat"]
    assert [sample.conditioning.text for sample in samples] == ["a dog", "a cat", "a dog"]
    assert samples[0].conditioning is samples[2].conditioning


def test_repeats_stand_in_the_dataset_but_are_encoded_once(folder: Path) -> None:
    (folder / "3_x").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "3_x" / "4.png")
    encoder = Encoder()
    dataset = encoder.encode(folder)
    assert [sample.name for sample in dataset.samples] == ["1.png", "2.png", "3.png", "4.png", "4.png", "4.png"]
    assert len(dataset) == 6 and len(encoder.shapes) == 4
    assert dataset.samples[3].latents is dataset.samples[5].latents


def test_no_upscaling(folder: Path) -> None:
    encoder = Encoder()
    encoder.encode(folder, resolution=512, multiple=32, upscale=False)
    assert encoder.shapes == [(1, 3, 96, 96), (1, 3, 96, 192), (1, 3, 96, 32)]


def test_progress(folder: Path) -> None:
    calls = []
    Encoder().encode(folder, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3, "1.png"), (2, 3, "2.png"), (3, 3, "3.png")]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_name_the_image(folder: Path, bad: float) -> None:
    encoder = Encoder()

    def encode_image(pixels: torch.Tensor) -> torch.Tensor:
        latents = encoder.image(pixels)
        if len(encoder.shapes) == 2:
            latents[0, 1, 2, 3] = bad
        return latents

    with pytest.raises(DataError, match=r"latents must be finite, got NaN or infinity for 2\.png; encode in fp32 or"):
        encode_folder(
            scan_folder(folder), encode_image=encode_image, encode_text=encoder.text, resolution=64, multiple=16
        )
    assert len(encoder.shapes) == 2, "it stops at once"


def test_an_image_that_disappeared(folder: Path) -> None:
    scan = scan_folder(folder)
    (folder / "2.png").unlink()
    encoder = Encoder()
    with pytest.raises(DataError, match=r"2\.png does not exist"):
        encode_folder(scan, encode_image=encoder.image, encode_text=encoder.text, resolution=64, multiple=16)


def test_datasets_refuse_what_cannot_be_trained_on() -> None:
    good = Sample(torch.zeros(4, 8, 8), CONDITIONING, "good")
    assert len(EncodedDataset((good, good))) == 2
    with pytest.raises(DataError, match="at least one sample, got none"):
        EncodedDataset(())
    for latents in (torch.zeros(1, 4, 8, 8), torch.zeros(16, 8, 8)):
        with pytest.raises(DataError, match=r"latents must all be \(4, height, width\), got .* for odd"):
            EncodedDataset((good, Sample(latents, CONDITIONING, "odd")))
    with pytest.raises(DataError, match=r"finite.* for odd"):
        EncodedDataset((good, Sample(torch.full((4, 8, 8), torch.nan), CONDITIONING, "odd")))


def test_digests_tell_images_captions_and_sizes_apart_and_nothing_else(folder: Path) -> None:
    def digests(**options: int) -> list[str]:
        return [sample.digest for sample in Encoder().encode(folder, **options).samples]

    before = digests()
    assert len(set(before)) == 3
    assert digests() == before
    assert not set(digests(resolution=32)) & set(before)
    (folder / "1.txt").write_text("a fox")
    Image.new("RGB", (200, 100), "blue").save(folder / "2.png")
    assert [new == old for new, old in zip(digests(), before, strict=True)] == [False, False, True]
