from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.encoding import load_dataset
from lorasmith.data.folder import scan_folder
from lorasmith.families.model import Autoencoder, Model, TextEncoder
from tests.data.encoder_cases import Encoder


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

    plain = encoder.image

    def encode_image(pixels: torch.Tensor) -> torch.Tensor:
        latents = plain(pixels)
        if len(encoder.shapes) == 2:
            latents[0, 1, 2, 3] = bad
        return latents

    encoder.image = encode_image  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"latents must be finite, got NaN or infinity for 2\.png; encode in fp32 or"):
        encoder.encode(folder)
    assert len(encoder.shapes) == 2, "it stops at once"


def test_an_image_that_disappeared(folder: Path) -> None:
    scan = scan_folder(folder)
    (folder / "2.png").unlink()
    encoder = Encoder()
    with pytest.raises(DataError, match=r"2\.png does not exist"):
        encoder.encode(scan)


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


@pytest.fixture
def single(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    return tmp_path


def test_both_encoders_work_on_the_device_that_is_named(
    single: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for kind in (TextEncoder, Autoencoder):

        def listen(self: object, device: torch.device | None = None, active: object = kind.active) -> object:
            seen.append((type(self), device))
            return active(self, device)  # type: ignore[operator]

        monkeypatch.setattr(kind, "active", listen)
    load_dataset(single, tiny, resolution=64, device="cpu")
    assert seen == [(TextEncoder, torch.device("cpu")), (Autoencoder, torch.device("cpu"))]


def test_a_device_that_is_not_here_is_refused(single: Path, tiny: Model) -> None:
    with pytest.raises(OptionError, match="device must be one that is here"):
        load_dataset(single, tiny, device="gpu")
