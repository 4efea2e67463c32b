"""The page at `/`: static files of the package.

`pages/` holds an HTML file, style sheets, typefaces, ES modules without a build step, tables of translations, and
vendored libraries, with their licences.
Only files that exist at start are served, below `/pages/`: requested names are looked up in a table.
The style sheets of reports are included, since the page shares its design, and pictures that the built-in model drew
are, from its package.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from lorasmith.core.folders import BUILT_IN_SAMPLE

if TYPE_CHECKING:
    from lorasmith.server.request_handling import ServerContext

PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The page may load its own files and the API, and `blob:` URLs of photos before upload."""

_PAGES = Path(__file__).parent / "pages"
_SHARED = {
    **{path.name: path for path in (Path(__file__).parents[1] / "report").glob("*.css")},
    "lorasmith-tiny.webp": BUILT_IN_SAMPLE,
}
_TYPES = {  # the operating system's table may differ, and browsers refuse modules of another type
    ".css": "text/css",
    ".html": "text/html",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
_INDEX = "index.html"


@dataclass(frozen=True)
class PageFile:
    """A file of the page; `type` is its media type, `digest` its ETag."""

    content: bytes
    type: str
    digest: str


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The routes of the page."""
    return [web.get("/", _index), web.get("/pages/{file:.+}", _file)]


@functools.cache
def page_files() -> Mapping[str, PageFile]:
    """The files by served name, relative to `/pages/`; all are small."""
    own = {path.relative_to(_PAGES).as_posix(): path for path in _PAGES.rglob("*") if path.suffix in _TYPES}
    return {name: _read(path) for name, path in {**own, **_SHARED}.items() if path.is_file()}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    return PageFile(content, _TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:32])


async def _index(request: web.Request) -> web.Response:
    # Not cached: it names the files of this version.
    return _answer(request, page_files()[_INDEX], cache="no-store")


async def _file(request: web.Request) -> web.Response:
    file = page_files().get(request.match_info["file"])
    if file is None or file is page_files()[_INDEX]:
        raise web.HTTPNotFound(text="the page has no such file")
    return _answer(request, file, cache="no-cache")


def _answer(request: web.Request, file: PageFile, *, cache: str) -> web.Response:
    """The file, or 304 if the browser's copy is current."""
    headers = {
        "Cache-Control": cache,
        "Content-Security-Policy": PAGE_POLICY,
        "ETag": f'"{file.digest}"',
    }
    if any(tag.value == file.digest for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    charset = None if file.type.startswith(("image/", "font/")) else "utf-8"
    return web.Response(body=file.content, content_type=file.type, charset=charset, headers=headers)
