from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from lorasmith.families.locating import BUILT_IN
from lorasmith.server import page_routes
from lorasmith.server.page_routes import PAGE_POLICY, page_files, routes

T = TypeVar("T")
PAGES = Path(page_routes.__file__).parent / "pages"


def asked(question: Callable[[TestClient[Any, Any]], Awaitable[T]]) -> T:
    async def main() -> T:
        app = web.Application()
        app.add_routes(routes(None))  # type: ignore[arg-type]
        async with TestClient(TestServer(app)) as client:
            return await question(client)

    return asyncio.run(main())


def test_the_page_is_never_stored_and_runs_no_inline_code() -> None:
    async def main(client: TestClient[Any, Any]) -> tuple[int, Any, str]:
        answer = await client.get("/")
        return answer.status, answer.headers, await answer.text()

    status, headers, text = asked(main)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"] == PAGE_POLICY and "unsafe" not in PAGE_POLICY
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", text)


def test_every_file_of_the_page_is_served_with_its_type_and_nothing_else() -> None:
    async def main(client: TestClient[Any, Any]) -> dict[str, tuple[int, str]]:
        absent = (
            "index.html",
            "vendor/README.md",
            "../page_routes.py",
            "..%2Fpage_routes.py",
            "lib",
            "lib/",
            "report.css/x",
        )
        found = {}
        for name in (*page_files(), *absent):
            async with client.get(f"/pages/{name}") as answer:
                found[name] = answer.status, answer.headers["Content-Type"]
        return found

    found = asked(main)
    served = {name for name, (status, _) in found.items() if status == 200}
    assert served == set(page_files()) - {"index.html"}
    assert {found[name][1] for name in served if name.endswith(".mjs")} == {"text/javascript; charset=utf-8"}
    assert found["report.css"] == found["page.css"] == (200, "text/css; charset=utf-8")


def test_the_built_in_model_has_pictures_that_it_drew() -> None:
    file = page_files()[f"{BUILT_IN}.webp"]
    with Image.open(io.BytesIO(file.content)) as opened:
        assert (opened.format, opened.size) == ("WEBP", (768, 96)) and file.type == "image/webp"
        assert len(opened.convert("RGB").getcolors(1 << 17) or []) > 1000, "an empty picture"
    assert len(file.content) < 20_000


def test_no_block_of_a_style_sheet_is_left_open() -> None:
    sheets = [file.content.decode() for name, file in page_files().items() if name.endswith(".css")]
    assert sheets and all(one.count("{") == one.count("}") for one in sheets)


def test_an_unchanged_file_is_not_sent_again() -> None:
    async def main(client: TestClient[Any, Any]) -> tuple[int, bytes]:
        first = await client.get("/pages/main.mjs")
        again = await client.get("/pages/main.mjs", headers={"If-None-Match": first.headers["ETag"]})
        return again.status, await again.read()

    assert asked(main) == (304, b"")


@pytest.mark.parametrize("path", sorted(PAGES.rglob("*.mjs")), ids=lambda path: path.name)
def test_imports_of_modules_lead_to_files_of_the_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"""(?:^|;|\}|\s)(?:import|export)\b[^;'"]*?from\s*["']([^"']+)["']""", text)
    for name in names:
        assert name.startswith("."), name
        assert (path.parent / name).resolve().is_file(), name
    assert "sourceMappingURL" not in text


def test_addresses_elsewhere_are_in_no_file_but_licences() -> None:
    """The page works offline: nothing is loaded from another host."""
    for name, file in page_files().items():
        if not name.startswith(("vendor/", "fonts/")) and file.type != "image/webp":
            found = set(re.findall(r"https?://[^\s\"'`<>]+", file.content.decode()))
            assert found <= {"http://www.w3.org/2000/svg"}, name


def test_libraries_come_with_their_licences() -> None:
    notice = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8")
    readme = (PAGES / "vendor" / "README.md").read_text(encoding="utf-8")
    for path in (PAGES / "vendor").glob("*.mjs"):
        assert path.name in readme
    for library in ("preact", "htm", "uplot"):
        assert (PAGES / "vendor" / f"{library}.LICENSE.txt").stat().st_size > 500
        assert library in notice.casefold()
