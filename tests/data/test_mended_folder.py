"""A mended copy of a folder: what can be mended is, the rest is as it was, and so is the original."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_cases import movie

from lorasmith.core.choices import Fix
from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data import mended_folder
from lorasmith.data.data_config import DataConfig
from lorasmith.data.folder import scan_folder
from lorasmith.data.image_files import image_header, open_image
from lorasmith.data.mended_folder import MendedFolder, write_mended
from lorasmith.data.preflight import Preflight, preflight
from tests.data.test_preflight import add, photo


def checked(folder: Path, resolution: int = 128) -> Preflight:
    return preflight(scan_folder(folder), DataConfig(), folder=folder, resolution=resolution, multiple=16)


def mended(
    folder: Path, resolution: int = 128, *, config: DataConfig | None = None, only: Collection[Fix] = get_args(Fix)
) -> MendedFolder:
    before, config = content(folder), config or DataConfig()
    check = preflight(scan_folder(folder, config), config, folder=folder, resolution=resolution, multiple=16)
    done = write_mended(check, config, folder.with_name("fixed"), only=only)
    assert content(folder) == before, "the original is only read"
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    return done


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest() for path in files}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "photos"


def test_good_images_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = BUILT_IN_BASE / "input" / "fox"
    check = preflight(scan_folder(source), DataConfig(), folder=source, resolution=256, multiple=16)
    done = write_mended(check, DataConfig(), tmp_path / "fixed")
    before, after = content(source), content(done.folder)
    assert {name: after[name] for name in after if name.endswith(".png")} == {
        name: before[name] for name in before if name.endswith(".png")
    }
    assert (done.pictures, done.captions, done.changes) == (6, 6, {"left out": ("LICENSE.txt",)})


def test_large_pictures_are_reduced_to_twice_the_area(folder: Path) -> None:
    add(folder / "1.jpg", photo(1, (900, 600)), "a dog")
    add(folder / "2.png", photo(2, (900, 600)))
    add(folder / "3.jpg", photo(3, (180, 180)))
    done = mended(folder)
    assert done.changes == {"reduced": ("1.jpg", "2.png")}
    for name in ("1.jpg", "2.png"):
        with Image.open(done.folder / name) as picture:
            assert 0.98 * 2 * 128**2 < picture.width * picture.height <= 2 * 128**2
            assert picture.width / picture.height == pytest.approx(1.5, rel=0.01)
            assert picture.format == ("JPEG" if name == "1.jpg" else "PNG")
    assert (done.folder / "3.jpg").read_bytes() == (folder / "3.jpg").read_bytes()


@pytest.mark.parametrize("orientation", [2, 6])
def test_pictures_are_turned_upright(folder: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    add(folder / "1.png", photo(1, (160, 120)), exif=exif)
    done = mended(folder)
    assert done.changes == {"turned upright": ("1.png",)}
    assert image_header(done.folder / "1.png").is_upright
    assert open_image(done.folder / "1.png").tobytes() == open_image(folder / "1.png").tobytes()


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "F"])
def test_pictures_become_8_bit(folder: Path, mode: str) -> None:
    folder.mkdir()
    greys = np.linspace(0, 1, 128 * 128, dtype=np.float32).reshape(128, 128)
    if mode == "CMYK":
        photo(1, (128, 128)).convert("CMYK").save(folder / "1.jpg")
    else:
        values = greys if mode == "F" else (greys * 65535).astype(np.uint16)
        Image.fromarray(values).save(folder / "1.tif")
    (name,) = mended(folder).changes["converted"]
    assert name == ("1.jpg" if mode == "CMYK" else "1.png")
    fixed = folder.with_name("fixed") / name
    assert image_header(fixed).mode == "RGB"
    (original,) = folder.iterdir()
    difference = np.abs(np.asarray(open_image(fixed), dtype=int) - np.asarray(open_image(original), dtype=int))
    assert difference.mean() < 4


def test_transparency_is_kept(folder: Path) -> None:
    picture = photo(1, (400, 400))
    picture.putalpha(Image.linear_gradient("L").resize((400, 400)))
    add(folder / "1.png", picture)
    with Image.open(mended(folder).folder / "1.png") as fixed:
        assert fixed.mode == "RGBA" and fixed.getchannel("A").getextrema()[0] < 5


@pytest.mark.parametrize("suffix", ["tga", "jp2", "ppm"])
def test_other_formats_are_converted(folder: Path, suffix: str) -> None:
    add(folder / "1.png", photo(1))
    add(folder / f"2.{suffix}", photo(2), "a cat")
    if suffix == "ppm":  # of a format that the scan does not know, under the name of one that it does
        (folder / "2.ppm").rename(folder / "2.webp")
    done = mended(folder, 256)
    assert done.changes == {"converted": ("2.png",)} and done.captions == 1
    assert open_image(done.folder / "2.png").tobytes() == photo(2).tobytes()


def test_unusable_files_are_kept_apart_with_their_reason(folder: Path) -> None:
    add(folder / "1.png", photo(1))
    whole = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "x.psd").write_bytes(b"no picture")
    (folder / "tiny.tga").parent.mkdir(exist_ok=True)
    photo(2, (9, 9)).save(folder / "tiny.tga")
    (folder / "raw").mkdir()
    done = mended(folder, 256)
    assert done.changes["unused"] == ("unused/cut.png", "unused/tiny.tga", "unused/x.psd")
    assert done.changes["left out"] == ("raw",) and done.pictures == 1
    reasons = (done.folder / "unused" / "REASONS.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in reasons] == ["cut.png", "tiny.tga", "x.psd"]
    assert "is damaged or cut short" in reasons[0] and "is a PSD file" in reasons[2]
    assert set(done.reasons) == {"cut.png", "tiny.tga", "x.psd", "raw"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_pipes_are_not_waited_for(folder: Path) -> None:
    add(folder / "1.png", photo(1))
    os.mkfifo(folder / "2.png")
    done = mended(folder, 256)
    assert "unused" not in done.changes
    assert "2.png (not copied, " in (done.folder / "unused" / "REASONS.txt").read_text(encoding="utf-8")


def test_copies_are_set_apart(folder: Path) -> None:
    add(folder / "1.png", photo(1), "a dog")
    add(folder / "2_cats" / "1.png", photo(1, (64, 64)), "small")
    done = mended(folder, 256)
    assert done.changes == {"set apart": ("duplicates/2_cats_1.png",)}
    assert (done.folder / "duplicates" / "2_cats_1.txt").read_text() == "small"
    assert (done.folder / "duplicates" / "REASONS.txt").read_text() == "2_cats_1.png: shows what 1.png shows\n"


def test_captions_become_utf_8(folder: Path) -> None:
    add(folder / "1.png", photo(1)).with_suffix(".txt").write_bytes("ein Füchslein".encode("latin-1"))
    add(folder / "2.png", photo(2)).with_suffix(".caption").write_bytes("a\r\ncat".encode("utf-16"))
    add(folder / "3.png", photo(3), "")
    done = mended(folder, 256)
    captions = {path.name: path.read_bytes().decode() for path in done.folder.glob("[1-3].txt")}
    assert captions == {"1.txt": "ein Füchslein\n", "2.txt": "a cat\n"} and done.captions == 2


def test_repeats_are_kept_and_names_made_safe(folder: Path) -> None:
    names = ("10_sks dog/a:b?.png", "-x.png", "con.png", "..y.png", "z .png", "grün.PNG", "tab\t.png")
    for index, name in enumerate(names):
        add(folder / name, photo(index), f"caption {index}")
    done = mended(folder, 256)
    images = scan_folder(done.folder).images
    assert {image.caption for image in images} >= {f"caption {index}" for index in (0, 1, 2, 4, 5, 6)}
    written = {image.path.relative_to(done.folder).as_posix() for image in images}
    assert written == {"10_sks dog/a_b_.png", "x.png", "_con.png", "z.png", "grün.png", "tab_.png"}


def test_pictures_of_one_name_get_captions_of_their_own(folder: Path) -> None:
    add(folder / "a.jpg", photo(1), "both")
    add(folder / "a.png", photo(2))
    add(folder / "A.webp", photo(3), "third", lossless=True)
    done = mended(folder, 256)
    stems = sorted(path.stem for path in done.folder.iterdir() if path.suffix != ".txt")
    assert len({stem.casefold() for stem in stems}) == 3
    assert done.captions == 3 and len(done.changes["renamed"]) == 2


def test_content_decides_the_suffix(folder: Path) -> None:
    add(folder / "a.jpeg", photo(1))
    add(folder / "b.png", photo(2)).rename(folder / "b.gif")
    assert {path.name for path in mended(folder, 256).folder.iterdir()} == {"a.jpeg", "b.png", "CHANGES.txt"}


def test_what_can_be_mended_is_found_no_more(folder: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    add(folder / "1.jpg", photo(1, (900, 700)), "one", exif=exif)
    add(folder / "2.png", photo(1, (500, 400)).rotate(-90, expand=True), "two")
    add(folder / "3.tga", photo(3), "three")
    (folder / "4.png").write_bytes(b"")
    assert {one.kind for one in checked(folder).findings} == {"unused files", "look-alikes"}
    assert checked(mended(folder).folder).findings == ()


def test_what_is_set_apart_is_never_trained_on(folder: Path) -> None:
    add(folder / "1.png", photo(1))
    add(folder / "2.png", photo(1, (64, 64)))
    (folder / "3.png").touch()
    done = mended(folder, 256)
    for recursive in (False, True):
        scan = scan_folder(done.folder, DataConfig(recursive=recursive))
        assert [one.path.name for one in scan.images] == ["1.png"] and scan.skipped == ()
    for name in ("duplicates", "unused"):
        (done.folder / name / "REASONS.txt").unlink()
    assert len(scan_folder(done.folder, DataConfig(recursive=True)).images) == 2, "folders of these names are usual"


def test_captions_of_metadata_files_become_text_files(folder: Path) -> None:
    for index in range(2):
        add(folder / f"{index}.png", photo(index))
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a dog"}\n{"file_name": "1.png", "text": "a cat"}\n', encoding="utf-8"
    )
    done = mended(folder, 256)
    assert [one.caption for one in scan_folder(done.folder).images] == ["a dog", "a cat"] and done.captions == 2


def test_masks_come_along(folder: Path) -> None:
    add(folder / "a:b.png", photo(1))
    add(folder / "a:b.mask.png", Image.new("L", (256, 256)))
    config = DataConfig(masks="files")
    done = mended(folder, config=config)
    (image,) = scan_folder(done.folder, config).images
    assert image.path.name == "a_b.png" and image.mask == done.folder / "a_b.mask.png"


def refused_folder(folder: Path) -> None:
    """A good picture, and a picture for each way in which its caption, its mask or its size has it refused."""
    add(folder / "good.jpg", photo(0), "a dog", quality=80)
    add(folder / "caption.jpg", photo(1), quality=80).with_suffix(".txt").write_bytes(b"a\0b")
    add(folder / "long.jpg", photo(2), "x " * 11_000, quality=80)
    add(folder / "mask.png", photo(3), "a cat")
    add(folder / "mask.mask.png", Image.new("L", (300, 100), 255))
    add(folder / "damaged.png", photo(4), "a fox")
    (folder / "damaged.mask.png").write_bytes(b"no picture")
    add(folder / "narrow.png", photo(5, (320, 24)))
    add(folder / "entry.png", photo(6))
    (folder / "metadata.jsonl").write_text('{"file_name": "entry.png", "text": 7}\n')
    for name in ("foreign.tga", "foreign_mask.tga"):
        add(folder / name, photo(7), "a bird")
    (folder / "foreign.txt").write_bytes(b"a\0b")
    add(folder / "foreign_mask.mask.png", Image.new("L", (300, 100), 255))


@pytest.mark.parametrize("only", [get_args(Fix), ("copies",)])
def test_what_training_refuses_stays_refused(folder: Path, only: tuple[Fix, ...]) -> None:
    refused_folder(folder)
    config = DataConfig(masks="files", trigger="sks")
    refused = {path.name: str(reason) for path, reason in scan_folder(folder, config).skipped}
    assert len(refused) == 8
    done = mended(folder, 256, config=config, only=only)
    assert [image.path.name for image in scan_folder(done.folder, config).images] == ["good.jpg"]
    assert set(done.reasons) >= set(refused) and len(done.changes["unused"]) == 8
    for name in ("caption.jpg", "mask.png", "narrow.png", "entry.png"):
        assert done.reasons[name] == refused[name], "the reason is that of training"
    for name in ("caption.txt", "long.txt", "mask.mask.png", "mask.txt", "foreign.txt"):
        kept = (done.folder / "unused" / name).read_bytes()
        assert kept == (folder / name).read_bytes(), "caption and mask are there to be repaired"
    if "formats" in only:
        assert "its caption file foreign.txt is not text" in done.reasons["foreign.tga"]
        assert "its mask foreign_mask.mask.png is 300×100 px" in done.reasons["foreign_mask.tga"]


def test_converted_pictures_keep_captions_of_metadata_files_and_masks(folder: Path) -> None:
    add(folder / "1.png", photo(1))
    add(folder / "2.tga", photo(2))
    add(folder / "2.mask.png", Image.new("L", (256, 256), 255))
    (folder / "metadata.jsonl").write_text('{"file_name": "2.tga", "text": "a cat"}\n')
    config = DataConfig(masks="files")
    done = mended(folder, 256, config=config)
    (found,) = [one for one in scan_folder(done.folder, config).images if one.path.name == "2.png"]
    assert found.caption == "a cat" and found.mask == done.folder / "2.mask.png"


@pytest.mark.parametrize("suffix", [".jpg", ".tga"])
def test_jpeg_files_are_copied_byte_for_byte(folder: Path, suffix: str) -> None:
    add(folder / "x.png", photo(9))
    for index, settings in enumerate(({}, {"progressive": True}, {"subsampling": 2})):
        add(folder / f"{index}.jpg", photo(index), quality=70, **settings).rename(folder / f"{index}{suffix}")
    two = io.BytesIO()
    photo(3).save(two, "MPO", save_all=True, append_images=[photo(4)])
    (folder / f"phone{suffix}").write_bytes(two.getvalue())
    done = mended(folder, 256, only=("formats",))
    for path in folder.glob(f"*{suffix}"):
        assert (done.folder / f"{path.stem}.jpg").read_bytes() == path.read_bytes()


def test_animations_keep_their_frames(folder: Path) -> None:
    add(folder / "1.png", photo(1))
    (folder / "2.webp").parent.mkdir(exist_ok=True)
    photo(2, (600, 600)).save(folder / "2.webp", save_all=True, append_images=[photo(3, (600, 600))])
    done = mended(folder)
    assert (done.folder / "2.webp").read_bytes() == (folder / "2.webp").read_bytes()


def test_videos_are_copied(folder: Path) -> None:
    add(folder / "1.png", photo(1), "a dog")
    movie(folder / "2.mp4", 3)
    check = preflight(scan_folder(folder, clips=True), DataConfig(), folder=folder, resolution=128, multiple=16)
    done = write_mended(check, DataConfig(), folder.with_name("fixed"))
    assert (done.folder / "2.mp4").read_bytes() == (folder / "2.mp4").read_bytes() and done.pictures == 2


def test_masks_of_reduced_pictures_still_fit(folder: Path) -> None:
    add(folder / "1.png", photo(1, (901, 601)))
    add(folder / "1.mask.png", Image.new("L", (3604, 2404), 255))
    config = DataConfig(masks="files")
    done = mended(folder, 64, config=config)
    (image,) = scan_folder(done.folder, config).images
    assert image.mask is not None and done.changes["reduced"] == ("1.png",)


def test_only_what_is_chosen_is_mended(folder: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    add(folder / "1.jpg", photo(1, (900, 600)), exif=exif)
    add(folder / "2.png", photo(2))
    add(folder / "3.png", photo(2, (200, 200)))
    add(folder / "4.png", photo(2))
    add(folder / "5.tga", photo(5))
    done = mended(folder, only=("copies",))
    assert done.changes == {"set apart": ("duplicates/4.png",), "unused": ("unused/5.tga",)}
    assert (done.folder / "1.jpg").read_bytes() == (folder / "1.jpg").read_bytes()
    done.folder.rename(folder.with_name("first"))
    done = mended(folder, only=("look-alikes", "rotation"))
    assert done.changes["set apart"] == ("duplicates/3.png",) and done.changes["turned upright"] == ("1.jpg",)
    with Image.open(done.folder / "1.jpg") as picture:
        assert picture.size == (600, 900)


def test_changes_and_what_is_left_out_are_listed_file_by_file(folder: Path) -> None:
    add(folder / "a:.png", photo(1), "a dog")
    add(folder / "2.png", photo(2)).with_suffix(".mask.png").write_bytes((folder / "a:.png").read_bytes())
    (folder / "2.txt").write_bytes(b"a\0b")  # not read here
    (folder / "orphan.txt").write_text("of no picture")
    (folder / "cut.png").write_bytes(b"no picture")
    add(folder / "changes.jpg", photo(3))
    done = mended(folder, 256, config=DataConfig(captions="none"))
    lines = (done.folder / "CHANGES.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "a:.png: renamed, is a_.png",
        "changes.jpg: renamed, is changes-2.jpg",
        "cut.png: unused, is unused/cut.png",
        "2.mask.png: left out",
        "2.txt: left out",
        "orphan.txt: left out",
    ]
    assert done.captions == 1 and scan_folder(done.folder).notes == ()


def test_targets_that_are_refused(folder: Path, tmp_path: Path) -> None:
    add(folder / "1.png", photo(1))
    check = checked(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(OptionError, match="must be a new or empty folder"):
            write_mended(check, DataConfig(), tmp_path / name)
    for inside in (folder, folder / "fixed", tmp_path / "photos" / ".." / "photos" / "x"):
        with pytest.raises(OptionError, match="must be outside of the original"):
            write_mended(check, DataConfig(), inside)
    assert write_mended(check, DataConfig(), tmp_path / "empty").pictures == 1
    assert write_mended(check, DataConfig(), tmp_path / "new" / "deep").pictures == 1


def test_nothing_is_left_of_a_copy_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder / "1.png", photo(1))
    check = checked(folder, 256)

    def full(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(mended_folder, "_copy", full)
    with pytest.raises(OutputError, match="was not written because the disk is full; free some space"):
        write_mended(check, DataConfig(), folder.with_name("fixed"))
    assert [path.name for path in folder.parent.iterdir()] == ["photos"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12), max_size=9))
def test_safe_names_are_different_and_safe(names: list[str]) -> None:
    given_names = mended_folder._Names()
    found = [given_names.place(f"{name}.png") for name in names]
    stems = [stem for _, stem in found]
    assert len({stem.casefold() for stem in stems}) == len(stems)
    for stem in stems:
        assert re.fullmatch(r"[\w.,()&+=@# -]+", stem)
        assert stem[0] not in " -." and stem[-1] not in " ."
        assert not re.fullmatch(r"(?i)(con|nul|aux|prn)", stem)


def test_controls_come_with_their_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for seed, name in enumerate(("a.png", "10_dog/b?.png", "control/a.png", "control/a_3.png", "control/b?.png")):
        add(folder / name, photo(seed))
    fixed = mended(folder).folder
    scan = scan_folder(fixed)
    assert [[one.path.relative_to(fixed).as_posix() for one in image.controls] for image in scan.images] == [
        ["control/a.png", "control_1/a.png"],
        ["control/10_dog/b_.png"],
    ]
    assert [one.digest for image in scan.images for one in image.controls] == [
        one.digest for image in scan_folder(folder).images for one in image.controls
    ]
