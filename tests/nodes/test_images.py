from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import DataError
from lorasmith.workflow import validate


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


def test_an_opaque_picture_has_an_empty_mask(bench: Any, inputs: Path) -> None:
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10).save(inputs / "a.png")
    image, mask = (items[0] for items in bench.call("LoadImage", image="a.png").outputs)
    assert image.shape == (1, 2, 4, 3)
    assert image.dtype == torch.float32
    assert torch.equal((image * 255).round().flatten(), torch.arange(24.0) * 10)
    assert mask.shape == (1, 64, 64)
    assert not mask.any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_the_mask_and_leaves_the_colours(bench: Any, inputs: Path, mode: str) -> None:
    pixels = np.full((2, 3, 4), 128, dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[0, 0, 3] = 0
    picture = Image.fromarray(pixels)
    if mode == "P":
        indexed = Image.new("P", (3, 2), 1)
        indexed.putpalette([9, 9, 9, 128, 128, 128])
        indexed.putpixel((0, 0), 0)
        indexed.save(inputs / "a.png", transparency=0)
    else:
        picture.convert(mode).save(inputs / "a.png")
    image, mask = (items[0] for items in bench.call("LoadImage", image="a.png").outputs)
    assert mask.tolist() == [[[1, 0, 0], [0, 0, 0]]]
    assert image[0, 1, 1].tolist() == pytest.approx([128 / 255] * 3)
    assert image[0, 0, 0, 0].item() == pytest.approx(9 / 255 if mode == "P" else 128 / 255)


def test_exif_orientation_is_honoured(bench: Any, inputs: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(inputs / "a.jpg", exif=exif)
    assert bench.one("LoadImage", image="a.jpg").shape == (1, 40, 20, 3)


def test_frames_of_an_animation_are_a_batch(bench: Any, inputs: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(inputs / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert bench.one("LoadImage", image="a.webp")[:, 0, 0].tolist() == torch.eye(3).tolist()


def test_files_of_subfolders_and_other_places_are_found_when_named(bench: Any, inputs: Path) -> None:
    outputs = inputs.parent / "output"
    outputs.mkdir()
    Image.new("RGB", (2, 2)).save(outputs / "b.png")
    for name in ("fox/fox_1.png", "b.png [output]"):
        validate(
            {
                "1": {"class_type": "LoadImage", "inputs": {"image": name}},
                "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
            },
            bench.folders,
        )
        assert bench.one("LoadImage", image=name).ndim == 4


def test_a_text_file_named_png_is_refused(bench: Any, inputs: Path) -> None:
    (inputs / "a.png").write_text("hello")
    with pytest.raises(DataError, match="not an image"):
        bench.call("LoadImage", image="a.png")


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"])
def test_each_method_scales_to_the_size(bench: Any, pictures: Callable[..., Tensor], method: str) -> None:
    image = pictures(2, 40, 80)
    stretched = bench.one("ImageScale", image=image, upscale_method=method, width=32, height=24, crop="disabled")
    assert stretched.shape == (2, 24, 32, 3)
    # A smooth picture looks the same at any size, whatever the method.
    centre = stretched[:, 11:13, 15:17].mean((1, 2)) - image[:, 18:22, 36:44].mean((1, 2))
    assert centre.abs().max() < 0.05


def test_a_missing_side_keeps_the_proportions(bench: Any, pictures: Callable[..., Tensor]) -> None:
    image = pictures(1, 40, 80)
    scale = {"image": image, "upscale_method": "area", "crop": "disabled"}
    assert bench.one("ImageScale", **scale, width=0, height=20).shape == (1, 20, 40, 3)
    assert bench.one("ImageScale", **scale, width=40, height=0).shape == (1, 20, 40, 3)
    assert bench.one("ImageScale", **scale, width=0, height=0) is image


def test_center_crops_instead_of_stretching(bench: Any) -> None:
    image = torch.zeros(1, 10, 30, 3)
    image[:, :, 10:20] = 1
    scale = {"image": image, "upscale_method": "nearest-exact", "width": 10, "height": 10}
    assert bench.one("ImageScale", **scale, crop="center").all()
    assert not bench.one("ImageScale", **scale, crop="disabled").all()
    tall = {**scale, "image": image.transpose(1, 2)}
    assert bench.one("ImageScale", **tall, crop="center").all()


def test_a_batch_takes_the_size_of_its_first_picture(bench: Any, pictures: Callable[..., Tensor]) -> None:
    first, second = pictures(2, 16, 16), pictures(1, 32, 64, seed=1)
    batch = bench.one("ImageBatch", image1=first, image2=second)
    assert batch.shape == (3, 16, 16, 3)
    assert torch.equal(batch[:2], first)


def test_a_channel_is_read_as_a_mask(bench: Any, inputs: Path) -> None:
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[...] = (255, 0, 51, 128)
    Image.fromarray(pixels).save(inputs / "a.png")
    for channel, value in {"red": 1.0, "green": 0.0, "blue": 0.2, "alpha": 1 - 128 / 255}.items():
        mask = bench.one("LoadImageMask", image="a.png", channel=channel)
        assert mask.shape == (1, 2, 3)
        torch.testing.assert_close(mask, torch.full_like(mask, value))


def test_sizes_are_scaled_by_a_factor_or_to_a_number_of_pixels(bench: Any, pictures: Callable[..., Tensor]) -> None:
    def size(node: str, **changes: Any) -> tuple[int, ...]:
        scaled = bench.one(node, image=pictures(2, 32, 48), upscale_method="bilinear", **changes)
        assert len(scaled) == 2
        return tuple(scaled.shape[1:3])

    assert size("ImageScaleBy", scale_by=1.5) == (48, 72)
    assert size("ImageScaleBy", scale_by=0.01) == (1, 1)
    assert size("ImageScaleToTotalPixels", megapixels=0.25) == (418, 627)
    assert size("ImageScaleToTotalPixels", megapixels=0.25, resolution_steps=64) == (448, 640)


def test_sizes_are_width_height_and_number(bench: Any, pictures: Callable[..., Tensor]) -> None:
    assert bench.call("GetImageSize", image=pictures(3, 32, 48)).outputs == ((48,), (32,), (3,))
