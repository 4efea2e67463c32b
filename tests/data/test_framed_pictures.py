from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorasmith.data.crops import Framing, framed, mask_of, place_weights
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import ImageFile
from lorasmith.data.image_files import ImageError, file_digest
from tests.data.encoder_cases import add

WHOLE = Framing(64, 64, (0, 0, 64, 64))


def image(path: Path, mask: Path | None = None) -> ImageFile:
    with Image.open(path) as opened:
        return ImageFile(path, *opened.size, "", "none", mask=mask)


def test_pixels_and_the_inside_of_a_mask(tmp_path: Path) -> None:
    path = add(tmp_path, "a.png", (64, 64), (255, 0, 0))
    mask = Image.new("L", (128, 128))  # of another size, but the same aspect
    mask.paste(255, (0, 0, 64, 128))
    mask.save(tmp_path / "a.mask.png")
    config = DataConfig(masks="files")
    mirrored = Framing(64, 64, (0, 0, 64, 64), is_mirrored=True)
    plain, other = framed(
        image(path, tmp_path / "a.mask.png"), file_digest(path), [WHOLE, mirrored], config, downscale=8
    )
    assert torch.equal(plain.pixels[:, 5, 5], torch.tensor([1.0, -1.0, -1.0]))
    assert plain.inside is not None and other.inside is not None
    assert plain.inside.shape == (8, 8) and plain.inside[:, :4].eq(1).all() and plain.inside[:, 4:].eq(0).all()
    assert torch.equal(other.inside, plain.inside.flip(1))


def test_transparency_is_a_mask_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = add(tmp_path, "a.png", (64, 64), (255, 0, 0, 0))
    assert framed(image(path), file_digest(path), [WHOLE], DataConfig(), downscale=8)[0].inside is None
    (one,) = framed(image(path), file_digest(path), [WHOLE], DataConfig(masks="alpha"), downscale=8)
    assert one.inside is not None and one.inside.eq(0).all() and one.pixels.eq(1).all()
    opaque = add(tmp_path, "b.png", (64, 64), (255, 0, 0))
    assert framed(image(opaque), file_digest(opaque), [WHOLE], DataConfig(masks="alpha"), downscale=8)[0].inside is None


def test_a_transparent_mask_is_outside_where_it_is_transparent(tmp_path: Path) -> None:
    path = add(tmp_path, "a.png", (64, 64), (255, 0, 0))
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 32, 64))
    mask.save(tmp_path / "a.mask.png")
    found = mask_of(image(path, tmp_path / "a.mask.png"), DataConfig(masks="files"))
    assert found is not None and found.getpixel((5, 5)) == 0 and found.getpixel((50, 5)) == 255


def test_a_file_that_has_changed_is_not_taken_for_what_it_was(tmp_path: Path) -> None:
    path = add(tmp_path, "a.png", (64, 64), (255, 0, 0))
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    before, scanned = file_digest(path), image(path)
    add(tmp_path, "a.png", (64, 64), (0, 0, 255))
    with pytest.raises(ImageError, match="has changed since it was checked"):
        framed(scanned, before, [WHOLE], DataConfig(), downscale=8)


def test_a_large_photograph_is_decoded_smaller_and_looks_the_same(tmp_path: Path) -> None:
    noise = Image.effect_noise((1600, 1600), 60).convert("RGB").resize((800, 800)).resize((1600, 1600))
    noise.save(tmp_path / "a.jpg", quality=95)
    photo = ImageFile(tmp_path / "a.jpg", 1600, 1600, "", "none")
    small = Framing(128, 128, (0, 0, 1600, 1600))
    (one,) = framed(photo, file_digest(photo.path), [small], DataConfig(), downscale=8)
    with Image.open(photo.path) as whole:
        exact = small.applied(whole.convert("RGB"), whole.size)
    difference = (one.pixels - torch.from_numpy(np.array(exact)).permute(2, 0, 1) / 127.5 + 1).abs()
    assert difference.mean() < 0.01, "less than a level and a half of 255"


def test_weights_inside_and_outside() -> None:
    for settings, expected in [
        ({}, [2.0, 0.0]),
        ({"mask_normalize": False}, [1.0, 0.0]),
        ({"mask_outside": 0.5}, [1 / 0.75, 0.5 / 0.75]),
        ({"mask_inside": 0.0, "mask_outside": 1.0}, [0.0, 2.0]),
    ]:
        inside = torch.tensor([[1.0, 0.0]])
        weights = place_weights(inside, DataConfig(masks="alpha", **settings))
        assert weights is not None and weights.flatten().tolist() == pytest.approx(expected)


def test_no_mask_and_an_empty_one_leave_the_picture_whole() -> None:
    assert place_weights(None, DataConfig(masks="alpha")) is None
    assert place_weights(torch.zeros(2, 2), DataConfig(masks="alpha")) is None
