"""ComfyUI's editor at `/editor/`: the files of the package `comfyui-frontend-package`, if it is installed, and others.

The editor prefixes all addresses with its own folder, so the protocol is served below `/editor` too
(`comfyui/all_routes.py`). The package is GPL-3.0: it is served unmodified, and Lorasmith contains no part of it.

Extensions are those of `lorasmith-editor` and of the installed editor package. Documentation is made from node
declarations. Templates are the package's examples (`nodes/example_workflows.py`): the editor reads
`templates/index.json`, opens `templates/<name>.json` and shows `templates/<name>-1.webp`, which
`tools/template_pictures.py` draws.
"""

from __future__ import annotations

import importlib.util
import json
import mimetypes
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from aiohttp import web

from lorasmith.core.extras import EDITOR
from lorasmith.core.files import is_regular
from lorasmith.core.printable import count_text
from lorasmith.server.contained_files import OutsideError, find_contained
from lorasmith.server.dispatcher import Assistant
from lorasmith.server.request_handling import ServerContext, refused, table

if TYPE_CHECKING:
    from lorasmith.nodes.example_workflows import Example

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


def editor_package() -> Path | None:
    """The folder of the editor's static files, found without importing its package; None if it is not installed."""
    spec = importlib.util.find_spec("comfyui_frontend_package")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "static"
    return folder if is_regular(folder / "index.html") else None


def send_editor_file(path: Path, *, cache: str = "no-cache") -> web.FileResponse:
    """A response with a file of the installation, which is trusted: it may be a script or a page."""
    kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {"Content-Type": kind, "Cache-Control": cache, "Content-Security-Policy": EDITOR_POLICY}
    return web.FileResponse(path, headers=headers)


class EditorFiles:
    """The routes; `assistant` makes the documentation of nodes."""

    def __init__(self, assistant: Assistant, *, ours: Path = EDITOR.folder, package: Path | None = None) -> None:
        self._assistant = assistant
        self._roots = [ours, *([package] if package is not None else [])]

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
                ("GET", "/extensions", self._extensions),
                ("GET", "/extensions/{path:.+}", self._extension),
                ("GET", "/templates/{path:.+}", self._template),
                ("GET", "/docs/{node}/{locale}.md", self._documentation),
                ("GET", "/i18n", self._words),
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
        path = template_file(request.match_info["path"])
        if isinstance(path, str):
            return web.json_response(text=path)
        return _sent(path)

    async def _documentation(self, request: web.Request) -> web.Response:
        if request.match_info["locale"] != "en":
            return refused(404, "the documentation is in English")  # the fallback that editors request
        text = await self._assistant.ask("node_documentation", node=request.match_info["node"])
        if text is None:
            return refused(404, "there is no such node")
        return web.Response(text=text, content_type="text/markdown")

    async def _words(self, request: web.Request) -> web.Response:
        return web.json_response(_WORDS)


_WORDS = {
    "en": {
        "rightSidePanel": {
            "missingNodePacks": {
                "title": "Nodes that are not here",
                "unknownPack": "Not a node of Lorasmith",
                "ossManagerDisabledHint": (
                    "Lorasmith has ComfyUI's nodes that train, load, encode, sample and save, and no custom nodes. Put "
                    "one of its own in their place (double-click the canvas for a list), or run this workflow in "
                    "ComfyUI and train here."
                ),
            }
        },
        "errorCatalog": {
            "missingErrors": {
                "missing_node": {
                    "displayMessageOss": "Replace or remove these nodes to run this workflow here.",
                    "toastMessageOneOss": "Lorasmith has no such node. Replace or remove it to run this workflow here.",
                    "toastMessageManyOss": (
                        "Lorasmith lacks {count} nodes. Replace or remove them to run this workflow here."
                    ),
                }
            }
        },
    }
}
"""Texts of the editor that would name what is not here, by their places in its catalogue, and what they are here."""


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
<p>To use ComfyUI's graph editor here, run <code>{escape(EDITOR.commands[0])}</code> in a copy of Lorasmith's
repository, or <code>{escape(EDITOR.commands[1])}</code>, and restart the server.</p>
<p><a href="/">Back to Lorasmith</a></p>
</html>
"""


PICTURES = EDITOR.folder / "templates"


def templates() -> dict[str, Example]:
    """Every template by name, those that need no other file first."""
    from lorasmith.nodes.example_workflows import examples  # imported late, to start fast

    return {example.name: example for example in examples()}


def picture_of(name: str) -> Path:
    """The picture of a template."""
    return PICTURES / f"{name}-1.webp"


def index() -> list[dict[str, Any]]:
    """The editor's list of templates, in two groups: those that need no other file first."""
    listed = templates().values()
    groups = {
        "Start here": [example for example in listed if not example.needs],
        "Models": [example for example in listed if example.needs],
    }
    return [
        {
            "moduleName": "default",
            "type": "image",
            "category": "Lorasmith",
            "title": title,
            "isEssential": title == "Start here",
            "templates": [_card(member) for member in members],
        }
        for title, members in groups.items()
    ]


def template_file(name: str) -> Path | str | None:
    """The file `templates/<name>`: a path, or JSON text; None if there is none."""
    if name == "index.json":
        return json.dumps(index())
    if name == "index_logo.json":  # logos of model makers; none here
        return "{}"
    examples = templates()
    if (stem := name.removesuffix("-1.webp")) != name and stem in examples:
        return picture_of(stem)
    if (stem := name.removesuffix(".json")) != name and stem in examples:
        return examples[stem].editor_path
    return None


def _card(example: Example) -> dict[str, Any]:
    return {
        "name": example.name,
        "title": example.card,
        "mediaType": "image",
        "mediaSubtype": "webp",
        "description": _description(example),
        "tags": ["LoRA", "Training"],
        "openSource": True,
    }


def _description(example: Example) -> str:
    """One or two sentences without file names: the editor shows hyphens and underscores as spaces."""
    says = f"{example.title}." if example.title[0].isupper() else f"Trains {example.title}."
    if not example.needs:
        return f"{says} Runs at once, with the built in model."
    return f"{says} Needs {count_text(len(example.needs), 'model file')}, named in the loaders."
