"""Files of datasets and runs as answers: pictures inline, everything else as a download, and nothing as a page."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from aiohttp import web

__all__ = ["PICTURES", "file_response", "page_response"]

PICTURES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".jfif": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".heic": "image/heic",
    ".heif": "image/heif",
}
"""Media types by suffix. SVG is none of them, as it can hold scripts."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"


def file_response(path: Path) -> web.FileResponse:
    """A file, whose media type the browser does not guess."""
    kind = PICTURES.get(path.suffix.lower())
    headers = {
        "Cache-Control": "private, no-cache",
        "Content-Security-Policy": _POLICY,
        "Content-Type": kind or "application/octet-stream",
        "X-Content-Type-Options": "nosniff",
    }
    if kind is None:
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(path.name, safe='', errors='replace')}"
    return web.FileResponse(path, headers=headers)


def page_response(content: bytes) -> web.Response:
    """A page of ours about data of others: no scripts, no network, and an origin of its own."""
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
    }
    return web.Response(body=content, content_type="text/html", charset="utf-8", headers=headers)
