"""The page in a browser: the way from photos to a LoRA, and what can go wrong on it."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.runs.presets import PRESETS, recipe_settings
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.questions import answer
from tests.families.flux_parts import denoiser
from tests.families.original_models import save
from tests.server.pages.conftest import assert_legible, choose_files, expected, until
from tests.server.pages.run_folders import SKETCH, ScriptedRun, events_of, step_done, write_evaluation, write_record
from tests.server.pages.served_page import ServedPage
from tests.training.run_cases import picture, started

Opener = Callable[..., Any]


def waits(page: Any, text: str) -> None:
    page.get_by_text(text).first.wait_for()


def pull_up(page: Any) -> None:
    """Show the panel beside the pictures on a phone."""
    page.locator(".panel-handle").click()
    page.locator(".panel.up").wait_for()


def test_a_newcomer_walks_from_photos_to_a_lora(served: ServedPage, open_page: Opener, photos: Path) -> None:
    models = served.base / "models"
    for kind in ("checkpoints", "diffusion_models"):
        (models / kind).mkdir(parents=True)
    built_in = BUILT_IN_BASE / "models" / "checkpoints" / "lorasmith-tiny.safetensors"
    shutil.copyfile(built_in, models / "checkpoints" / "mine.safetensors")
    save(models / "diffusion_models" / "flux1-dev.safetensors", denoiser())
    page = open_page(width=390, scheme="dark")  # a phone
    assert_legible(page)
    page.locator("input[type=file]").nth(1).set_input_files(photos)

    page.wait_for_url("**/#/new/my-dog/photos")  # named after the folder
    page.locator(".tile img[src^='blob:']").first.wait_for()  # seen before it is sent
    page.get_by_role("button", name="3 files not added").click()
    broken, notes, sea = sorted(page.locator(".remark .file-list li").all_inner_texts())
    assert broken.startswith("broken.jpg is not an image in spite of its name")
    assert notes == "notes.pdf is not a picture." and sea.startswith("sea.mp4 is a video, which the page does not take")
    waits(page, "2 without “before”")
    page.get_by_role("button", name="Before / after", exact=True).click()  # as guessed; the panel comes up
    page.get_by_role("radio", name="Pet").check(force=True)
    expected(page.get_by_text("2 without “before”")).to_have_count(0)  # single photos, whatever the folder control has
    waits(page, "2 of 3 with a caption")
    page.get_by_label("What will you call it in prompts?").fill("bello")
    assert_legible(page)
    page.get_by_role("button", name="Pet · bello").click()
    page.get_by_role("button", name="Choose a model").click()

    page.wait_for_selector("input[name=model]:checked")
    assert page.locator("input[name=model]:checked").get_attribute("value") == "mine.safetensors"
    assert page.locator("input[name=model]:disabled").count() == 1  # the one without its parts
    waits(page, "text encoder 2 (t5xxl_fp16.safetensors), vae (ae.safetensors)")
    page.get_by_role("button", name="Next: settings").click()

    page.wait_for_selector("input[name=preset]:checked")
    assert page.locator("input[name=preset]:checked").get_attribute("value") == "balanced"
    waits(page, "Takes about")  # measured by itself
    waits(page, "A pet: its name goes in front of every caption")
    assert_legible(page)
    page.get_by_role("button", name="Start training").click()

    page.wait_for_url("**/#/jobs/*")
    job = served.taken()
    job.prepare("3 photos found", "Loading mine.safetensors…")
    waits(page, "3 photos found")
    run = job.train()
    run.show(started(400))
    run.preview(0, 0.0)
    expected(page.get_by_role("img", name="Without your LoRA: a photo of foxy in the snow")).to_have_count(1)
    run.show(*events_of(run.folder)[2:])
    run.finish()
    job.end()
    page.wait_for_url("**/#/runs/*")  # it has ended
    expected(page.locator(".verdict")).to_have_text("Trained for 60 steps.")
    pull_up(page)
    page.get_by_role("button", name="Keep this one").click()
    keep = page.get_by_role("dialog", name="Keep step 60")
    assert keep.get_by_role("link", name="Download the file").get_attribute("href").endswith("/bello.safetensors")
    assert_legible(page, "keep")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="For engineers").click()
    waits(page, "The LoRA improves on held-out images, most at step 50; a little overfitting after that.")
    assert_legible(page)
    assert [one.kind for one in served.do(lambda: served.context.store.ended(9))].count("train") == 1
    assert job.request == {
        "sources": [{"path": "input/my-dog"}],
        "model": "mine.safetensors",
        "name": "bello",
        "preset": "balanced",
        "kind": "subject",
        "settings": {"trigger": "bello", "controls": "none"},
        "evaluate": True,
    }


def colour(page: Any, picture: Any) -> str:
    """The colour of a picture before an edit, of one colour, as it is shown: channels are full or empty."""
    picture.scroll_into_view_if_needed()
    expected(picture).to_have_js_property("complete", True)
    return str(
        picture.evaluate(
            """(one) => {
                const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
                const pen = canvas.getContext("2d");
                pen.drawImage(one, 0, 0, 1, 1);
                return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((each) => (each > 127 ? 255 : 0)).join();
            }"""
        )
    )


@pytest.mark.slow
def test_pairs_are_matched_mended_replaced_and_removed(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    folder = served.add_dataset("fox", 3)
    model = served.base / "models" / "diffusion_models" / "flux1-kontext.safetensors"
    model.parent.mkdir(parents=True)
    model.touch()
    listed = answer("models", {}, served.folders)
    kontext = {"name": model.name, "title": "flux1-kontext", "family": "Flux.1", "builtin": False, "edit": "kontext"}
    edits = {"edits": ["kontext"], "recognised_by": "name", "takes_controls": True}
    listed["models"].append({**listed["models"][0], **kontext, **edits})
    served.made_up["models"] = listed
    for name, one in (("fox_1", "red"), ("fox_2", "lime"), ("stray", "blue"), ("new", "white")):
        Image.new("RGB", (64, 48), one).save(tmp_path / f"{name}.png")
    page = open_page("#/new/fox/photos")
    page.get_by_role("radio", name="Before / after").check(force=True)
    waits(page, "3 without “before”")
    choose_files(
        page.get_by_role("button", name="Choose photos: pictures before"),
        [tmp_path / f"{name}.png" for name in ("fox_1", "fox_2", "stray")],
    )
    waits(page, "1 without “before”")
    before = [page.locator(f'.before[data-before="fox_{number}.png"]') for number in (1, 2, 3)]
    pictures = [one.locator("img") for one in before]
    assert [colour(page, one) for one in pictures[:2]] == ["255,0,0", "0,255,0"]
    expected(before[2]).to_contain_text("No “before”")
    assert_legible(page, "pairs")

    expected(pictures[0]).to_have_attribute("draggable", "true")
    held = page.evaluate_handle("new DataTransfer()")  # by a pointer, what is said of the photos moves the places
    pictures[0].dispatch_event("dragstart", {"dataTransfer": held})
    before[1].dispatch_event("dragover", {"dataTransfer": held})
    before[1].dispatch_event("drop", {"dataTransfer": held})  # they change places
    waits(page, "have changed places")
    expected(pictures[0]).to_have_attribute("src", re.compile("v=1"))
    assert [colour(page, one) for one in pictures[:2]] == ["0,255,0", "255,0,0"]

    page.get_by_role("button", name="Move it to another picture: stray.png").press("Enter")
    dialog = page.get_by_role("dialog")
    assert_legible(page, "dialog")
    dialog.get_by_role("button", name="fox_3.png").press("Enter")
    expected(pictures[2]).to_have_count(1)
    assert colour(page, pictures[2]) == "0,0,255"
    expected(page.get_by_text("without a partner")).to_have_count(0)
    expected(page.get_by_text("without “before”")).to_have_count(0)

    page.locator('.tile[data-file="fox_1.png"]').click(position={"x": 8, "y": 8})
    choose_files(page.get_by_role("button", name="Replace the “before” of fox_1.png"), tmp_path / "new.png")
    waits(page, "1 photo added")
    expected(pictures[0]).to_have_attribute("src", re.compile("v=3"))
    page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="Remove it, the “before”: fox_2.png").click()
    expected(before[1]).to_contain_text("No “before”")
    assert {one.name for one in (folder / "control").iterdir()} == {"fox_1.png", "fox_3.png"}
    page.reload()
    expected(pictures[0]).to_have_count(1)
    assert colour(page, pictures[0]) == "255,255,255"

    page.get_by_role("button", name="Choose a model").click()
    page.wait_for_selector("input[name=model]:checked")
    assert "kontext" in page.locator("input[name=model]:checked").get_attribute("value")
    page.get_by_label("Does it edit pictures?").select_option("none")
    page.get_by_role("link", name="Back").click()
    page.get_by_role("button", name="Cannot edit").click()
    waits(page, "flux1-kontext cannot edit pictures. Choose one that can, make it a slider")

    page.get_by_role("radio", name="Slider").check(force=True)
    page.get_by_role("button", name="Choose photos: opposites").wait_for()
    expected(before[1]).to_contain_text("No opposite")
    waits(page, "1 without opposite")
    expected(page.get_by_text("Cannot edit")).to_have_count(0)
    caption = page.get_by_label("Caption of fox_1.png")
    caption.fill("make it a poster")
    caption.blur()
    page.get_by_role("button", name="1 name the change").click()
    waits(page, "Say what both pictures show")
    assert_legible(page, "slider")
    page.get_by_role("button", name="Choose a model").click()
    page.get_by_role("button", name="Next: settings").click()
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/jobs/**")
    assert served.taken().request["settings"]["pairs"] == "slider"


@pytest.mark.slow
def test_a_slider_is_looked_at_over_its_strengths(served: ServedPage, open_page: Opener) -> None:
    served.add_run(strengths=(-2.0, -1.0, 0.0, 1.0, 2.0), prompts=("a lion",), slider_positive="a big lion")
    page = open_page("#/runs/runs%2Ffox-001", scheme="dark", width=390)
    chosen, picture = page.get_by_label("Strength", exact=True), page.locator(".easel-picture")
    expected(picture).to_have_attribute("alt", "Step 60: a lion")
    chosen.focus()
    for strength, alt in ((0, "strength 0"), (-1, "strength -1"), (-2, "strength -2"), (-2, "strength -2")):
        page.keyboard.press("ArrowLeft")
        expected(picture).to_have_attribute("alt", f"Step 60, {alt}: a lion")
        expected(chosen).to_have_attribute("aria-valuetext", "without" if strength == 0 else str(strength))
    chosen.evaluate("(one) => { one.value = -1.5; one.dispatchEvent(new Event('input', {bubbles: true})); }")
    expected(page.locator(".easel img[alt='']").last).to_have_css("opacity", "0.5")  # between two that were drawn
    chosen.dispatch_event("change")
    expected(picture).to_have_attribute("alt", re.compile("strength -[12]:"))
    assert_legible(page)
    page.get_by_role("button", name="Step 20").click()
    expected(picture).to_have_attribute("src", re.compile(r"20--[12]\.0-1\.png"))
    page.get_by_role("button", name="How it is drawn").click()
    strength = page.get_by_label("Exact strength")
    strength.fill("-2.5")
    waits(page, "Must be a number from -2 to 2.")
    strength.fill("-1.5")
    page.get_by_role("button", name="Draw", exact=True).click()
    until(lambda: bool(served.of("draw_request")))
    assert served.of("draw_request")[-1]["strength"] == -1.5
    assert served.of("draw_request")[-1]["strengths"] == [-2, -1, 1, 2]


@pytest.mark.slow
def test_captions_are_edited_in_place_and_all_at_once(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page("#/new/fox/photos")
    first = page.get_by_label("Caption of fox_1.png")
    first.fill("a fox <b>asleep</b>")
    first.blur()
    page.get_by_role("button", name="Find and replace in captions").click()
    page.get_by_label("Find", exact=True).fill("FOX")
    page.get_by_label("Replace with").fill("cat")
    waits(page, "In 3 captions.")
    page.get_by_role("button", name="Replace", exact=True).click()
    waits(page, "3 captions changed.")
    assert served.captions() == ["a cat <b>asleep</b>", "", "a red cat, picture 2", "a red cat, picture 3"]
    assert first.input_value() == "a cat <b>asleep</b>"
    page.locator(".toast").get_by_role("button", name="Undo", exact=True).click()
    expected(first).to_have_value("a fox <b>asleep</b>")
    page.reload()
    page.wait_for_selector("textarea")
    assert served.captions() == ["a fox <b>asleep</b>", "", "a red fox, picture 2", "a red fox, picture 3"]
    assert first.input_value() == "a fox <b>asleep</b>"


@pytest.mark.slow
def test_advice_on_pictures_is_followed_and_undone(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    served.add_run()
    served.advise("runs/fox-001")
    page = open_page("#/runs/runs%2Ffox-001")
    page.get_by_text("2 photos to look at").click()
    expected(page.get_by_role("button", name="Repeat less")).to_have_count(1)

    page.get_by_role("button", name="Leave out: fox_2.png").click()
    waits(page, "fox_2.png was moved to the removed files.")
    assert served.photos() == ["fox_1.png", "fox_3.png", "fox_4.png"]
    page.get_by_role("button", name="Undo: fox_2.png").click()
    page.get_by_role("button", name="Leave out: fox_2.png").wait_for()
    assert "fox_2.png" in served.photos()

    page.get_by_role("button", name="Repeat less: fox_3.png").click()
    page.get_by_role("button", name="Undo: fox_3.png").click()
    page.get_by_role("button", name="Repeat less: fox_3.png").click()
    waits(page, "It will be drawn less often.")
    page.reload()
    page.get_by_text("2 photos to look at").click()
    waits(page, "It will be drawn less often.")

    page.get_by_role("button", name="Edit the caption: fox_2.png").click()
    caption = page.get_by_label("Caption of fox_2.png")
    expected(caption).to_be_focused()
    page.keyboard.type("a grey fox")
    page.get_by_role("button", name="Choose a model").click()
    page.get_by_role("button", name="Next: settings").click()
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/jobs/*")
    until(lambda: served.captions()[1] == "a grey fox")
    assert served.taken().request["settings"]["image_repeats"] == "fox_3.png=0.1"


@pytest.mark.slow
def test_a_caption_that_another_tab_has_changed_waits_for_a_choice(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_dataset()
    page = open_page("#/new/fox/photos")

    def elsewhere(text: str) -> None:
        (folder / "fox_1.txt").write_text(text)

    field = page.get_by_label("Caption of fox_1.png")
    expected(field).to_have_value("a red fox, picture 0")
    for mine, theirs, choice in (("mine", "theirs", "Use that one"), ("again mine", "theirs, again", "Keep mine")):
        elsewhere(theirs)
        field.fill(mine)
        field.blur()
        conflict = page.locator(".conflict")
        expected(conflict).to_contain_text("It was changed elsewhere, so your text is not stored")
        expected(conflict.locator(".there")).to_have_text(theirs)
        field.fill(f"{mine}!")  # goes on typing
        field.fill(mine)
        field.blur()
        assert served.captions()[0] == theirs and field.input_value() == mine
        assert_legible(page, "conflict")
        if choice == "Use that one":
            conflict.get_by_role("button", name=choice).click()
        else:  # it is stored, and shown as it is stored
            with page.expect_response(lambda answer: answer.url.endswith("/datasets/fox")):
                conflict.get_by_role("button", name=choice).click()
        expected(conflict).to_have_count(0)
        expected(field).to_have_value(theirs if choice == "Use that one" else mine)
    assert served.captions()[0] == "again mine"
    elsewhere("theirs, a third time")
    page.get_by_role("button", name="Find and replace in captions").click()
    page.get_by_label("Find", exact=True).fill("mine")
    page.get_by_label("Replace with").fill("yours")
    replace = page.get_by_role("button", name="Replace", exact=True)
    replace.click()
    page.get_by_role("dialog").get_by_text("was changed elsewhere, and nothing was stored").wait_for()
    waits(page, "In 0 captions.")  # what is there now is looked at
    page.get_by_label("Find", exact=True).fill("theirs")
    waits(page, "In 1 caption.")
    replace.click()
    waits(page, "1 caption changed.")
    assert served.captions()[0] == "yours, a third time"


@pytest.mark.slow
def test_what_is_wrong_stands_on_the_picture_beside_the_crop(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_dataset()
    for copy in ("fox_3.png", "fox_4.png"):
        (folder / copy).write_bytes((folder / "fox_1.png").read_bytes())
    served.trains_four_fifths()
    page = open_page("#/new/fox/photos")
    waits(page, "1 without words")
    page.get_by_role("button", name="2 twice").click()
    waits(page, "Keep one of each.")
    expected(page.locator(".tile")).to_have_count(2)
    page.get_by_role("button", name="Show all").click()
    expected(page.locator(".tile")).to_have_count(4)
    expected(page.locator(".dot-mark")).to_have_count(2)
    page.locator('.tile[data-file="fox_3.png"]').click()
    expected(page.locator(".problems li")).to_have_text(["copy"])
    crop, picture = page.locator(".tile .crop").bounding_box(), page.locator(".tile[aria-selected=true]").bounding_box()
    assert crop["width"] == pytest.approx(0.8 * picture["width"], abs=1)
    page.get_by_role("button", name="Remove all").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove all").click()
    waits(page, "The photos were moved to user/lorasmith/removed/")
    page.wait_for_url("**/#/")
    assert not folder.exists()


def test_pairs_without_a_model_that_edits_are_offered_a_slider(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_dataset("fox", 2)
    (folder / "control").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "control" / "fox_1.png")
    page = open_page("#/new/fox/model")
    waits(page, "None of these models edits pictures")
    assert page.get_by_text("Suggested").count() == 0
    assert page.locator("input[name=model]:checked").count() == 0
    following = page.get_by_role("button", name="Next: settings")
    expected(following).to_have_attribute("aria-disabled", "true")
    page.get_by_role("radio").first.check()
    waits(page, "cannot edit pictures, and your photos")
    expected(following).to_have_attribute("aria-disabled", "true")
    assert_legible(page)
    page.get_by_role("button", name="Make it a slider").click()
    expected(page.locator("input[name=model]:checked")).to_have_count(1)
    until(lambda: served.draft("fox").get("settings", {}).get("pairs") == "slider")
    following.click()
    page.wait_for_url("**/settings")


def test_without_a_model_the_page_says_what_to_install(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    served.made_up["models"] = {"models": [], "other": [], "notes": ["lorasmith-tiny is not installed; run this"]}
    page = open_page("#/new/fox/model")
    page.get_by_text("lorasmith-tiny is not installed; run this.").wait_for()
    assert page.get_by_text("the small one that is built in").count() == 0


@pytest.mark.slow
def test_every_setting_is_there_and_keeps_to_its_range(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    plan = served.made_up["plan"]

    def refusing(spec: Any, **given: Any) -> Any:
        """The plan of a model that takes a rank of at most 64."""
        if (rank := spec["settings"].get("rank", 1)) > 64:
            raise RefusedError("OptionError", f"rank must be between 1 and 64, got {rank}; choose another")
        return plan(spec, **given)

    served.made_up["plan"] = refusing
    page = open_page("#/new/fox/model")
    page.get_by_role("button", name="Next: settings").click()
    page.get_by_text("All settings").click()
    rank = page.get_by_label("Rank", exact=True).or_(page.get_by_label("Rank changed", exact=True))
    assert rank.input_value() == "16"  # that of the preset
    rank.fill("100000")
    rank.blur()
    waits(page, "Must be a whole number between 1 and")
    assert rank.get_attribute("aria-invalid") == "true"
    page.get_by_text("All settings").click()
    page.get_by_role("button", name="Start training").click()  # waits, and shows the field
    expected(rank).to_be_focused()
    assert rank.input_value() == "100000"
    rank.fill("100")  # that the declaration allows, and this model refuses
    rank.blur()
    page.locator(".field .field-error", has_text="Rank must be between 1 and 64, got 100; choose another.").wait_for()
    rank.fill("24")
    rank.blur()
    search = page.get_by_role("searchbox")
    search.fill("algorithm")
    page.get_by_label("Algorithm").select_option("LoKr")
    search.fill("flip")
    page.get_by_label("Flip").check()
    page.reload()  # the choices outlive it
    page.get_by_text("3 changes").wait_for()
    page.get_by_text("All settings").click()
    assert page.get_by_label("Algorithm changed").input_value() == "LoKr"  # groups with changes are open
    page.get_by_role("button", name="Back to off").click()
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/jobs/*")
    assert served.taken().request["settings"] == {"rank": 24, "algorithm": "LoKr"}


@pytest.mark.slow
def test_a_set_that_nothing_names_is_asked_for_before_it_is_trained(served: ServedPage, open_page: Opener) -> None:
    for one in served.add_dataset().glob("*.txt"):
        one.unlink()
    page = open_page("#/new/fox/model", width=390, scheme="dark")
    page.get_by_role("button", name="Next: settings").click()
    start = page.get_by_role("button", name="Start training")
    asked = page.get_by_label("What should I draw?")
    asked.wait_for()
    expected(start).to_be_disabled()
    assert_legible(page)
    asked.press_sequentially(" a fox")
    expected(asked).to_be_focused()  # it stays while it is answered
    expected(start).to_be_enabled()
    start.click()
    assert served.taken().request["settings"]["trigger"] == "a fox"


@pytest.mark.slow
def test_several_values_are_tried_by_the_one_button_that_starts(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page("#/new/fox/model")
    page.get_by_role("button", name="Next: settings").click()
    waits(page, "Takes about 3 minutes")  # 400 steps, as measured
    page.get_by_text("Try several values").click()
    first, second = (page.get_by_role("group", name=f"{one} setting") for one in ("First", "Second"))
    important, others = first.locator("optgroup").all()
    for names in (one.locator("option").all_inner_texts() for one in (important, others)):
        assert names == sorted(names, key=str.lower) and len(names) > 5
    first.get_by_label("Values").fill("4, abc")
    waits(page, "Must be a whole number between 1 and")
    page.get_by_role("button", name="Train 2 runs").click()  # shows the field
    expected(first.get_by_label("Values")).to_be_focused()
    first.get_by_label("Values").fill("4, 8")
    second.get_by_label("Values").fill("200, 400")
    waits(page, "Choose the setting that has these values.")
    second.get_by_label("Setting (optional)").select_option("Steps")
    expected(second.get_by_text("Number of optimizer updates.")).to_be_visible()
    waits(page, "A fifth of the photos is kept aside")
    waits(page, "Takes about 10 minutes for all 4 runs")  # twice 200 and 400 steps, with start and previews
    page.get_by_role("button", name="Train 4 runs").click()
    page.wait_for_url("**/#/sweeps/fox-sweep-001")
    expected(page.get_by_text("Try several values")).to_have_count(0)  # a view that was never left keeps its values
    request = served.taken().request
    tried = {name: request["settings"][name] for name in ("rank", "steps", "validation_share")}
    assert tried == {"rank": 4, "steps": 200, "validation_share": 0.2}
    assert "previews" not in request["settings"], "each run draws pictures to compare"

    page.goto(served.address + "#/new/fox/settings")
    page.get_by_text("Try several values").click()
    first.get_by_label("Values").fill("24")  # one value is that of the one run
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/jobs/*")
    assert served.do(served.context.store.pending)[-1].request["settings"] == {"rank": 24}


@pytest.mark.slow
def test_a_busy_computer_is_said_with_the_time(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    plan = served.made_up["plan"]
    served.made_up["plan"] = lambda spec, **given: {**plan(spec, **given), "slowdown": 3.0}
    page = open_page("#/new/fox/model")
    page.get_by_role("button", name="Next: settings").click()
    waits(page, "Takes about 9 minutes, as other programs keep the processor busy")  # 3 without them


@pytest.mark.slow
def test_a_distilled_model_is_trained_with_its_adapter_if_that_is_chosen(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    adapter = served.base / "models" / "loras" / "turbo_v2.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.touch()
    plan = served.made_up["plan"]

    def distilled(spec: Any, **given: Any) -> Any:
        said = {"distilled": "It is distilled to few steps.", "usual_adapter": adapter.name}
        return {**plan(spec, **given), **({} if "training_adapter" in spec["settings"] else said)}

    served.made_up["plan"] = distilled
    page = open_page("#/new/fox/model")
    waits(page, "It is distilled to few steps.")
    page.get_by_role("button", name="Next: settings").click()
    page.get_by_role("button", name="Train with turbo_v2.safetensors").click()
    waits(page, "Trained with turbo_v2.safetensors beneath.")
    assert_legible(page)
    page.get_by_role("button", name="Leave it out").click()
    page.get_by_role("button", name="Train with turbo_v2.safetensors").click()
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/jobs/*")
    assert served.taken().request["settings"]["training_adapter"] == str(adapter)


@pytest.mark.slow
def test_refusals_of_the_server_stand_where_they_belong(
    served: ServedPage, open_page: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.add_dataset()
    page = open_page("#/new/fox/model")
    page.get_by_role("button", name="Next: settings").click()
    full = RefusedError("QueueFullError", "10,000 jobs wait already; let some of them end first")
    submit = served.context.dispatcher.submit

    def refusing(kind: str, *given: Any, **more: Any) -> Any:
        if kind == "train":
            raise full
        return submit(kind, *given, **more)

    monkeypatch.setattr(served.context.dispatcher, "submit", refusing)
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("alert").get_by_text("10,000 jobs wait already; let some of them end first.").wait_for()
    page.goto(served.address + "#/new/absent/photos")
    waits(page, "There is no folder of photos that is called “absent”.")
    page.goto(served.address + "#/jobs/absent")
    page.get_by_role("alert").get_by_text("There is no job absent; it may have been removed.").wait_for()


@pytest.mark.slow
def test_a_training_pauses_resumes_and_stops(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page("#/new/fox/model")
    page.get_by_role("button", name="Next: settings").click()
    page.get_by_role("button", name="Start training").click()
    job = served.taken()
    run = job.train()
    run.show(started(400))
    run.preview(20)
    page.wait_for_selector(".easel img")
    page.get_by_role("button", name="Pause").click()
    expected(page.locator(".verdict")).to_have_text("Paused")
    page.reload()  # its address and its history survive
    page.wait_for_selector(".easel img")
    page.get_by_role("button", name="For engineers").click()
    page.wait_for_selector(".plot canvas")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Continue", exact=True).click()
    job = served.taken()
    run = job.train()
    run.show(started(400))
    run.take_steps(to=30)
    # One page shows it, in one word, and what pages measure by themselves is no work.
    served.do(lambda: served.context.dispatcher.submit("measure", {"model": "lorasmith-tiny", "settings": {}}))
    expected(page.get_by_role("link", name="My LoRAs")).to_have_text("My LoRAs1")
    page.goto(served.address + "#/runs")
    expected(page.locator(".run-rows .status")).to_have_text("Training")
    page.goto(served.address)
    expected(page.get_by_role("listitem", name="Learning")).to_contain_text("step 30 of 400")
    page.get_by_role("button", name="Queue").click()
    expected(page.get_by_role("region", name="Queue").get_by_role("listitem")).to_have_count(1)
    expected(page.get_by_text("Measurement")).to_have_count(0)
    page.goto(served.address + "#/runs/runs%2Ffox-001")
    page.wait_for_url(f"**/#/jobs/{job.id}")
    expected(page.locator(".status")).to_have_text("Training")
    page.get_by_role("button", name="Stop and keep").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("What was learnt in 30 steps is kept").wait_for()
    dialog.get_by_role("button", name="Stop and keep").click()
    page.wait_for_url("**/#/runs/*")
    expected(page.locator(".verdict")).to_have_text("Stopped at step 30, kept.")
    expected(page.locator(".status")).to_have_text("Stopped")
    page.goto(served.address + "#/runs")
    expected(page.locator(".run-rows .status")).to_have_text("Stopped")


def test_the_example_is_trained_in_one_click_and_shown_on_the_wall(served: ServedPage, open_page: Opener) -> None:
    page = open_page()
    page.get_by_role("button", name="Try it with the fox").click()
    page.wait_for_url("**/#/jobs/*")
    job = served.taken()
    assert (job.request["preset"], job.request["settings"]["trigger"]) == ("quick", "a fox")
    run = job.train()
    run.show(started(90))
    run.preview(0, 0.0)
    sharpening = page.get_by_text("the next one, being drawn")
    page.locator(".easel-picture").wait_for()
    expected(sharpening).to_have_count(0)
    run.sketch()
    expected(sharpening).to_have_count(1)
    expected(page.locator(".easel img").last).to_have_attribute("src", SKETCH)
    run.preview(30)
    expected(sharpening).to_have_count(0)
    page.goto(served.address)
    tile = page.get_by_role("listitem", name="Learning")
    expected(tile.get_by_role("img", name="Step 30: a photo of foxy in the snow")).to_have_count(1)
    run.preview(60)
    expected(tile.locator(".newest")).to_have_attribute("alt", "Step 60: a photo of foxy in the snow")
    expected(tile).to_contain_text("step 60 of 90")
    assert_legible(page)
    run.finish()
    job.end()
    expected(page.get_by_role("link", name="a fox · built-in model")).to_have_count(1)
    expected(tile).to_have_count(0)


@pytest.mark.slow
def test_a_lost_connection_is_said_and_mended(served: ServedPage, open_page: Opener) -> None:
    served.add_run()
    page = open_page("#/runs")
    page.get_by_role("link", name="fox-001").first.wait_for()
    served.stop()
    lost = page.get_by_text("The connection to the server is lost.")
    lost.wait_for()
    page.get_by_role("link", name="My LoRAs").click()
    page.goto(f"{served.address}#/runs")
    expected(page.get_by_text("lorasmith serve")).to_have_count(1)  # said once, and in full
    expected(page.get_by_text("Waiting for the server…")).to_have_count(1)
    served.start()
    lost.wait_for(state="detached")
    page.get_by_role("link", name="fox-001").first.wait_for()
    page.context.set_offline(True)
    page.get_by_role("link", name="fox-001").first.click()
    lost.wait_for()
    page.context.set_offline(False)
    lost.wait_for(state="detached")
    expected(page.locator(".panel-name")).to_contain_text("fox-001")


@pytest.mark.slow
def test_interrupted_trainings_are_offered_to_continue(served: ServedPage, open_page: Opener) -> None:
    job = served.add_job("interrupted")
    page = open_page()
    waits(page, "was interrupted")
    page.get_by_role("button", name="Queue").click()
    row = page.get_by_role("dialog").get_by_role("listitem").filter(has_text="Interrupted")
    expected(row.get_by_role("button", name="Continue")).to_have_count(1)
    served.add_dataset()
    page.goto(served.address + "#/new/fox/photos")
    page.locator(".tile").first.wait_for()
    offer = page.get_by_role("group", name="Interrupted training")
    expected(offer).to_have_count(0)  # pictures come first
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(served.address + "#/runs")
    waits(page, "was interrupted")
    assert offer.bounding_box()["height"] < 70, "one line on a phone"
    assert_legible(page, "offer")
    offer.get_by_role("button", name="Continue").click()
    page.wait_for_url(f"**/#/jobs/{job.id}")


@pytest.mark.slow
def test_a_run_of_the_command_line_is_shown_live(served: ServedPage, open_page: Opener) -> None:
    run = ScriptedRun(write_record(served.base, "runs/cli-001", [], steps=40))
    run.show(started(40))
    page = open_page("#/runs/runs%2Fcli-001")
    run.show(step_done(1), step_done(2, math.nan))
    waits(page, "of 40 steps")
    expected(page.locator("progress")).to_have_js_property("value", 2)
    run.close()


@pytest.mark.slow
def test_runs_are_compared(served: ServedPage, open_page: Opener) -> None:
    for number in (1, 2):
        record = served.add_run(f"runs/fox-00{number}", rank=8 * number) / "run.json"
        record.write_text(record.read_text().replace('"name": "lorasmith-tiny"', f'"name": "<i>model {number}</i>"'))
    page = open_page("#/runs")
    expected(page.get_by_role("checkbox")).to_have_count(2)
    for box in page.get_by_role("checkbox").all():
        box.check()
    page.get_by_role("button", name="Compare").click()
    prompt = "a photo of foxy in the snow"
    right = page.locator(".easel-picture")
    expected(right).to_have_attribute("alt", f"fox-001: {prompt}")
    expected(page.locator(".easel-left")).to_have_attribute("alt", f"fox-002: {prompt}")
    page.get_by_role("button", name="foxy <b>as</b> a knight, oil painting").click()  # as text
    page.locator(".sides select").first.select_option("Without")
    page.get_by_role("button", name="Show fox-002 on the right").click()
    expected(right).to_have_attribute("alt", "fox-002: foxy <b>as</b> a knight, oil painting")
    expected(page.locator(".easel-left")).to_have_attribute("alt", re.compile("^Without: "))
    page.get_by_role("button", name="For engineers").click()
    page.wait_for_selector(".plot canvas")
    table = page.get_by_role("region", name="Settings that differ, as a table")
    assert table.locator("tbody th").all_inner_texts() == ["rank"]
    assert table.locator("tbody td").all_inner_texts() == ["16", "8"]
    waits(page, "<i>model 1</i>")  # as text


@pytest.mark.slow
def test_a_result_is_copied_and_trained_further(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_run()
    page = open_page("#/runs/runs%2Ffox-001")
    page.get_by_role("button", name="For engineers").click()
    table = page.get_by_role("region", name="Pictures by strength and step")
    assert table.locator("thead th").all_inner_texts() == ["Strength", "Step 20", "Step 40", "Step 60"]
    assert table.locator("tbody th").all_inner_texts() == ["Base model", "0.5", "1", "1.5"]
    assert page.locator(".thumbs .faint").all_inner_texts() == ["Held out."]  # nothing that asks for nothing
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Step 40").click()
    page.get_by_role("button", name="Keep this one").click()
    page.get_by_role("dialog", name="Keep step 40").get_by_role("button", name="Copy to ComfyUI").click()
    name = "fox-step00000040.safetensors"
    waits(page, f"Copied as {name} into the folder models/loras.")
    assert (served.base / "models" / "loras" / name).read_bytes() == (folder / name).read_bytes()
    page.get_by_label("More", exact=True).click()
    page.get_by_role("button", name="Train it further").click()
    page.get_by_label("More steps").fill("15")
    page.get_by_role("button", name="Train 15 more steps").click()
    page.wait_for_url("**/#/jobs/*")
    request = served.taken().request
    assert request["settings"]["steps"] == 75
    assert request["settings"]["existing_state"] == str(folder.resolve() / "states" / "step-000060.safetensors")


def draw_on(served: ServedPage, folder: Path) -> None:
    """Draw the two pictures of the next job."""
    job = served.taken()
    job.progress(4)
    files = [f"tried/{job.id}-{number}.png" for number in (1, 2)]
    for file in files:
        picture(folder / file, "", (200, 90, 40), edge=64)
    job.end(outputs={"pictures": files, "notes": []})


@pytest.mark.slow
def test_a_lora_is_tried_beside_the_base_model(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_run()
    served.submit()
    training = served.taken()
    page = open_page("#/runs/runs%2Ffox-001")
    prompt, draw = page.get_by_label("Prompt", exact=True), page.get_by_role("button", name="Draw", exact=True)
    expected(prompt).to_have_value("foxy")
    prompt.fill("foxy <i>in</i> snow")
    page.get_by_role("button", name="How it is drawn").click()
    page.get_by_label("Exact strength").fill("3")
    waits(page, "Must be a number from 0 to 2.")
    expected(draw).to_have_attribute("aria-disabled", "true")
    page.get_by_label("Exact strength").fill("0.8")
    page.get_by_label("Seed", exact=True).fill("7")
    expected(page.get_by_role("button", name="Random seed")).to_have_attribute("aria-pressed", "false")
    expected(page.get_by_label("LoRA", exact=True)).to_have_value("fox.safetensors")
    page.get_by_label("LoRA", exact=True).select_option("Step 40")
    page.get_by_label("Draw other strengths too").uncheck()
    draw.click()
    waits(page, "It waits for its turn.")
    other = open_page("#/runs/runs%2Ffox-001")  # every page has it
    expected(other.get_by_text("It waits for its turn.")).to_have_count(1)
    page.get_by_role("button", name="Cancel").click()
    expected(page.get_by_role("region", name="You drew")).to_have_count(0)
    prompt.press("Enter")
    waits(page, "It waits for its turn.")
    training.end()
    draw_on(served, folder)
    tiles = page.get_by_role("region", name="You drew").get_by_role("button")
    expected(tiles).to_have_count(1)
    expected(page.locator(".easel-picture")).to_have_attribute("alt", "Step 40, strength 0.8: foxy <i>in</i> snow")
    page.get_by_role("button", name="Random seed").click()
    draw.click()
    draw_on(served, folder)
    expected(tiles).to_have_count(2)
    for one in (page, other):
        one.reload()
        expected(one.get_by_role("region", name="You drew").get_by_role("button")).to_have_count(2)
    tiles.last.click()
    expected(tiles.last).to_have_attribute("aria-pressed", "true")
    first, second = served.of("draw_request")[0], served.of("draw_request")[-1]
    assert first == {
        "id": "runs/fox-001",
        "prompt": "foxy <i>in</i> snow",
        "strength": 0.8,
        "seed": 7,
        "control": "",
        "lora": "fox-step00000040.safetensors",
        "strengths": [],
    }
    assert second["seed"] != 7


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_run_is_evaluated(served: ServedPage, open_page: Opener, scheme: str, width: int) -> None:
    folder = served.add_run()
    served.made_up["evaluation_request"] = lambda id, **_: {"run": id}  # it needs a package more
    page = open_page("#/runs/runs%2Ffox-001", scheme=scheme, width=width)
    if width < 500:
        pull_up(page)
    asked = page.get_by_role("group", name="Evaluation")
    expected(asked.locator(".effort")).to_have_text(re.compile(r"^It draws \d+ pictures, in (about|a few|less) .+\.$"))
    asked.get_by_role("button", name="Which step is best?").click()
    job = served.taken()
    job.progress(4)
    page.get_by_role("group", name="Evaluation").get_by_role("progressbar").wait_for()
    evaluated = write_evaluation(folder)
    job.end()
    expected(page.locator(".verdict")).to_have_text("It learnt your photos.")
    expected(page.locator(".reason")).to_have_text("Step 40 looks most like them and still follows prompts.")
    expected(page.locator(".easel-picture")).to_have_attribute("alt", "Step 40: foxy")
    page.get_by_role("region", name="Drawn for you").get_by_role("button", name="foxy, <b>on</b> a beach").click()
    best = page.get_by_role("button", name="Step 40, recommended")
    expected(best).to_have_attribute("aria-pressed", "true")
    best.press("ArrowDown")
    expected(page.locator(".easel-picture")).to_have_attribute("alt", "Step 60: foxy, <b>on</b> a beach")  # as text
    page.get_by_role("button", name="For engineers").click()
    waits(page, evaluated["sentence"])
    expected(page.get_by_role("button", name="Evaluate again")).to_be_visible()
    assert_legible(page, "drawer")


@pytest.mark.slow
def test_what_a_run_is_drawn_for_is_found_again_and_asked_where_nothing_says_it(
    served: ServedPage, open_page: Opener
) -> None:
    served.add_run(trigger="", captions=("one", "two", "three", "four"))
    served.made_up["evaluation_request"] = lambda id, **_: {"run": id}  # it needs a package more
    page = open_page("#/runs/runs%2Ffox-001")
    evaluation, drawn = page.get_by_role("group", name="Evaluation"), page.get_by_role("region", name="You drew")
    expected(evaluation.get_by_role("button", name="Which step is best?")).to_be_disabled()
    evaluation.get_by_label("What should I draw?").fill(" a fox ")
    evaluation.get_by_role("button", name="Which step is best?").click()
    evaluation.get_by_role("button", name="Cancel").wait_for()
    page.get_by_role("button", name="How it is drawn").click()
    page.get_by_label("Prompt", exact=True).fill("a fox")
    page.get_by_role("button", name="Draw it at every step").click()
    drawn.get_by_role("button", name="Cancel").wait_for()
    assert served.of("evaluation_request")[0]["subject"] == served.of("grid_request")[0]["subject"] == "a fox"
    page.reload()
    job, begun = served.taken(), time.monotonic()
    evaluation.get_by_role("progressbar").wait_for()

    def heard() -> bool:
        done = 4 + int(time.monotonic() - begun)
        job.notice("progress", {"value": done, "maximum": 400, "pictures": 40})
        return bool(re.search(r"\d+ of 40 pictures · About \d+ (seconds|minutes) left", evaluation.inner_text()))

    until(heard)
    expected(drawn.get_by_text("It waits for its turn.")).to_have_count(1)
    expected(evaluation.locator(".effort")).to_have_text(re.compile("^It draws"))  # while it is drawn, too
    queue = page.context.new_page()
    queue.goto(served.address)
    queue.get_by_role("button", name="Queue").click()
    row = queue.get_by_role("region", name="Queue").get_by_role("listitem").filter(has_text="Evaluation")
    expected(row.get_by_role("link", name="fox-001")).to_have_attribute("href", "#/runs/runs%2Ffox-001")
    queue.close()
    evaluation.get_by_role("button", name="Cancel").click()
    evaluation.get_by_role("button", name="Which step is best?").wait_for()
    drawn.get_by_role("button", name="Cancel").click()
    expected(drawn).to_have_count(0)


@pytest.mark.slow
def test_an_edit_model_is_tried_on_a_picture(served: ServedPage, open_page: Opener, photos: Path) -> None:
    folder = served.add_run()
    served.made_up["drawing_facts"] = {"control": "required", "least_strength": 0.0, "strengths": [1.0]}  # of another
    served.made_up["draw_request"] = lambda id, **given: {"run": id, "text": given["prompt"], **given}
    page = open_page("#/runs/runs%2Ffox-001", scheme="dark", width=390)
    waits(page, "choose one first")
    page.get_by_label("Prompt", exact=True).fill("as a sketch")
    draw = page.get_by_role("button", name="Draw", exact=True)
    draw.click(force=True)
    assert served.of("draw_request") == []
    choose_files(page.get_by_role("button", name="Choose a picture"), photos / "dog 0.jpg")
    page.get_by_role("img", name="Picture to edit").wait_for()
    served.made_up["keep_control"] = RefusedError("DataError", "the picture is damaged; choose another one")
    draw.click()
    waits(page, "The picture is damaged; choose another one.")
    del served.made_up["keep_control"]
    draw.click()
    draw_on(served, folder)
    expected(page.locator(".easel-picture")).to_have_attribute("alt", re.compile(": as a sketch$"))
    page.get_by_label("On the left").select_option("Before")
    expected(page.locator(".easel-left")).to_have_attribute("alt", "Before: as a sketch")
    assert (folder / "tried" / served.of("draw_request")[0]["control"]).is_file()
    assert_legible(page)


@pytest.mark.slow
def test_dialogs_hold_the_focus_and_give_it_back(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page("#/new/fox/photos")
    page.get_by_role("button", name="Find and replace in captions").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    for _ in range(12):
        page.keyboard.press("Tab")
        # The body is where the browser's own controls are between the last and the first of the dialog.
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    expected(page.get_by_role("button", name="Find and replace in captions")).to_be_focused()


@pytest.mark.slow
def test_everything_is_reached_by_keyboard_with_a_visible_focus(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset("fox", 2)
    page = open_page("#/new/fox/photos")
    page.wait_for_selector("textarea")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            continue  # between the last and the first
        name, outline = page.evaluate(
            "[document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || "
            "document.activeElement.labels?.[0]?.innerText, getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.add((name or "").split("\n")[-1])
        assert outline != "none", name
    wanted = {
        "Skip to the content",
        "My LoRAs",
        "Name of the LoRA",
        "Add photos",
        "Add a folder",
        "Size of the pictures",
        "fox_1.png, a red fox, picture 0",
        "What will you call it in prompts?",
        "Caption of fox_1.png",
        "Choose a model",
    }
    assert wanted <= reached


@pytest.mark.slow
def test_runs_are_told_apart_named_starred_deleted_and_brought_back(served: ServedPage, open_page: Opener) -> None:
    for number in (1, 2):
        served.add_run(f"runs/fox-00{number}")
    job = served.add_job("paused", run="runs/fox-001")
    page = open_page("#/runs")
    row = page.get_by_role("listitem", name="fox-001")
    expected(row.locator(".status")).to_have_text("Paused")  # that of its job, which is no row of its own
    expected(page.get_by_role("heading", name="Queue")).to_have_count(0)
    row.get_by_role("button", name="Star").click()
    expected(row.get_by_role("button", name="Star")).to_have_attribute("aria-pressed", "true")
    expected(page.locator(".run-rows b").first).to_have_text("fox-001")  # above the newer one
    row.get_by_role("button", name="Continue").click()
    expected(page.locator(".status").first).not_to_have_text("Paused")
    assert served.taken().id == job.id

    page.get_by_role("link", name="fox-002", exact=True).click()
    page.get_by_label("More", exact=True).click()
    page.get_by_role("button", name="Name and note").click()
    page.get_by_label("Name (optional)").fill("the good one")
    page.get_by_label("Note (optional)").fill("for mum")
    page.get_by_role("button", name="Store").click()
    expected(page.locator(".panel-name")).to_contain_text("the good one")
    assert_legible(page, "run with a note")
    page.get_by_role("button", name="Delete").click()
    page.wait_for_url("**/#/runs")
    expected(page.locator(".run-rows li")).to_have_count(1)
    page.get_by_role("button", name="Undo", exact=True).click()
    page.wait_for_url("**/#/runs/runs%2Ffox-002")
    expected(page.get_by_text("for mum")).to_have_count(1)


@pytest.mark.slow
def test_training_again_keeps_what_was_chosen_as_a_choice(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    quick = recipe_settings(PRESETS["quick"], images=4)
    served.add_run("runs/fox-001", **quick)
    served.add_run("runs/fox-002", **quick, algorithm="LoKr", trigger="")
    page = open_page("#/runs/runs%2Ffox-001")
    page.get_by_role("button", name="Train again with changes").click()
    page.wait_for_url("**/settings")
    expected(page.locator("input[name=preset]:checked")).to_have_value("quick")
    expected(page.get_by_text("1 change")).to_have_count(0)
    again = page.locator("p", has=page.get_by_role("link", name="fox-001"))
    expected(again).to_have_text("fox-001 again, with nothing changed yet.")
    page.get_by_role("radio", name="Thorough").check(force=True)
    expected(again).to_contain_text("Rank 32 (8 before)")
    page.goto(served.address + "#/runs/runs%2Ffox-002")
    page.get_by_role("button", name="Train again with changes").click()
    page.wait_for_url("**/settings")
    expected(page.locator("input[name=preset]:checked")).to_have_value("quick")
    expected(page.locator(".all-settings > details > summary .tag")).to_have_text("1 change")
    expected(page.get_by_text("fox-002 again, with nothing changed yet.")).to_have_count(1)
