"""Pictures first: what is seen while a LoRA trains, and of the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server.pages.conftest import assert_legible, expected
from tests.server.pages.run_folders import PROMPTS, ScriptedRun, write_evaluation, write_grid, write_record
from tests.server.pages.served_page import ServedPage
from tests.training.run_cases import started

Opener = Callable[..., Any]

RUN = "runs/cli-001"


@pytest.fixture
def training(served: ServedPage) -> Iterator[ScriptedRun]:
    """A run of the command line that trains."""
    run = ScriptedRun(write_record(served.base, RUN, [], steps=300))
    run.show(started(300))
    run.preview(0, 0.0)
    yield run
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_pictures_come_from_the_start_and_are_scrubbed(
    training: ScriptedRun, open_page: Opener, scheme: str, width: int
) -> None:
    page = open_page("#/runs/runs%2Fcli-001", scheme=scheme, width=width)
    alone = page.locator(".alone")
    expected(alone).to_contain_text("Base model. Pictures with the LoRA follow.")
    expected(page.locator(".plot canvas")).to_have_count(0)  # losses are folded up
    assert_legible(page, "base")
    for step in (30, 75):
        training.preview(step)
    film = page.get_by_role("region", name="Pictures")
    after = film.locator(".wipe img").first
    expected(after).to_have_attribute("alt", f"Step 75: {PROMPTS[0]}")
    scrubber = film.get_by_label("Step", exact=True)
    scrubber.focus()
    page.keyboard.press("ArrowLeft")
    expected(after).to_have_attribute("alt", f"Step 30: {PROMPTS[0]}")
    training.preview(150)
    expected(film.get_by_role("button", name="Step 150")).to_have_count(1)
    expected(after).to_have_attribute("alt", f"Step 30: {PROMPTS[0]}")  # what was chosen stays
    film.get_by_role("button", name="Step 150").press("Enter")
    training.preview(225)
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
    training: ScriptedRun, open_page: Opener
) -> None:
    page = open_page("#/runs/runs%2Fcli-001", scheme="dark", width=390)
    training.preview(30)
    training.take_steps(to=33)
    page.get_by_role("button", name="Preview now").press("Enter")
    page.get_by_text("Pictures are drawn after this step.").wait_for()
    assert training.serve_requests() == ["preview"]
    expected(page.get_by_role("button", name="Step 33")).to_have_count(1)
    page.get_by_role("button", name="Save now").click()
    page.get_by_text("The LoRA is saved after this step.").wait_for()
    assert training.serve_requests() == ["save"]
    expected(page.get_by_role("link", name="step 33")).to_have_attribute(
        "href", re.compile(r"cli-step00000033\.safetensors$")
    )
    lora = page.get_by_label("LoRA", exact=True)
    expected(lora.locator("option")).to_have_text(["As it is now", "Step 33"])
    page.get_by_label("Prompt", exact=True).fill("foxy <i>in</i> snow")
    page.get_by_role("button", name="Draw", exact=True).click()
    tried = page.locator(".try")
    expected(tried).to_have_count(1)
    drawing = {"prompt": "foxy <i>in</i> snow", "strength": 1, "seed": 0, "control": "", "lora": ""}
    assert training.serve_requests() == [drawing]
    expected(tried.locator("img")).to_have_count(2)
    expected(tried.locator("p").first).to_have_text("foxy <i>in</i> snow step 33, strength 1, seed 0")
    assert_legible(page, "tried")
    training.close()
    page.get_by_role("button", name="Save now").click()
    page.get_by_text("a request is for a run that is being trained").or_(
        page.get_by_text("A request is for a run that is being trained")
    ).first.wait_for()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_result_is_a_verdict_a_file_and_pictures(
    served: ServedPage, open_page: Opener, scheme: str, width: int
) -> None:
    folder = served.add_run("runs/fox-001", trigger="foxy fox")
    write_evaluation(folder, trigger="foxy fox")
    page = open_page("#/runs/runs%2Ffox-001", scheme=scheme, width=width)
    expected(page.locator(".verdict")).to_have_text(
        "It learnt your fox. Step 40 looks most like it and still follows prompts."
    )
    (download,) = page.locator(".large-button").all()
    assert re.fullmatch(r"Download step 40 \(\d+ bytes\)", download.inner_text())
    assert download.get_attribute("href").endswith("fox-step00000040.safetensors")
    expected(page.locator(".wipe img").first).to_have_attribute("alt", re.compile("^Step 40: "))
    with page.expect_download() as card:
        page.get_by_role("link", name="Share card").click()
    assert card.value.suggested_filename == "fox-001.png"
    gallery = page.get_by_role("region", name="Gallery")

    def draw() -> None:
        gallery.get_by_role("button", name="Draw 16 pictures").click()
        job = served.taken()
        write_grid(folder, job.request)
        job.end()

    gallery.get_by_role("button", name="on a purple background").click()
    draw()
    expected(gallery.locator("table.grid img")).to_have_count(16)
    assert gallery.locator("table.grid thead th").all_inner_texts() == [
        "Base model", "Strength", "Step 40", "Step 50", "Step 60",
    ]  # fmt: skip
    prompt = "foxy fox, on a purple background"
    gallery.get_by_role("button", name=f"Step 50, strength 0.8: {prompt}").click()
    page.get_by_text("9 of 16").wait_for()
    assert_legible(page, "lightbox")
    page.keyboard.press("Escape")
    gallery.get_by_role("button", name="Something else").click()
    gallery.get_by_label("What to ask for").fill("in a <b>hat</b>")
    draw()
    expected(gallery.get_by_text("foxy fox, in a <b>hat</b>")).to_have_count(1)
    expected(gallery.get_by_role("group", name="Yours").get_by_role("button")).to_have_count(1)
    assert [one["wish"] for one in served.of("grid_request")] == ["on a purple background", "in a <b>hat</b>"]
    assert_legible(page, "result")
