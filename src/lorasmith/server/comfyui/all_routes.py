"""All routes of the protocol, below every prefix that clients use; those about the server itself and its models.

Clients use them with and without `/api`; the editor, served at `/editor`, prefixes all addresses with its own folder.
What editors fetch and this server does not have is a stub.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from lorasmith.server.comfyui.editor_files import EditorFiles, editor_package
from lorasmith.server.comfyui.file_routes import FileRoutes, UserFiles
from lorasmith.server.comfyui.queue_routes import QueueRoutes
from lorasmith.server.comfyui.websocket import FEATURES, TERMINAL_SIZE, Sockets, log_entry
from lorasmith.server.contained_files import find_contained, send_file
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.request_handling import ServerContext, read_object, refused, table

PREFIXES = ("", "/api", "/editor", "/editor/api")


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The routes for a server."""
    parts = (
        QueueRoutes(context),
        UserFiles(context.folders.base),
        FileRoutes(context.folders, context.assistant),
        EditorFiles(context.assistant, package=editor_package()),
        SystemRoutes(context),
    )
    found = [route for part in parts for route in part.routes()]
    return [web.route(route.method, prefix + route.path, route.handler) for prefix in PREFIXES for route in found]


PROTOCOL_VERSION = "0.33.0"  # the ComfyUI release of this protocol, reported by `/system_stats`

MODEL_KINDS = ("checkpoints", "diffusion_models", "embeddings", "loras", "text_encoders", "vae")
"""Kinds that are listed even if their folders are missing."""
_OLDER_NAMES = ("unet", "clip")
_PICTURES = (".preview.png", ".png", ".jpg", ".jpeg", ".webp")


class SystemRoutes:
    """The routes about the server and the model folders."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._folders = context.folders
        self._sockets = Sockets(context)

    def routes(self) -> list[web.RouteDef]:
        empty = ("/workflow_templates", "/global_subgraphs", "/node_replacements")
        return table(
            [
                ("GET", "/ws", self._sockets.connect),
                ("GET", "/system_stats", self._stats),
                ("GET", "/features", self._features),
                *(("GET", path, self._nothing) for path in empty),
                ("GET", "/internal/logs", self._log_text),
                ("GET", "/internal/logs/raw", self._log),
                ("PATCH", "/internal/logs/subscribe", self._subscribe),
                ("GET", "/internal/folder_paths", self._folder_paths),
                ("GET", "/models", self._list_kinds),
                ("GET", "/models/{kind}", self._list),
                ("GET", "/embeddings", self._embeddings),
                ("GET", "/view_metadata/{kind}", self._metadata),
                ("GET", "/experiment/models", self._list_folders),
                ("GET", "/experiment/models/{kind}", self._list_files),
                ("GET", "/experiment/models/preview/{kind}/{index}/{name:.+}", self._picture),
            ]
        )

    async def _stats(self, request: web.Request) -> web.Response:
        import psutil

        memory = psutil.virtual_memory()
        system = {
            "os": sys.platform,
            "ram_total": memory.total,
            "ram_free": memory.available,
            "comfyui_version": PROTOCOL_VERSION,
            "lorasmith_version": _version("lorasmith"),
            "python_version": sys.version,
            "pytorch_version": _version("torch"),
            "embedded_python": False,
            "argv": [os.path.basename(sys.argv[0])],  # noqa: PTH119 - arguments may hold the token
        }
        # Before the workers have started: clients use the first device without checking that there is one.
        unknown = {"name": "cpu", "title": "CPU", "memory_bytes": memory.total, "free_bytes": memory.available}
        known = self._context.dispatcher.devices() or [unknown]
        devices = [_device(device, index) for index, device in enumerate(known)]
        return web.json_response({"system": system, "devices": devices})

    async def _features(self, request: web.Request) -> web.Response:
        return web.json_response(FEATURES)

    async def _nothing(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _log_text(self, request: web.Request) -> web.Response:
        return web.json_response("".join(f"{entry['t']} - {entry['m']}\n" for entry in self._context.log.entries))

    async def _log(self, request: web.Request) -> web.Response:
        entries = [log_entry(entry) for entry in self._context.log.entries]
        return web.json_response({"entries": entries, "size": TERMINAL_SIZE})

    async def _subscribe(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        client, enabled = body.get("clientId"), body.get("enabled")
        if not isinstance(client, str) or not isinstance(enabled, bool):
            return refused(400, "clientId must be text, and enabled true or false")
        self._sockets.subscribe_to_log(client, enabled)
        return web.Response()

    async def _folder_paths(self, request: web.Request) -> web.Response:
        return web.json_response({kind: self._roots(kind) for kind in self._kinds()})

    def _kinds(self) -> list[str]:
        """`MODEL_KINDS`, kinds with a folder, and those of extra model paths."""
        own = self._folders.base / "models"
        there = [entry.name for entry in own.iterdir() if entry.is_dir()] if own.is_dir() else []
        named = {*MODEL_KINDS, *there, *self._folders.extra, *self._folders.preferred} - {*_OLDER_NAMES, "configs"}
        return sorted(name for name in named if not name.startswith("."))

    async def _list_kinds(self, request: web.Request) -> web.Response:
        return web.json_response(self._kinds())

    async def _list(self, request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        if not self._has(kind):
            return refused(404, "there is no such kind of models")
        return web.json_response(await asyncio.to_thread(self._folders.files, kind))

    async def _embeddings(self, request: web.Request) -> web.Response:
        names = await asyncio.to_thread(self._folders.files, "embeddings")
        return web.json_response([name.rpartition(".")[0] or name for name in names])

    async def _metadata(self, request: web.Request) -> web.Response:
        kind, name = request.match_info["kind"], request.query.get("filename", "")
        if not self._has(kind) or not name.endswith(".safetensors"):
            return refused(404, "there is no such file")
        try:
            found = await self._context.assistant.ask("file_metadata", kind=kind, name=name)
        except RefusedError as error:
            return refused(404, error.message)
        return refused(404, "the file has no metadata") if found is None else web.json_response(found)

    async def _list_folders(self, request: web.Request) -> web.Response:
        return web.json_response([{"name": kind, "folders": self._roots(kind)} for kind in self._kinds()])

    async def _list_files(self, request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        if not self._has(kind):
            return refused(404, "there is no such kind of models")
        return web.json_response(await asyncio.to_thread(self._described, kind))

    def _described(self, kind: str) -> list[dict[str, Any]]:
        roots, found = self._folders.roots(kind), []
        for name in self._folders.files(kind):
            places = [(index, root / name) for index, root in enumerate(roots) if (root / name).exists()]
            if places:
                index, path = places[0]
                status = path.stat()
                times = {"modified": status.st_mtime, "created": status.st_ctime}
                found.append({"name": name, "pathIndex": index, "size": status.st_size, **times})
        return found

    async def _picture(self, request: web.Request) -> web.StreamResponse:
        kind, name, roots = request.match_info["kind"], request.match_info["name"], []
        if self._has(kind) and request.match_info["index"].isdecimal():
            roots = self._folders.roots(kind)[int(request.match_info["index"][:6]) :][:1]
        stem = name.rpartition(".")[0] or name
        candidates = (find_contained(roots, stem + suffix) for suffix in _PICTURES)
        path: Path | None = next((candidate for candidate in candidates if candidate is not None), None)
        return refused(404, "the model has no picture") if path is None else send_file(path)

    def _roots(self, kind: str) -> list[str]:
        return list(map(str, self._folders.roots(kind)))

    def _has(self, kind: str) -> bool:
        return kind in _OLDER_NAMES or kind in self._kinds()


def _device(device: dict[str, Any], index: int) -> dict[str, Any]:
    name, _, number = str(device.get("name", "cpu")).partition(":")
    total = device.get("memory_bytes") or 0
    free = device.get("free_bytes", total)
    return {
        "name": device.get("title", name),
        "type": name,
        "index": int(number) if number.isdecimal() else (index if name != "cpu" else None),
        "vram_total": total,
        "vram_free": free,
        "torch_vram_total": total,
        "torch_vram_free": free,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
