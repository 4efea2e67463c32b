"""Information about the server, and stubs for what editors fetch and this server does not have."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

from aiohttp import web

from lorasmith.server.comfyui.answers import read_json, refused, table
from lorasmith.server.comfyui.messages import TERMINAL_SIZE, log_entry
from lorasmith.server.comfyui.model_routes import ModelRoutes
from lorasmith.server.comfyui.websocket import Sockets, features
from lorasmith.server.request_handling import MAX_UPLOAD_BYTES, ServerContext

PROTOCOL_VERSION = "0.33.0"  # the ComfyUI release of this protocol, reported by `/system_stats`


class SystemRoutes:
    """The routes; `sockets` has the subscriptions to the log, `models` the model folders."""

    def __init__(self, context: ServerContext, sockets: Sockets, models: ModelRoutes) -> None:
        self._context = context
        self._sockets = sockets
        self._models = models

    def routes(self) -> list[web.RouteDef]:
        empty = ("/i18n", "/workflow_templates", "/global_subgraphs", "/node_replacements")
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
        found = self._context.dispatcher.devices() or [unknown]
        devices = [_device(one, index) for index, one in enumerate(found)]
        return web.json_response({"system": system, "devices": devices})

    async def _features(self, request: web.Request) -> web.Response:
        return web.json_response(features(MAX_UPLOAD_BYTES))

    async def _nothing(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _log_text(self, request: web.Request) -> web.Response:
        return web.json_response("".join(f"{one['t']} - {one['m']}\n" for one in self._context.log.entries))

    async def _log(self, request: web.Request) -> web.Response:
        entries = [log_entry(one) for one in self._context.log.entries]
        return web.json_response({"entries": entries, "size": TERMINAL_SIZE})

    async def _subscribe(self, request: web.Request) -> web.Response:
        body = await read_json(request, kind=dict)
        client, enabled = body.get("clientId"), body.get("enabled")
        if not isinstance(client, str) or not isinstance(enabled, bool):
            return refused(400, "clientId must be text, and enabled true or false")
        self._sockets.subscribe_to_log(client, enabled)
        return web.Response()

    async def _folder_paths(self, request: web.Request) -> web.Response:
        roots = self._context.folders.roots
        return web.json_response({kind: [str(root) for root in roots(kind)] for kind in self._models.kinds()})


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
