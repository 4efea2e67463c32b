"""How far it is from photos to the first picture and to a LoRA on the page: clicks, typed characters and seconds.

A browser walks the page of a fresh server as somebody does who has never trained. The walk `fox` clicks on the example
of the first open, at once or after `--look` seconds, waits for pictures and keeps the LoRA. The walk `photos` drops the
example pictures, types a trigger, accepts what is suggested, and downloads the LoRA; `--preset quick` is one click
more. The built-in model is trained, as there is no other. The last column is what the processes of the server have
computed since they were started.

    python -m benchmarks.newcomer fox
    python -m benchmarks.newcomer photos
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.results import Results, add_json
from lorasmith.core.folders import BUILT_IN_BASE
from tools.browsing import drop, opened_browser, served

_PATIENCE_MS = 1_800_000


def main() -> None:
    arguments = _arguments()
    results = Results(arguments)
    seconds = {"seconds": ".1f", "since the start": ".1f", "processor seconds": ".1f"}
    results.table({"": "", "drops": "d", "clicks": "d", "characters": "d", **seconds})
    with (
        tempfile.TemporaryDirectory() as folder,
        opened_browser() as browser,
        served(Path(folder) / "base") as server,
    ):
        page = browser.new_page(viewport={"width": 1200, "height": 844})
        page.set_default_timeout(_PATIENCE_MS)
        hand = _Hand(page, results, server.pid)
        page.goto(server.address)
        {"fox": _fox, "photos": _photos}[arguments.walk](hand, page, arguments)


class _Hand:
    """Acts on the page, counts, and adds a row for each stretch of the way."""

    def __init__(self, page: Any, results: Results, server: int) -> None:
        self._page = page
        self._results = results
        self._server = psutil.Process(server)
        self._counts = [0, 0, 0]
        self._totals = [0, 0, 0]
        self._first = self._start = time.monotonic()

    def drop(self, files: list[Path]) -> None:
        drop(self._page, files)
        self._counts[0] += 1

    def click(self, target: Any) -> None:
        target.click()
        self._counts[1] += 1

    def type(self, target: Any, text: str) -> None:
        """A click into the field, and the text."""
        target.click()
        target.press_sequentially(text)
        self._counts[1] += 1
        self._counts[2] += len(text)

    def reached(self, what: str) -> None:
        now = time.monotonic()
        self._results.add(what, *self._counts, now - self._start, now - self._first, self._processor_s())
        self._totals = [total + count for total, count in zip(self._totals, self._counts, strict=True)]
        self._counts, self._start = [0, 0, 0], now

    def restart(self) -> None:
        """What follows is counted from now."""
        self._first = self._start = time.monotonic()

    def sum(self) -> None:
        seconds = time.monotonic() - self._first
        self._results.add("all", *self._totals, seconds, seconds, self._processor_s())

    def _processor_s(self) -> float:
        times = [one.cpu_times() for one in (self._server, *self._server.children(recursive=True))]
        return sum(one.user + one.system for one in times)


def _fox(hand: _Hand, page: Any, arguments: argparse.Namespace) -> None:
    example = page.get_by_role("button", name="Try it with the fox")
    example.wait_for()
    page.wait_for_timeout(1000 * arguments.look)
    hand.reached("the page is there")
    hand.restart()
    hand.click(example)
    page.wait_for_url("**/#/jobs/*")
    hand.reached("a training")
    _pictures(hand, page)
    page.wait_for_url("**/#/runs/*")
    hand.click(page.get_by_role("button", name="Keep this one"))
    page.get_by_role("link", name="Download the file").wait_for()
    hand.reached("the kept LoRA")


def _photos(hand: _Hand, page: Any, arguments: argparse.Namespace) -> None:
    page.get_by_text("Drop photos or a folder here").wait_for()
    hand.reached("the page is there")
    hand.drop(sorted((BUILT_IN_BASE / "input" / "fox").glob("fox_*.png")))  # without their captions
    hand.type(page.get_by_label("What will you call it in prompts?"), "sks fox")
    page.get_by_text("0 of 6 with a caption").wait_for()
    hand.click(page.get_by_role("button", name="Choose a model"))
    page.wait_for_selector("input[name=model]:checked")
    hand.reached("photos, a trigger")
    hand.click(page.get_by_role("button", name="Next: settings"))
    page.wait_for_selector("input[name=preset]:checked")
    hand.reached("the suggested model")
    if arguments.preset:
        hand.click(page.locator(f"input[name=preset][value={arguments.preset}]"))
    hand.click(page.get_by_role("button", name="Start training"))
    page.wait_for_url("**/#/jobs/*")
    hand.reached("the suggested settings")
    _pictures(hand, page)
    page.wait_for_url("**/#/runs/*")
    hand.click(page.get_by_role("button", name="Keep this one"))
    download = page.get_by_role("link", name="Download the file")
    download.wait_for()
    hand.reached("the end of the training")
    with page.expect_download() as downloaded:
        hand.click(download)
    assert downloaded.value.suggested_filename == "sks-fox.safetensors"
    assert Path(downloaded.value.path()).stat().st_size > 10_000
    hand.reached("the LoRA, downloaded")
    hand.sum()


def _pictures(hand: _Hand, page: Any) -> None:
    page.locator(".easel img").first.wait_for()
    hand.reached("the first picture, of the base model")
    page.locator(".easel-left").first.wait_for()
    hand.reached("the first picture with the LoRA")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("walk", choices=("fox", "photos"))
    parser.add_argument("--look", type=float, default=0.0, help="seconds on the first page before the click")
    parser.add_argument("--preset", help="choice of settings, instead of the suggested one")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
