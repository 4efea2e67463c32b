"""Take the pictures of the page in docs/images: the real server, a training of the built-in model, Chromium.

    python -m tools.page_pictures [--all FOLDER]

It needs Playwright and Chromium, and trains for some minutes. With `--all`, pictures of every view, light, dark and as
on a phone, are put into a folder to be looked at.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
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
_PHONE = {"width": 390, "height": 860}


class _Camera:
    """Takes pictures of views.

    Args:
        folder: for pictures of every view; None to take none but those of the documents.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @property
    def wants_all(self) -> bool:
        return self._folder is not None

    def every_look(self, name: str, page: Any) -> None:
        """A view in both colour schemes and on a phone, whole."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for look, scheme, width in (
            ("light", "light", _SIZE["width"]),
            ("dark", "dark", _SIZE["width"]),
            ("phone", "dark", 390),
        ):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 860})
            page.wait_for_timeout(400)
            page.screenshot(path=str(self._folder / f"{name}-{look}.png"), full_page=True)
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
    camera.every_look("1-home", page)
    drop(page, sorted((BUILT_IN_BASE / "input" / "fox").glob("fox_*")))
    page.wait_for_url("**/photos")
    page.get_by_role("radio", name="Pet").check(force=True)
    page.get_by_label("What will you call it in prompts?").fill("sks fox")
    page.locator(".tile .crop, .sheet-head .chip.fair").first.wait_for()
    page.wait_for_timeout(2500)
    camera.document("serve-photos", page, scheme="light", height=860)
    camera.every_look("2-photos", page)
    page.get_by_role("button", name="Choose a model").click()
    page.wait_for_selector("input[name=model]:checked")
    camera.document("serve-model", page, scheme="light", height=1000)
    camera.every_look("3-model", page)
    page.get_by_role("button", name="Next: settings").click()
    if camera.wants_all:
        page.get_by_text("Takes about").wait_for()  # measured
    camera.every_look("4-settings", page)
    page.get_by_text("All settings").first.click()
    for label, value in (("Steps", str(_STEPS)), ("Previews", "sks fox|sks fox, on a blue background")):
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Tab")
    camera.every_look("4-all-settings", page)
    page.get_by_role("button", name="Start training").click()
    page.locator(".easel img").first.wait_for()
    camera.every_look("5-base", page)
    page.locator(".easel-left").wait_for()
    while page.locator("progress").first.evaluate("bar => bar.value") < 0.62 * _STEPS:
        time.sleep(0.5)
    camera.document("serve-training", page, scheme="dark", height=860)
    camera.every_look("5-training", page)
    page.wait_for_url("**/#/runs/*")
    page.get_by_role("button", name="Keep this one").wait_for()
    page.locator(".easel-left").wait_for()
    page.wait_for_timeout(1000)
    camera.document("serve-result", page, scheme="light", height=860)
    if camera.wants_all:
        page.locator(".chip", has_text="noto style").click()
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_role("region", name="You drew").locator(".scene-tile").first.wait_for()
    camera.every_look("6-result", page)
    page.get_by_role("button", name="For engineers").click()
    page.wait_for_selector(".plot canvas")
    camera.every_look("6-details", page)
    page.goto(f"{page.url.split('#')[0]}#/runs")
    page.wait_for_selector(".run-rows li")
    camera.every_look("7-runs", page)
    if camera.wants_all:
        _sweep(page, f"{address}#/new/fox-2/settings", camera)


def _sweep(page: Any, settings: str, camera: _Camera) -> None:
    """Try two values, by keyboard."""
    page.goto(settings)
    page.get_by_text("All settings").first.click()
    page.locator("summary", has_text="Validation and previews").click()
    for label, value in (("Steps", "2"), ("Validation share", "0.34")):
        page.get_by_role("textbox", name=label).first.fill(value)
        page.get_by_role("textbox", name=label).first.press("Tab")
    page.get_by_text("All settings").first.click()
    page.locator("summary", has_text="Try several values").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Values").first.focus()
    page.keyboard.type("4, 8")
    camera.every_look("8-several-values", page)
    page.get_by_role("button", name="Train 2 runs").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/#/sweeps/*")
    page.wait_for_selector("table.sweep")
    camera.every_look("9-sweep-running", page)
    page.locator("table.sweep").get_by_text("Finished").nth(1).wait_for()
    camera.every_look("9-sweep", page)
    page.goto(f"{page.url.split('#')[0]}#/runs")
    page.locator(".row", has_text="2 runs").wait_for()
    camera.every_look("9-sweeps", page)


if __name__ == "__main__":
    main()
