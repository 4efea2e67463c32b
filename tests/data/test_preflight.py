"""A checked folder: facts, buckets, steps and likeness, from files on disk."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lorasmith.core.cancellation import answering
from lorasmith.core.errors import CancelledError, DataError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.crops import framings
from lorasmith.data.data_config import DataConfig
from lorasmith.data.findings import CaptionKeys, TokenLimit
from lorasmith.data.folder import ImageFile, scan_folder
from lorasmith.data.preflight import Bucket, Epoch, Preflight, name_in, preflight, usual_resolution

EXAMPLES = BUILT_IN_BASE / "input"


def photo(seed: int, size: tuple[int, int] = (256, 256)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)


def add(path: Path, picture: Image.Image, caption: str | None = None, **details) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **details)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def checked(folder: Path, *, resolution: int = 256, multiple: int = 16, config=None, **settings) -> Preflight:
    config = config or DataConfig()
    scan = scan_folder(folder, config)
    return preflight(scan, config, folder=folder, resolution=resolution, multiple=multiple, **settings)


def test_a_check_that_nobody_waits_for_ends_in_the_middle(tmp_path: Path) -> None:
    for number in range(6):
        add(tmp_path / f"{number}.png", photo(number))
    given_up, seen = threading.Event(), []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            given_up.set()

    with answering(given_up), pytest.raises(CancelledError, match="nobody waits"):
        checked(tmp_path, progress=progress)
    assert seen == [(1, 6), (2, 6)]
    with answering(given_up), pytest.raises(CancelledError, match="nobody waits"):
        scan_folder(tmp_path)


def kinds(found: Preflight) -> list[str]:
    return [one.kind for one in found.findings]


@pytest.mark.parametrize("name", ["fox", "high-contrast"])
def test_the_example_pictures_are_fit_for_training(name: str) -> None:
    found = checked(EXAMPLES / name)
    assert found.findings == () and found.alike == () and found.skipped == ()
    assert found.buckets == (Bucket(256, 256, len(found.images), len(found.images)),)
    assert all(one.scale == 1 and one.kept == 1 for one in found.images)


def test_facts_of_an_image(tmp_path: Path) -> None:
    add(tmp_path / "5_dog" / "wide.jpg", photo(1, (600, 320)), "a dog, on a sofa")
    found = checked(tmp_path, config=DataConfig(trigger="sks"), tokenize=lambda text: len(text.split()))
    (one,) = found.images
    assert (one.name, one.size, one.bucket, one.tokens) == ("5_dog/wide.jpg", "600×320", (352, 176), 6)
    left, top, right, bottom = one.crop
    assert (left, right) == (0, 600) and bottom - top == pytest.approx(300) and top == pytest.approx(10)
    assert one.scale == pytest.approx(352 / 600) and one.kept == pytest.approx(300 / 320)
    assert found.buckets == (Bucket(352, 176, 1, 5),)
    assert found.captioned == 1 and found.trigger == "sks"


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (90, 700)])
def test_the_crop_is_what_training_takes(tmp_path: Path, size: tuple[int, int]) -> None:
    add(tmp_path / "a.png", photo(2, size), "x")
    for config in (DataConfig(), DataConfig(flip=True, crop="random", crop_jitter=0.3), DataConfig(bucket_min=128)):
        (one,) = checked(tmp_path, config=config).images
        first = framings(*size, config, resolution=256, multiple=16, name="a.png")[0]
        assert (one.bucket, one.crop, one.scale) == ((first.width, first.height), first.box, first.scale)


def test_the_crop_follows_the_mask(tmp_path: Path) -> None:
    picture = photo(2, (600, 200)).convert("RGBA")
    picture.putalpha(Image.new("L", (600, 200)))
    picture.paste((255, 0, 0, 255), (500, 50, 600, 150))
    add(tmp_path / "a.png", picture, "x")
    config = DataConfig(masks="alpha", crop="mask", bucket_max=256)
    assert checked(tmp_path, config=config).images[0].crop == (400, 0, 600, 200)


def test_upright_sizes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    add(tmp_path / "a.jpg", photo(3, (300, 200)), "x", exif=exif)
    assert [(one.size, one.bucket) for one in checked(tmp_path).images] == [("200×300", (208, 304))]


def test_the_largest_resolution_decides_what_is_enlarged(tmp_path: Path) -> None:
    add(tmp_path / "a.png", photo(4), "x")
    assert checked(tmp_path).findings == ()
    found = checked(tmp_path, config=DataConfig(more_resolutions="384, 512"))
    assert found.resolutions == (256, 384, 512)
    assert kinds(found) == ["tiny pictures"] and found.images[0].scale == 2 and found.images[0].bucket == (256, 256)
    assert checked(tmp_path, config=DataConfig(more_resolutions="512", upscale=False)).findings == ()


def test_bucket_step_and_the_crop_that_it_costs(tmp_path: Path) -> None:
    add(tmp_path / "a.png", photo(5, (1000, 640)), "x")
    found = checked(tmp_path, config=DataConfig(bucket_step=256))
    assert found.multiple == 256 and found.images[0].bucket == (256, 256)
    assert kinds(found) == ["cut pictures"]
    with pytest.raises(DataError, match="bucket_step must be a multiple of 64"):
        checked(tmp_path, multiple=64, config=DataConfig(bucket_step=32))


def test_quality_is_measured_upright_and_reduced(tmp_path: Path) -> None:
    sharp = photo(6, (1200, 900))
    add(tmp_path / "1.jpg", sharp, "one")
    add(tmp_path / "2.png", photo(7, (1200, 900)).filter(ImageFilter.GaussianBlur(20)), "two")
    add(tmp_path / "3.png", Image.new("RGB", (300, 300), "red"), "three")
    found = checked(tmp_path)
    assert [(one.kind, one.images) for one in found.findings] == [("empty pictures", (2,)), ("blurred pictures", (1,))]
    assert found.findings_of(1) == ["blurred pictures"] and found.findings_of(0) == []


def test_the_copy_with_a_mask_is_kept(tmp_path: Path) -> None:
    add(tmp_path / "1.png", photo(8), "with words")
    shutil.copy(tmp_path / "1.png", tmp_path / "2.png")
    Image.new("L", (8, 8)).save(tmp_path / "2.mask.png")
    (group,) = checked(tmp_path, config=DataConfig(masks="files")).alike
    assert (group.best, group.copies) == (1, ((0, 1),))


def test_copies_and_the_best_of_pictures_that_look_alike(tmp_path: Path) -> None:
    add(tmp_path / "1.png", photo(8, (128, 128)), "small")
    add(tmp_path / "2.jpg", photo(8), None, quality=95)
    add(tmp_path / "3.png", photo(8), "large")
    add(tmp_path / "4.png", photo(8, (400, 400)).filter(ImageFilter.GaussianBlur(8)), "blurred")
    add(tmp_path / "5.png", photo(9), "another")
    shutil.copy(tmp_path / "1.png", tmp_path / "6.png")
    found = checked(tmp_path)
    (group,) = found.alike
    assert (group.best, group.others, group.copies) == (2, (0, 1, 3, 5), ((5, 0),))
    assert [
        (one.kind, one.images) for one in found.findings if one.kind in ("blurred pictures", "copies", "look-alikes")
    ] == [
        ("blurred pictures", (3,)),
        ("copies", (5,)),
        ("look-alikes", (0, 1, 3)),
    ]


def test_captions(tmp_path: Path) -> None:
    for index, caption in enumerate((None, "", "  \n", "a cat that sits on a mat")):
        add(tmp_path / f"{index}.png", photo(index), caption)
    limit = TokenLimit("the text encoder of X", 3)
    found = checked(tmp_path, tokenize=lambda text: len(text.split()), limit=limit)
    assert [(one.kind, one.images) for one in found.findings] == [
        ("missing captions", (0,)),
        ("empty captions", (1, 2)),
        ("long captions", (3,)),
    ]


def test_captions_in_json_are_parsed_as_they_are_trained(tmp_path: Path) -> None:
    captions = (
        '{"a": "sks fox", "b": []}',
        "a fox",
        '{"a": "sks fox"}',
        '{"a": "sks fox", "b": [}',
        '{"a": "", "b": 1}',
    )
    for index, caption in enumerate(captions):
        add(tmp_path / f"{index}.png", photo(index), caption)
    keys = CaptionKeys("X", ("a", "b"))
    faults = [one.json_fault for one in checked(tmp_path, config=DataConfig(trigger="sks"), keys=keys).images]
    assert faults == ["", "", "no b", "Expecting value at letter 24", ""]
    assert not any(one.json_fault for one in checked(tmp_path).images), "where a model reads such alone"


def test_skipped_files_are_named_with_their_reason(tmp_path: Path) -> None:
    add(tmp_path / "1.png", photo(1), "x")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "raw").mkdir()
    found = checked(tmp_path)
    assert [path.name for path, _ in found.skipped] == ["b.jpg", "raw"]
    assert found.findings[0].examples == "b.jpg (is empty), raw (is a folder without repeats in its name)"


def test_steps_of_an_epoch(tmp_path: Path) -> None:
    for index in range(20):
        add(tmp_path / ("3_dog" if index < 10 else "1_cat") / f"{index}.png", photo(index), f"picture {index}")
    whole = checked(tmp_path, validation_share=0.0, batch=8).epoch
    assert whole == Epoch(40, (), 0, 8)
    assert [whole.steps(epochs) for epochs in (1, 2, 10)] == [5, 10, 50] and whole.epochs(10) == 2
    held = checked(tmp_path, batch=3).epoch
    assert len(held.held_out) == 2 and held.samples + held.held_out_samples == 40
    assert held.steps(1) == -(-held.samples // 3)


def test_threads_change_nothing_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(9):
        add(tmp_path / f"{index}.png", photo(index % 7), "x")
    seen: list[tuple[int, int]] = []
    found = []
    for cores in (1, 8):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found.append(checked(tmp_path, progress=lambda done, total: seen.append((done, total))))
    assert found[0] == found[1]
    assert seen == [(done, 9) for done in range(1, 10)] * 2


def test_the_usual_resolution_is_what_most_images_fill() -> None:
    def images(*sides: int) -> list[ImageFile]:
        return [ImageFile(Path("a.png"), side, side, "", "none") for side in sides]

    assert usual_resolution(images(1024, 2000, 1100, 300)) == 1024
    assert usual_resolution(images(1024, 800, 780, 300)) == 768
    assert usual_resolution(images(256, 256)) == usual_resolution(images(16)) == 256


def test_names(tmp_path: Path) -> None:
    assert name_in(tmp_path, tmp_path / "2_a" / "b.png") == "2_a/b.png"
    assert name_in(tmp_path, Path("/elsewhere/b.png")) == "b.png"


def pairs_in(folder: Path, **settings: object) -> dict[str, str]:
    """The findings about pairs, by kind."""
    found = checked(folder, config=DataConfig(resolution=256, **settings))
    kinds = ("missing controls", "unchanged pairs", "swapped pairs", "other aspects")
    return {one.kind: one.sentence for one in found.findings if one.kind in kinds}


def test_pairs_are_looked_at(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        add(tmp_path / f"{name}.png", photo(number), "make it blue and bright")
    assert pairs_in(tmp_path) == {}
    add(tmp_path / "control" / "a.png", photo(10))
    add(tmp_path / "control" / "b.png", photo(1))
    add(tmp_path / "control" / "c.png", photo(11, (256, 192)))
    assert pairs_in(tmp_path) == {
        "missing controls": "1 image has no control: d.png; add a file of the same name to the folder of controls, or "
        "train with --controls optional",
        "unchanged pairs": "1 image is the same as its control: b.png; replace it, as the model learns to change "
        "nothing",
        "other aspects": "1 image has a control of another aspect ratio, which is cropped on its own: c.png (256×256 "
        "from 256×192); crop it and the control alike, unless the edit changes the frame",
    }
    assert pairs_in(tmp_path, controls="optional").keys() == {"unchanged pairs", "other aspects"}
    assert pairs_in(tmp_path, controls="none") == {}


def test_captions_beside_controls_alone_look_swapped(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        add(tmp_path / f"{name}.png", photo(number))
        add(tmp_path / "control" / f"{name}.png", photo(10 + number), f"turn {name} into winter")
    assert pairs_in(tmp_path) == {
        "swapped pairs": "2 images have no caption, but their controls have: a.png, b.png; check that the edited "
        "pictures are trained on and --control names those before, or move the captions"
    }
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"turn {name} into winter")
    assert pairs_in(tmp_path) == {}


def test_pairs_are_repeated_if_their_controls_are(tmp_path: Path) -> None:
    for name, control in {"a": 10, "b": 11, "c": 10}.items():
        add(tmp_path / f"{name}.png", photo(1), f"turn {name} into winter")
        add(tmp_path / "control" / f"{name}.png", photo(control))
    (alike,) = checked(tmp_path).alike
    assert (alike.members, alike.copies) == ((0, 2), ((2, 0),))
    assert checked(tmp_path, config=DataConfig(controls="none")).alike[0].members == (0, 1, 2)
