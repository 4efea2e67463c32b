"""Captions are written beside images, one by one, and never over one that is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.core.errors import DataError, OutputError
from lorasmith.data.captions import read_caption
from lorasmith.data.folder import scan_folder
from lorasmith.data.folder_listing import LINK
from lorasmith.runs import captioning
from lorasmith.runs.captioning import caption_images, images_to_caption


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in (
        "10.png",
        "2.jpg",
        "a.PNG",
        ".hidden.png",
        "3_dogs/1.png",
        "other/deep/1.png",
        ".no/1.png",
        "3_x/y/1.png",
    ):
        picture(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.md").write_text("x")
    return tmp_path / "photos"


def names(photos: Path, paths: tuple[Path, ...]) -> list[str]:
    return [path.relative_to(photos).as_posix() for path in paths]


def test_the_images_are_those_that_training_reads(photos: Path) -> None:
    found = images_to_caption(photos)
    assert names(photos, found.images) == ["2.jpg", "10.png", "a.PNG", "3_dogs/1.png"]
    assert [one.path for one in scan_folder(photos).images] == list(found.images)
    deep = images_to_caption(photos, recursive=True)
    assert names(photos, deep.images[4:]) == ["3_x/y/1.png", "other/deep/1.png"]


def test_no_folder_is_read_twice(photos: Path) -> None:
    (photos / "other" / "round").symlink_to(photos)
    assert len(images_to_caption(photos, recursive=True).images) == 6


def test_captions_that_are_there_stay(photos: Path) -> None:
    (photos / "2.txt").write_text("mine")
    (photos / "10.caption").write_text("mine, too")
    (photos / "a.txt").symlink_to("gone")
    found = images_to_caption(photos)
    assert names(photos, found.images) == ["3_dogs/1.png"]
    assert names(photos, found.kept) == ["2.jpg", "10.png", "a.PNG"]
    done = caption_images(images_to_caption(photos, overwrite=True).images, lambda image: "new")
    assert len(done.written) == 4 and (photos / "2.txt").read_text() == "new\n"
    assert [read_caption(photos / name).text for name in ("2.jpg", "10.png", "a.PNG")] == ["new"] * 3  # type: ignore[union-attr]
    assert (photos / "10.caption").read_text() == "mine, too"
    assert not (photos / "gone").exists()


def test_two_images_of_one_name_share_no_caption(photos: Path) -> None:
    picture(photos / "2.png")
    found = images_to_caption(photos, overwrite=True)
    assert found.sharing == ((photos / "2.png", photos / "2.jpg"),)
    caption_images(found.images, lambda image: "x")
    assert (photos / "2.png") in images_to_caption(photos).kept
    picture(photos / "A.jpg")  # A.txt is a.txt where case is ignored
    assert len(images_to_caption(photos, overwrite=True).sharing) == 2


def test_links_out_of_the_folder_are_captioned_if_that_is_typed(photos: Path, tmp_path: Path) -> None:
    (photos / "link.png").symlink_to(picture(tmp_path / "elsewhere" / "x.png"))
    found = images_to_caption(photos)
    assert names(photos, found.images) == ["2.jpg", "10.png", "a.PNG", "3_dogs/1.png"]
    assert [(path.name, reason) for path, reason in found.refused] == [("link.png", LINK)]
    assert len(images_to_caption(photos, follow_links=True).images) == 5
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    with pytest.raises(DataError, match=r"holds no images but links: link\.png is a link out of its folder"):
        images_to_caption(tmp_path / "links")


def test_the_trigger_is_in_front_as_in_training(photos: Path) -> None:
    said = iter(("on a beach", "  A SKS Dog\nruns ", "sks dogs", "x"))
    caption_images(images_to_caption(photos).images, lambda image: next(said), trigger="sks dog")
    captions = [one.caption for one in scan_folder(photos).images]
    assert captions == ["sks dog, on a beach", "A SKS Dog runs", "sks dog, sks dogs", "sks dog, x"]


def test_what_fails_is_named_and_the_rest_is_written(photos: Path) -> None:
    (photos / "2.jpg").write_text("no picture")
    images = images_to_caption(photos).images
    said = iter((ValueError("too\nred"), " \n", None, "x" * 30_000, "good"))

    def captioner(image: Image.Image) -> str:
        assert (image.size, image.mode) == ((32, 32), "RGB")
        one = next(said)
        if isinstance(one, Exception):
            raise one
        return one  # type: ignore[return-value]

    more = [picture(photos / f"z{number}.png") for number in range(2)]
    seen: list[tuple[int, int, str]] = []
    done = caption_images([*images, *more], captioner, trigger="sks", progress=lambda *one: seen.append(one))
    assert names(photos, done.written) == ["z1.txt"]
    assert names(photos, done.empty) == ["a.PNG"]
    reasons = {path.name: reason for path, reason in done.failed}
    assert "is not an image" in reasons["2.jpg"] and "(ValueError: too\\nred)" in reasons["10.png"]
    assert "got NoneType" in reasons["1.png"] and "at most 20,000 characters" in reasons["z0.png"]
    assert len(list(photos.rglob("*.txt"))) == 1
    assert seen[0] == (1, 6, "2.jpg") and len(seen) == 6 and done.left == 0


def test_being_stopped_keeps_what_is_written(photos: Path) -> None:
    images = images_to_caption(photos).images
    asked: list[int] = []
    done = caption_images(images, lambda image: "x", cancelled=lambda: len(asked) == 2 or asked.append(1) is not None)
    assert (len(done.written), done.left) == (2, 2)

    def interrupted(image: Image.Image) -> str:
        if (photos / "a.txt").exists():
            raise KeyboardInterrupt
        return "y"

    with pytest.raises(KeyboardInterrupt):
        caption_images(images_to_caption(photos).images, interrupted)
    assert len(list(photos.rglob("*.txt"))) == 3 and not list(photos.rglob("*.tmp"))
    assert len(images_to_caption(photos).images) == 1


def test_a_caption_that_cannot_be_written_ends_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OutputError(f"{path} was not written because the disk is full; free some space")

    monkeypatch.setattr(captioning, "write_atomic", full)
    with pytest.raises(OutputError, match="the disk is full"):
        caption_images(images_to_caption(photos).images, lambda image: "x")


def test_what_is_no_folder_of_images_is_a_sentence(tmp_path: Path, photos: Path) -> None:
    for path in (tmp_path / "nowhere", photos / "2.jpg"):
        with pytest.raises(DataError, match=r"does not exist; check the path|images must be in a folder"):
            images_to_caption(path)
    with pytest.raises(DataError, match=r"holds no images; put some in it .*--recursive"):
        images_to_caption(photos / "other")
    if hasattr(os, "mkfifo"):
        os.mkfifo(photos / "pipe.png")
        done = caption_images([photos / "pipe.png"], lambda image: "x")
        assert "named pipe" in done.failed[0][1]
