from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.errors import OutputError
from lorasmith.report.contact_sheet import PreviewFolder
from lorasmith.report.pictures import Clip

COLOURS = {"base": (255, 0, 0), 100: (0, 255, 0), 200: (0, 0, 255), 0.5: (255, 255, 0), 1.0: (0, 255, 255)}


def pictures(key: object, count: int = 2, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[key]) for _ in range(count)]  # type: ignore[index]


def folder(path: Path, *, prompts: tuple[str, ...] = ("a cat", "ein Bär"), **sampling: Any) -> PreviewFolder:
    return PreviewFolder(path / "samples", prompts, title="pets", sampling={"Steps": 20, "Seed": 3, **sampling})


def shown(sheet: Path) -> dict[object, tuple[int, int]]:
    """Where each colour begins (row) and how many of its pixels there are, for the colours that are there."""
    pixels = np.asarray(Image.open(sheet))
    found = {}
    for key, colour in COLOURS.items():
        mask = np.all(pixels == colour, axis=-1)
        if mask.any():
            found[key] = (int(mask.any(axis=1).argmax()), int(mask.sum()))
    return found


def test_each_picture_says_how_it_was_made(tmp_path: Path) -> None:
    paths = folder(tmp_path).write_step(pictures(100), 100, "pets.safetensors")
    assert [path.name for path in paths] == ["step-000100-1.png", "step-000100-2.png"]
    with Image.open(paths[1]) as picture:
        assert picture.info["parameters"] == (
            "ein Bär\nSteps: 20, Seed: 3, LoRA: pets.safetensors, Step: 100, Strength: 1.0"
        )
        assert '"Prompt": "ein B' in picture.info["lorasmith.preview"]
        assert "prompt" not in picture.info, "ComfyUI would take it for a graph"
    assert [path.name for path in folder(tmp_path).write_base(pictures("base"))] == ["base-1.png", "base-2.png"]
    (half, _) = folder(tmp_path).write_strength(pictures(0.5), 0.5, 200, "pets.safetensors")
    assert half.name == "strength-0.5-1.png"
    assert not list(half.parent.glob(".*")), "no temporary files stay"


def test_the_steps_are_below_the_base_in_order(tmp_path: Path) -> None:
    folder(tmp_path).write_step(pictures(200), 200, "x")
    files = folder(tmp_path)  # of the continued run
    files.write_base(pictures("base"))
    files.write_step(pictures(100), 100, "x")
    found = shown(files.write_steps_sheet())
    assert sorted(found, key=lambda key: found[key][0]) == ["base", 100, 200]
    assert {count for _, count in found.values()} == {2 * 128 * 128}


def test_pictures_that_do_not_compare_stay_off_the_sheet(tmp_path: Path) -> None:
    folder(tmp_path, Seed=4).write_step(pictures(100), 100, "x")
    files = folder(tmp_path)
    files.write_base(pictures("base"))
    files.write_step(pictures(200), 200, "x")
    assert set(shown(files.write_steps_sheet())) == {"base", 200}
    other = folder(tmp_path, prompts=("a cat", "a dog"))
    other.write_base(pictures("base"))
    found = shown(other.write_steps_sheet())
    assert found[200][1] == found["base"][1] // 2, "the prompt that stayed is shown, the place of the other is empty"


def test_spoilt_files_leave_their_place_empty(tmp_path: Path) -> None:
    files = folder(tmp_path)
    files.write_base(pictures("base"))
    first, second = files.write_step(pictures(100), 100, "x")
    first.write_bytes(first.read_bytes()[:50])
    assert shown(files.write_steps_sheet())[100][1] == 128 * 128
    Image.new("RGB", (64, 64), COLOURS[100]).save(second)
    assert set(shown(files.write_steps_sheet())) == {"base"}


def test_strengths(tmp_path: Path) -> None:
    files = folder(tmp_path)
    files.write_base(pictures("base"))
    for strength in (0.5, 1.0):
        files.write_strength(pictures(strength), strength, 200, "x")
    files.write_step(pictures(200), 200, "x")
    found = shown(files.write_strengths_sheet([0.5, 1.0], 200))
    assert sorted(found, key=lambda key: found[key][0]) == ["base", 0.5, 1.0]


def test_large_pictures_and_many_steps_fit(tmp_path: Path) -> None:
    files = folder(tmp_path, prompts=("a cat",))
    files.write_base(pictures("base", 1, (512, 512)))
    (written,) = files.write_step(pictures(100, 1, (512, 512)), 10, "x")
    for step in range(20, 500, 10):
        shutil.copy(written, written.with_name(f"step-{step:06}-1.png"))
    with Image.open(files.write_steps_sheet()) as sheet:
        assert 3000 < sheet.height < 4500 and sheet.width < 600
    few = folder(tmp_path / "few", prompts=("a cat",))
    few.write_base(pictures("base", 1, (1024, 512)))
    assert shown(few.write_steps_sheet())["base"][1] == 384 * 192


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "samples").touch()
    with pytest.raises(OutputError, match="must be a folder but is a file"):
        folder(tmp_path).write_base(pictures("base"))


def test_clips_are_animations_that_stand_in_sheets_with_their_first_picture(tmp_path: Path) -> None:
    def clips(key: object) -> list[Clip]:
        return [Clip((one, Image.new("RGB", one.size)), 4.0) for one in pictures(key, size=(128, 128))]

    files = folder(tmp_path)
    paths = files.write_step(clips(100), 100, "pets.safetensors")
    assert [path.name for path in paths] == ["step-000100-1.webp", "step-000100-2.webp"]
    files.write_base(clips("base"))
    rows = [Image.open(path).convert("RGB").getpixel((5, 5)) for path in (paths[0], tmp_path / "samples/base-1.webp")]
    assert rows == [pytest.approx(COLOURS[key], abs=6) for key in (100, "base")]
    sheet = np.asarray(Image.open(files.write_steps_sheet())).astype(int)
    near = {key: (np.abs(sheet - COLOURS[key]).max(axis=-1) < 8).sum() for key in (100, "base")}
    assert all(count > 1.9 * 128 * 128 for count in near.values())
    other = folder(tmp_path, Seed=4)
    other.write_step(clips(200), 200, "pets.safetensors")
    sheet = np.asarray(Image.open(other.write_steps_sheet())).astype(int)
    assert (np.abs(sheet - COLOURS[100]).max(axis=-1) < 8).sum() == 0, "those of another seed are not compared"
