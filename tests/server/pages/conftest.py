"""A browser, and the page on the application with a scripted worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.runs import supervisor
from lorasmith.server import event_streams
from lorasmith.server.models import downloads
from tests.launched import LONG_S
from tests.server.pages.served_page import ServedPage
from tools import browsing
from tools.browsing import chromium, opened_browser

PagesOpener = Callable[..., Any]

CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8")
AXE = Path(__file__).parents[3] / "tools" / "pages" / "node_modules" / "axe-core" / "axe.min.js"
"""Installed by `make lint-pages`; without it, `assert_legible` checks the rest alone."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if chromium() is None:
        pytest.skip("there is no Chromium to open the page in")
    with opened_browser() as opened:
        yield opened


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedPage]:
    page = ServedPage(tmp_path / "base")
    for module in (supervisor, downloads):
        monkeypatch.setattr(module, "ChildProcess", page.new_process)
    monkeypatch.setattr(event_streams, "_POLL_S", 0.02)
    monkeypatch.setattr(event_streams, "_RETRY_MS", 300)
    monkeypatch.chdir(page.base)  # as the assistant's
    page.start()
    yield page
    page.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base folder of `server`."""
    return tmp_path / "ComfyUI"


@pytest.fixture
def server(browser: Any, base: Path) -> Iterator[browsing.Served]:
    """The whole server, after the browser, so that nothing is started where there is none."""
    with browsing.served(base) as running:
        yield running


@pytest.fixture
def open_pages(browser: Any) -> Iterator[PagesOpener]:
    """Opens addresses; whatever goes wrong in a page (errors, files that its policy refuses) fails the test."""
    wrong: list[str] = []
    contexts = []

    def opened(address: str, *, width: int = 1200, scheme: str = "light", locale: str = "en-US") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 844},
            color_scheme=scheme,
            locale=locale,
            has_touch=width < 500,
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * LONG_S)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: _is_wrong(message) and wrong.append(message.text))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def open_page(open_pages: PagesOpener, served: ServedPage) -> PagesOpener:
    """Opens views of the page."""
    return lambda view="", **looks: open_pages(served.address + view, **looks)


def expected(locator: Any) -> Any:
    """What is to become true of a part of the page. (Its policy refuses functions that are polled.)"""
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * LONG_S)
    return expect(locator)


def choose_files(button: Any, files: Any) -> None:
    """Press a button that asks for files, and choose some."""
    with button.page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files(files)


def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds on the server, where no part of the page shows it."""
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def assert_legible(page: Any, name: str = "") -> None:
    """Text has contrast, controls have names, nothing sticks out of the window, and axe finds nothing."""
    found = page.evaluate(CHECKS)
    assert found == {"faint": [], "nameless": [], "wide": [], "small": []}, name
    if AXE.is_file():
        assert violations(page) == [], name


def violations(page: Any) -> list[str]:
    """What axe finds on a page: each rule with the first places where it is violated."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(
        """async () => (await axe.run({resultTypes: ["violations"]})).violations.map(
            ({id, help, nodes}) => `${id}: ${help}: ${nodes.slice(0, 3).map((one) => one.html).join(" ")}`)"""
    )
    return list(found)


def _is_wrong(message: Any) -> bool:
    # Answers with errors, and a server that is gone, are tested; the browser logs them by itself.
    # Nor does a test depend on how soon a busy machine uses the typeface that it has loaded before.
    is_usual = message.text.startswith("Failed to load resource") or "was preloaded using link preload" in message.text
    return message.type in ("error", "warning") and not is_usual


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three photos, two captions, a broken picture, a video, a control and another file."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos") / "My Dög"
    folder.mkdir()
    for index, size in enumerate([(640, 480), (480, 640), (512, 512)]):
        Image.new("RGB", size, (40 * index, 120, 200)).save(folder / f"dog {index}.jpg")
    (folder / "dog 0.txt").write_text("a dog on grass")
    (folder / "dog 1.txt").write_text("a dog <img src=x onerror=\"document.title='harmed'\">")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / "sea.mp4").write_bytes(b"video")
    (folder / "control").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "control" / "dog 0.jpg")
    return folder
