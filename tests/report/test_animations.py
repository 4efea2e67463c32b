"""Clips as files that browsers show."""

from __future__ import annotations

import io

from PIL import ExifTags, Image

from lorasmith.report.pictures import Clip, animation, parameters_entry


def clip(frames: int = 3, size: tuple[int, int] = (32, 16), rate: float = 8.0) -> Clip:
    return Clip(tuple(Image.new("RGB", size, (40 * number, 0, 0)) for number in range(frames)), rate)


def test_a_clip_is_an_animated_webp_with_its_parameters() -> None:
    tag, value = parameters_entry("a wave\nSteps: 3, ü")
    content = animation(clip(), {tag: value, int(ExifTags.Base.Model): "prompt:{}"}, lossless=True)
    with Image.open(io.BytesIO(content)) as opened:
        assert (opened.format, opened.n_frames, opened.size) == ("WEBP", 3, (32, 16))  # type: ignore[attr-defined]
        opened.seek(2)
        opened.load()
        assert opened.info["duration"] == 125
        assert opened.convert("RGB").getpixel((3, 3)) == (80, 0, 0)
        exif = opened.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == "a wave\nSteps: 3, ü"
    assert exif[ExifTags.Base.Model] == "prompt:{}"


def test_loss_makes_smaller_files() -> None:
    noise = Clip(tuple(Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(3)), 16.0)
    assert noise.size == (64, 64)
    assert len(animation(noise, {}, quality=20)) < len(animation(noise, {}, lossless=True)) / 2
