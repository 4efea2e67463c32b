"""ComfyUI's editor at `/editor/`: the static files of the package `comfyui-frontend-package`, if it is installed.

The editor prefixes all addresses with its own folder, so the protocol is served below `/editor` too
(`comfyui/all_routes.py`), as are the editor's extensions, templates and node help (`comfyui/editor_files.py`). The
package is GPL-3.0: it is served unmodified, and Lorasmith contains no part of it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from aiohttp import web

from lorasmith.core.files import is_regular
from lorasmith.server.comfyui.editor_files import editor_package, send_editor_file
from lorasmith.server.contained_files import OutsideError, find_contained
from lorasmith.server.request_handling import ServerContext

INSTALL = 'pip install "lorasmith[editor]"'


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The routes of the editor's own files."""
    return EditorPages(editor_package(), context.folders.base / "user" / "default" / "user.css").routes()


class EditorPages:
    """The routes. Without `package`, a page says that the editor is missing; `style` need not exist."""

    def __init__(self, package: Path | None, style: Path) -> None:
        self._package, self._style_sheet = package, style

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/editor", self._redirect),
            web.get("/editor/", self._page),
            # The page links both, and browsers log an error if a style sheet is missing.
            web.get("/editor/user.css", self._style),
            web.get("/editor/api/userdata/user.css", self._style),
            # The editor requests these pictures at the root, regardless of its own address.
            web.get("/assets/images/favicon_progress_16x16/{name}", self._progress_icon),
            web.get("/assets/favicon.ico", self._icon),
            web.get("/favicon.ico", self._icon),
            web.get("/editor/{path:.+}", self._file),
        ]

    async def _redirect(self, request: web.Request) -> web.Response:
        location = request.rel_url.with_path("/editor/", keep_query=True)  # still encoded: safe in a header
        return web.Response(status=307, headers={"Location": str(location)})

    async def _page(self, request: web.Request) -> web.StreamResponse:
        if self._package is None:
            return web.Response(text=_MISSING_PAGE, content_type="text/html", headers={"Cache-Control": "no-store"})
        return send_editor_file(self._package / "index.html", cache="no-store")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        return self._send(request.match_info["path"])

    async def _style(self, request: web.Request) -> web.StreamResponse:
        if self._style_sheet.is_symlink() or not is_regular(self._style_sheet):
            return web.Response(text="", content_type="text/css")
        return send_editor_file(self._style_sheet)

    async def _progress_icon(self, request: web.Request) -> web.StreamResponse:
        return self._send(f"assets/images/favicon_progress_16x16/{request.match_info['name']}")

    async def _icon(self, request: web.Request) -> web.StreamResponse:
        return self._send("assets/favicon.ico")

    def _send(self, name: str) -> web.StreamResponse:
        try:
            path = find_contained([self._package], name) if self._package is not None else None
        except OutsideError:
            path = None
        if path is None:
            return web.Response(status=404, text="there is no such file\n")
        return send_editor_file(path)


_MISSING_PAGE = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lorasmith: editor</title>
<style>
  :root {{ color-scheme: light dark; font: 17px/1.6 system-ui, sans-serif }}
  body {{ max-width: 40rem; margin: 20vh auto; padding: 0 1rem }}
  code {{ background: #7f7f7f33; padding: 0.1em 0.4em; border-radius: 4px; white-space: nowrap }}
</style>
<p>To use ComfyUI's graph editor here, install it with <code>{escape(INSTALL)}</code> and restart the server.</p>
<p><a href="/">Back to Lorasmith</a></p>
</html>
"""
