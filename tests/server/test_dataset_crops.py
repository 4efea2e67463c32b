"""Crops by hand, and what undoes other changes of a dataset."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.image_files import file_digest
from lorasmith.server.datasets import dataset_answers as questions
from lorasmith.server.datasets import dataset_change_answers as changes
from lorasmith.server.datasets.dataset_folders import UnknownFileError
from lorasmith.server.datasets.dataset_shapes import Crop
from tests.server.test_dataset_answers import dog, folders, noise, sent

__all__ = ["dog", "folders"]  # fixtures

PART = {"x": 0.25, "y": 0.1, "width": 0.5, "height": 0.8}


def row(folders: Folders, file: str) -> questions.PictureRow:
    return next(one for one in questions.dataset(folders, "dog").images if one.file == file)


def test_a_crop_is_made_of_the_original_and_taken_back(folders: Folders, dog: Path) -> None:
    before = (dog / "1.png").read_bytes()
    whole = np.asarray(Image.open(dog / "1.png"))
    assert row(folders, "1.png").crop is None
    assert changes.crop_image(folders, "dog", "1.png", **PART).file == "1.png"
    found = row(folders, "1.png")
    assert (found.width, found.height, found.crop) == (24, 32, Crop(**PART))
    assert found.caption == "a dog\non grass"
    assert np.array_equal(np.asarray(Image.open(dog / "1.png")), whole[4:36, 12:36])

    wider = {"x": 0.0, "y": 0.0, "width": 0.75, "height": 1.0}  # than the first: what that cut comes back
    changes.crop_image(folders, "dog", "1.png", **wider)
    assert np.array_equal(np.asarray(Image.open(dog / "1.png")), whole[:, :36])
    shown = io.BytesIO(questions.thumbnail(folders, "dog", "1.png", 48, original=True))
    assert Image.open(shown).size == (48, 40)
    assert Path(questions.picture_file(folders, "dog", "1.png", original=True)).read_bytes() == before

    changes.crop_image(folders, "dog", "1.png", x=0, y=0, width=1, height=1)
    assert (dog / "1.png").read_bytes() == before and row(folders, "1.png").crop is None
    assert list((dog / ".originals").iterdir()) == []
    assert [one.name for one in questions.datasets(folders).datasets if not one.builtin] == ["dog"]


def test_jpeg_stays_jpeg_upright_and_others_become_png(folders: Folders, dog: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    smooth.save(dog / "turned.jpg", exif=exif, quality=95, icc_profile=b"profile")
    changes.crop_image(folders, "dog", "turned.jpg", x=0, y=0.5, width=1, height=0.5)
    with Image.open(dog / "turned.jpg") as found:
        assert (found.format, found.size, found.getexif().get(0x0112)) == ("JPEG", (32, 32), None)
        assert found.info["icc_profile"] == b"profile"
        upright = np.asarray(smooth.transpose(Image.Transpose.ROTATE_270))[32:]
        assert np.abs(np.asarray(found).astype(int) - upright).mean() < 3

    noise().save(dog / "x.webp", lossless=True)
    (dog / "x.txt").write_text("x")
    assert changes.crop_image(folders, "dog", "x.webp", **PART).file == "x.png"
    assert not (dog / "x.webp").exists() and row(folders, "x.png").caption == "x"
    assert changes.crop_image(folders, "dog", "x.png", x=0, y=0, width=1, height=1).file == "x.webp"
    assert not (dog / "x.png").exists()


def test_heic_is_cropped(folders: Folders, dog: Path) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)
    noise((64, 48)).save(dog / "a.heic")
    assert changes.crop_image(folders, "dog", "a.heic", **PART).file == "a.png"
    assert (row(folders, "a.png").width, row(folders, "a.png").height) == (32, 38)


def test_a_record_of_another_picture_counts_for_nothing(folders: Folders, dog: Path) -> None:
    changes.crop_image(folders, "dog", "1.png", **PART)
    noise(seed=5).save(dog / "1.png")
    assert row(folders, "1.png").crop is None
    changes.crop_image(folders, "dog", "1.png", **PART)  # of the new one; the first original is set aside
    assert row(folders, "1.png").crop == Crop(**PART)
    (aside,) = (folders.base / "user" / "lorasmith" / "removed").glob("*/1.png")
    assert Image.open(aside).tobytes() == noise(seed=1).tobytes()
    for text in ("{", '{"original": "../2.png", "crop": {}, "sha256": ""}', "[]"):
        (dog / ".originals" / "1.png.json").write_text(text)
        assert row(folders, "1.png").crop is None
    record = {"original": "../2.png", "crop": PART, "sha256": file_digest(dog / "1.png")}
    (dog / ".originals" / "1.png.json").write_text(json.dumps(record))
    assert row(folders, "1.png").crop is None


def test_what_cannot_be_cropped_says_so(folders: Folders, dog: Path) -> None:
    def refused(file: str, match: str, **part: float) -> None:
        with pytest.raises(LorasmithError, match=match):
            changes.crop_image(folders, "dog", file, **{**PART, **part})

    refused("1.png", "must be a part of the picture", x=0.9)
    refused("1.png", "must be a part of the picture", width=0)
    refused("1.png", "sides of at least 16 pixels .* got 5×32; draw a larger one", width=0.1)
    refused("none.png", "there is no picture")
    Image.new("L", (48, 40)).save(dog / "1.mask.png")
    refused("1.png", r"1\.png belongs to 1\.mask\.png, which would have to be cropped alike")
    (dog / "control").mkdir()
    noise().save(dog / "control" / "2.png")
    refused("2.png", r"2\.png belongs to 2\.png")
    frames = [noise(seed=one) for one in range(2)]
    frames[0].save(dog / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    refused("moving.webp", "is an animation")
    noise(seed=7).save(dog / "y.webp", lossless=True)
    noise(seed=8).save(dog / "y.png")
    refused("y.webp", r"there is a file y\.png in dog already")
    with pytest.raises(LorasmithError, match="belongs to Lorasmith"):
        changes.crop_image(folders, "fox", "fox_1.png", **PART)


def test_several_pictures_are_removed_and_return_together(folders: Folders, dog: Path) -> None:
    before = {path.name: path.read_bytes() for path in dog.iterdir()}
    with pytest.raises(UnknownFileError):
        changes.remove_images(folders, "dog", files=("1.png", "none.png"))
    assert {path.name for path in dog.iterdir()} == set(before)
    removed = changes.remove_images(folders, "dog", files=("1.png", "2.png", "1.png")).removed
    assert [path.name for path in dog.iterdir()] == ["10.png"]
    assert changes.restore_removed(folders, "dog", removed=removed).changed == 4
    assert {path.name: path.read_bytes() for path in dog.iterdir()} == before


def test_a_dataset_returns(folders: Folders, dog: Path) -> None:
    removed = changes.remove_dataset(folders, "dog").removed
    assert not dog.exists()
    with pytest.raises(UnknownFileError, match="there is nothing in"):
        changes.restore_removed(folders, "cat", removed=removed)
    changes.restore_removed(folders, "dog", removed=removed)
    assert (dog / "1.txt").read_text() == "a dog\non grass\n"
    for bad in ("../dog", removed, "user"):
        with pytest.raises((UnknownFileError, OptionError)):
            changes.restore_removed(folders, "dog", removed=bad)


def test_controls_return_where_they_were(folders: Folders, dog: Path, tmp_path: Path) -> None:
    def add(seed: int, file: str = "control/1.png") -> dict[str, str]:
        return changes.add_image(folders, "dog", file=file, temporary=sent(tmp_path, noise(seed=seed)))

    add(20)
    first = (dog / "control" / "1.png").read_bytes()
    replaced = add(21)["replaced"]
    changes.remove_control(folders, "dog", file="1.png")
    assert changes.restore_removed(folders, "dog", removed=replaced, control=True).changed == 1
    assert (dog / "control" / "1.png").read_bytes() == first
    changes.pair_control(folders, "dog", control="1.png", image="2.png")
    assert (dog / "control" / "2.png").read_bytes() == first
    changes.pair_control(folders, "dog", control="2.png", former="1.png")
    assert [path.name for path in (dog / "control").iterdir()] == ["1.png"]
    changes.pair_control(folders, "dog", control="1.png", former="../../x.png")
    assert [path.name for path in (dog / "control").iterdir()] == ["x.png"]
