"""Files that the editor fetches besides its own: extensions, templates, documentation of nodes.

Extensions are Lorasmith's own, in `server/editor/extensions/`, and those of the installed editor package. Templates are
the example workflows (`server/editor_templates.py`); documentation is made from node declarations.
"""

from __future__ import annotations

import importlib.util
import mimetypes
from pathlib import Path
from urllib.parse import quote

from aiohttp import web

from lorasmith.core.files import is_regular
from lorasmith.server.assistant import Assistant
from lorasmith.server.comfyui.answers import refused, table
from lorasmith.server.contained_files import find_contained
from lorasmith.server.editor_templates import template_file

EDITOR_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
"""Content policy of ComfyUI's editor, which compiles code and has inline scripts: nothing from other origins."""

OUR_FILES = Path(__file__).parents[1] / "editor"


def editor_package() -> Path | None:
    """The folder of the editor's static files, found without importing its package; None if it is not installed."""
    found = importlib.util.find_spec("comfyui_frontend_package")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "static"
    return folder if is_regular(folder / "index.html") else None


def send_editor_file(path: Path, *, cache: str = "no-cache") -> web.FileResponse:
    """A response with a file of the installation, which is trusted: it may be a script or a page."""
    kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {"Content-Type": kind, "Cache-Control": cache, "Content-Security-Policy": EDITOR_POLICY}
    return web.FileResponse(path, headers=headers)


class EditorFiles:
    """The routes; `assistant` makes the documentation of nodes."""

    def __init__(self, assistant: Assistant, *, ours: Path = OUR_FILES, package: Path | None = None) -> None:
        self._assistant = assistant
        self._roots = [ours, *([package] if package is not None else [])]

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
                ("GET", "/extensions", self._extensions),
                ("GET", "/extensions/{path:.+}", self._extension),
                ("GET", "/templates/{path:.+}", self._template),
                ("GET", "/docs/{node}/{locale}.md", self._documentation),
            ]
        )

    async def _extensions(self, request: web.Request) -> web.Response:
        found = {
            f"/extensions/{quote(path.relative_to(root / 'extensions').as_posix())}": None
            for root in self._roots
            for path in sorted((root / "extensions").rglob("*.js"))
        }
        return web.json_response([*found])

    async def _extension(self, request: web.Request) -> web.StreamResponse:
        folders = [root / "extensions" for root in self._roots]
        return _sent(find_contained(folders, request.match_info["path"]))

    async def _template(self, request: web.Request) -> web.StreamResponse:
        found = template_file(request.match_info["path"])
        if isinstance(found, str):
            return web.json_response(text=found)
        return _sent(found)

    async def _documentation(self, request: web.Request) -> web.Response:
        if request.match_info["locale"] != "en":
            return refused(404, "the documentation is in English")  # the fallback that editors request
        text = await self._assistant.ask("node_documentation", node=request.match_info["node"])
        if text is None:
            return refused(404, "there is no such node")
        return web.Response(text=text, content_type="text/markdown")


def _sent(path: Path | None) -> web.StreamResponse:
    return refused(404, "there is no such file") if path is None else send_editor_file(path)


_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
"""Browsers refuse these files under other types, which the system's table may give them."""
