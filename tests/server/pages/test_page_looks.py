"""What the page looks like to everybody: contrast in both colour schemes, names of controls, and phones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.training.events import Outcome
from tests.server.pages.conftest import assert_legible, expected, until
from tests.server.pages.served_page import TRAINING, ServedPage

VIEWS = {
    "home": ("", ".covers .cover"),
    "sets": ("#/photos", ".cover.four"),
    "photos": ("#/new/fox/photos", ".crop"),
    "no photos": ("#/new/none", ".button.primary"),
    "model": ("#/new/fox/model", ".choice"),
    "models": ("#/models", ".release"),
    "settings": ("#/new/fox/settings", ".choice"),
    "run": ("#/runs/runs%2Ffox-001", ".easel img"),
    "advice": ("#/runs/runs%2Ffox-004", ".easel img"),
    "runs": ("#/runs", ".run-rows li"),
    "sweep": ("#/sweeps/fox-sweep-001", "table.sweep td"),
    "compare": ("#/compare/runs%2Ffox-001/runs%2Ffox-002", ".easel img"),
}

FOR_ENGINEERS = re.compile(
    r"\b(parameters?|[KMGT]iB|(?:fp|bf|float|int)\d+|nf4|dtypes?|quantiz\w+|VRAM|CUDA|NaN|undefined)\b",
    re.IGNORECASE,
)


def test_views_say_nothing_that_only_engineers_act_on(served: ServedPage, open_page: Callable[..., Any]) -> None:
    """As they open: what is folded and in drawers is not seen."""
    served.add_dataset()
    served.trains_four_fifths()
    for number in (1, 2, 4):
        served.add_run(f"runs/fox-00{number}")
    request = {**TRAINING, "output": "runs/fox-sweep-001/rank-8"}
    served.do(lambda: served.context.store.add("train", request, sweep="fox-sweep-001", varied={"rank": 8}))
    page = open_page()
    for name, (view, ready) in VIEWS.items():
        page.goto(served.address + view)
        page.wait_for_selector(ready)
        if name == "settings":
            page.get_by_text("What will happen, in numbers").wait_for()
        if name == "model":
            page.get_by_text("Too large for this machine").wait_for()
        assert len(text := page.locator("body").inner_text()) > 50
        assert not FOR_ENGINEERS.findall(text), name
        if name == "run":
            page.get_by_role("button", name="Keep this one").click()
            page.get_by_role("link", name="Download the file").wait_for()
            assert not FOR_ENGINEERS.findall(page.locator("dialog").inner_text())
            page.keyboard.press("Escape")


@pytest.mark.slow
def test_settings_are_beside_what_is_to_be_learnt(served: ServedPage, open_page: Callable[..., Any]) -> None:
    served.add_dataset()
    page = open_page("#/new/fox/model")
    page.get_by_role("button", name="Next: settings").click()
    page.locator(".choice").first.wait_for()
    photos = page.locator(".learnt img")
    expected(photos).to_have_count(4)
    expected(photos.first).to_be_hidden()
    page.set_viewport_size({"width": 2560, "height": 1440})
    expected(photos.first).to_be_visible()
    choices = page.locator(".choices").first.bounding_box()
    boxes = [photo.bounding_box() for photo in photos.all()]
    assert all(box["x"] > choices["x"] + choices["width"] and box["width"] > 400 for box in boxes)
    assert choices["width"] > 1200, "three choices fill their column"
    assert_legible(page)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_messy_set_opens_with_its_photos(
    served: ServedPage, open_page: Callable[..., Any], tmp_path: Path, width: int
) -> None:
    """Remarks and what was not added leave them the larger part of the window."""
    folder = served.add_dataset("fox", 6)
    (folder / "fox_7.png").write_bytes((folder / "fox_3.png").read_bytes())
    Image.new("RGB", (40, 40), "red").save(folder / "fox_8.png")
    for name in ("a.jxl", "b.pdf", "nobody.txt"):
        (tmp_path / name).write_text("no picture")
    page = open_page("#/new/fox/photos", width=width)
    page.get_by_role("button", name="1 twice").wait_for()
    page.locator("input[type=file]").first.set_input_files([*tmp_path.glob("*.*")])
    page.get_by_role("button", name="3 files not added").wait_for()
    page.evaluate("scrollTo(0, 0)")
    window = page.viewport_size["height"]
    boxes = [one.bounding_box() for one in page.locator(".tile").all()]
    assert min(box["y"] for box in boxes) < 0.5 * window
    assert any(box["y"] + box["height"] < window for box in boxes), "the first photos are seen whole"


def test_photos_fill_a_window_that_becomes_larger(served: ServedPage, open_page: Callable[..., Any]) -> None:
    served.add_dataset()
    page = open_page("#/new/fox/photos")
    tile = page.locator(".tile").first
    tile.wait_for()
    before = tile.bounding_box()["height"]
    page.set_viewport_size({"width": 2560, "height": 1440})
    until(lambda: tile.bounding_box()["height"] > 1.3 * before)


@pytest.mark.slow
def test_few_loras_fill_a_wide_wall(served: ServedPage, open_page: Callable[..., Any]) -> None:
    """Until there are four, side by side; then the first one is as large as four others."""
    page = open_page()
    page.set_viewport_size({"width": 2560, "height": 1440})
    for number in range(1, 5):
        served.add_run(f"runs/fox-00{number}")
        page.reload()
        page.wait_for_selector(f".covers > li:nth-child({number + 1})")
        boxes = [one.bounding_box() for one in page.locator(".covers > li").all()]
        seen = sum(box["width"] * max(0, min(1440, box["y"] + box["height"]) - box["y"]) for box in boxes)
        assert seen > 0.5 * 2560 * 1440, f"{number}: {boxes}"
        assert max(box["width"] for box in boxes) > (1200 if number != 2 else 800)
    page.goto(served.address + "#/photos")
    page.wait_for_selector(".cover.four")
    assert page.locator(".covers > li").first.bounding_box()["width"] > 500


@pytest.mark.slow
@pytest.mark.parametrize("learns", [False, True])
def test_a_wall_of_few_loras_has_no_hole(served: ServedPage, open_page: Callable[..., Any], learns: bool) -> None:
    page = open_page()
    if learns:
        served.submit()
        served.taken().train()
    for number in range(0 if learns else 1, 5):
        if number:
            served.add_run(f"runs/cat-00{number}")
        page.reload()
        page.wait_for_selector(f".covers > li:nth-child({number + 1 + learns})")
        for width in (1280, 2560):
            page.set_viewport_size({"width": width, "height": width // 2})
            boxes = [one.bounding_box() for one in page.locator(".covers > li").all()]
            wall = page.locator(".covers").bounding_box()
            gaps = 16 * (wall["width"] + 2 * wall["height"])
            covered = sum(box["width"] * box["height"] for box in boxes)
            assert covered > wall["width"] * wall["height"] - gaps, f"{number} at {width}: {boxes}"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_text_is_legible_controls_have_names_and_nothing_sticks_out(
    served: ServedPage, open_page: Callable[..., Any], scheme: str, width: int
) -> None:
    folder = served.add_dataset()
    (folder / "fox_4.png").write_bytes((folder / "fox_3.png").read_bytes())  # a remark
    served.trains_four_fifths()
    served.add_job("interrupted")
    request = {**TRAINING, "output": "runs/fox-sweep-001/rank-8"}
    served.do(lambda: served.context.store.add("train", request, sweep="fox-sweep-001", varied={"rank": 8}))
    for number in (1, 2, 3):
        run = served.add_run(f"runs/fox-00{number}", outcome=Outcome.FAILED if number == 3 else Outcome.FINISHED)
        marks = {"title": f"fox {number}", "starred": number == 2, "note": "for mum"}
        (run / "marks.json").write_text(json.dumps(marks))
    served.add_run("runs/fox-004")
    served.advise("runs/fox-004")
    page = open_page(scheme=scheme, width=width)
    for name, (view, ready) in VIEWS.items():
        page.goto(served.address + view)
        page.wait_for_selector(ready)
        if name == "settings":
            page.get_by_text("All settings").click()
            page.get_by_text("Try several values").click()
        if name == "advice":
            if width < 500:
                page.locator(".panel-handle").click()
            page.get_by_text("2 photos to look at").click()
            page.get_by_text("Repeat less").wait_for()
        if name == "run":
            if width < 500:
                page.locator(".panel-handle").click()
            page.get_by_role("button", name="For engineers").click()
            page.wait_for_selector(".plot canvas")
        if name == "model":
            page.get_by_text("Too large for this machine").wait_for()
        assert_legible(page, name)
