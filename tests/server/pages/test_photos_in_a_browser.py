"""Photos and captions in a browser: large, cropped, tagged, captioned, mended, and undone."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.server.datasets.dataset_answers import dataset
from lorasmith.server.datasets.dataset_shapes import Crop
from lorasmith.server.hub import Notice
from tests.server.pages.conftest import assert_legible, expected, until
from tests.server.pages.served_page import PICTURES, ServedPage

Opener = Callable[..., Any]
PHOTOS = "#/new/fox/photos"


def crop_of(served: ServedPage) -> Crop | None:
    """The crop of the first photo."""
    return dataset(served.folders, "fox").images[0].crop


def choose(page: Any, file: str) -> Any:
    """The tile of a photo, which is chosen."""
    tile = page.locator(f'.tile[data-file="{file}"]')
    tile.click(position={"x": 8, "y": 8})
    expected(tile).to_have_attribute("aria-selected", "true")
    return tile


def test_remarks_are_chips_and_what_mends_them_is_undone(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_dataset("fox", 4)
    (folder / "fox_5.png").write_bytes((folder / "fox_3.png").read_bytes())
    Image.new("RGB", (256, 256), "red").save(folder / "fox_4.png")
    Image.open(PICTURES / "fox_1.png").resize((40, 40)).save(folder / "fox_1.png")
    page = open_page(PHOTOS)
    chips = page.locator(".sheet-head .chip.fair")
    expected(chips).to_have_text(["1 empty", "1 tiny", "2 without words", "1 twice"])
    assert {one["model"] for one in served.of("check_dataset")} == {"lorasmith-tiny"}  # that is suggested
    page.get_by_role("button", name="1 twice").click()
    expected(page.locator(".tile")).to_have_count(1)
    page.get_by_role("button", name="1 tiny").click()
    page.get_by_text("fox_1.png is tiny and will look blurred.").wait_for()
    assert_legible(page)

    page.get_by_role("button", name="Fix all: leave out 2 photos").click()
    page.get_by_text("2 photos left out: 1 empty, 1 twice.").wait_for()
    assert served.photos() == ["fox_1.png", "fox_2.png", "fox_3.png"]  # not the small one
    expected(page.locator(".tile.pale")).to_have_count(2)  # in their places
    page.locator(".toast").get_by_role("button", name="Undo", exact=True).click()
    expected(page.locator(".tile.pale")).to_have_count(0)
    expected(page.locator(".tile")).to_have_count(5)
    assert len(served.photos()) == 5
    page.get_by_role("button", name="1 tiny").press("Enter")
    page.get_by_role("button", name="Leave out 1").press("Enter")
    until(lambda: len(served.photos()) == 4)
    expected(page.locator(".tile.pale")).to_have_count(1)
    page.keyboard.press("Control+z")
    expected(page.locator(".tile.pale")).to_have_count(0)


def test_keys_alone_go_through_the_sheet_and_mask_a_photo(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_dataset()
    page = open_page(PHOTOS, scheme="dark")
    choose(page, "fox_1.png")
    for key in ("ArrowRight", "ArrowRight", "x"):
        page.keyboard.press(key)
    pale = page.locator('.tile.pale[data-file="fox_3.png"]')
    expected(pale).to_be_focused()
    assert served.photos() == ["fox_1.png", "fox_2.png", "fox_4.png"]
    page.keyboard.press("x")  # brings it back
    expected(pale).to_have_count(0)
    expected(page.locator('.tile[data-file="fox_3.png"]')).to_have_count(1)
    assert len(served.photos()) == 4
    page.keyboard.press("Enter")
    page.get_by_text("3 of 4", exact=True).wait_for()
    page.keyboard.press("c")
    page.get_by_role("button", name="Corner top left").focus()
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    brush = page.get_by_role("application")
    expected(brush).to_be_focused()
    page.wait_for_function("document.querySelector('.masker canvas').width === 256")
    for key in ("]", "Space", "ArrowLeft", "Shift+ArrowDown", "Space"):
        page.keyboard.press(key)
    assert_legible(page, "mask")
    page.get_by_role("button", name="Keep the mask").press("Enter")
    page.get_by_text("fox_3 has a mask now.").wait_for()
    mask = Image.open(folder / "fox_3.mask.png").convert("L")
    assert (mask.getpixel((128, 128)), mask.getpixel((8, 8))) == (255, 0)
    until(lambda: served.draft("fox").get("settings") == {"masks": "files"})  # it is used
    expected(page.locator(".stage .mask-shade")).to_have_count(1)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Remove the mask").click()
    page.get_by_text("The mask of fox_3.png was removed.").wait_for()
    assert not (folder / "fox_3.mask.png").exists()
    page.keyboard.press("Control+z")
    until((folder / "fox_3.mask.png").exists)


def test_an_archive_is_opened_as_its_folder(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    archive = tmp_path / "My foxes.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as written:
        written.write(PICTURES / "fox_1.png", "foxes/fox_1.png", zipfile.ZIP_STORED)
        written.write(PICTURES / "fox_2.png", "foxes/fox_2.png")
        written.writestr("foxes/fox_2.txt", "a fox on a tree")
        written.writestr("__MACOSX/foxes/._fox_2.png", b"x")
        written.writestr("foxes/inner.zip", b"x")
    page = open_page()
    page.get_by_role("button", name="Try it with the fox").wait_for()
    page.locator("input[type=file]").first.set_input_files(archive)
    page.get_by_label("Caption of fox_1.png").wait_for()
    assert page.url.endswith("#/new/my-foxes/photos")
    until(lambda: served.photos("my-foxes") == ["fox_1.png", "fox_2.png"])
    assert "a fox on a tree" in served.captions("my-foxes")

    archive.write_bytes(archive.read_bytes()[:-30])
    page.locator("input[type=file]").first.set_input_files([archive, PICTURES / "fox_3.png"])
    page.get_by_role("button", name="1 file not added").click()
    page.get_by_text("My foxes.zip cannot be unpacked; pack it again.").wait_for()
    until(lambda: len(served.photos("my-foxes")) == 3)


def test_what_is_not_added_is_named_with_its_reason(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    for name in (".DS_Store", "a.jxl", "b.jxl", "fox_2.txt", "nobody.txt"):
        (folder / name).write_text("a fox on a tree")
    page = open_page()
    page.get_by_role("button", name="Try it with the fox").wait_for()
    page.locator("input[webkitdirectory]").set_input_files(folder)
    page.get_by_text("no pictures among these files: a.jxl is a JXL file, which is not read here").wait_for()
    accepted = page.locator("input[type=file]").first.get_attribute("accept").split(",")
    assert {"image/*", ".jpg", ".heic", ".txt"} <= set(accepted) and ".jxl" not in accepted

    served.add_dataset("fox", 2)
    page.goto(f"{served.address}{PHOTOS}")
    page.get_by_label("Caption of fox_1.png").wait_for()
    page.locator("input[webkitdirectory]").set_input_files(folder)
    page.get_by_role("button", name="3 files not added").click()
    listed = page.locator(".remark .file-list li")
    expected(listed).to_have_count(2)
    assert sorted(listed.all_inner_texts()) == [
        "a.jxl is a JXL file, which is not read here; convert it to PNG or JPEG. Also b.jxl.",
        "nobody.txt has no picture of the same name; add that too.",
    ]
    assert served.captions()[1] == "a fox on a tree"  # of a picture that was there
    assert_legible(page)
    page.get_by_role("button", name="Close the list of files that were not added").click()
    expected(listed).to_have_count(0)


@pytest.mark.slow
def test_what_it_is_sets_what_is_trained(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page(PHOTOS)

    def becomes(kind: str, **draft: Any) -> None:
        page.get_by_role("radio", name=kind).check(force=True)
        until(lambda: {name: served.draft("fox").get(name) for name in draft} == draft)

    becomes("Style", what="style", teaches="style", pairs=False, settings={"caption_dropout": 0.1})
    becomes("Slider", what="slider", teaches="", pairs=True, settings={"pairs": "slider"})
    becomes("Before / after", what="edit", teaches="", pairs=True, settings={})
    page.get_by_label("They are worse and better ones").check()
    until(lambda: served.draft("fox")["settings"] == {"pairs": "dpo"})
    becomes("Pet", what="pet", teaches="subject", pairs=False, settings={})
    page.get_by_label("What will you call it in prompts?").fill("milo cat")
    page.get_by_label("Keep others of “cat” as they were").check()
    kept = {"preserve": "class", "preserve_class": "cat"}
    until(lambda: served.draft("fox")["settings"] == kept)
    page.get_by_label("What will you call it in prompts?").fill("milo tomcat")
    until(lambda: served.draft("fox")["settings"] == {**kept, "preserve_class": "tomcat"})
    assert_legible(page)
    becomes("Style", settings={"caption_dropout": 0.1})
    page.goto(served.address + "#/new/fox/model")
    page.get_by_role("button", name="Next: settings").click()
    page.get_by_text("All settings").click()
    page.get_by_role("searchbox").fill("dropout")
    dropout = page.get_by_label(re.compile("^Caption dropout"))
    expected(dropout).to_have_value("0.1")
    expected(page.locator(".all-settings > details > summary .tag")).to_have_count(0)  # nobody changed it
    dropout.fill("0.3")
    dropout.blur()
    expected(page.locator(".all-settings > details > summary .tag")).to_have_text("1 change")


@pytest.mark.slow
def test_a_phone_shows_the_remarks_of_a_long_name_and_asks_for_no_drop(served: ServedPage, open_page: Opener) -> None:
    name = "photos-of-the-old-fox-at-the-end-of-the-garden-behind-our-house"
    folder = served.add_dataset(name, 4)
    (folder / "fox_5.png").write_bytes((folder / "fox_3.png").read_bytes())
    page = open_page(f"#/new/{name}/photos", width=390)
    chip = page.get_by_role("button", name="1 twice")
    chip.wait_for()
    box = chip.bounding_box()
    assert box["x"] + box["width"] <= 390
    for choice in ("photos", "a folder"):  # once each, without the inputs behind them
        expected(page.get_by_role("button", name=re.compile(f"{choice}$", re.IGNORECASE))).to_have_count(1)
    page.locator(".panel-handle").click()
    page.get_by_text("4 different photos: it works with a few").wait_for()
    for view in ("#/photos", "#/new/none/photos", "#/models", ""):
        page.goto(served.address + view)
        page.get_by_role("button", name=re.compile("^Choose")).first.or_(
            page.locator(".button.primary")
        ).first.wait_for()
        expected(page.get_by_text(re.compile(r"\bdrop\b", re.IGNORECASE))).to_have_count(0)


def test_a_new_set_has_a_name_that_says_something(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    page = open_page()
    page.clock.set_fixed_time("2026-05-09T12:00:00")
    for names, wanted in (
        (("IMG_2041", "IMG_2042"), "photos-9-may"),  # the day, where files have names of a camera
        (("IMG_2043", "IMG_2044"), "photos-9-may-2"),
        (("milo_1", "IMG_2 milo", "garden"), "milo"),  # what most share
    ):
        files = [tmp_path / f"{one}.png" for one in names]
        for one in files:
            Image.new("RGB", (64, 64), "red").save(one)
        page.goto(served.address)
        page.locator("input[type=file]").first.set_input_files(files)
        page.wait_for_url(f"**/#/new/{wanted}/photos")
        expected(page.get_by_label("Name of the LoRA")).to_have_attribute("placeholder", wanted)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_message_covers_no_button_that_leads_on(served: ServedPage, open_page: Opener, width: int) -> None:
    served.add_dataset()
    page = open_page(PHOTOS, width=width)
    for on in ("Choose a model", "Next: settings", "Start training"):
        button = page.get_by_role("button", name=on)
        expected(button).to_be_enabled()
        page.evaluate("import('/pages/lib/stores.mjs').then(({ toast }) => toast.set({ text: 'It is done.' }))")
        page.locator(".toast").wait_for()
        above, below = page.locator(".toast").bounding_box(), button.bounding_box()
        assert above["y"] + above["height"] <= below["y"] or above["x"] >= below["x"] + below["width"], on
        button.click()


@pytest.mark.slow
def test_a_mask_that_is_dropped_finds_its_photo(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    served.add_dataset("fox", 2)
    page = open_page(PHOTOS)
    page.get_by_label("Caption of fox_1.png").wait_for()
    mask = tmp_path / "fox_1.mask.png"
    Image.new("L", (8, 8)).save(mask)
    page.locator("input[type=file]").first.set_input_files(mask)
    page.get_by_text("fox_1 has a mask now.").wait_for()
    expected(page.locator('.tile[data-file="fox_1.png"] .mask-shade')).to_have_count(1)
    expected(page.get_by_label("Learn only what the masks leave bright")).to_be_checked()
    expected(page.locator(".tile")).to_have_count(2)
    page.locator(".toast").get_by_role("button", name="Undo", exact=True).click()
    expected(page.locator(".mask-shade")).to_have_count(0)
    other = tmp_path / "fox_1.png"  # another photo of this name gets another one, and keeps its mask
    Image.new("RGB", (64, 64), "blue").save(other)
    page.locator("input[type=file]").first.set_input_files([mask, other])
    expected(page.locator('.tile[data-file="fox_1-2.png"] .mask-shade')).to_have_count(1)
    expected(page.locator(".mask-shade")).to_have_count(1)
    expected(page.locator(".tile")).to_have_count(3)


def test_a_long_check_says_how_far_it_is(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset("fox", 2)
    page = open_page(PHOTOS)
    page.get_by_text("1 without words").wait_for()
    for name, done, shown in (("fox", 1200, 1), ("other", 9000, 1), ("fox", 10_000, 0)):
        notice = Notice(kind="check", data={"name": name, "done": done, "total": 10_000})
        served.do(lambda: served.context.hub.publish(notice))  # noqa: B023 - called at once
        expected(page.get_by_text("Checking photos: 1,200 of 10,000…")).to_have_count(shown)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_photo_is_large_beside_its_words(served: ServedPage, open_page: Opener, scheme: str, width: int) -> None:
    served.add_dataset()
    page = open_page(PHOTOS, scheme=scheme, width=width)
    choose(page, "fox_1.png").press("Enter")
    page.get_by_text("1 of 4", exact=True).wait_for()
    assert_legible(page, "large")
    if width < 500:
        page.get_by_role("button", name="What is it?").click()
    words = page.get_by_label("Caption of fox_1.png")
    words.fill("a fox")
    words.press("PageDown")  # it goes on writing in the next one
    words = page.get_by_label("Caption of fox_2.png")
    expected(words).to_be_focused()
    expected(page.get_by_text("2 of 4", exact=True)).to_have_count(1)
    page.keyboard.insert_text("b" * 30_000)  # nothing is cut
    assert len(words.input_value()) == 30_000
    words.fill("another fox, asleep")
    words.blur()
    page.get_by_text("Tags", exact=True).click()
    expected(page.get_by_label("Tags of fox_2.png").locator("li")).to_have_count(2)
    assert_legible(page, "panel")
    if width < 500:
        page.locator(".panel-handle").click()
    page.get_by_role("button", name="Previous photo").click()
    expected(page.get_by_text("1 of 4", exact=True)).to_have_count(1)
    until(lambda: served.captions()[:2] == ["a fox", "another fox, asleep"])
    page.get_by_role("button", name="Undo the last change").click()
    expected(page.get_by_text("Undone: The caption of fox_2.png was changed.")).to_have_count(1)
    assert served.captions()[:2] == ["a fox", ""]
    page.keyboard.press("x")
    until(lambda: len(served.photos()) == 3)
    page.get_by_role("button", name="Undo the last change").click()
    until(lambda: len(served.photos()) == 4)
    page.keyboard.press("Escape")
    expected(page.locator(".tile")).to_have_count(4)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_photo_is_cropped_by_keys_and_by_the_pointer(served: ServedPage, open_page: Opener, width: int) -> None:
    served.add_dataset()
    page = open_page(PHOTOS, width=width)
    choose(page, "fox_1.png")
    page.keyboard.press("c")
    corner = page.get_by_role("button", name="Corner bottom right")
    corner.focus()
    for _ in range(5):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert_legible(page, "cropper")
    page.locator(".cropper").get_by_role("button", name="Crop").click()
    page.locator(".stage img[src*='v=0.0']").wait_for()
    part = crop_of(served)
    assert part is not None and (part.x, part.y) == (0, 0)
    assert part.width == pytest.approx(0.75) and part.height == pytest.approx(0.99, abs=0.004)  # whole pixels

    page.keyboard.press("c")  # from the frame that there is
    assert page.locator(".cropper img").get_attribute("src").endswith("original=true")
    page.wait_for_function("document.querySelector('.cropper img').naturalWidth > 0")
    image, handle = page.locator(".cropper img").bounding_box(), page.get_by_role("button", name="Corner top left")
    box = handle.bounding_box()
    start = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + 0.25 * image["width"], start[1] + 0.5 * image["height"], steps=4)
    page.mouse.up()
    page.locator(".cropper").get_by_role("button", name="Crop").click()
    page.locator(".stage img[src*='v=0.2']").wait_for()
    part = crop_of(served)
    assert part is not None
    assert part.x == pytest.approx(0.25, abs=0.02) and part.width == pytest.approx(0.5, abs=0.02)
    assert part.y == pytest.approx(0.5, abs=0.02) and part.height == pytest.approx(0.49, abs=0.02)

    page.keyboard.press("c")
    page.get_by_label("Shape").select_option("square")
    page.locator(".cropper").get_by_role("button", name="Crop").click()
    expected(page.locator(".cropper")).to_have_count(0)
    part = crop_of(served)
    assert part is not None and part.width == pytest.approx(part.height, abs=0.01)  # the photo is square
    for _ in range(3):
        with page.expect_response(lambda answer: answer.url.endswith("/crop")):
            page.get_by_role("button", name="Undo the last change").click()
        page.get_by_text("Undone: fox_1.png was cropped.").wait_for()
    assert crop_of(served) is None


@pytest.mark.slow
def test_texts_of_a_caption_in_json_are_fields(served: ServedPage, open_page: Opener) -> None:
    """What is between them stays letter for letter, and its commas are not tags."""
    folder = served.add_dataset("fox", 2)
    caption = '{"high_level_description": "FIRST", "parts": [{"bbox": [0.10, 1.0, 2, 3], "text": "SECOND"}]}'
    written = caption.replace("FIRST", "a fox").replace("SECOND", r"\"Hi\", 1")
    (folder / "fox_1.txt").write_text(written)
    page = open_page(PHOTOS)
    choose(page, "fox_1.png")
    panel = page.locator(".panel-part", has_text="Words for the chosen photo")
    expected(panel.locator(".texts textarea")).to_have_count(2)
    expected(panel.get_by_label("parts 1 text")).to_have_value('"Hi", 1')
    assert panel.get_by_text("Tags", exact=True).count() == 0
    panel.get_by_label("parts 1 text").fill('"Ho", 2')
    panel.get_by_label("high level description").fill("a red fox")
    changed = caption.replace("FIRST", "a red fox").replace("SECOND", r"\"Ho\", 2")
    until(lambda: served.captions()[0] == changed)
    assert_legible(page)
    panel.get_by_role("button", name="Show it as JSON").click()
    expected(panel.get_by_label("Caption of fox_1.png")).to_have_value(changed)


def test_tags_are_chips_of_one_caption_and_of_all(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page(PHOTOS)
    page.get_by_text("Tags", exact=True).click()
    assert page.get_by_label("Tags of fox_1.png").locator("li span").all_inner_texts() == ["a red fox", "picture 0"]
    page.get_by_label("Add a tag").fill("snow")
    page.get_by_label("Add a tag").press("Enter")
    expected(page.get_by_label("Caption of fox_1.png")).to_have_value("a red fox, picture 0, snow")
    page.get_by_role("button", name="Remove the tag picture 0").click()
    expected(page.get_by_label("Caption of fox_1.png")).to_have_value("a red fox, snow")

    choose(page, "fox_2.png")
    page.locator('.tile[data-file="fox_4.png"]').click(modifiers=["Shift"])
    page.get_by_text("3 photos chosen").wait_for()
    page.get_by_label("Words to add to all of them").fill("at night")
    page.get_by_role("button", name="Add", exact=True).click()
    until(
        lambda: (
            served.captions() == ["a red fox, snow", "at night", *(f"a red fox, picture {n}, at night" for n in (2, 3))]
        )
    )
    page.get_by_text("“at night” was added to 3 captions.").wait_for()  # from then on it can be undone
    page.keyboard.press("Control+z")
    until(lambda: served.captions()[1] == "")
    page.locator('.tile[data-file="fox_3.png"]').click(modifiers=["Control"])
    page.get_by_text("2 photos chosen").wait_for()

    page.get_by_text("4 tags in the captions").click()
    page.get_by_role("button", name="a red fox 3").click()
    expected(page.locator(".tile")).to_have_count(3)
    assert_legible(page)
    page.get_by_role("button", name="Add it to the other 1").click()
    expected(page.locator(".tile")).to_have_count(4)
    until(lambda: served.captions()[1] == "a red fox")
    page.get_by_role("button", name="Remove it from 4 captions").click()
    page.get_by_text("“a red fox” was removed from 4 captions.").wait_for()
    assert served.captions() == ["snow", "", "picture 2", "picture 3"]
    for _ in range(2):
        with page.expect_response(lambda answer: answer.url.endswith("/captions")):
            page.get_by_role("button", name="Undo the last change").click()
    assert served.captions() == ["a red fox, snow", "", "a red fox, picture 2", "a red fox, picture 3"]
    page.locator(".tag-list").get_by_role("button", name="snow 1").click()
    expected(page.locator(".tile")).to_have_count(1)
    for _ in range(2):  # the tag is gone then, and all photos are there
        with page.expect_response(lambda answer: answer.url.endswith("/captions")):
            page.get_by_role("button", name="Undo the last change").click()
    expected(page.locator(".tile")).to_have_count(4)


@pytest.mark.slow
def test_a_captioner_is_got_and_writes_what_can_be_undone(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    served.draft("fox", trigger="foxy")
    place = served.base / "models" / "captioners" / "florence-2-base"
    file = {
        "repository": "florence-community/Florence-2-base",
        "file": "config.json",
        "path": str(place / "config.json"),
    }
    served.made_up["download_files"] = {"title": "Florence-2 base", "files": [file]}
    row = {"folder": "models/captioners", "repository": file["repository"], "size_bytes": 2**30, "kept_bytes": 0}
    served.made_up["check_download"] = {
        "title": "Florence-2 base", "files": [{"file": "config.json", **row}], "free_bytes": 10**11
    }  # fmt: skip
    page = open_page(PHOTOS, width=390, scheme="dark")
    page.locator(".panel-handle").click()
    page.get_by_role("button", name="Write captions").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Get it: Florence-2 base").click()
    assert_legible(page, "question")
    assert [one for one in served.processes if "files" in one.first] == []
    page.get_by_role("button", name="Download 1.1 GB").click()
    dialog.get_by_text("Asking the hub", exact=True).wait_for()
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    served.end_download()
    dialog.get_by_role("radio", name="Florence-2 base").wait_for()
    assert_legible(page, "captioners")
    dialog.get_by_role("button", name="Write 1 caption").click()
    job = served.taken()
    assert job.request["captioner"] == str(place) and job.request["photos"] == {"fox_2.png": ""}
    outputs = {"changed": [], "empty": [], "failed": {"odd.png": "makes the captioner fail"}}
    job.end(outputs={**outputs, "written": job.caption("fox_2.png")})
    page.get_by_text("1 caption was written.").wait_for()
    page.get_by_text("odd.png makes the captioner fail.").wait_for()
    assert served.captions()[1] == "foxy, written"
    page.locator(".toast").get_by_role("button", name="Undo", exact=True).click()
    expected(page.get_by_text("3 of 4 with a caption")).to_have_count(1)
    until(lambda: served.captions()[1] == "")

    page.get_by_role("button", name="Write captions").first.click()
    dialog.get_by_label("All 4 photos").check()
    dialog.get_by_role("button", name="Write 4 captions").click()
    job = served.taken()
    first, *others = served.photos()
    written = job.caption(first)
    page.get_by_role("button", name="Stop writing captions").wait_for()
    expected(page.get_by_label("Caption of fox_1.png")).to_have_value("foxy, written")  # as they are written
    assert_legible(page, "captioning")
    page.reload()  # it goes on
    page.get_by_role("button", name="Stop writing captions").wait_for()
    job.end(outputs={**outputs, "failed": {}, "written": written | job.caption(*others)})
    page.get_by_text("4 captions were written.").wait_for()
    assert set(served.captions()) == {"foxy, written"}


@pytest.mark.slow
def test_photos_that_were_added_and_removed_come_and_go(
    served: ServedPage, open_page: Opener, photos: Any, tmp_path: Any
) -> None:
    served.add_dataset("fox", 2)
    page = open_page(PHOTOS)
    page.locator("input[type=file]").first.set_input_files([photos / "dog 0.jpg", photos / "dog 1.jpg"])
    expected(page.locator(".tile")).to_have_count(4)
    page.get_by_text("of 4 with a caption").wait_for()
    page.locator(".toast").get_by_role("button", name="Undo", exact=True).click()
    expected(page.locator(".tile")).to_have_count(2)
    until(lambda: served.photos() == ["fox_1.png", "fox_2.png"])

    page.get_by_role("button", name="Remove all").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove all").click()
    page.get_by_text("The photos were moved to").wait_for()
    assert not (served.base / "input" / "fox").exists()
    page.locator(".toast").get_by_role("button", name="Undo", exact=True).click()
    expected(page.locator(".tile")).to_have_count(2)


@pytest.mark.slow
def test_an_example_is_shown_by_four_whole_pictures(served: ServedPage, open_page: Opener) -> None:
    page = open_page("#/photos")
    tiles = page.locator(".cover", has_text="example")
    expected(tiles).to_have_count(len([one for one in PICTURES.parent.iterdir() if one.is_dir()]))
    for tile in tiles.all():
        pictures = tile.locator("img")
        expected(pictures).to_have_count(4)
        for one in pictures.all():
            one.scroll_into_view_if_needed()
            expected(one).to_have_js_property("complete", True)
            kept = one.evaluate("(img) => img.clientWidth / img.clientHeight / (img.naturalWidth / img.naturalHeight)")
            assert 0.9 < kept < 1.1, "ears are not cut off"


@pytest.mark.slow
def test_times_are_said_in_words(served: ServedPage, open_page: Opener) -> None:
    page = open_page("#/photos")
    said = """async (seconds) => {
        const { duration } = await import(`${location.origin}/pages/lib/words.mjs`);
        return seconds.map((one) => duration(one, { about: true }));
    }"""
    assert page.evaluate(said, [3, 27, 54, 87, 200, 5403, 20_000]) == [
        "a few seconds", "about 30 seconds", "about a minute", "about a minute", "about 3 minutes",
        "about 1 hour 30 min", "about 6 hours",
    ]  # fmt: skip
