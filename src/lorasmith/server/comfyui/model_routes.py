"""Lists of model files by kind, their metadata and pictures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web

from lorasmith.core.folders import Folders
from lorasmith.server.assistant import Assistant, RefusedError
from lorasmith.server.comfyui.answers import refused, table
from lorasmith.server.contained_files import find_contained, send_file

MODEL_KINDS = ("checkpoints", "diffusion_models", "embeddings", "loras", "text_encoders", "vae")
"""Kinds that are listed even if their folders are missing."""
_OLDER_NAMES = ("unet", "clip")
_PICTURES = (".preview.png", ".png", ".jpg", ".jpeg", ".webp")


class ModelRoutes:
    """The routes; `assistant` reads file headers."""

    def __init__(self, folders: Folders, assistant: Assistant) -> None:
        self._folders = folders
        self._assistant = assistant

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
                ("GET", "/models", self._list_kinds),
                ("GET", "/models/{kind}", self._list),
                ("GET", "/embeddings", self._embeddings),
                ("GET", "/view_metadata/{kind}", self._metadata),
                ("GET", "/experiment/models", self._list_folders),
                ("GET", "/experiment/models/{kind}", self._list_files),
                ("GET", "/experiment/models/preview/{kind}/{index}/{name:.+}", self._picture),
            ]
        )

    def kinds(self) -> list[str]:
        """`MODEL_KINDS`, kinds with a folder, and those of extra model paths."""
        own = self._folders.base / "models"
        there = [entry.name for entry in own.iterdir() if entry.is_dir()] if own.is_dir() else []
        named = {*MODEL_KINDS, *there, *self._folders.extra, *self._folders.preferred} - {*_OLDER_NAMES, "configs"}
        return sorted(name for name in named if not name.startswith("."))

    async def _list_kinds(self, request: web.Request) -> web.Response:
        return web.json_response(self.kinds())

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
            found = await self._assistant.ask("file_metadata", kind=kind, name=name)
        except RefusedError as error:
            return refused(404, error.message)
        return refused(404, "the file has no metadata") if found is None else web.json_response(found)

    async def _list_folders(self, request: web.Request) -> web.Response:
        return web.json_response(
            [{"name": kind, "folders": [str(root) for root in self._folders.roots(kind)]} for kind in self.kinds()]
        )

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
        path: Path | None = next((one for one in candidates if one is not None), None)
        return refused(404, "the model has no picture") if path is None else send_file(path)

    def _has(self, kind: str) -> bool:
        return kind in _OLDER_NAMES or kind in self.kinds()
