"""The page about a checked folder: its pictures, words and commands."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from lorasmith.core.errors import OutputError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.data_config import DataConfig
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.report.data_page import DataReport, Trouble
from lorasmith.runs.data_check import check_folder, data_report, step_lines, write_data_page
from tests.data.test_preflight import add, photo
from tests.report.test_run_report import HOSTILE, Page

FOX = BUILT_IN_BASE / "input" / "fox"


def report(folder: Path, *, model: str | None = None, batch: int = 1, **settings) -> DataReport:
    config = DataConfig(**settings)
    files = None if model is None else ModelFiles(model)
    return data_report(check_folder(folder, config, files=files, batch=batch), config, model=model)


def by_title(found: DataReport) -> dict[str, Trouble]:
    return {one.title: one for one in found.troubles}


@pytest.fixture
def troubled(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    add(folder / "1.png", photo(1, (400, 300)), "a dog that sleeps on a sofa")
    add(folder / "2.png", photo(2, (100, 100)), "a dog that sleeps on a sofa")
    add(folder / "3.jpg", photo(1, (200, 150)), "small")
    add(folder / "4.png", photo(1, (400, 300)), "")
    add(folder / "5.png", photo(5, (400, 300)).filter(ImageFilter.GaussianBlur(12)), "blurred")
    add(folder / "6.png", Image.new("RGB", (256, 256)), "black")
    add(folder / "7.png", photo(7))
    add(folder / "8.png", photo(8), "word " * 400)
    (folder / "9.jpg").write_bytes(b"")
    (folder / "4.png").write_bytes((folder / "1.png").read_bytes())
    return folder


def test_a_folder_with_nothing_to_look_at() -> None:
    found = report(FOX, model=BUILT_IN)
    assert (found.status, found.mood, found.troubles) == ("Nothing to look at", "good", [])
    assert found.verdict == "All 6 images are fit for training."
    assert found.title == "fox" and found.summary.startswith(BUILT_IN)
    assert len(found.others) == 6 and found.others_more == 0
    assert list(found.commands) == ["Train on it"]
    assert all(one.picture is not None and one.crop is None and not one.marks for one in found.others)


def test_every_trouble_has_its_pictures(troubled: Path) -> None:
    found = by_title(report(troubled, model=BUILT_IN, resolution=256))
    names = {
        title: [[(one.name, *one.marks, *one.remarks) for one in group] for group in trouble.groups]
        for title, trouble in found.items()
    }
    soft = "tiny, enlarged 2.6×"
    assert names == {
        "Files that cannot be used": [],
        "Pictures that show nothing": [[("6.png", "one colour")]],
        "Pictures that are far too small": [[("2.png", soft, "others have this caption too")]],
        "Pictures that would be enlarged": [[("3.jpg", "small, enlarged 1.5×", "look-alike")]],
        "Blurred pictures": [[("5.png", "blurred")]],
        "Copies": [[("1.png", "others have this caption too"), ("4.png", "copy", "its caption file is empty")]],
        "Nearly identical pictures": [
            [("1.png", "others have this caption too"), ("3.jpg", "small, enlarged 1.5×", "look-alike")]
        ],
        "Missing captions": [[("7.png",)]],
        "Empty captions": [[("4.png", "copy", "its caption file is empty")]],
        "Equal captions": [
            [("1.png", "others have this caption too"), ("2.png", soft, "others have this caption too")]
        ],
        "Captions that are too long": [[("8.png", "400 tokens of 225")]],
    }
    assert found["Files that cannot be used"].files == [("9.jpg", "is empty; get a good copy or remove it")]
    assert [one.is_kept for one in found["Copies"].groups[0]] == [True, False]
    assert found["Blurred pictures"].groups[0][0].picture is not None


def test_the_crop_in_shares_of_the_picture(tmp_path: Path) -> None:
    add(tmp_path / "1.png", photo(1, (1000, 640)), "x")
    ((one,),) = report(tmp_path, resolution=256, bucket_step=256).troubles[0].groups
    assert one.marks == ["36 % cut off"] and one.about == "1000×640 → 256×256"
    assert one.crop == pytest.approx((0.18, 0, 0.82, 1))


def test_pictures_are_limited(tmp_path: Path) -> None:
    for index in range(30):
        add(tmp_path / f"{index:02}.png", Image.new("RGB", (256, 256), (index, 0, 0)), f"number {index}")
    (trouble,) = report(tmp_path).troubles
    assert len(trouble.groups[0]) == 24 and trouble.more == 6
    assert "30 images show a single colour" in trouble.problem


def test_commands_can_be_pasted(troubled: Path) -> None:
    found = report(troubled, model=BUILT_IN, trigger="sks dog", resolution=256)
    fix, train = map(shlex.split, found.commands.values())
    assert fix[:3] == ["lorasmith", "data", "check"] and fix[-2:] == ["--fix", f"{troubled}-mended"]
    assert train == [
        "lorasmith", "train", str(troubled), "--model", BUILT_IN, "--trigger", "sks dog", "--resolution", "256",
    ]  # fmt: skip


def test_commands_on_pairs_name_the_controls(tmp_path: Path) -> None:
    for place in ("after", "more before"):
        add(tmp_path / place / "1.png", photo(len(place), (400, 300)), place)
    found = report(tmp_path / "after", control=(str(tmp_path / "more before"),), controls="optional")
    assert found.facts["with a control"] == "1"
    expected = ["--control", str(tmp_path / "more before"), "--controls", "optional"]
    assert shlex.split(found.commands["Train on it"])[-4:] == expected


def test_sizes_steps_and_captions(troubled: Path) -> None:
    found = report(troubled, batch=4, trigger="sks", resolution=256, more_resolutions="512")
    assert found.steps["An epoch"] == "8 samples (8 images)"
    assert found.steps["Steps"] == "2 for 1 epoch, 20 for 10 epochs, 100 for 50 epochs with batch 4"
    assert sum(row.images for row in found.sizes) == 8 and "512×512 as well" in found.sizes_are
    assert found.captions["Trigger"] == "sks" and "6 of 8 images" in found.captions["Written"]
    assert "Length" not in found.captions and "sks × " in found.captions["Frequent tags"]
    assert "Neither a model nor a resolution" not in found.sizes_are
    assert "Neither a model nor a resolution" in report(troubled).sizes_are


def test_steps_with_repeats_and_held_out_images(tmp_path: Path) -> None:
    for index in range(20):
        add(tmp_path / "3_dog" / f"{index}.png", photo(index), f"number {index}")
    lines = step_lines(check_folder(tmp_path, DataConfig()).preflight)
    assert lines["An epoch"] == "54 samples (20 images, 60 with repeats, 2 held out)"
    assert lines["Held out"].count(".png") == 2


def test_the_page_is_whole_and_names_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    name = HOSTILE.replace("/", "") if os.name == "posix" else "&amp;"
    add(folder / f"{name}.png", Image.new("RGB", (256, 256)), HOSTILE)
    check = check_folder(folder, DataConfig())
    write_data_page(check, tmp_path / "page.html", DataConfig())
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and name in page.text and HOSTILE in page.text
    assert page.tags.count("img") == 1


def test_a_picture_that_is_gone_leaves_its_words(tmp_path: Path) -> None:
    path = add(tmp_path / "photos" / "1.png", Image.new("RGB", (64, 64)), "x")
    check = check_folder(path.parent, DataConfig())
    path.unlink()
    ((one,),) = data_report(check, DataConfig()).troubles[0].groups
    assert one.picture is None and one.name == "1.png"


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_data_page(check_folder(FOX, DataConfig()), tmp_path / "file" / "page.html", DataConfig())


def test_pairs_are_shown_beside_their_controls(tmp_path: Path) -> None:
    for name in "ab":
        add(tmp_path / f"{name}.png", photo(ord(name), (400, 300)), f"edit {name}")
    add(tmp_path / "control" / "a.png", photo(1, (300, 400)))
    found = report(tmp_path)
    shots = {one.name: one for trouble in found.troubles for group in trouble.groups for one in group}
    assert shots["b.png"].controls is None
    control, picture = shots["a.png"].controls, shots["a.png"].picture
    assert control is not None and picture is not None and control[1] < control[2] and picture[1] > picture[2]
    page = tmp_path / "check.html"
    write_data_page(check_folder(tmp_path, DataConfig()), page, DataConfig())
    assert "control of a.png" in page.read_text() and "control of b.png" not in page.read_text()
