"""A page of another site in a real browser, while the user is logged in: it writes nothing and reads nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.server.access import Access
from tests.launched import LONG_S
from tests.server.fake_server import GOOD, Played, serving
from tests.server.test_access import TOKEN, routes_of
from tools.browsing import FLAGS, chromium

pytestmark = pytest.mark.slow

ATTACK = (Path(__file__).parent / "foreign_page.js").read_text(encoding="utf-8")
SITES = {
    "another site": "http://evil.example:81",
    "another port": "http://127.0.0.1:81",
    "another name of this machine": "http://localhost:{port}",
    "a name made to point here": "http://rebound.example:{port}",
    "a name of this machine that anybody may use": "http://evil.localhost:{port}",
    "a frame without an origin": "http://evil.example:82",
}
FRAMED = "http://evil.example:82"  # whose page is in a sandbox


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if (found := chromium()) is None:
        pytest.skip("there is no Chromium to open the page in")
    rules = "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP rebound.example 127.0.0.1"
    # Newer Chromiums stop pages of the network before they reach this machine; older ones and other browsers do not.
    unchecked = "--disable-features=LocalNetworkAccessChecks,LocalNetworkAccessChecksWebSockets"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=(*FLAGS, rules, unchecked))
        yield browser
        browser.close()


class InThread:
    """A server in a thread of its own, with a picture and a waiting job."""

    def __init__(self, base: Path, token: str | None) -> None:
        self.base, self._token = base, token
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with serving(self.base, token=self._token) as self.played:
            self.played.context.dispatcher.submit("graph", {"prompt": GOOD})
            self._ready.set()
            await self._end.wait()

    def __enter__(self) -> Played:
        (self.base / "output").mkdir(parents=True)
        (self.base / "output" / "a.png").write_bytes(PNG)
        self._thread.start()
        assert self._ready.wait(LONG_S)
        return self.played

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(LONG_S)

    def state(self) -> dict[str, bytes]:
        """Files that requests may have written, with the waiting jobs."""
        files = [path for path in self.base.rglob("*") if path.is_file() and "jobs.sqlite3" not in path.name]
        jobs = asyncio.run_coroutine_threadsafe(self._jobs(), self._loop).result(LONG_S)
        return {"jobs": jobs, **{str(path): path.read_bytes() for path in files}}

    async def _jobs(self) -> bytes:
        return repr(self.played.context.store.lines(("pending", "running", "cancelled"))).encode()


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d4944415478da63f8cfc0f01f0005000201"
    "27d5a9d40000000049454e44ae426082"
)


def attacked(browser: Any, site: str, server: Played, token: str | None) -> dict[str, list[str]]:
    """What a page of a site finds out, in the browser of somebody who has logged in."""
    address = f"http://127.0.0.1:{server.port}"
    context = browser.new_context()
    if token is not None:
        cookie = {"name": "lorasmith", "value": Access(token).cookie, "url": address, "sameSite": "Strict"}
        context.add_cookies([cookie])
    page = context.new_page()
    html = f"<!doctype html><title>evil</title><body><script>{ATTACK}</script>"
    headers = {"Content-Security-Policy": "sandbox allow-scripts allow-forms"} if site == FRAMED else {}
    page.route(f"{site}/evil", lambda route: route.fulfill(content_type="text/html", body=html, headers=headers))
    page.goto(f"{site}/evil")
    assert (page.evaluate("self.origin") == "null") == (site == FRAMED)
    # A page whose name points here asks under that name; all others ask the server by its address.
    base = site if site.endswith(f":{server.port}") and "rebound" in site else address
    routes = [one for one in routes_of(server) if not one[1].startswith(("/api/", "/editor/"))]
    routes = [one for one in routes if not one[1].endswith(("/ws", "/events"))]
    found: dict[str, list[str]] = page.evaluate("([...given]) => attack(...given)", [base, routes, GOOD])
    context.close()
    return found


@pytest.mark.parametrize("token", [None, TOKEN], ids=["no token", "a token"])
@pytest.mark.parametrize("site", SITES)
def test_a_page_of_another_site_can_do_nothing(browser: Any, tmp_path: Path, site: str, token: str | None) -> None:
    running = InThread(tmp_path / "base", token)
    with running as server:
        before = running.state()
        found = attacked(browser, SITES[site].format(port=server.port), server, token)
        assert found == {"read": [], "opened": [], "shown": []}
        assert running.state() == before


@pytest.mark.parametrize("token", [None, TOKEN], ids=["no token", "a token"])
def test_the_same_page_of_this_server_can(browser: Any, tmp_path: Path, token: str | None) -> None:
    """So the attack works, and what stops it is where it comes from."""
    running = InThread(tmp_path / "base", token)
    with running as server:
        before = running.state()
        found = attacked(browser, f"http://127.0.0.1:{server.port}", server, token)
        after = running.state()
        assert len(found["read"]) > 20 and found["opened"] == ["/ws", "/api/ws", "events"]
        assert "/view?filename=a.png" in found["shown"]
        assert after["jobs"] != before["jobs"] and len(after) > len(before)
