"""Which caption, which entry of a metadata file and which mask an image has, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.core.errors import DataError
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import scan_folder
from tests.data.folder_cases import add_image, names

MASKS = DataConfig(masks="files")


def write(path: Path, **captions: object) -> Path:
    """A `metadata.jsonl`, or kohya's JSON, with captions by name (without `.png`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps({name: {"caption": text} for name, text in captions.items()}))
    else:
        entries = [{"file_name": f"{name}.png", "text": text} for name, text in captions.items()]
        path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.json", "meta_lat.json"])
def test_captions_of_a_metadata_file(tmp_path: Path, name: str) -> None:
    for stem in "123":
        add_image(tmp_path / f"{stem}.png")
    write(tmp_path / name, **{"1": "a dog", "2": ["a cat", "two cats"]})
    scan = scan_folder(tmp_path, DataConfig(trigger="sks"))
    assert [(i.caption, i.captions, i.caption_source) for i in scan.images] == [
        ("sks, a dog", ("a dog",), "metadata"),
        ("sks, a cat", ("a cat", "two cats"), "metadata"),
        ("sks", (), "trigger"),
    ]
    assert scan.missing_captions == (tmp_path / "3.png",)
    assert scan.notes == scan.skipped == ()


def test_caption_files_come_before_metadata(tmp_path: Path) -> None:
    for stem, caption in (("1", "of the file"), ("2", "the same"), ("3", " ")):
        add_image(tmp_path / f"{stem}.png", caption)
    write(tmp_path / "metadata.jsonl", **{"1": "of the metadata", "2": "the  same", "3": "instead"})
    scan = scan_folder(tmp_path)
    assert [(i.caption, i.caption_source) for i in scan.images] == [
        ("of the file", "file"),
        ("the same", "file"),
        ("instead", "metadata"),
    ]
    assert scan.notes == (
        "1 image has different captions in a caption file and in a metadata file; of 1.png, 1.txt is used",
    )


def test_a_metadata_file_as_source(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png", "of the file")
    add_image(tmp_path / "2.png", "not named")
    add_image(tmp_path / "sub" / "3.png")
    path = write(tmp_path / "meta_clean.json", **{"1": "one", "sub/3": "three"})
    scan = scan_folder(path)
    assert [(i.path.name, i.caption, i.caption_source) for i in scan.images] == [
        ("1.png", "one", "metadata"),
        ("3.png", "three", "metadata"),
    ]
    assert scan.notes == (
        "1 image has different captions in a caption file and in a metadata file; of 1.png, meta_clean.json is used",
        "1 image is not used, such as 2.png, as the metadata file does not name them",
    )
    path.write_text("{")
    with pytest.raises(DataError, match=r"meta_clean\.json is not valid JSON; repair it, or use another one"):
        scan_folder(path)


def test_the_nearest_metadata_file_counts(tmp_path: Path) -> None:
    for name in ("1.png", "a/2.png", "a/3.png"):
        add_image(tmp_path / name)
    write(tmp_path / "metadata.jsonl", **{"1": "root 1", "a/2": "root 2", "a/3": "root 3"})
    write(tmp_path / "a" / "metadata.jsonl", **{"2": "inner 2"})
    scan = scan_folder(tmp_path, DataConfig(recursive=True))
    assert [image.caption for image in scan.images] == ["root 1", "inner 2", "root 3"]
    assert scan.notes == ()


def test_entries_without_an_image_are_said(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png")
    add_image(tmp_path / "2.png", size=(1, 1))
    write(tmp_path / "metadata.jsonl", **{"1": "a", "2": "b", "4": "d", "3": "c", "../5": "e"})
    scan = scan_folder(tmp_path)
    assert scan.notes == (
        "2 entries of metadata files have no image here, such as 3.png",
        "1 entry of metadata files is not used, such as ../5.png, as they name files outside of the folder",
    )


def test_a_second_metadata_file_is_said(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png")
    write(tmp_path / "metadata.jsonl", **{"1": "jsonl"})
    write(tmp_path / "meta_lat.json", **{"1": "json"})
    scan = scan_folder(tmp_path)
    assert scan.images[0].caption == "jsonl"
    assert scan.skipped == ((tmp_path / "meta_lat.json", "is not read besides metadata.jsonl; keep one of them"),)


def test_images_without_a_caption_of_their_own_wait_for_damaged_metadata(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png", "of the file")
    add_image(tmp_path / "2.png")
    (tmp_path / "metadata.jsonl").write_text("{")
    scan = scan_folder(tmp_path)
    assert names(scan) == ["1.png"]
    assert scan.skipped == (
        (
            tmp_path / "2.png",
            "is left out because metadata.jsonl is not valid JSON in line 1; repair or remove that file",
        ),
        (tmp_path / "metadata.jsonl", "is not valid JSON in line 1; repair or remove it"),
    )


def test_an_image_whose_entry_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png")
    add_image(tmp_path / "2.png")
    write(tmp_path / "metadata.jsonl", **{"1": "x" * 30_000, "2": "a"})
    scan = scan_folder(tmp_path)
    assert names(scan) == ["2.png"]
    assert scan.skipped[0][1].startswith("is left out because metadata.jsonl has a caption of more than 20,000")


def test_files_of_another_kind_do_no_harm(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png")
    (tmp_path / "metadata.json").write_text('{"version": 3}')
    scan = scan_folder(tmp_path, DataConfig(trigger="sks"))
    assert [image.caption for image in scan.images] == ["sks"]
    assert [path.name for path, _ in scan.skipped] == ["metadata.json"]


@pytest.mark.parametrize("origin", ["filename", "folder", "none"])
def test_metadata_is_not_read_for_other_origins(tmp_path: Path, origin: str) -> None:
    add_image(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text("{")
    scan = scan_folder(tmp_path, DataConfig(captions=origin))
    assert names(scan) == ["1.png"] and scan.skipped == ()
    assert scan.notes == ("1 file with captions is not used, such as metadata.jsonl; they are with captions files",)


def test_caption_files_without_an_image_are_said(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png", "used")
    for name in ("2.txt", "3.caption", "README.txt", "license.txt", "x.psd", "x.txt", "notes.md"):
        (tmp_path / name).touch()
    scan = scan_folder(tmp_path)
    assert scan.notes == (
        "2 caption files have no image of the same name, such as 2.txt; rename or remove what is not needed",
    )


def test_a_second_caption_file_is_said(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png", "of the text file")
    (tmp_path / "1.caption").write_text("another")
    scan = scan_folder(tmp_path)
    assert scan.images[0].caption == "of the text file"
    assert scan.notes == (
        "1 caption file is not used, such as 1.caption, as the image has another one; remove one of them",
    )


def test_masks_beside_images(tmp_path: Path) -> None:
    for name in ("1.png", "1.mask.png", "2.png", "3.mask.png"):
        add_image(tmp_path / name)
    scan = scan_folder(tmp_path, MASKS)
    assert [image.mask for image in scan.images] == [tmp_path / "1.mask.png", None]
    assert scan.notes == ("1 mask is not used, such as 3.mask.png, as there is no image of the name, or another mask",)


def test_masks_without_the_setting_are_no_images_either(tmp_path: Path) -> None:
    for name in ("1.png", "1.mask.png"):
        add_image(tmp_path / name)
    scan = scan_folder(tmp_path)
    assert names(scan) == ["1.png"] and scan.images[0].mask is None
    assert scan.notes == ("1 mask is not used, such as 1.mask.png; they are with masks files",)
    assert scan_folder(tmp_path, DataConfig(masks="alpha")).images[0].mask is None


def test_masks_in_a_folder_of_their_own(tmp_path: Path) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "photos" / "masks"
    for name in ("1.jpg", "2.png", "a/1.png", "masks/1.png", "masks/2.mask.png", "masks/a/1.png", "masks/9.png"):
        add_image(photos / name)
    config = DataConfig(masks="files", mask_folder=str(masks), recursive=True)
    scan = scan_folder(photos, config)
    assert [(image.path, image.mask) for image in scan.images] == [
        (photos / "1.jpg", masks / "1.png"),
        (photos / "2.png", masks / "2.mask.png"),
        (photos / "a" / "1.png", masks / "a" / "1.png"),
    ]
    assert scan.notes == ("1 mask is not used, such as 9.png, as there is no image of the name, or another mask",)
    with pytest.raises(DataError, match=r"mask_folder must be a folder, got .*; check the path"):
        scan_folder(photos, DataConfig(masks="files", mask_folder=str(tmp_path / "none")))
    with pytest.raises(DataError, match="mask_folder must be another folder than that of the images"):
        scan_folder(photos, DataConfig(masks="files", mask_folder=str(photos / "masks" / "..")))


def test_an_image_whose_mask_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    for stem, size in (("1", (64, 48)), ("2", (48, 64)), ("3", (64, 47)), ("4", (33, 25))):
        add_image(tmp_path / f"{stem}.png", size=(64, 48))
        add_image(tmp_path / f"{stem}.mask.png", size=size)
    add_image(tmp_path / "5.png")
    (tmp_path / "5.mask.png").write_bytes(b"")
    scan = scan_folder(tmp_path, MASKS)
    assert names(scan) == ["1.png", "3.png", "4.png"]
    assert [reason for _, reason in scan.skipped] == [
        "is left out because its mask 2.mask.png is 48×64 px and the picture 64×48; make both of one aspect ratio",
        "is left out because its mask 5.mask.png is empty; get a good copy or remove it",
    ]
