"""Photos and captions in a browser: large, cropped, tagged, captioned, mended, and undone."""

from __future__ import annotations

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


def open_large(page: Any, file: str) -> Any:
    page.get_by_role("button", name=f"Show {file} large").click()
    return page.get_by_role("dialog")


def test_remarks_are_one_card_and_what_mends_them_is_undone(served: ServedPage, open_page: Opener) -> None:
    folder = served.add_dataset("fox", 4)
    (folder / "fox_5.png").write_bytes((folder / "fox_3.png").read_bytes())
    Image.new("RGB", (256, 256), "red").save(folder / "fox_4.png")
    Image.open(PICTURES / "fox_1.png").resize((40, 40)).save(folder / "fox_1.png")
    page = open_page(PHOTOS)
    card = page.locator(".remarks-card")
    expected(card.get_by_role("heading")).to_have_text("4 remarks")
    titles = ["Pictures that show nothing", "Pictures that are far too small", "Missing captions", "Copies"]
    assert card.locator("b").all_inner_texts() == titles
    card.get_by_role("button", name="Show only: Copies").click()
    expected(page.locator(".tile")).to_have_count(1)
    page.get_by_role("button", name="Show all").click()
    expected(page.locator(".tile")).to_have_count(5)

    card.get_by_role("button", name="Fix all: leave out 2 photos").click()
    page.get_by_text("2 photos were moved to the removed files: pictures that show nothing (1), copies (1).").wait_for()
    assert served.photos() == ["fox_1.png", "fox_2.png", "fox_3.png"]  # not the small one
    assert_legible(page)
    page.get_by_role("button", name="Undo", exact=True).click()
    expected(page.locator(".tile")).to_have_count(5)
    assert len(served.photos()) == 5
    card.get_by_role("button", name="Leave out: Pictures that are far too small").press("Enter")
    expected(page.locator(".tile")).to_have_count(4)
    page.get_by_text("fox_2.png").first.click()
    page.keyboard.press("Control+z")
    expected(page.locator(".tile")).to_have_count(5)


def test_what_is_not_added_is_named_with_its_reason(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    for name in (".DS_Store", "a.jxl", "b.jxl", "fox_2.txt", "nobody.txt"):
        (folder / name).write_text("a fox on a tree")
    page = open_page()
    page.locator("input[webkitdirectory]").set_input_files(folder)
    page.get_by_text("no pictures among these files: a.jxl is a JXL file, which is not read here").wait_for()
    accepted = page.locator("input[type=file]").first.get_attribute("accept").split(",")
    assert {"image/*", ".jpg", ".heic", ".txt"} <= set(accepted) and ".jxl" not in accepted

    served.add_dataset("fox", 2)
    page.goto(f"{served.address}{PHOTOS}")
    page.get_by_label("Caption of fox_1.png").wait_for()
    page.locator("input[webkitdirectory]").set_input_files(folder)
    listed = page.locator(".notice .file-list li")
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
def test_a_mask_that_is_dropped_finds_its_photo(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    served.add_dataset("fox", 2)
    page = open_page(PHOTOS)
    page.get_by_label("Caption of fox_1.png").wait_for()
    mask = tmp_path / "fox_1.mask.png"
    Image.new("L", (8, 8)).save(mask)
    page.locator("input[type=file]").first.set_input_files(mask)
    expected(page.get_by_text("Mask: fox_1.mask.png (used with “masks: files” in the settings)")).to_have_count(1)
    expected(page.get_by_text("Waiting…")).to_have_count(0)
    expected(page.locator(".tile")).to_have_count(2)


def test_a_long_check_says_how_far_it_is(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset("fox", 2)
    page = open_page(PHOTOS)
    page.get_by_text("remark").first.wait_for()
    for name, done, shown in (("fox", 1200, 1), ("other", 9000, 1), ("fox", 10_000, 0)):
        notice = Notice(kind="check", data={"name": name, "done": done, "total": 10_000})
        served.do(lambda: served.context.hub.publish(notice))  # noqa: B023 - called at once
        expected(page.get_by_text("Checking photos: 1,200 of 10,000…")).to_have_count(shown)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_photo_is_large_beside_its_caption(served: ServedPage, open_page: Opener, scheme: str, width: int) -> None:
    served.add_dataset()
    page = open_page(PHOTOS, scheme=scheme, width=width)
    dialog = open_large(page, "fox_1.png")
    dialog.get_by_text("1 of 4").wait_for()
    assert_legible(page, "large")
    words = dialog.get_by_label("Caption of fox_1.png")
    words.fill("a fox")
    words.press("PageDown")  # it goes on writing in the next one
    words = dialog.get_by_label("Caption of fox_2.png")
    expected(words).to_be_focused()
    expected(dialog.get_by_text("2 of 4")).to_have_count(1)
    page.keyboard.insert_text("b" * 30_000)  # nothing is cut

    assert len(words.input_value()) == 30_000
    words.fill("another fox, asleep")
    words.blur()
    expected(dialog.get_by_label("Tags of fox_2.png").locator("li")).to_have_count(2)
    page.keyboard.press("ArrowLeft")
    expected(dialog.get_by_text("1 of 4")).to_have_count(1)
    until(lambda: served.captions()[:2] == ["a fox", "another fox, asleep"])
    dialog.get_by_role("button", name="Undo the last change").click()
    expected(page.get_by_text("Undone: The caption of fox_2.png was changed.")).to_have_count(1)
    assert served.captions()[:2] == ["a fox", ""]

    dialog.get_by_role("button", name="Leave out").click()
    expected(dialog.get_by_text("1 of 3")).to_have_count(1)
    dialog.get_by_role("button", name="Undo the last change").click()
    expected(dialog.get_by_text("2 of 4")).to_have_count(1)
    page.keyboard.press("Escape")
    expected(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_photo_is_cropped_by_keys_and_by_the_pointer(served: ServedPage, open_page: Opener, width: int) -> None:
    served.add_dataset()
    page = open_page(PHOTOS, width=width)
    dialog = open_large(page, "fox_1.png")
    dialog.get_by_role("button", name="Crop").click()
    corner = dialog.get_by_role("button", name="Corner bottom right")
    corner.focus()
    for _ in range(5):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert_legible(page, "cropper")
    dialog.locator(".cropper").get_by_role("button", name="Crop").click()
    dialog.get_by_text("· cropped").wait_for()
    part = crop_of(served)
    assert part is not None and (part.x, part.y) == (0, 0)
    assert part.width == pytest.approx(0.75) and part.height == pytest.approx(0.99, abs=0.004)  # whole pixels

    dialog.get_by_role("button", name="Crop").click()  # from the frame that there is
    assert dialog.locator(".cropper img").get_attribute("src").endswith("original=true")
    page.wait_for_function("document.querySelector('.cropper img').naturalWidth > 0")
    image, handle = dialog.locator(".cropper img").bounding_box(), dialog.get_by_role("button", name="Corner top left")
    box = handle.bounding_box()
    start = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + 0.25 * image["width"], start[1] + 0.5 * image["height"], steps=4)
    page.mouse.up()
    dialog.locator(".cropper").get_by_role("button", name="Crop").click()
    expected(dialog.locator(".cropper")).to_have_count(0)
    part = crop_of(served)
    assert part is not None
    assert part.x == pytest.approx(0.25, abs=0.02) and part.width == pytest.approx(0.5, abs=0.02)
    assert part.y == pytest.approx(0.5, abs=0.02) and part.height == pytest.approx(0.49, abs=0.02)

    dialog.get_by_role("button", name="Crop").click()
    dialog.get_by_label("Shape").select_option("square")
    dialog.locator(".cropper").get_by_role("button", name="Crop").click()
    expected(dialog.locator(".cropper")).to_have_count(0)
    part = crop_of(served)
    assert part is not None and part.width == pytest.approx(part.height, abs=0.01)  # the photo is square
    for _ in range(3):
        with page.expect_response(lambda answer: answer.url.endswith("/crop")):
            dialog.get_by_role("button", name="Undo the last change").click()
        page.get_by_text("Undone: fox_1.png was cropped.").wait_for()
    assert crop_of(served) is None


@pytest.mark.slow
def test_tags_are_chips_of_one_caption_and_of_all(served: ServedPage, open_page: Opener) -> None:
    served.add_dataset()
    page = open_page(PHOTOS)
    dialog = open_large(page, "fox_1.png")
    assert dialog.get_by_label("Tags of fox_1.png").locator("li span").all_inner_texts() == ["a red fox", "picture 0"]
    dialog.get_by_label("Add a tag").fill("snow")
    dialog.get_by_label("Add a tag").press("Enter")
    expected(dialog.get_by_label("Caption of fox_1.png")).to_have_value("a red fox, picture 0, snow")
    dialog.get_by_role("button", name="Remove the tag picture 0").click()
    expected(dialog.get_by_label("Caption of fox_1.png")).to_have_value("a red fox, snow")
    page.keyboard.press("Escape")

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
    page.get_by_role("button", name="Undo", exact=True).click()
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
    page.get_by_role("button", name="Undo", exact=True).click()
    expected(page.locator(".tile")).to_have_count(2)
    until(lambda: served.photos() == ["fox_1.png", "fox_2.png"])

    page.get_by_role("button", name="Remove all").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove all").click()
    page.get_by_text("The photos were moved to").wait_for()
    assert not (served.base / "input" / "fox").exists()
    page.get_by_role("button", name="Undo", exact=True).click()
    expected(page.locator(".tile")).to_have_count(2)
