"""Pictures first: what is seen while a LoRA trains, and of the result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from lorasmith.training.events import Previewed, StepDone
from tests.server.pages.conftest import ServedPage, assert_legible, expected
from tests.server.pages.fake_api import PROMPTS, started

Opener = Callable[..., Any]

RUN = "runs/cli-001"


@pytest.fixture
def training(served: ServedPage) -> Callable[..., None]:
    """A run of the command line that trains; the function shows a preview of a step."""
    served.server.add_run(RUN, state="running", status="Running", lora=None, previews=[], job=None, recommended=None)
    served.server.show(RUN, started(300))

    def preview(step: int, strength: float = 1.0) -> None:
        if step:
            served.server.show(RUN, StepDone(step=step, loss=0.5, grad_norm=1.0))
        paths = tuple(f"{step}-{strength}-{number}.png" for number in (1, 2))
        served.server.show(RUN, Previewed(step=step, prompts=PROMPTS, paths=paths, strength=strength))

    preview(0, 0.0)
    return preview


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_pictures_come_from_the_start_and_are_scrubbed(
    training: Callable[..., None], open_page: Opener, scheme: str, width: int
) -> None:
    page = open_page("#/runs/runs%2Fcli-001", scheme=scheme, width=width)
    alone = page.locator(".alone")
    expected(alone).to_contain_text("Base model. Pictures with the LoRA follow.")
    expected(page.locator(".plot canvas")).to_have_count(0)  # losses are folded up
    assert_legible(page, "base")
    for step in (30, 75):
        training(step)
    film = page.get_by_role("region", name="Pictures")
    after = film.locator(".wipe img").first
    expected(after).to_have_attribute("alt", f"Step 75: {PROMPTS[0]}")
    scrubber = film.get_by_label("Step", exact=True)
    scrubber.focus()
    page.keyboard.press("ArrowLeft")
    expected(after).to_have_attribute("alt", f"Step 30: {PROMPTS[0]}")
    training(150)
    expected(film.get_by_role("button", name="Step 150")).to_have_count(1)
    expected(after).to_have_attribute("alt", f"Step 30: {PROMPTS[0]}")  # what was chosen stays
    film.get_by_role("button", name="Step 150").press("Enter")
    training(225)
    expected(after).to_have_attribute("alt", f"Step 225: {PROMPTS[0]}")  # the newest again
    film.get_by_role("button", name=PROMPTS[1]).click()  # as text
    expected(after).to_have_attribute("alt", f"Step 225: {PROMPTS[1]}")
    divider = film.get_by_label(re.compile("^Divider: Base model on its left, Step 225 on its right"))
    divider.focus()
    page.keyboard.press("Home")
    expected(divider).to_have_attribute("aria-valuetext", "0 % Base model")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.wipe-before')).clipPath") == "inset(0px 100% 0px 0px)"
    )
    height = page.evaluate("document.querySelector('.film').getBoundingClientRect().height / innerHeight")
    assert 0.3 < height <= 1, "prompts, picture, slider and strip are more than a screen"
    assert_legible(page, "film")
    page.get_by_role("heading", name="Details").click()
    page.locator(".plot canvas").wait_for()
    assert_legible(page, "details")


@pytest.mark.slow
def test_a_run_that_trains_is_asked_for_pictures_its_lora_and_a_prompt(
    served: ServedPage, training: Callable[..., None], open_page: Opener
) -> None:
    page = open_page("#/runs/runs%2Fcli-001", scheme="dark", width=390)
    training(30)
    page.get_by_role("button", name="Preview now").press("Enter")
    page.get_by_text("Pictures are drawn after this step.").wait_for()
    page.get_by_role("button", name="Save now").click()
    expected(page.get_by_role("link", name="step 30")).to_have_attribute(
        "href", re.compile(r"fox-step00000030\.safetensors$")
    )
    lora = page.get_by_label("LoRA", exact=True)
    expected(lora.locator("option")).to_have_text(["As it is now", "Step 30"])
    page.get_by_label("Prompt", exact=True).fill("foxy <i>in</i> snow")
    page.get_by_role("button", name="Draw", exact=True).click()
    tried = page.locator(".try")
    expected(tried.locator("img")).to_have_count(2)
    expected(tried.locator("p").first).to_have_text("foxy <i>in</i> snow step 30, strength 1, seed 0")
    assert_legible(page, "tried")
    bodies = [body for _, path, body in served.server.calls if path.endswith("requests")]
    drawing = {"prompt": "foxy <i>in</i> snow", "strength": 1, "seed": 0, "control": "", "lora": ""}
    assert bodies == [{"what": "preview"}, {"what": "save"}, {"what": "drawing", "drawing": drawing}]
    served.server.refusals[f"POST /lorasmith/v1/runs/{RUN}/requests"] = (400, "it is not being trained; name another")
    page.get_by_role("button", name="Save now").click()
    page.get_by_text("it is not being trained").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_result_is_a_verdict_a_file_and_pictures(
    served: ServedPage, open_page: Opener, scheme: str, width: int
) -> None:
    best = {"sentence": "Looks like your fox; use step 40.", "is_judged": True, "step": 40, "bytes": 45_000_000}
    served.server.add_run("runs/fox-001", recommended={**best, "file": "fox-40.safetensors"})
    page = open_page("#/runs/runs%2Ffox-001", scheme=scheme, width=width)
    expected(page.locator(".verdict")).to_have_text("Looks like your fox; use step 40.")
    (download,) = page.locator(".large-button").all()
    assert download.inner_text() == "Download step 40 (43 MiB)"
    assert download.get_attribute("href").endswith("fox-40.safetensors")
    expected(page.locator(".wipe img").first).to_have_attribute("alt", re.compile("^Step 40: "))
    with page.expect_download() as card:
        page.get_by_role("link", name="Share card").click()
    assert card.value.suggested_filename == "fox-001.png"
    gallery = page.get_by_role("region", name="Gallery")
    gallery.get_by_role("button", name="in a city street at night").click()
    gallery.get_by_role("button", name="Draw 10 pictures").click()
    expected(gallery.locator("table.grid img")).to_have_count(10)
    assert gallery.locator("table.grid thead th").all_inner_texts() == [
        "Base model", "Strength", "Step 20", "Step 40", "Step 60",
    ]  # fmt: skip
    gallery.get_by_role("button", name="Step 40, strength 0.8: foxy, in a city street at night").click()
    page.get_by_text("6 of 10").wait_for()
    assert_legible(page, "lightbox")
    page.keyboard.press("Escape")
    gallery.get_by_role("button", name="Something else").click()
    gallery.get_by_label("What to ask for").fill("in a <b>hat</b>")
    gallery.get_by_role("button", name="Draw 10 pictures").click()
    expected(gallery.get_by_text("foxy, in a <b>hat</b>")).to_have_count(1)
    expected(gallery.get_by_role("group", name="Yours").get_by_role("button")).to_have_count(1)
    bodies = [body for _, path, body in served.server.calls if path.endswith("gallery")]
    assert bodies == [{"wish": "in a city street at night"}, {"wish": "in a <b>hat</b>"}]
    assert_legible(page, "result")
