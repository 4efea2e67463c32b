"""Pictures first: what is seen while a LoRA trains, and of the result."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import hub_with_login
from tests.runs.test_model_card import kohya_file
from tests.server.pages.conftest import assert_legible, expected, until
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
    after = page.locator(".easel-picture")
    expected(after).to_have_attribute("alt", f"Without your LoRA: {PROMPTS[0]}")
    expected(page.locator(".plot canvas")).to_have_count(0)  # losses are in the drawer
    assert_legible(page, "base")
    for step in (30, 75):
        training.preview(step)
    expected(after).to_have_attribute("alt", f"Step 75: {PROMPTS[0]}")
    strip = page.get_by_role("group", name="Pictures by step")
    strip.get_by_role("button", name="Step 75").press("ArrowLeft")
    expected(after).to_have_attribute("alt", f"Step 30: {PROMPTS[0]}")
    training.preview(150)
    expected(strip.get_by_role("button")).to_have_count(3)
    expected(after).to_have_attribute("alt", f"Step 30: {PROMPTS[0]}")  # what was chosen stays
    strip.get_by_role("button", name="Step 150").press("Enter")
    training.preview(225)
    expected(after).to_have_attribute("alt", f"Step 225: {PROMPTS[0]}")  # the newest again
    if width < 500:
        page.locator(".panel-handle").click()
    page.get_by_role("region", name="Drawn for you").get_by_role("button", name=PROMPTS[1]).click()  # as text
    expected(after).to_have_attribute("alt", f"Step 225: {PROMPTS[1]}")
    if width < 500:
        page.locator(".panel-handle").click()
    divider = page.get_by_label(re.compile("^Divider: Without on its left, Step 225 on its right"))
    divider.focus()
    page.keyboard.press("Home")
    expected(divider).to_have_attribute("aria-valuetext", "0 % Without")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.easel-left')).clipPath") == "inset(0px 100% 0px 0px)"
    )
    height = page.evaluate("document.querySelector('.easel').getBoundingClientRect().height / innerHeight")
    assert 0.4 < height < 1, "the picture is as large as the window lets it"
    assert_legible(page, "room")
    if width < 500:
        page.locator(".panel-handle").click()
    page.get_by_role("button", name="For engineers").click()
    page.locator(".plot canvas").wait_for()
    assert_legible(page, "drawer")


@pytest.mark.slow
def test_a_run_that_trains_is_asked_for_pictures_its_lora_and_a_prompt(
    training: ScriptedRun, open_page: Opener
) -> None:
    page = open_page("#/runs/runs%2Fcli-001", scheme="dark", width=390)
    training.preview(30)
    training.take_steps(to=33)
    page.locator(".panel-handle").click()
    page.get_by_role("button", name="Preview now").press("Enter")
    page.get_by_text("Pictures are drawn after this step.").wait_for()
    assert training.serve_requests() == ["preview"]
    expected(page.get_by_role("button", name="Step 33")).to_have_count(1)
    page.get_by_role("button", name="Save now").click()
    page.get_by_text("The LoRA is saved after this step.").wait_for()
    assert training.serve_requests() == ["save"]
    page.get_by_role("button", name="For engineers").click()
    expected(page.get_by_role("link", name="Download step 33")).to_have_attribute(
        "href", re.compile(r"cli-step00000033\.safetensors$")
    )
    page.keyboard.press("Escape")
    page.locator(".panel-handle").click()
    page.get_by_role("button", name="How it is drawn").click()
    lora = page.get_by_label("LoRA", exact=True)
    expected(lora.locator("option")).to_have_text(["As it is now", "Step 33"])
    expected(lora).to_have_value("")
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_label("Prompt", exact=True).fill("foxy <i>in</i> snow")
    page.get_by_role("button", name="Draw", exact=True).click()
    drawn = page.locator("[aria-label='You drew']")  # in the panel, which is down
    expected(drawn.get_by_text("training goes on afterwards")).to_have_count(1)
    page.reload()
    expected(drawn.get_by_text("training goes on afterwards")).to_have_count(1)  # it is found again
    drawing = {"prompt": "foxy <i>in</i> snow", "strength": 1, "seed": 5, "control": "", "lora": ""}
    assert training.serve_requests() == [drawing]
    expected(drawn.locator(".scene-tile")).to_have_count(1)
    page.reload()
    expected(drawn.locator(".scene-tile")).to_have_count(1)
    assert_legible(page, "tried")
    training.close()
    page.locator(".panel-handle").click()
    page.get_by_role("button", name="Save now").click()
    page.get_by_text(re.compile("^a request is for a run that is being trained", re.IGNORECASE)).first.wait_for()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the hub's client
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_what_leaves_is_listed_before_a_lora_is_shared(
    served: ServedPage, open_page: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, width: int
) -> None:
    folder = served.add_run("runs/fox-001", trigger="foxy fox")
    write_evaluation(folder, trigger="foxy fox")
    lora = kohya_file(tmp_path, **{"lorasmith.steps": "40", "ss_sd_model_name": "mine.safetensors"})
    shutil.copyfile(lora, folder / "fox-step00000040.safetensors")
    with hub_with_login(monkeypatch) as hub:
        page = open_page("#/runs/runs%2Ffox-001", scheme=scheme, width=width)
        if width < 500:
            page.locator(".panel-handle").click()
        page.get_by_role("button", name="Keep this one").click()
        keep = page.get_by_role("dialog", name="Keep step 40")
        keep.get_by_role("button", name="Share it on Hugging Face").click()
        files = keep.locator(".hub-files")
        files.get_by_text("README.md").wait_for()
        assert served.of("write_hub_folder")[-1]["step"] == 40
        keep.get_by_text("The LoRA's metadata has no folders, captions or prompts.").wait_for()
        assert_legible(page, "folder")
        keep.get_by_label("Licence of the base model").fill("mit")
        keep.get_by_label("Licence of the base model").press("Enter")
        until(lambda: served.of("write_hub_folder")[-1].get("licence") == "mit")
        with page.expect_download() as saved:
            keep.get_by_role("link", name="Download the folder").click()
        assert saved.value.suggested_filename == "fox.zip"
        with zipfile.ZipFile(saved.value.path()) as sent:
            assert "license: mit" in sent.read("fox/README.md").decode()
        assert not hub.requests, "nothing was asked for"

        keep.get_by_label("Repository").fill("fox")
        keep.get_by_role("button", name="Upload…").click()
        keep.get_by_text(re.compile("files go to the hub, where only you see them")).wait_for()
        assert not hub.requests
        keep.get_by_role("button", name="Yes, upload them").click()
        keep.get_by_role("link", name="somebody/fox").wait_for()
        assert hub.private == {"somebody/fox": True}
        assert_legible(page, "uploaded")

        keep.get_by_label("Keep folders, captions and prompts in the LoRA's metadata").check()
        keep.locator(".hub-told").wait_for()
        assert_legible(page, "told")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_result_is_a_verdict_a_file_and_pictures(
    served: ServedPage, open_page: Opener, scheme: str, width: int
) -> None:
    folder = served.add_run("runs/fox-001", trigger="foxy fox")
    write_evaluation(folder, trigger="foxy fox")
    page = open_page("#/runs/runs%2Ffox-001", scheme=scheme, width=width)
    expected(page.locator(".verdict")).to_have_text("It learnt your fox.")
    expected(page.locator(".easel-picture")).to_have_attribute("alt", "Step 40: foxy fox")
    if width < 500:
        page.locator(".panel-handle").click()
    page.get_by_role("button", name="Keep this one").click()
    keep = page.get_by_role("dialog", name="Keep step 40")
    expected(keep.get_by_role("link", name="Download the file")).to_have_attribute(
        "href", re.compile(r"fox-step00000040\.safetensors$")
    )
    keep.get_by_text(
        "The file is called fox-step00000040.safetensors. Here it is in the folder runs/fox-001."
    ).wait_for()
    keep.get_by_role("button", name="Share a picture").click()
    card = keep.get_by_role("img", name="The picture to share")
    expected(card).to_have_js_property("complete", True)
    assert card.evaluate("(one) => one.naturalWidth") == 1200  # it is seen before it is saved
    assert_legible(page, "share")
    with page.expect_download() as saved:
        keep.get_by_role("link", name="Save the picture").click()
    assert saved.value.suggested_filename == "fox-001.png"
    page.keyboard.press("Escape")
    if width < 500:
        page.locator(".panel-handle").click()

    page.get_by_label("Prompt", exact=True).fill("foxy fox, in a <b>hat</b>")
    page.get_by_role("button", name="How it is drawn").click()
    page.get_by_role("button", name="Draw it at every step").click()
    job = served.taken()
    write_grid(folder, job.request)
    job.end()
    expected(page.locator(".easel-picture")).to_have_attribute("alt", "Step 40: foxy fox, in a <b>hat</b>")
    strip = page.get_by_role("group", name="Pictures by step")
    expected(strip.get_by_role("button")).to_have_count(3)
    slider = page.get_by_label("Strength", exact=True)
    slider.press("ArrowLeft")
    expected(slider).to_have_attribute("aria-valuetext", "0.8")
    expected(page.locator(".easel-picture")).to_have_attribute("alt", re.compile("^Step 40, strength 0.8: "))
    assert [one["wish"] for one in served.of("grid_request")] == ["foxy fox, in a <b>hat</b>"]
    assert_legible(page, "result")
