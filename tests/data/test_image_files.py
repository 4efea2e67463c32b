from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from lorasmith.data import image_files
from lorasmith.data.image_files import (
    ImageError,
    ImageHeader,
    header_size,
    image_header,
    image_size,
    image_suffixes,
    open_image,
    open_original,
    open_reduced,
    to_tensor,
)


def picture(width: int = 40, height: int = 24, channels: int = 3) -> Image.Image:
    """Smooth colours, another in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (width + height - 2)]
    return Image.fromarray(np.stack(planes[:channels], axis=-1).astype(np.uint8).squeeze())


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_reads_every_format(tmp_path: Path) -> None:
    for suffix in sorted(image_suffixes() - {".heic", ".heif"}):
        path = tmp_path / f"a{suffix.upper()}"
        format_name = {".jpg": "JPEG", ".jfif": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
        picture().save(path, format_name)
        image = open_image(path)
        assert (image.mode, image.size) == ("RGB", (40, 24))
        assert abs(pixels(image) - pixels(picture())).mean() < 30, "the same picture, palettes and compression aside"
        assert image_size(path) == (40, 24)


def test_formats_asked_for_are_there() -> None:
    assert image_suffixes() >= {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    for suffix in ["jpg", "png", "webp", "tif"]:
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            path = tmp_path / f"a.{suffix}"
            picture().save(path, exif=exif, quality=95)
            with Image.open(path) as stored:
                expected = ImageOps.exif_transpose(stored).convert("RGB")
            image = open_image(path)
            assert image.size == expected.size == image_size(path)
            assert image.size == ((24, 40) if orientation >= 5 else (40, 24))
            assert np.array_equal(pixels(image), pixels(expected))


def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture().save(path, exif=b"Exif\0\0nonsense")
    assert open_image(path).size == image_size(path) == (40, 24)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    """The left half is transparent (by alpha, or by a colour or palette entry), the right half black."""
    for mode in ["RGBA", "LA", "P", "RGB", "L", "1"]:
        path = tmp_path / "a.png"
        if mode in ("RGBA", "LA"):
            image = Image.new(mode, (20, 20))
            image.paste(Image.new(mode, (10, 20), (0, 255) if mode == "LA" else (0, 0, 0, 255)), (10, 0))
            image.save(path)
        else:
            image = Image.new(mode, (20, 20), 1 if mode == "1" else 0)
            key = {"P": 7, "L": 7, "RGB": (7, 8, 9), "1": 1}[mode]
            image.paste(key, (0, 0, 10, 20))
            image.paste({"RGB": (0, 0, 0)}.get(mode, 0), (10, 0, 20, 20))
            if mode == "P":
                image.putpalette([0, 0, 0] * 256)
            image.save(path, transparency=255 if mode == "1" else key)
        opened = open_image(path)
        assert opened.getpixel((2, 2)) == (255, 255, 255)
        assert opened.getpixel((17, 17)) == (0, 0, 0)


def test_half_transparency_is_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 127, 127)


def test_palette_with_alpha_in_its_entries(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_wide_greys_are_scaled_to_8_bits(tmp_path: Path) -> None:
    for array, expected in [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 0, 13107, 65535]], np.int32), [0, 0, 51, 255]),
        (np.array([[-5, 0, 2**30, 2**31 - 1]], np.int32), [0, 0, 128, 255]),
        (np.array([[0, 0.2, 0.5, 1]], np.float32), [0, 51, 128, 255]),
        (np.array([[0, 1, 100, 254]], np.float32), [0, 1, 100, 254]),
        (np.array([[np.nan, np.inf, -1, 65535]], np.float32), [0, 0, 0, 255]),
        (np.array([[0, 0, 50_000, 100_000]], np.float32), [0, 0, 128, 255]),
        (np.zeros((1, 4), np.float32), [0, 0, 0, 0]),
    ]:
        Image.fromarray(array).save(tmp_path / "a.tif")
        image = open_image(tmp_path / "a.tif")
        assert image.mode == "RGB"
        assert pixels(image)[0].tolist() == [[value] * 3 for value in expected]


def test_16_bit_png(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = open_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5
    assert image_size(tmp_path / "a.jpg") == (16, 16)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    red, green, blue = open_image(tmp_path / f"a.{suffix}").getpixel((5, 5))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("read", [open_image, image_size])
class TestRefusals:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
    def test_cut_short(self, tmp_path: Path, read, suffix: str) -> None:
        path = tmp_path / f"a.{suffix}"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(ImageError, match=rf"a\.{suffix} is (damaged or cut short|not an image)"):
            read(path)

    def test_damaged_png(self, tmp_path: Path, read) -> None:
        picture().save(tmp_path / "a.png")
        content = bytearray((tmp_path / "a.png").read_bytes())
        at = content.index(b"IDAT") + 12
        content[at : at + 8] = bytes(8)
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"is damaged or cut short \(.+\); get a good copy or remove it$"):
            read(tmp_path / "a.png")

    def test_single_pixel(self, tmp_path: Path, read) -> None:
        Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
        with pytest.raises(ImageError, match=r"is a single pixel; replace it by a picture or remove it$"):
            read(tmp_path / "a.png")

    def test_missing_file_and_folder(self, tmp_path: Path, read) -> None:
        with pytest.raises(ImageError, match="does not exist; check the name"):
            read(tmp_path / "a.png")
        with pytest.raises(ImageError, match=r"it is a folder, not a file"):
            read(tmp_path)

    def test_other_formats_behind_the_name(self, tmp_path: Path, read) -> None:
        """Pillow would start Ghostscript for PostScript, whatever the file's name."""
        picture().save(tmp_path / "a.png", "EPS")
        with pytest.raises(ImageError, match="is not an image"):
            read(tmp_path / "a.png")


def test_large_photographs_are_read_without_a_warning(tmp_path: Path) -> None:
    """100 million pixels are above Pillow's threshold for a warning, and warnings are errors here."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (10_000, 10_000)


def _encoded(format_name: str) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, format_name)
    return buffer.getvalue()


_SOUND = {name: _encoded(name) for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")}


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(_SOUND)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    kept=st.floats(0.05, 1),
)
def test_damaged_files_raise_nothing_but_image_errors(tmp_path_factory, name, edits, kept) -> None:
    content = bytearray(_SOUND[name])
    for place, value in edits:
        content[int(place * len(content))] = value
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{name.lower()}"
    path.write_bytes(content[: int(kept * len(content))])
    try:
        assert open_image(path).mode == "RGB"
    except ImageError as error:
        assert re.fullmatch(r"[^\n]+", str(error), re.DOTALL)


def test_to_tensor_range_and_layout() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[0].eq(-1).all() and tensor[1].eq(1).all()
    assert torch.allclose(tensor[2], torch.tensor(-0.6))


def test_large_pictures_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    @contextlib.contextmanager
    def lock() -> Iterator[None]:
        held.append(True)
        yield

    monkeypatch.setattr(image_files, "_LARGE", lock())
    monkeypatch.setattr(image_files, "_LARGE_PIXELS", 500)
    for name, size in (("small.png", (20, 25)), ("large.png", (20, 26))):
        Image.new("RGB", size).save(tmp_path / name)
        assert image_size(tmp_path / name) == size
        assert held == ([] if name == "small.png" else [True])


@pytest.mark.pairwise(suffix=["jpg", "png", "webp", "tif"], orientation=[1, 6], grey=[False, True])
def test_reduced_pictures_are_the_whole_ones_reduced(tmp_path: Path, suffix: str, orientation: int, grey: bool) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    picture(1200, 800).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    reduced = open_reduced(tmp_path / f"a.{suffix}", 150, grey=grey)
    whole = open_image(tmp_path / f"a.{suffix}").convert("L" if grey else "RGB")
    assert (reduced.mode, max(reduced.size)) == (whole.mode, 150)
    assert abs(pixels(reduced) - pixels(whole.resize(reduced.size, Image.Resampling.LANCZOS))).mean() < 3


def test_reduced_pictures_are_not_enlarged_and_lie_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "a.png")
    for grey in (False, True):
        reduced = open_reduced(tmp_path / "a.png", 150, grey=grey)
        assert reduced.size == (40, 30) and reduced.convert("L").getextrema() == (255, 255)


@pytest.mark.parametrize("read", [image_header, open_original, lambda path: open_reduced(path, 10)])
def test_every_reader_refuses_what_is_damaged(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        read(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError):
        read(tmp_path / "a.png")


def test_pictures_of_phones_are_jpeg_files(tmp_path: Path) -> None:
    """A second picture in them, as of another lens, makes Pillow call them MPO."""
    picture().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture()])
    assert image_header(tmp_path / "a.jpg").suffixes[0] == ".jpg" and not image_header(tmp_path / "a.jpg").is_animated


def test_headers(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    picture().convert("CMYK").save(tmp_path / "a.png", "JPEG", exif=exif)
    assert image_header(tmp_path / "a.png") == ImageHeader("JPEG", (".jpg", ".jpeg", ".jfif"), "CMYK", False)
    picture().save(tmp_path / "b.png")
    assert image_header(tmp_path / "b.png") == ImageHeader("PNG", (".png",), "RGB", True)


def test_originals_keep_transparency_and_profile(tmp_path: Path) -> None:
    see_through = picture().convert("RGBA")
    see_through.putalpha(7)
    see_through.save(tmp_path / "a.png", icc_profile=b"a profile")
    image, profile = open_original(tmp_path / "a.png")
    assert (image.mode, image.getpixel((0, 0))[3], profile) == ("RGBA", 7, b"a profile")
    picture().convert("CMYK").save(tmp_path / "b.jpg", icc_profile=b"of CMYK")
    image, profile = open_original(tmp_path / "b.jpg")
    assert (image.mode, profile) == ("RGB", None), "a profile of other colours than the ones that are saved"


def test_other_formats_are_read_where_they_are_converted_alone(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.tga")
    assert open_original(tmp_path / "a.tga", any_format=True)[0].tobytes() == picture().tobytes()
    with pytest.raises(ImageError, match="is not an image"):
        open_original(tmp_path / "a.tga")
    picture().save(tmp_path / "a.eps")
    with pytest.raises(ImageError, match="is not an image"):
        open_original(tmp_path / "a.eps", any_format=True)


def test_heic_is_read(tmp_path: Path) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
    shown = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    shown.save(tmp_path / "a.heic", quality=95)
    assert image_size(tmp_path / "a.heic") == header_size(tmp_path / "a.heic") == (96, 64)
    found = np.asarray(open_image(tmp_path / "a.heic"), np.float32)
    assert np.abs(found - np.asarray(shown, np.float32)).mean() < 3
    content = (tmp_path / "a.heic").read_bytes()
    (tmp_path / "cut.heic").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="replace or remove it"):
        open_image(tmp_path / "cut.heic")


@pytest.mark.parametrize(
    ("installed", "registered"),
    [
        ({"pillow_heif": "1.23.2"}, ["pillow_heif"]),
        ({"pi_heif": "1.24.0"}, ["pi_heif"]),
        ({"pillow_heif": "1.24.0", "pi_heif": "1.24.0"}, ["pillow_heif"]),
        ({"pillow_heif": "1.21.2", "pi_heif": "1.23.2-dev"}, ["pi_heif"]),
        ({"pi_heif": "1.23.1"}, []),
        ({}, []),
    ],
)
def test_heic_is_read_by_a_plug_in_that_is_recent_enough(
    monkeypatch: pytest.MonkeyPatch, installed: Mapping[str, str], registered: Sequence[str]
) -> None:
    asked: list[str] = []
    for name in ("pillow_heif", "pi_heif"):
        plug_in = types.ModuleType(name)
        plug_in.register_heif_opener = lambda name=name, **settings: asked.append(name)  # type: ignore[attr-defined]
        plug_in.libheif_version = lambda name=name: installed[name]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, plug_in if name in installed else None)
    image_files._register_heif.cache_clear()
    assert ".png" in image_suffixes()
    image_suffixes()
    assert asked == registered


def test_what_is_too_long_to_train_on_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (900, 100)).save(tmp_path / "long.png")
    Image.new("RGB", (800, 100)).save(tmp_path / "usable.png")
    decoded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (decoded.append(self.size), load(self))[1])
    assert (image_size(tmp_path / "long.png"), decoded) == ((900, 100), [])
    assert image_size(tmp_path / "usable.png") == (800, 100) and decoded
