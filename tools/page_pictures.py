"""Take the pictures of the page in docs/images: the real server, a training of the built-in model, Chromium.

    python -m tools.page_pictures [--all FOLDER]

It needs Playwright and Chromium, and trains for some minutes. With `--all`, pictures of every view, light and dark, as
on a phone, a laptop and a large screen, are put into a folder to be looked at.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from tools.browsing import drop, opened_browser, served

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 150_000
_PATIENCE_MS = 900_000
_STEPS = 200
_SIZE = {"width": 1280, "height": 860}
_HEIGHTS = {390: 844, 1280: 860, 2560: 1440}
"""Of the windows in which every view is looked at, by their widths."""

_PHONE = 390


class _Camera:
    """Takes pictures of views.

    Args:
        folder: for pictures of every view; None to take none but those of the documents.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def wants_all(self) -> bool:
        return self._folder is not None

    def every_look(self, name: str, page: Any, *, whole: bool = False, widths: Sequence[int] = tuple(_HEIGHTS)) -> None:
        """A view in both colour schemes, as on a phone, a laptop and a large screen; `whole` with what is scrolled to.

        The picture of a width is `NAME-WIDTH-SCHEME.png`.
        """
        if self._folder is None:
            return
        for width in widths:
            page.set_viewport_size({"width": width, "height": _HEIGHTS[width]})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.wait_for_timeout(500)
                page.screenshot(path=str(self._folder / f"{name}-{width}-{scheme}.png"), full_page=whole)
        print(name, flush=True)
        page.set_viewport_size(_SIZE)
        page.emulate_media(color_scheme="light")

    def document(self, name: str, page: Any, *, scheme: str, height: int) -> None:
        """A picture of a view's upper part for the documents, in `IMAGES`."""
        page.emulate_media(color_scheme=scheme)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(600)
        part = {"x": 0, "y": 0, "width": _SIZE["width"], "height": height}  # of the page as its window is, however high
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=part)))
        path = IMAGES / f"{name}.webp"
        picture.convert("RGB").save(path, quality=86, method=6)
        assert path.stat().st_size < MOST_BYTES, f"{path} has {path.stat().st_size} bytes"
        print(path, picture.size, path.stat().st_size, flush=True)
        page.emulate_media(color_scheme="light")


def main() -> None:
    """Walk from photos to a LoRA and take pictures on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="folder for pictures of every view")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder) / "ComfyUI") as server,
        opened_browser() as browser,
    ):
        page = browser.new_page(viewport=_SIZE)
        page.set_default_timeout(_PATIENCE_MS)
        _walk(page, server.address, _Camera(arguments.all))


def _walk(page: Any, address: str, camera: _Camera) -> None:
    page.goto(address)
    page.get_by_text("No photos at hand?").wait_for()
    camera.every_look("first", page, whole=True)
    drop(page, sorted((BUILT_IN_BASE / "input" / "fox").glob("fox_*")))
    page.wait_for_url("**/photos")
    page.get_by_role("radio", name="Pet").check(force=True)
    page.get_by_label("What will you call it in prompts?").fill("sks fox")
    page.locator(".tile .crop, .sheet-head .chip.fair").first.wait_for()
    page.wait_for_timeout(2500)
    camera.document("serve-photos", page, scheme="light", height=860)
    camera.every_look("photos", page)
    if camera.wants_all:
        _photo(page, camera)
    page.get_by_role("button", name="Choose a model").click()
    page.wait_for_selector("input[name=model]:checked")
    camera.document("serve-model", page, scheme="light", height=1000)
    camera.every_look("model", page, whole=True)
    page.get_by_role("button", name="Next: settings").click()
    if camera.wants_all:
        page.get_by_text("Takes about").wait_for()  # measured
    camera.every_look("settings", page)
    page.get_by_text("All settings").first.click()
    for label, value in (("Steps", str(_STEPS)), ("Previews", "sks fox|sks fox, on a blue background")):
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Tab")
    camera.every_look("settings-all", page, whole=True)
    page.get_by_role("button", name="Start training").click()
    page.locator(".easel img").first.wait_for()
    camera.every_look("training-base", page, widths=(_PHONE, _SIZE["width"]))
    page.locator(".easel-left").wait_for()
    while page.locator("progress").first.evaluate("bar => bar.value") < 0.62 * _STEPS:
        time.sleep(0.5)
    camera.document("serve-training", page, scheme="dark", height=860)
    camera.every_look("training", page)
    page.wait_for_url("**/#/runs/*")
    page.get_by_role("button", name="Keep this one").wait_for()
    page.locator(".easel-left").wait_for()
    page.wait_for_timeout(1000)
    camera.document("serve-result", page, scheme="light", height=860)
    if camera.wants_all:
        _room(page, camera)
        _sweep(page, f"{address}#/new/fox-2/settings", camera)
        _beside(page, address, camera)


def _photo(page: Any, camera: _Camera) -> None:
    """One photo large, cropped and masked; and the panel of the sheet on a phone."""
    page.set_viewport_size({"width": _PHONE, "height": _HEIGHTS[_PHONE]})
    handle = page.locator(".panel-handle")
    handle.click()
    camera.every_look("photos-panel", page, widths=[_PHONE])
    page.set_viewport_size({"width": _PHONE, "height": _HEIGHTS[_PHONE]})
    handle.click()
    page.set_viewport_size(_SIZE)
    page.locator(".tile").nth(1).click(position={"x": 8, "y": 8})
    for key, name in (("Enter", "photo"), ("c", "photo-crop"), ("Escape", ""), ("m", "photo-mask"), ("Escape", "")):
        page.keyboard.press(key)
        if name:
            page.wait_for_timeout(500)
            camera.every_look(name, page)
    page.keyboard.press("Escape")


def _room(page: Any, camera: _Camera) -> None:
    """The result, what is kept of it, and what engineers look at."""
    page.locator(".chip", has_text="noto style").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("region", name="You drew").locator(".scene-tile").first.wait_for()
    camera.every_look("room", page)
    page.set_viewport_size({"width": _PHONE, "height": _HEIGHTS[_PHONE]})
    page.locator(".panel-handle").click()
    camera.every_look("room-panel", page, widths=[_PHONE])
    page.get_by_role("button", name="Keep this one").click()
    camera.every_look("keep", page)
    page.get_by_role("button", name="Share a picture").click()
    page.get_by_role("link", name="Save the picture").wait_for()
    page.locator("dialog .loading").wait_for(state="detached")
    camera.every_look("share", page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="For engineers").click()
    page.wait_for_selector(".plot canvas")
    camera.every_look("engineers", page)
    page.keyboard.press("Escape")


def _sweep(page: Any, settings: str, camera: _Camera) -> None:
    """Try two values, by keyboard."""
    page.goto(settings)
    page.get_by_text("All settings").first.click()
    page.locator("summary", has_text="Validation and previews").click()
    for label, value in (("Steps", "60"), ("Validation share", "0.34")):
        page.get_by_role("textbox", name=label).first.fill(value)
        page.get_by_role("textbox", name=label).first.press("Tab")
    page.get_by_text("All settings").first.click()
    page.locator("summary", has_text="Try several values").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Values").first.focus()
    page.keyboard.type("4, 8")
    camera.every_look("settings-values", page)
    page.get_by_role("button", name="Train 2 runs").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/#/sweeps/*")
    page.wait_for_selector("table.sweep")
    camera.every_look("sweep-running", page)
    page.locator("table.sweep").get_by_text("Finished").nth(1).wait_for()
    camera.every_look("sweep", page)


def _beside(page: Any, address: str, camera: _Camera) -> None:
    """The wall with several LoRAs, one of which learns, and all else that is looked up."""
    page.goto(f"{address}#/new/fox/settings")
    page.get_by_role("link", name="Choose a model").click()
    page.get_by_role("button", name="Next: settings").click()
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/jobs/*")
    page.goto(address)
    page.locator(".learning .cover-strip").wait_for()
    camera.every_look("wall", page)
    page.get_by_role("button", name="Queue").click()
    camera.every_look("wall-drawer", page)
    page.keyboard.press("Escape")
    for name, sign in (("runs", ".run-rows li"), ("photos", ".covers li a"), ("models", ".release")):
        page.goto(f"{address}#/{name}")
        page.locator(sign).first.wait_for()
        page.wait_for_timeout(1000)
        camera.every_look(f"all-{name}", page)
    page.goto(f"{address}#/runs")
    page.locator(".run-rows li").first.wait_for()
    page.get_by_role("link", name="Watch").wait_for(state="detached")  # the end of the training
    for box in page.get_by_role("checkbox").all()[-2:]:
        box.check()
    camera.every_look("all-runs-marked", page, widths=(_PHONE, _SIZE["width"]))
    page.get_by_role("button", name="Compare").click()
    page.locator(".easel-left").wait_for()
    page.wait_for_timeout(1000)
    camera.every_look("compare", page)
    for view, name in (
        ("lorasmith/v1/runs/runs%2Fsks-fox-001/report", "report"),
        ("editor/?run=runs/sks-fox-001", "editor"),
    ):
        page.goto(f"{address}{view}")
        page.wait_for_timeout(15_000)
        camera.every_look(name, page)


if __name__ == "__main__":
    main()
