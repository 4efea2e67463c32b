"""Walks of artists on a real server: one click, a messy folder, a slider, each to a LoRA that is kept."""

from __future__ import annotations

import io
import itertools
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.evaluation.likeness import is_installed
from lorasmith.evaluation.measures import learnt, likeness, self_likeness
from lorasmith.evaluation.recognition import recogniser_of
from lorasmith.runs.gallery import read_grids
from tests.server.pages.conftest import PagesOpener, expected
from tests.server.pages.test_page_on_a_server import PATIENCE_MS, change_in_diffusers, loaded, wait_until
from tools.browsing import Served, drop

pytestmark = pytest.mark.slow

INPUT = BUILT_IN_BASE / "input"
FOX = sorted((INPUT / "fox").glob("*.png"))

LEARNT = 0.3
"""Least share of the way from what the base model draws to the training pictures, by the judge."""


@pytest.fixture
def page(server: Served, open_pages: PagesOpener) -> Any:
    page = open_pages(server.address)
    page.set_default_timeout(PATIENCE_MS)
    page.get_by_role("button", name="Try it with the fox").wait_for()
    return page


class Hand:
    """Clicks on a page, and counts them."""

    def __init__(self) -> None:
        self.clicks = 0
        self._start = time.monotonic()

    def click(self, target: Any) -> None:
        target.click()
        self.clicks += 1

    def reached(self, what: str) -> None:
        print(f"{what}: {self.clicks} clicks, {time.monotonic() - self._start:.1f} s")


def train(page: Any, hand: Hand) -> None:
    """From the photos to the room, with all that is suggested."""
    hand.click(page.get_by_role("button", name="Choose a model"))
    page.wait_for_selector("input[name=model]:checked")
    hand.click(page.get_by_role("button", name="Next: settings"))
    hand.click(page.get_by_role("button", name="Start training"))
    page.wait_for_url("**/#/jobs/*")
    page.wait_for_url("**/#/runs/*")
    hand.reached("the LoRA in its room")
    loaded(page, ".easel img", 2)


def keep(page: Any, hand: Hand, name: str, target: Path) -> Path:
    """Have the LoRA of the room as a file."""
    hand.click(page.get_by_role("button", name="Keep this one"))
    expected(page.get_by_role("link", name="Download the file")).to_be_focused()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == name
    download.value.save_as(target / name)
    return target / name


def shown(page: Any) -> np.ndarray:
    """The picture with the LoRA in the room."""
    answer = page.request.get(page.locator(".easel-picture").evaluate("picture => picture.src"))
    return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"), np.float32)


def test_the_fox_in_one_click(page: Any, base: Path, server: Served, tmp_path: Path) -> None:
    hand = Hand()
    hand.click(page.get_by_role("button", name="Try it with the fox"))
    page.wait_for_url("**/#/jobs/*")
    loaded(page, ".easel img", 1)
    hand.reached("what it draws without the LoRA")
    page.locator(".easel-left").wait_for()
    hand.reached("the first picture with it")
    page.goto(server.address)
    page.locator(".learning .newest").wait_for()  # watched on the wall
    cover = page.get_by_role("link", name="a fox · built-in model")
    cover.wait_for()
    hand.reached("the LoRA on the wall")
    cover.click()
    page.get_by_role("button", name="Keep this one").wait_for()
    loaded(page, ".easel img", 2)
    assert change_in_diffusers(keep(page, hand, "fox.safetensors", tmp_path)) > 1e-3
    hand.reached("the LoRA as a file")
    if is_installed():  # README's installation brings it
        page.locator(".verdict", has_text=re.compile("^It learnt your fox")).wait_for(timeout=4 * PATIENCE_MS)
        hand.reached("which step is best")
        expected(page.locator(".reason")).to_have_text(re.compile(r"^(Step \d+ looks|It looks) .*like it"))
    page.close()
    (run,) = (base / "runs").iterdir()
    samples = run / "samples"
    assert share_learnt(samples / "base-1.png", max(samples.glob("step-*-1.png")), FOX) > LEARNT


def test_a_messy_folder_to_a_kept_lora(page: Any, base: Path, tmp_path: Path) -> None:
    drop(page, messy_folder(tmp_path / "holiday"))
    hand = Hand()
    page.wait_for_url("**/photos")
    folder = base / "input" / page.url.split("/")[-2]
    page.get_by_text("7 photos", exact=True).wait_for()  # the copy is the same file
    page.get_by_role("button", name="1 tiny").wait_for()
    page.get_by_role("button", name="6 files not added").wait_for()
    assert (folder / "fox_2.mask.png").is_file()
    assert [one.read_text("utf-8").strip() for one in folder.glob("*.txt")] == ["a fox"]
    hand.reached("the photos")
    page.get_by_label("What will you call it in prompts?").fill("sks fox")
    train(page, hand)
    assert change_in_diffusers(keep(page, hand, "sks-fox.safetensors", tmp_path)) > 1e-3
    hand.reached("the LoRA as a file")
    assert hand.clicks <= 4


def test_a_slider_from_four_pairs(page: Any, tmp_path: Path) -> None:
    more = [copied(one, tmp_path / "grey" / one.name) for one in FOX[:4]]
    less = []
    for one in more:
        less.append(tmp_path / "dark" / one.name)
        less[-1].parent.mkdir(exist_ok=True)
        Image.open(one).convert("RGB").point(lambda value: value * 0.25).save(less[-1])
    hand = Hand()
    drop(page, more)
    page.wait_for_url("**/photos")
    page.get_by_text("4 photos", exact=True).wait_for()
    page.get_by_role("radio", name="Slider").check(force=True)
    drop(page, less, onto=".drop-zone[data-before='']")
    expected(page.locator(".tile .half.before img")).to_have_count(4)
    page.get_by_label("What do all pictures show?").fill("a fox")
    hand.reached("the pairs")
    train(page, hand)
    strength = page.get_by_label("Strength", exact=True)
    drawn = {}
    for key in ("ArrowRight", "ArrowLeft"):  # to both ends
        for _ in range(12):
            strength.press(key)
            drawn[strength.get_attribute("aria-valuetext")] = shown(page)
    assert {"-2", "-1", "1", "2"} <= set(drawn)
    light = {one: float(picture.mean()) for one, picture in drawn.items()}
    print(light)
    assert min(light["1"], light["2"]) - max(light["-1"], light["-2"]) > 10  # of 255: the dark end is darker
    assert all(np.abs(drawn[one] - drawn[two]).mean() > 5 for one, two in itertools.combinations(sorted(light), 2))
    keep(page, hand, "a-fox.safetensors", tmp_path)
    hand.reached("the slider as a file")


@pytest.mark.parametrize("way", ["an example of a style", "photos with words", "photos without words"])
def test_other_ways_end_in_a_gallery_of_what_was_taught(way: str, page: Any, base: Path) -> None:
    hand, subject, taught = Hand(), "a fox", FOX
    if way == "an example of a style":
        subject, taught = "high contrast style", sorted((INPUT / "high-contrast").glob("*.png"))
        hand.click(page.get_by_role("link", name="high-contrast"))
        page.get_by_text("16 photos", exact=True).wait_for()
    else:
        words = [one.with_suffix(".txt") for one in FOX if way == "photos with words"]
        drop(page, [*FOX, *words])
        page.get_by_text(f"{len(words)} of 6 with a caption").wait_for()
        hand.reached("the photos")
    hand.click(page.get_by_role("button", name="Choose a model"))
    page.wait_for_selector("input[name=model]:checked")
    hand.click(page.get_by_role("button", name="Next: settings"))
    if way == "photos without words":
        page.get_by_label("What should I draw?").fill(subject)
    page.get_by_role("radio", name=re.compile("^Quick")).check(force=True)
    hand.click(page.get_by_role("button", name="Start training"))
    page.wait_for_url("**/#/runs/*")
    hand.reached("the LoRA in its room")
    page.get_by_role("group", name="Prompts to try").get_by_role("button", name=f"{subject}, on a red").click()
    hand.click(page.get_by_role("button", name="How it is drawn"))
    hand.click(page.get_by_role("button", name="Draw it at every step"))
    (run,) = (base / "runs").iterdir()
    wait_until(lambda: len(read_grids(run)) == 1)
    hand.reached("its gallery")
    (grid,) = read_grids(run)
    assert grid.prompt == f"{subject}, on a red background"
    last = max((cell for cell in grid.cells if cell.strength == 1), key=lambda cell: cell.step)
    assert share_learnt(run / grid.base, run / last.file, taught) > LEARNT


def share_learnt(base: Path, lora: Path, taught: list[Path]) -> float:
    """Share of the way from the base model's picture to the training pictures, by the judge."""
    judge = recogniser_of(is_built_in=True)
    own = judge.features([Image.open(one) for one in taught])
    before, after = judge.features([Image.open(base), Image.open(lora)]).split(1)
    found, plain, photos = likeness(after, own), likeness(before, own), self_likeness(own)
    print(f"base {plain:.3f}, LoRA {found:.3f}, photos {photos:.3f}")
    return learnt(found, plain, photos)


def copied(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    return target


def messy_folder(folder: Path) -> list[Path]:
    """A folder as it comes from a phone and a chat: six foxes, one of them twice, and whatever lies beside them."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener(thumbnails=False)
    folder.mkdir()
    pictures = [Image.open(one).convert("RGB") for one in FOX]
    for index in (0, 1, 2):
        copied(FOX[index], folder / FOX[index].name)
    pictures[3].save(folder / "IMG_0004.heic", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter to the right
    pictures[4].transpose(Image.Transpose.ROTATE_90).save(folder / "IMG_0005.jpg", quality=95, exif=turned)
    pictures[5].save(folder / "Fox (1).JPEG", quality=95)
    copied(FOX[0], folder / "fox_1 copy.png")
    pictures[5].resize((24, 24)).save(folder / "thumb.png")
    Image.new("L", pictures[1].size, 255).save(folder / "fox_2.mask.png")
    (folder / "fox_1.txt").write_text("a fox")
    (folder / "notes.txt").write_text("from the holidays")
    (folder / "broken.jpg").write_bytes(FOX[0].read_bytes()[:500])
    (folder / "list.pdf").write_bytes(b"%PDF")
    (folder / "fox.jxl").write_bytes(b"\xff\x0a")
    (folder / "film.mp4").write_bytes(b"no film")
    return sorted(folder.iterdir())
