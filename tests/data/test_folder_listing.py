from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lorasmith.core.errors import DataError
from lorasmith.data.folder_listing import ListedFolder, Skipped, list_folders, name_without_repeats, stem_of
from tests.processor_time import processor_time


def listed(folder: Path, *, recursive: bool = False, **options) -> tuple[list[ListedFolder], Skipped]:
    skipped: Skipped = []
    options = {"masks": False, **options}
    return list(list_folders(str(folder), recursive=recursive, skipped=skipped, **options)), skipped


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_what_a_folder_holds(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a.jpg", "a.caption", "a.txt", "b.TXT", "x.psd", "metadata.jsonl", "notes.md", ".a.png")
    ((folder,), _) = listed(tmp_path)
    assert folder.images == ["a.jpg", "b.PNG"]
    assert folder.captions == {"a": ["a.txt", "a.caption"], "b": ["b.TXT"]}
    assert folder.metadata == ["metadata.jsonl"]
    assert [path.name for path, _ in folder.foreign] == ["x.psd"]


def test_masks_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.mask.png", "b.mask.webp", "mask.png")
    ((folder,), _) = listed(tmp_path)
    assert (folder.images, folder.masks) == (["a.png", "b.mask.webp", "mask.png"], {"a": ["a.mask.png"]})
    ((folder,), _) = listed(tmp_path, masks=True)
    assert (folder.images, folder.masks) == (["a.png", "mask.png"], {"a": ["a.mask.png"], "b": ["b.mask.webp"]})


def test_folders_inside_of_folders(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "b/2.png", "b/4_toys/3.png", "b/4_toys/x/4.png", "2_a/5.png", "0_off/6.png", ".git/7.png")
    folders, skipped = listed(tmp_path, recursive=True)
    assert [(one.inside, one.repeats, one.caption, one.images) for one in folders] == [
        ("", 1, "", ["1.png"]),
        ("2_a", 2, "a", ["5.png"]),
        ("b", 1, "", ["2.png"]),
        ("b/4_toys", 4, "toys", ["3.png"]),
        ("b/4_toys/x", 4, "toys", ["4.png"]),
    ]
    assert [path.name for path, _ in skipped] == ["0_off"]

    folders, skipped = listed(tmp_path)
    assert [one.inside for one in folders] == ["", "2_a"]
    assert [path.name for path, _ in skipped] == ["0_off", "b"]


def test_folders_inside_of_repeated_ones_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "2_a/1.png", "2_a/3_b/2.png")
    folders, skipped = listed(tmp_path)
    assert [one.inside for one in folders] == ["", "2_a"]
    assert skipped == [(tmp_path / "2_a" / "3_b", "is a folder inside of another one; add recursive to include it")]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_loops_of_links_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/b/2.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "here").symlink_to(".")
    folders, skipped = listed(tmp_path, recursive=True)
    assert [one.images for one in folders] == [[], ["1.png"], ["2.png"]]
    reason = "is a link to a folder that is read already"
    assert skipped == [(tmp_path / "here", reason), (tmp_path / "a" / "b" / "up", reason)]


def test_folders_of_runs_are_passed_over(tmp_path: Path) -> None:
    """Previews are no images to train on, and a second run has the same images as the first."""
    touch(tmp_path, "1.png", "runs/cat-001/run.json", "runs/cat-001/events.jsonl", "runs/cat-001/samples/step-1.png")
    touch(tmp_path, "2_dog/run.json", "2_dog/events.jsonl", "2_dog/2.png", "other/run.json", "other/3.png")
    folders, skipped = listed(tmp_path, recursive=True)
    assert [one.inside for one in folders] == ["", "other", "runs"] and skipped == []
    assert [one.inside for one in listed(tmp_path)[0]] == [""]


def test_the_folder_of_masks_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "masks/1.png")
    folders, skipped = listed(tmp_path, recursive=True, excluding=[str(tmp_path / "masks")])
    assert [one.inside for one in folders] == [""] and skipped == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2_a/2.png")
    (tmp_path / "2_a").chmod(0)
    try:
        folders, skipped = listed(tmp_path)
    finally:
        (tmp_path / "2_a").chmod(0o755)
    assert [one.inside for one in folders] == [""]
    assert skipped == [(tmp_path / "2_a", "cannot be read (Permission denied); check its permissions")]


@pytest.mark.parametrize("name", ["no\x00name", "\ud800"])
def test_names_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        listed(tmp_path / name)


def test_names() -> None:
    assert [name_without_repeats(name) for name in ("10_sks dog", "photos", "x_1")] == ["sks dog", "photos", "x_1"]
    for name in ("a.png", "a.b.png", "a", "a."):
        assert stem_of(name) == (Path(name).stem if name != "a." else "a")


def test_thousands_of_names_are_listed_at_once(tmp_path: Path) -> None:
    for index in range(3000):
        (tmp_path / f"photo {index}.png").touch()
    with processor_time(at_most_s=2):
        ((folder,), _) = listed(tmp_path)
    assert folder.images[:3] == ["photo 0.png", "photo 1.png", "photo 2.png"] and len(folder.images) == 3000
