from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from lorasmith.data.folder import FolderScan, ImageFile
from lorasmith.runs.run_images import (
    LeftOut,
    RunImage,
    image_facts,
    images_in,
    keep_thumbnails,
    left_out_in,
    thumbnail_of,
)
from tests.runs.folder_cases import pictures
from tests.runs.test_run_plan import plan


def run(folder: Path) -> object:
    files = tuple(
        ImageFile(folder / f"{index}.png", 40, 40, "sks", "trigger", repeats=1 + index, is_class=index == 2)
        for index in range(3)
    )
    scan = FolderScan(files, ((folder / "x.heic", "is a HEIC file"),), (), ())
    return replace(plan("a", trigger="sks"), scan=scan, held_out=("1.png",))


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    facts = image_facts(run(tmp_path))
    assert images_in(facts) == (
        RunImage(name="0.png", caption="sks"),
        RunImage(name="1.png", caption="sks", use="held out", repeats=2),
        RunImage(name="2.png", caption="sks", use="class", repeats=3),
    )
    assert left_out_in(facts) == (LeftOut(name="x.heic", reason="is a HEIC file"),)
    assert facts["captions_used"] == "the trigger 'sks' for 3 of 3 images"


def test_a_record_without_images_or_with_odd_ones() -> None:
    assert images_in({}) == images_in({"images": 3}) == images_in({"images": [{"name": 3}]}) == ()


def test_small_versions_are_kept_of_what_can_be_read(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos", 2)
    keep_thumbnails(tmp_path / "run", run(folder).scan.images)
    with Image.open(thumbnail_of(tmp_path / "run", 0)) as small:
        assert (small.format, small.size) == ("WEBP", (40, 40))
    assert not thumbnail_of(tmp_path / "run", 2).exists()
    first = thumbnail_of(tmp_path / "run", 0)
    before = first.stat().st_mtime_ns
    keep_thumbnails(tmp_path / "run", run(folder).scan.images)
    assert first.stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos", 2)
    (tmp_path / "run").touch()
    keep_thumbnails(tmp_path / "run", run(folder).scan.images)


def test_a_small_version_of_a_pair_has_the_control_on_the_left(tmp_path: Path) -> None:
    for name, size in (("after", (40, 40)), ("before", (60, 30)), ("depth", (20, 20))):
        Image.new("RGB", size, {"after": "red", "before": "lime", "depth": "blue"}[name]).save(tmp_path / f"{name}.png")
    controls = tuple(ImageFile(tmp_path / f"{name}.png", 1, 1, "", "none") for name in ("before", "depth"))
    pair = ImageFile(tmp_path / "after.png", 40, 40, "sks", "trigger", controls=controls)
    keep_thumbnails(tmp_path / "run", [pair])
    with Image.open(thumbnail_of(tmp_path / "run", 0)) as small:
        assert small.size == (60 + 4 + 20 + 4 + 40, 40)
        colours = [small.convert("RGB").getpixel((x, 20)) for x in (30, 74, 108)]
    assert [max(range(3), key=one.__getitem__) for one in colours] == [1, 2, 0]
    scan = FolderScan((pair,), (), (), ())
    (image,) = images_in(image_facts(replace(plan("a", trigger="sks"), scan=scan, held_out=())))
    assert image.controls == 2
