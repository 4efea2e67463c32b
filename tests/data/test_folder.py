from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import DataError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.data_config import DataConfig, ImageSource
from lorasmith.data.folder import ImageFile, scan_folder, scan_sources
from lorasmith.data.source_files import NoteKind, ScanNotes
from lorasmith.formats.metadata import sha256_file
from tests.data.folder_cases import add_image, names


def test_images_and_captions(tmp_path: Path) -> None:
    one = add_image(tmp_path / "one.png", "a dog")
    two = add_image(tmp_path / "two.jpg")
    three = add_image(tmp_path / "three.png", " \n", size=(24, 32))
    scan = scan_folder(tmp_path)
    assert all(image.digest == sha256_file(image.path) for image in scan.images)
    assert tuple(replace(image, digest="") for image in scan.images) == (
        ImageFile(one, 32, 24, "a dog", "file", captions=("a dog",)),
        ImageFile(three, 24, 32, "", "none"),
        ImageFile(two, 32, 24, "", "none"),
    )
    assert scan.missing_captions == (three, two)
    assert scan.skipped == scan.notes == ()


def test_natural_order(tmp_path: Path) -> None:
    for name in ("img10.png", "img2.png", "IMG1.png", "img02.png", "10.png", "9.png", "a.png"):
        add_image(tmp_path / name)
    assert names(scan_folder(tmp_path)) == [
        "9.png",
        "10.png",
        "a.png",
        "IMG1.png",
        "img02.png",
        "img2.png",
        "img10.png",
    ]


def test_repeats_of_kohya_s_folders(tmp_path: Path) -> None:
    add_image(tmp_path / "10_sks dog" / "1.png")
    add_image(tmp_path / "10_sks dog" / "2.png", "a dog on a beach")
    add_image(tmp_path / "2_cats" / "3.png")
    add_image(tmp_path / "4.png")
    found = [(i.path.name, i.repeats, i.caption, i.caption_source) for i in scan_folder(tmp_path).images]
    assert found == [
        ("4.png", 1, "", "none"),
        ("3.png", 2, "cats", "folder"),
        ("1.png", 10, "sks dog", "folder"),
        ("2.png", 10, "a dog on a beach", "file"),
    ]
    with_trigger = scan_folder(tmp_path, DataConfig(trigger="zzz")).images
    assert [image.caption for image in with_trigger] == ["zzz", "zzz", "zzz", "zzz, a dog on a beach"]


def test_other_folders_are_told(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png")
    add_image(tmp_path / "masks" / "1.png")
    add_image(tmp_path / "0_off" / "1.png")
    scan = scan_folder(tmp_path)
    assert names(scan) == ["1.png"]
    reason = "is a folder without repeats in its name; rename it to 1_name or add recursive"
    assert scan.skipped == ((tmp_path / "0_off", reason), (tmp_path / "masks", reason))


def test_everything_that_is_wrong_is_skipped_with_its_reason(tmp_path: Path) -> None:
    add_image(tmp_path / "good.png")
    add_image(tmp_path / "small.png", size=(1, 1))
    add_image(tmp_path / "flat.png", size=(100, 15))
    add_image(tmp_path / "long.png", size=(20_000, 20))
    add_image(tmp_path / "edge.png", size=(128, 16))
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "photo.psd").write_bytes(b"8BPS")
    cut = add_image(tmp_path / "cut.jpg", size=(200, 200))
    cut.write_bytes(cut.read_bytes()[:-200])
    scan = scan_folder(tmp_path)
    assert names(scan) == ["edge.png", "good.png"]
    reasons = {path.name: reason for path, reason in scan.skipped}
    assert reasons.pop("text.png").startswith("is not an image in spite of its name")
    assert reasons.pop("cut.jpg").startswith("is damaged or cut short")
    assert reasons == {
        "small.png": "is a single pixel; replace it by a picture or remove it",
        "flat.png": "is 100×15 px, but its shorter edge must be 16 px; use a larger one",
        "long.png": "is 20000×20 px, longer than 8:1; crop it or cut it into pieces",
        "photo.psd": "is a PSD file, which is not read here; convert it to PNG or JPEG",
    }


def test_what_has_no_usable_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images; put some in it \(.*jpg.*png.*\)$"):
        scan_folder(tmp_path)
    with pytest.raises(DataError, match=r"^image folder .*nowhere does not exist; check the path$"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"1\.png is a file; use the folder it is in"):
        scan_folder(add_image(tmp_path / "1.png", size=(1, 1)))
    (tmp_path / "2.png").touch()
    with pytest.raises(DataError, match=r"no usable image: 1\.png is a single pixel; .* \(1 more were skipped\)$"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(("folder", "count"), [("high-contrast", 16), ("fox", 6)])
def test_example_folders(folder: str, count: int) -> None:
    path = BUILT_IN_BASE / "input" / folder
    scan = scan_folder(path)
    assert len(scan.images) == count
    assert scan.skipped == scan.missing_captions == scan.notes == ()
    assert all(image.width == image.height == 256 for image in scan.images)
    assert all(image.path.stat().st_size < 15_000 for image in scan.images)
    assert (path / "LICENSE.txt").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="files of POSIX systems")
def test_what_is_no_file_is_skipped_by_name(tmp_path: Path) -> None:
    add_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "1_x").mkdir()
    os.mkfifo(tmp_path / "1_x" / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    scan = scan_folder(tmp_path, DataConfig(follow_links=True))

    assert names(scan) == ["a.png"]
    assert [(path.name, reason) for path, reason in scan.skipped] == [
        ("pipe.png", "cannot be read (it is a named pipe, not a file); replace or remove it"),
        ("zero.png", "cannot be read (it is a device, not a file); replace or remove it"),
        ("pipe.png", "cannot be read (it is a named pipe, not a file); replace or remove it"),
    ]


def test_more_repeats_than_any_are_skipped(tmp_path: Path) -> None:
    add_image(tmp_path / "a.png")
    add_image(tmp_path / "99999999999_x" / "b.png")
    add_image(tmp_path / "10000_x" / "c.png")
    scan = scan_folder(tmp_path)

    assert [image.repeats for image in scan.images] == [1, 10_000]
    assert scan.skipped == ((tmp_path / "99999999999_x", "repeats its images more than 10,000 times; rename it"),)


@pytest.mark.skipif(sys.platform != "linux", reason="names on other systems are Unicode")
def test_names_that_are_not_unicode_are_captions_all_the_same(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/2_caf\xe9\x1b"))
    add_image(folder / "a.png")
    (image,) = scan_folder(tmp_path).images

    assert image.caption == "caf?\x1b"


def test_links_to_outside_are_named(tmp_path: Path) -> None:
    elsewhere = add_image(tmp_path / "elsewhere" / "a.png", "secret")
    folder = tmp_path / "photos"
    add_image(folder / "b.png")
    (folder / "b.txt").symlink_to(elsewhere.with_suffix(".txt"))
    (folder / "a.png").symlink_to(elsewhere)

    follow = DataConfig(follow_links=True)
    assert scan_folder(folder, follow).notes == (
        f"2 files are links to outside of the folder, such as a.png to {elsewhere}",
    )

    (folder / "metadata.json").symlink_to(tmp_path / "elsewhere" / "m.json")
    (tmp_path / "elsewhere" / "m.json").write_text('{"a": {"caption": "x"}}')
    (folder / "inside").symlink_to("metadata.json")
    (folder / "more").symlink_to(elsewhere.parent)
    (folder / "c.png").symlink_to("b.png")
    follow = replace(follow, recursive=True)
    assert "5 files are links to outside" in scan_folder(folder, follow).notes[-1]


LEADS_OUT = {
    "picture": ("a.png", "a.png"),
    "caption": ("a.txt", "a.png"),
    "mask": ("a.mask.png", "a.png"),
    "metadata": ("metadata.jsonl", "a.png"),
    "folder": ("2_more", "inner.png"),
    "mask elsewhere": ("../masks/a.png", "a.png"),
}
"""What is a link in the folder, and the picture that is not trained on for it."""


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("case", LEADS_OUT)
def test_what_a_link_leads_out_to_is_read_only_if_that_is_typed(tmp_path: Path, case: str) -> None:
    name, lost = LEADS_OUT[case]
    secrets = tmp_path / "secrets"
    add_image(secrets / "inner.png", "secret")
    for secret in ("a.png", "a.mask.png"):
        shutil.copy(secrets / "inner.png", secrets / secret)
    (secrets / "a.txt").write_text("secret")
    (secrets / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "secret"}')
    folder, masks = tmp_path / "photos", tmp_path / "masks"
    masks.mkdir()
    add_image(folder / "b.png", "mine")
    if case != "picture":
        add_image(folder / "a.png")
    target = secrets if case == "folder" else secrets / Path(name).name
    (folder / name).symlink_to(target)
    settings: dict[str, Any] = {"masks": "files"} if "mask" in case else {}
    settings |= {"mask_folder": str(masks)} if case == "mask elsewhere" else {}

    scan = scan_folder(folder, DataConfig(**settings))
    assert lost not in names(scan) and "b.png" in names(scan)
    assert "secret" not in str([vars(one) for one in scan.images])
    assert any("--follow-links" in reason for _, reason in scan.skipped)
    followed = scan_folder(folder, DataConfig(**settings, follow_links=True))
    assert lost in names(followed)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_folder_that_is_a_link_itself_is_read(tmp_path: Path) -> None:
    add_image(tmp_path / "disk" / "a.png", "a dog")
    (tmp_path / "disk" / "alias.png").symlink_to("a.png")
    (tmp_path / "photos").symlink_to(tmp_path / "disk")
    scan = scan_folder(tmp_path / "photos")
    assert names(scan) == ["a.png", "alias.png"] and scan.images[0].caption == "a dog"


def test_names_that_differ_by_case_alone_are_said(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "b.jpg"):  # b.txt is of both everywhere
        add_image(tmp_path / name)
    assert scan_folder(tmp_path).notes == ()
    add_image(tmp_path / "A.jpg")
    (note,) = scan_folder(tmp_path).notes
    assert note.startswith("1 image has the name of another one but for case, such as ") and "A.jpg" in note


def test_repeats_and_weights_of_sources(tmp_path: Path) -> None:
    add_image(tmp_path / "a" / "10_x" / "1.png", "one")
    add_image(tmp_path / "b" / "2.png", "two")
    scan = scan_sources([ImageSource(str(tmp_path / "a"), 2, 0.5), ImageSource(str(tmp_path / "b"))])
    assert [(i.path.name, i.repeats, i.weight) for i in scan.images] == [("1.png", 20, 0.5), ("2.png", 1, 1.0)]

    with pytest.raises(DataError, match=r"10_x repeats its images more than 10,000 times"):
        scan_sources([ImageSource(str(tmp_path / "a"), 1001)])


def test_a_source_without_images_is_named_besides_others(tmp_path: Path) -> None:
    add_image(tmp_path / "a" / "1.png", size=(1, 1))
    add_image(tmp_path / "b" / "2.png")
    both = [ImageSource(str(tmp_path / name)) for name in "ab"]
    scan = scan_sources(both)
    assert names(scan) == ["2.png"] and [path.name for path, _ in scan.skipped] == ["1.png"]
    with pytest.raises(DataError, match="does not exist"):
        scan_sources([*both, ImageSource(str(tmp_path / "c"))])
    with pytest.raises(DataError, match="a run needs images, got no source of them"):
        scan_sources([])


def test_images_in_two_sources_are_said(tmp_path: Path) -> None:
    add_image(tmp_path / "5_x" / "1.png")
    scan = scan_sources([ImageSource(str(tmp_path)), ImageSource(str(tmp_path / "5_x"))])
    assert [image.repeats for image in scan.images] == [5, 1]
    assert scan.notes == ("1 image is in several sources, such as 1.png, and counted for each",)


@pytest.mark.parametrize(
    ("origin", "trigger", "expected"),
    [
        ("filename", "", [("sks dog", "filename"), ("", "none")]),
        ("filename", "zzz", [("zzz, sks dog", "filename"), ("zzz", "trigger")]),
        ("folder", "", [("my photos", "folder"), ("toys", "folder")]),
        ("none", "zzz", [("zzz", "trigger"), ("zzz", "trigger")]),
        ("none", "", [("", "none"), ("", "none")]),
    ],
)
def test_captions_from_elsewhere(tmp_path: Path, origin: str, trigger: str, expected: list[tuple[str, str]]) -> None:
    folder = tmp_path / "my photos"
    add_image(folder / "sks_dog_01.png", "of the file")
    add_image(folder / "3_toys" / "007.png")
    scan = scan_folder(folder, DataConfig(captions=origin, trigger=trigger))
    assert [(image.caption, image.caption_source) for image in scan.images] == expected
    assert scan.notes == ("1 file with captions is not used, such as sks_dog_01.txt; they are with captions files",)
    assert len(scan.missing_captions) == (1 if origin == "filename" else 0)


def test_rules_apply_to_the_plain_caption(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png", "a {red|blue} dog\n\n a cat ")
    config = DataConfig(prefix="a photo of", suffix=", best", trigger="sks", wildcards=True, caption_lines=True)
    (image,) = scan_folder(tmp_path, config).images
    assert image.captions == ("a {red|blue} dog", "a cat")
    assert image.caption == "a photo of sks, a red dog, best"
    (image,) = scan_folder(tmp_path).images
    assert image.captions == ("a {red|blue} dog a cat",) and image.caption == image.captions[0]


def test_images_of_the_class(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png", "a dog in a garden")
    add_image(tmp_path / "2.png")
    add_image(tmp_path / "1_hound" / "3.png")
    config = DataConfig(trigger="sks dog", class_prompt="a dog")
    scan = scan_sources([ImageSource(str(tmp_path))], config, is_class=True)
    assert all(image.is_class for image in scan.images)
    assert [(image.caption, image.caption_source) for image in scan.images] == [
        ("a dog in a garden", "file"),
        ("a dog", "class"),
        ("a dog", "class"),
    ]
    without = scan_sources([ImageSource(str(tmp_path))], DataConfig(trigger="sks dog"), is_class=True)
    assert [image.caption for image in without.images] == ["a dog in a garden", "", "hound"]


def test_results_do_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(60):
        add_image(tmp_path / f"{index}.png", str(index), size=(16 + index % 3, 16) if index % 7 else (1, 1))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    several = scan_folder(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert several == scan_folder(tmp_path)
    assert [image.caption for image in several.images] == [str(index) for index in range(60) if index % 7]


def test_a_scan_shows_itself_on_a_line(tmp_path: Path) -> None:
    add_image(tmp_path / "1.png", "a fox")
    add_image(tmp_path / "2.png")
    (tmp_path / "3.png").write_bytes(b"")
    assert repr(scan_folder(tmp_path)) == "FolderScan(2 images, 1 skipped, 1 without a caption)"


def test_remarks_of_a_kind_are_one_sentence() -> None:
    remarks = ScanNotes()
    remarks.add(NoteKind.LINKS, "b.png to /x")
    remarks.add(NoteKind.LATIN_1, "")
    remarks.add(NoteKind.SECOND_FILE, "none", 0)
    remarks.add(NoteKind.NO_IMAGE, "{0}.txt", 1999)
    remarks.add(NoteKind.NO_IMAGE, "other.txt")
    assert remarks.sentences() == (
        "1 caption file is not UTF-8 and read as latin-1, such as ; check the accents or save as UTF-8",
        "2,000 caption files have no image of the same name, such as {0}.txt; rename or remove what is not needed",
        "1 file is a link to outside of the folder, such as b.png to /x",
    )


def test_repeats_of_single_images(tmp_path: Path) -> None:
    folder = tmp_path / "10_fox"
    for name in ("a.png", "b.png"):
        add_image(tmp_path / name)
    add_image(folder / "c.png")
    for rules, expected in {
        "": {"a.png": 1, "b.png": 1, "c.png": 10},
        "c.png=0.1": {"a.png": 1, "b.png": 1, "c.png": 1},
        "b.png = 0.5": {"a.png": 2, "b.png": 1, "c.png": 20},
        "b.png=0.25|c*=0": {"a.png": 4, "b.png": 1},
        "[ab].png=3 | a.png=0": {"a.png": 3, "b.png": 3, "c.png": 10},
    }.items():
        scan = scan_folder(tmp_path, DataConfig(image_repeats=rules))
        assert {image.name: image.repeats for image in scan.images} == expected, rules
        left_out = "1 image is left out by image_repeats, such as c.png"
        assert (left_out in scan.notes) == ("c*=0" in rules)
    with pytest.raises(DataError, match="leaves out each of 3 images"):
        scan_folder(tmp_path, DataConfig(image_repeats="*=0"))
    with pytest.raises(DataError, match=r"image_repeats makes c\.png occur 100,000 times; use factors such as 0\.5"):
        scan_folder(tmp_path, DataConfig(image_repeats="a.png=0.01 | c.png=100"))


def test_pictures_of_the_class_keep_their_repeats(tmp_path: Path) -> None:
    add_image(tmp_path / "a.png")
    scan = scan_sources([ImageSource(str(tmp_path))], DataConfig(image_repeats="a.png=0"), is_class=True)
    assert names(scan) == ["a.png"]
