"""A browser, and the page on a server with made-up answers."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.launched import LONG_S
from tests.server.pages.fake_api import FakeServer
from tools.browsing import chromium, opened_browser

PagesOpener = Callable[..., Any]

CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if chromium() is None:
        pytest.skip("there is no Chromium to open the page in")
    with opened_browser() as opened:
        yield opened


class ServedPage:
    """The page on a fake server in a thread of its own."""

    def __init__(self) -> None:
        self.server = FakeServer(step_seconds=0.01)
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        self._call(self._started())

    def stop(self) -> None:
        """As a server that is killed: connections break."""
        self._call(self._stopped())

    def publish(self, job: dict[str, Any], **changes: Any) -> None:
        """Change a job, and send it to all pages."""
        self._loop.call_soon_threadsafe(lambda: self.server.publish(job, **changes))

    def change_draft(self, dataset: str, /, **changes: Any) -> None:
        """As another page does."""
        self._loop.call_soon_threadsafe(lambda: self.server.change_draft(dataset, **changes))

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=LONG_S)

    async def _started(self) -> None:
        self.server.is_closing = False
        self._runner = web.AppRunner(self.server.app(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=sys.platform != "win32").start()
        self.port = self._runner.addresses[0][1]

    async def _stopped(self) -> None:
        self.server.is_closing = True
        await asyncio.sleep(0.05)  # streams look up every 20 ms
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        others = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.02)  # transports close in the next rounds of the loop


@pytest.fixture
def served() -> Iterator[ServedPage]:
    page = ServedPage()
    yield page
    page.close()


@pytest.fixture
def open_pages(browser: Any) -> Iterator[PagesOpener]:
    """Opens addresses; whatever goes wrong in a page (errors, files that its policy refuses) fails the test."""
    wrong: list[str] = []
    contexts = []

    def opened(address: str, *, width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 500
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
    """Opens views of the page on the fake server."""
    return lambda view="", **looks: open_pages(served.address + view, **looks)


def expected(locator: Any) -> Any:
    """What is to become true of a part of the page. (Its policy refuses functions that are polled.)"""
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * LONG_S)
    return expect(locator)


def assert_legible(page: Any, name: str = "") -> None:
    """Text has contrast, controls have names, and nothing sticks out of the window."""
    found = page.evaluate(CHECKS)
    assert found == {"faint": [], "nameless": [], "wide": []}, name


def _is_wrong(message: Any) -> bool:
    # Answers with errors, and a server that is gone, are tested; the browser logs them by itself.
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


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
