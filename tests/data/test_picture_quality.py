"""Blur, emptiness and likeness of pictures, on the example pictures and on copies of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as example_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.picture_quality import PictureQuality, look_alikes, measured

EXAMPLES = sorted((BUILT_IN_BASE / "input").rglob("*.png"))


def example(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def textured(seed: int = 0, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Noise of all scales, as photographs of nature have it."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.integers(0, 255, (n, n), dtype=np.uint8)).resize(size), dtype=np.float64)
        for n in (4, 16, 64, 256)
    ]
    return Image.fromarray((sum(layers) / 4).clip(0, 255).astype(np.uint8)).convert("RGB")


def recompressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=25)
    return Image.open(buffer)


def test_sharp_pictures_are_sharp_and_blurred_copies_are_not() -> None:
    for picture in map(example, EXAMPLES):
        quality = measured(picture)
        assert not quality.is_empty and quality.blur is not None and quality.blur < 0.45
        assert measured(picture.filter(ImageFilter.GaussianBlur(2))).is_blurred


@pytest.mark.parametrize("sigma", [3, 6, 20])
def test_blur_of_a_texture_at_any_size(sigma: int) -> None:
    for factor in (1, 4):
        picture = textured().resize((400 * factor, 300 * factor))
        sharp, blurred = picture, picture.filter(ImageFilter.GaussianBlur(sigma * factor))
        assert not measured(sharp.reduce(factor)).is_blurred
        assert measured(blurred).blur is None or measured(blurred).is_blurred


def test_blur_does_not_depend_on_contrast() -> None:
    picture = example(EXAMPLES[0])
    full, weak = measured(picture).blur, measured(ImageEnhance.Contrast(picture).enhance(0.4)).blur
    assert full is not None and weak is not None and abs(full - weak) < 0.1


def test_a_sharp_subject_before_a_blurred_background_is_sharp() -> None:
    picture = textured().filter(ImageFilter.GaussianBlur(8))
    assert measured(picture).blur is None or measured(picture).is_blurred
    picture.paste(textured(1, (200, 150)), (100, 75))
    assert not measured(picture).is_blurred


def test_a_sharp_caption_does_not_make_a_blurred_picture_sharp() -> None:
    picture = example(EXAMPLES[0]).filter(ImageFilter.GaussianBlur(4))
    picture.paste(textured(1, (30, 10)), (10, 240))
    assert measured(picture).is_blurred


def test_a_dot_on_white_is_sharp_unless_it_is_blurred() -> None:
    picture = Image.new("L", (512, 512), "white")
    picture.paste(0, (240, 240, 270, 270))
    assert not measured(picture).is_empty and not measured(picture).is_blurred
    picture.paste(0, (140, 140, 370, 370))
    assert measured(picture.filter(ImageFilter.GaussianBlur(40))).is_blurred


def test_pictures_of_one_colour_are_empty() -> None:
    for mode in ["RGB", "L", "1", "P", "RGBA", "CMYK"]:
        quality = measured(Image.new("RGB", (64, 48), "white").convert(mode))
        assert quality.is_empty and quality.blur is None and not quality.is_blurred


def test_a_smooth_gradient_of_full_contrast_has_no_sharp_part() -> None:
    assert measured(Image.linear_gradient("L").resize((512, 512))).is_blurred


@example_of(width=64, height=64, seed=0)
@example_of(width=2, height=683, seed=0)
@given(width=st.integers(1, 700), height=st.integers(1, 700), seed=st.integers(0, 9))
def test_every_size_can_be_measured(width: int, height: int, seed: int) -> None:
    quality = measured(textured(seed, (width, height)))
    assert quality.blur is None or 0 <= quality.blur <= 1
    assert 0 <= quality.hash < 2**64 and len(quality.small) == 256


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda picture: picture,
    "compressed": recompressed,
    "half": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "three times": lambda picture: picture.resize((picture.width * 3, picture.height * 3)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.15),
    "paler": lambda picture: ImageEnhance.Color(picture).enhance(0.5),
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
    "stretched": lambda picture: picture.resize((picture.width, picture.height * 9 // 10)),
}


def test_copies_are_found() -> None:
    pictures = [example(path) for path in EXAMPLES[::3]] + [textured(seed) for seed in range(4)]
    qualities = [measured(one) for one in pictures]
    for name, change in COPIES.items():
        found = look_alikes(qualities + [measured(change(one)) for one in pictures])
        assert found == [[index, index + len(pictures)] for index in range(len(pictures))], name


def test_different_pictures_are_not_alike() -> None:
    pictures = [example(path) for path in EXAMPLES] + [textured(seed) for seed in range(20)]
    assert look_alikes([measured(one) for one in pictures]) == []


def test_mirrored_pictures_are_not_alike() -> None:
    pictures = [textured(0), textured(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    assert look_alikes([measured(one) for one in pictures]) == []


def test_empty_pictures_resemble_none() -> None:
    assert look_alikes([measured(Image.new("RGB", (64, 64), colour)) for colour in ("white", "white", "black")]) == []
    assert look_alikes([]) == []


def made(hash: int, small: bytes) -> PictureQuality:
    return PictureQuality(0.1, False, hash, small)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=40), st.data())
def test_hashes_in_blocks_are_compared_as_one_by_one(hashes: list[int], data: st.DataObject) -> None:
    flips = data.draw(st.lists(st.tuples(st.integers(0, len(hashes) - 1), st.integers(0, 2**14)), max_size=10))
    hashes = hashes + [hashes[index] ^ bits for index, bits in flips]
    small = bytes(range(256))  # one copy for all, so that the hashes alone decide
    near = [
        (first, second)
        for first, second in combinations(range(len(hashes)), 2)
        if (hashes[first] ^ hashes[second]).bit_count() <= 14
    ]
    leaders = list(range(len(hashes)))
    for _ in hashes:
        for first, second in near:
            leaders[first] = leaders[second] = min(leaders[first], leaders[second])
    wanted = [[i for i, leader in enumerate(leaders) if leader == one] for one in sorted(set(leaders))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorasmith.data.picture_quality._ROWS", 7)
        assert look_alikes([made(one, small) for one in hashes]) == [group for group in wanted if len(group) > 1]


def test_equal_hashes_of_other_pictures_are_not_alike() -> None:
    rng = np.random.default_rng(0)
    assert look_alikes([made(5, rng.bytes(256)) for _ in range(3)]) == []
