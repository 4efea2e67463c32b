from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.core.errors import DataError, OptionError
from lorasmith.data.crops import Framing, centre_of, framings, pixel_step
from lorasmith.data.data_config import DataConfig
from lorasmith.data.image_files import to_tensor

SIDES = st.integers(16, 3000)
SHARES = st.floats(0, 1)


def made(width: int, height: int, *, name: str = "a.png", centre: tuple[float, float] = (0.5, 0.5), **settings: Any):
    return framings(width, height, DataConfig(**settings), resolution=256, multiple=16, name=name, centre=centre)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 50)], axis=-1).astype(np.uint8))


@given(
    SIDES,
    SIDES,
    st.sampled_from(["center", "random"]),
    st.floats(0, 0.5),
    st.booleans(),
    st.booleans(),
    st.tuples(SHARES, SHARES),
)
def test_every_framing_is_inside_of_the_picture_and_has_the_aspect_of_its_bucket(
    width, height, crop, crop_jitter, flip, upscale, centre
) -> None:
    found = made(width, height, centre=centre, crop=crop, crop_jitter=crop_jitter, flip=flip, upscale=upscale)
    varies = crop == "random" or crop_jitter > 0
    assert len(found) == (4 if varies else 1) * (2 if flip else 1)
    for one in found:
        left, top, right, bottom = one.box
        assert -1e-6 <= left < right <= width + 1e-6 and -1e-6 <= top < bottom <= height + 1e-6
        assert (right - left) / (bottom - top) == pytest.approx(one.width / one.height)
        if not upscale and min(width, height) >= 16:
            assert one.scale <= 1 + 1e-6


@given(SIDES, SIDES)
def test_the_plain_framing_is_the_largest_part_around_the_centre(width: int, height: int) -> None:
    one = made(width, height, flip=True, crop="random", crop_jitter=0.3, colour_jitter=0.2)[0]
    left, top, right, bottom = one.box
    assert not one.is_mirrored and one.colours == (1, 1, 1)
    assert left == pytest.approx(width - right, abs=1e-6) and top == pytest.approx(height - bottom, abs=1e-6)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)


def test_variants_are_functions_of_the_name_and_differ_from_each_other() -> None:
    settings: dict[str, Any] = {"crop": "random", "crop_jitter": 0.2, "colour_jitter": 0.1, "picture_variants": 6}
    found = made(400, 300, **settings)
    assert found == made(400, 300, **settings) and len({one.box for one in found}) == 6
    assert made(400, 300, name="b.png", **settings)[0] == found[0]
    assert made(400, 300, name="b.png", **settings)[1:] != found[1:]
    assert all(0.9 <= factor <= 1.1 for one in found for factor in one.colours)
    assert made(400, 300, **{**settings, "picture_variants": 3}) == found[:3], "more variants keep those there were"


def test_several_resolutions_and_buckets_with_limits() -> None:
    sizes = [(one.width, one.height) for one in made(400, 200, more_resolutions="128, 256,512")]
    assert sizes == [(352, 176), (176, 80), (720, 352)]
    assert [(one.width, one.height) for one in made(900, 100, bucket_max=320, bucket_min=192)] == [(320, 192)]
    with pytest.raises(DataError, match="resolution must be within bucket_min and bucket_max, got 256"):
        made(900, 100, bucket_max=128)


def test_buckets_of_one_number_of_tokens() -> None:
    found = [
        made(*size, bucket_tokens=True, more_resolutions="512")[:2] for size in [(400, 200), (300, 400), (300, 301)]
    ]
    for at_256, at_512 in found:
        assert at_256.width * at_256.height == 240 * 16**2 and at_512.width * at_512.height == 960 * 16**2
    with pytest.raises(OptionError, match="bucket_tokens needs upscale"):
        DataConfig(bucket_tokens=True, upscale=False)


def test_a_step_that_the_model_excludes() -> None:
    assert pixel_step(DataConfig(), 8) == 8 and pixel_step(DataConfig(bucket_step=64), 8) == 64
    with pytest.raises(DataError, match="bucket_step must be a multiple of 16 for this model, got 24"):
        pixel_step(DataConfig(bucket_step=24), 16)


def test_framed_pictures_are_what_the_box_says() -> None:
    picture = gradient(256, 128)
    (plain,) = made(256, 128)
    framed = plain.applied(picture, picture.size)
    assert framed.size == (plain.width, plain.height)
    mirrored = made(256, 128, flip=True)[1]
    assert abs(pixels(mirrored.applied(picture, picture.size)) - pixels(framed)[:, ::-1]).max() == 0
    corner = Framing(64, 64, (192, 64, 256, 128)).applied(picture, picture.size)
    assert abs(pixels(corner) - pixels(picture.crop((192, 64, 256, 128)))).max() == 0
    halved = picture.reduce(2)
    smaller = Framing(32, 32, (192, 64, 256, 128)).applied(halved, picture.size)
    assert abs(pixels(smaller) - pixels(halved.crop((96, 32, 128, 64)))).max() == 0


def test_colours_change_alone_what_they_name() -> None:
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    brighter = Framing(32, 32, (0, 0, 32, 32), colours=(1.2, 1.0, 1.0)).applied(grey, grey.size)
    assert brighter.getpixel((5, 5)) == (120, 120, 120)
    assert Framing(32, 32, (0, 0, 32, 32), colours=(1.0, 1.3, 0.7)).applied(grey, grey.size).getpixel((5, 5)) == (
        100,
        100,
        100,
    )


@given(st.integers(64, 500), st.integers(64, 500), st.booleans())
def test_a_mask_has_the_crop_of_its_picture(width: int, height: int, flip: bool) -> None:
    one = made(width, height, flip=True)[int(flip)]
    mask = gradient(width, height).getchannel("R")
    size = (one.width // 8, one.height // 8)
    as_picture = (
        one.applied(Image.merge("RGB", [mask] * 3), mask.size).getchannel("R").resize(size, Image.Resampling.BOX)
    )
    assert abs(pixels(one.mask_applied(mask, mask.size, size)) - pixels(as_picture)).mean() < 3


def test_sizes_as_conditions_follow_crop_and_mirror() -> None:
    one = Framing(64, 64, (100, 20, 228, 148))
    assert one.picture_size(400, 200) == ((200, 400), (10, 50), (64, 64))
    mirrored = Framing(64, 64, (100, 20, 228, 148), is_mirrored=True)
    assert mirrored.picture_size(400, 200).crop == (10, round((400 - 228) / 2))


@given(st.integers(0, 60), st.integers(0, 40), st.integers(1, 30), st.integers(1, 20))
def test_the_crop_is_centred_on_what_is_inside_of_a_mask(x: int, y: int, width: int, height: int) -> None:
    mask = Image.new("L", (100, 60))
    mask.paste(255, (x, y, x + width, y + height))
    centre = centre_of(mask)
    inside = mask.getbbox()
    assert inside is not None
    expected = ((inside[0] + inside[2]) / 200, (inside[1] + inside[3]) / 120)
    assert centre == pytest.approx(expected)
    assert centre_of(Image.new("L", (10, 10))) == (0.5, 0.5)
    box = made(1000, 600, masks="files", crop="mask", centre=centre)[0].box
    clamped = min(max(centre[0] * 1000, (box[2] - box[0]) / 2), 1000 - (box[2] - box[0]) / 2)
    assert math.isclose((box[0] + box[2]) / 2, clamped, abs_tol=1e-6)


def resize_and_crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The largest part around the centre, at a size."""
    across = min(picture.width, picture.height * width / height)
    down = min(picture.height, picture.width * height / width)
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    return Framing(width, height, (left, top, left + across, top + down)).applied(picture, picture.size)


def picture(width: int = 40, height: int = 24, channels: int = 3) -> Image.Image:
    """Smooth colours, another in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)]
    return Image.fromarray(np.stack(planes[:channels], axis=-1).astype(np.uint8).squeeze())


@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 40), st.integers(1, 40))
def test_resize_and_crop_always_fills_the_size(width: int, height: int, to_width: int, to_height: int) -> None:
    assert resize_and_crop(Image.new("RGB", (width, height), "red"), to_width, to_height).getcolors() == [
        (to_width * to_height, (255, 0, 0))
    ]


def test_crop_equals_scaling_first_and_cropping_then() -> None:
    scaled = picture(120, 80).resize((90, 60), Image.Resampling.LANCZOS)
    expected = scaled.crop((15, 0, 75, 60))
    assert abs(pixels(resize_and_crop(picture(120, 80), 60, 60)) - pixels(expected)).max() <= 1


def test_same_size_changes_nothing() -> None:
    assert np.array_equal(pixels(resize_and_crop(picture(), 40, 24)), pixels(picture()))


def test_resize_agrees_with_another_antialiased_resampler() -> None:
    """Independent resampler: torch's antialiased bicubic differs in kernel only."""
    source = to_tensor(picture(128, 96))[None]
    theirs = torch.nn.functional.interpolate(source, (48, 64), mode="bicubic", antialias=True)
    ours = to_tensor(resize_and_crop(picture(128, 96), 64, 48))[None]
    assert (theirs - ours).abs().max() < 0.05


def test_extreme_shapes_stay_small() -> None:
    """Scaling 20,000×20 to cover 512 px before cropping would need 500 million pixels."""
    assert resize_and_crop(Image.new("RGB", (20_000, 20)), 512, 512).size == (512, 512)
