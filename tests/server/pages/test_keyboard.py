"""The keyboard alone leads from photos to a kept LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.pages.conftest import expected
from tests.server.pages.run_folders import events_of
from tests.server.pages.served_page import PICTURES, ServedPage
from tests.training.run_cases import started

MOST_STOPS = 80

FOCUSED = """() => {
  const one = document.activeElement;
  const box = one.getBoundingClientRect();
  const marked = [one, one.closest("label")].some((each) => each && getComputedStyle(each).outlineStyle !== "none");
  const inside = box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
  const label = one.getAttribute("aria-label") ?? one.labels?.[0]?.textContent ?? one.textContent;
  return { name: label.trim().replace(/\\s+/g, " "), html: one.outerHTML.slice(0, 160), seen: marked && inside };
}"""
"""What has the focus: its name, and whether it is in the window and outlined."""


def go_to(page: Any, name: str) -> None:
    """Press Tab until a control has the focus; that is seen at each stop."""
    stops = []
    for _ in range(MOST_STOPS):
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUSED)
        if found["html"].startswith("<body"):  # beyond the last control
            continue
        assert found["seen"], found
        stops.append(found["name"])
        if found["name"].startswith(name):
            return
    raise AssertionError(f"{name} is not among {stops}")


@pytest.mark.slow
def test_from_photos_to_a_kept_lora(served: ServedPage, open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.get_by_role("button", name="Choose a folder").wait_for()
    go_to(page, "Choose a folder")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(PICTURES)

    page.wait_for_url("**/photos")
    page.get_by_text("6 of 6 with a caption").wait_for()
    chosen = page.locator("input[type=radio]:focus")
    for _ in range(MOST_STOPS):
        page.keyboard.press("Tab")
        if chosen.count():
            break
    page.get_by_role("radio", name="Person").wait_for(state="attached")
    while page.locator(".choice:has(:focus)").inner_text() != "Pet":
        page.keyboard.press("ArrowRight")
    go_to(page, "What will you call it in prompts?")
    page.keyboard.type("bello")
    go_to(page, "Choose a model")
    page.keyboard.press("Enter")
    page.wait_for_selector("input[name=model]:checked")
    go_to(page, "Next: settings")
    page.keyboard.press("Enter")
    page.wait_for_selector("input[name=preset]:checked")
    go_to(page, "Start training")
    page.keyboard.press("Enter")

    page.wait_for_url("**/#/jobs/*")
    job = served.taken()
    assert job.request["settings"]["trigger"] == "bello"
    run = job.train()
    run.show(started(400))
    run.preview(0, 0.0)
    run.show(*events_of(run.folder)[2:])
    run.finish()
    job.end()
    page.wait_for_url("**/#/runs/*")
    for opened, dialog in (("Keep this one", "Keep step 60"), ("For engineers", "For engineers")):
        button = page.get_by_role("button", name=opened)
        button.wait_for()
        go_to(page, opened)
        page.keyboard.press("Enter")
        page.get_by_role("dialog", name=dialog).wait_for()
        if opened == "Keep this one":
            go_to(page, "Download the file")
            with page.expect_download() as download:
                page.keyboard.press("Enter")
            assert download.value.suggested_filename == "bello.safetensors"
        page.keyboard.press("Escape")
        expected(page.get_by_role("dialog")).to_have_count(0)
        expected(button).to_be_focused()
