"""The page on a real server: from dropped photos to a LoRA that diffusers loads, and what comes after it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.families.locating import BUILT_IN, built_in_models
from tests.server.pages.conftest import PagesOpener, expected
from tools.browsing import Served, drop

pytestmark = pytest.mark.slow

STEPS = 40
PATIENCE_MS = 600_000
"""For a step of the way, on a busy machine."""


def test_from_photos_to_a_lora_and_beyond(server: Served, open_pages: PagesOpener, base: Path, tmp_path: Path) -> None:
    page = open_pages(server.address)
    page.set_default_timeout(PATIENCE_MS)
    page.get_by_text("Drop photos or a folder here").wait_for()
    drop(page, sorted((BUILT_IN_BASE / "input" / "fox").glob("fox_*")))
    page.wait_for_url("**/#/new/fox-2/photos")
    page.get_by_text("6 of 6 with a caption").wait_for()
    page.get_by_label("What will you call it in prompts?").fill("sks fox")
    caption = page.get_by_label("Caption of fox_1.png")  # of the first photo, which is chosen
    assert caption.input_value() == "a fox"
    caption.fill("a fox that looks ahead")
    caption.blur()
    wait_until(lambda: (base / "input/fox-2/fox_1.txt").read_text("utf-8").strip() == "a fox that looks ahead")
    loaded(page, ".tile img", 6)

    page.get_by_role("button", name="Choose a model").click()
    page.wait_for_selector("input[name=model]:checked")
    assert page.locator("input[name=model]:checked").get_attribute("value") == BUILT_IN
    page.get_by_role("button", name="Next: settings").click()
    start_with(page, {"Steps": STEPS, "Previews": "sks fox"})

    # The base model's picture is first. The curve grows while the previews come; what is asked for comes in between.
    page.get_by_role("img", name=re.compile("^Without.*: sks fox$")).first.wait_for()
    engineers = page.get_by_role("button", name="For engineers")
    engineers.click()
    curve = page.get_by_role("img", name=re.compile("Training loss over"))
    curve.wait_for()
    first, drawn = points(page), picture_of(page)
    wait_until(lambda: points(page) > first and picture_of(page) != drawn)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Save now").click()
    page.get_by_label("Prompt", exact=True).fill("sks fox that runs")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("img", name=re.compile("^Step \\d+: sks fox that runs$")).wait_for()
    loaded(page, ".easel img", 2)
    engineers.click()
    page.get_by_role("link", name=re.compile(r"^Download step \d+$")).first.wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("heading", name="Paused").wait_for()
    page.reload()
    engineers.click()
    curve.wait_for()
    paused_at = points(page)
    assert 0 < paused_at < STEPS  # all of it is there again
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Continue", exact=True).click()
    page.wait_for_url("**/#/runs/*")
    engineers.click()
    assert points(page) == STEPS
    table = page.get_by_role("region", name="Pictures by strength and step")
    assert {"Base model", "0.5", "1"} <= set(table.locator("tbody th").all_inner_texts())
    page.keyboard.press("Escape")

    page.get_by_role("button", name="Keep this one").click()
    keep = page.get_by_role("dialog")
    with page.expect_download() as download:
        keep.get_by_role("link", name="Download the file").click()
    assert download.value.suggested_filename == "sks-fox.safetensors"
    download.value.save_as(tmp_path / "sks-fox.safetensors")
    assert change_in_diffusers(tmp_path / "sks-fox.safetensors") > 1e-3
    keep.get_by_role("button", name="Share a picture").click()
    loaded(page, ".share-card", 1)
    with page.expect_download() as card:
        keep.get_by_role("link", name="Save the picture").click()
    assert Path(card.value.path()).read_bytes().startswith(b"\x89PNG")
    keep.get_by_role("button", name="Back").click()
    keep.get_by_role("button", name="Copy to ComfyUI").click()
    page.get_by_text("Copied as sks-fox.safetensors into the folder models/loras.").wait_for()
    copied = base / "models/loras/sks-fox.safetensors"
    assert copied.read_bytes() == (tmp_path / "sks-fox.safetensors").read_bytes()

    page.get_by_label("Prompt", exact=True).fill("sks fox that sits")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("img", name=re.compile("^Step \\d+: sks fox that sits$")).wait_for()
    wait_until(lambda: page.get_by_role("button", name="Enough").count() == 0)  # the other strengths are there, too
    *_, plain, _, tuned = sorted((base / "runs").glob("*/tried/*.png"))[-6:-3]
    assert plain.read_bytes() != tuned.read_bytes()
    slider = page.get_by_label("Strength", exact=True)
    slider.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "0.8"

    page.get_by_role("button", name="How it is drawn").click()
    page.get_by_role("group", name="Prompts to try").get_by_role("button", name="noto style").click()
    page.get_by_role("button", name="Draw it at every step").click()
    page.get_by_role("img", name="noto style").first.wait_for()

    page.get_by_label("More", exact=True).click()
    page.get_by_role("button", name="Train it further").click()
    page.get_by_label("More steps").fill("5")
    page.get_by_role("button", name="Train 5 more steps").click()
    page.wait_for_url("**/#/jobs/*")
    page.wait_for_url("**/#/runs/*")
    engineers.click()
    assert points(page) == STEPS + 5
    page.keyboard.press("Escape")

    # Another one, and both side by side.
    page.get_by_role("button", name="Train again with changes").click()
    page.wait_for_url("**/settings")
    start_with(page, {"Steps": 10, "Rank": 4})
    page.wait_for_url("**/#/jobs/*")
    page.wait_for_url("**/#/runs/*")
    engineers.click()
    assert points(page) == 10
    page.keyboard.press("Escape")
    page.goto(page.url.split("#")[0] + "#/runs")
    expected(page.get_by_role("checkbox")).not_to_have_count(0)
    for box in page.get_by_role("checkbox").all()[:2]:  # the newest
        box.check()
    page.get_by_role("button", name="Compare").click()
    loaded(page, ".easel img", 2)
    page.get_by_role("button", name="For engineers").click()
    page.wait_for_selector(".plot canvas")
    table = page.get_by_role("region", name="Settings that differ, as a table")
    table.wait_for()
    rows = dict(zip(table.locator("tbody th").all_inner_texts(), rows_of(table), strict=True))
    assert rows["steps"] == ["10", str(STEPS + 5)] and rows["rank"] == ["4", "16"]


def start_with(page: Any, settings: dict[str, int | str]) -> None:
    """Change some of all settings, and start."""
    page.wait_for_selector("input[name=preset]:checked")
    page.get_by_text("All settings").first.click()
    for label, value in settings.items():
        field = page.get_by_label(label, exact=True).or_(page.get_by_label(f"{label} changed", exact=True))
        field.fill(str(value))
        field.press("Tab")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/jobs/*")


def points(page: Any) -> int:
    """Steps in the curve of the loss."""
    label = page.get_by_role("img", name=re.compile("Training loss over")).get_attribute("aria-label")
    return int(label.split()[3])


def picture_of(page: Any) -> str:
    """The curve as it is drawn."""
    return str(page.evaluate("document.querySelector('.plot canvas').toDataURL()"))


def rows_of(table: Any) -> list[list[str]]:
    return [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]


def loaded(page: Any, selector: str, at_least: int) -> None:
    """Pictures are there, and have come."""
    wait_until(lambda: page.locator(selector).count() >= at_least)
    for picture in page.locator(selector).all()[:at_least]:
        picture.scroll_into_view_if_needed()
    shown = f"[...document.querySelectorAll('{selector}')].slice(0, {at_least})"
    wait_until(lambda: page.evaluate(f"{shown}.every(one => one.complete && one.naturalWidth > 0)"))


def wait_until(condition: Callable[[], bool]) -> None:
    """(The page's policy refuses functions that the browser polls.)"""
    end = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def change_in_diffusers(lora: Path) -> float:
    """Relative difference that a LoRA makes to the output of the built-in model, in diffusers."""
    from diffusers import StableDiffusionPipeline

    configs = str(BUILT_IN_BASE / "models" / "configs" / BUILT_IN)
    pipe = StableDiffusionPipeline.from_single_file(
        str(built_in_models()[BUILT_IN]), config=configs, local_files_only=True, safety_checker=None,
        feature_extractor=None,
    )  # fmt: skip
    x, time_step = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        context = pipe.text_encoder(pipe.tokenizer("sks fox", padding="max_length", return_tensors="pt").input_ids)[0]
        plain = pipe.unet(x, time_step, encoder_hidden_states=context).sample
        pipe.load_lora_weights(lora)
        tuned = pipe.unet(x, time_step, encoder_hidden_states=context).sample
    return float((tuned - plain).norm() / plain.norm())
