"""The editor's user files: saved workflows, settings, style sheet, below `<base>/user/default`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from lorasmith.core.errors import OutputError
from lorasmith.core.files import ensure_folder, is_folder, is_regular, read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.server.comfyui.answers import read_json, refused, table
from lorasmith.server.contained_files import OutsideError, contained, send_file
from lorasmith.server.request_handling import MAX_JSON_BYTES, read_body
from lorasmith.server.server_disk import disk_space, set_aside

FIRST_SETTINGS: dict[str, Any] = {"Comfy.Notification.ShowVersionUpdates": False}
"""Defaults of the editor's settings; it does not check for its own updates."""


class UserFiles:
    """Routes for the user's files."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._folder = base / "user" / "default"
        self._writing = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
                ("GET", "/users", self._users),
                ("GET", "/settings", self._settings),
                ("POST", "/settings", self._merge_settings),
                ("GET", "/settings/{id}", self._setting),
                ("POST", "/settings/{id}", self._change_setting),
                ("GET", "/userdata", self._list),
                ("GET", "/v2/userdata", self._list_all),
                ("GET", "/userdata/{file}", self._read),
                ("POST", "/userdata/{file}", self._write),
                ("DELETE", "/userdata/{file}", self._remove),
                ("POST", "/userdata/{file}/move/{dest}", self._move),
            ]
        )

    async def _users(self, request: web.Request) -> web.Response:
        return web.json_response({"storage": "server", "migrated": True})

    async def _settings(self, request: web.Request) -> web.Response:
        return web.json_response((await asyncio.to_thread(self._saved_settings))[0])

    async def _setting(self, request: web.Request) -> web.Response:
        saved, _ = await asyncio.to_thread(self._saved_settings)
        return web.json_response(saved.get(request.match_info["id"]))

    async def _merge_settings(self, request: web.Request) -> web.Response:
        changes = await read_json(request, kind=dict)
        await self._save_settings(changes)
        return web.Response()

    async def _change_setting(self, request: web.Request) -> web.Response:
        await self._save_settings({request.match_info["id"]: await read_json(request)})
        return web.Response()

    def _saved_settings(self) -> tuple[dict[str, Any], bool]:
        """The settings, and whether the file was read completely; an unreadable file does not stop the editor."""
        content, saved, is_all = b"{}", {}, False
        try:
            with contextlib.suppress(FileNotFoundError):
                content = read_regular(self._settings_file, at_most=MAX_JSON_BYTES)
            saved = parse_foreign_json(content)
            is_all = isinstance(saved, dict)
        except OSError:  # too large, a folder, or without permission
            pass
        except ValueError:  # other programs write NaN, duplicate keys and a byte order mark
            with contextlib.suppress(ValueError, RecursionError):
                saved = json.loads(content.decode("utf-8-sig"), parse_constant=lambda name: None)
        return FIRST_SETTINGS | (saved if isinstance(saved, dict) else {}), is_all

    async def _save_settings(self, changes: dict[str, Any]) -> None:
        async with self._writing:
            saved, is_all = await asyncio.to_thread(self._saved_settings)
            text = json.dumps(saved | changes, indent=4)
            if len(text) > MAX_JSON_BYTES:
                raise OutputError(f"settings must have at most {MAX_JSON_BYTES:,} bytes; remove some")
            if not is_all:
                await asyncio.to_thread(set_aside, self._base, [self._settings_file], self._settings_file.name)
            with disk_space(self._base, len(text)):
                await asyncio.to_thread(write_atomic, self._settings_file, text)

    @property
    def _settings_file(self) -> Path:
        return self._folder / "comfy.settings.json"

    async def _list(self, request: web.Request) -> web.Response:
        name = request.query.get("dir", "")
        if not name:
            return refused(400, "dir must name a folder, got none")
        folder = contained(self._folder, name)
        if not is_folder(folder):
            return refused(404, f"no folder {name!r}")
        recurse, full, split = (request.query.get(one, "").casefold() == "true" for one in _FLAGS)
        found = await asyncio.to_thread(_files_below, folder, recurse)
        if full:
            return web.json_response([_info(path, folder) for path in found])
        names = [path.relative_to(folder).as_posix() for path in found]
        return web.json_response([[one, *one.split("/")] for one in names] if split else names)

    async def _list_all(self, request: web.Request) -> web.Response:
        folder = contained(self._folder, unquote(request.query.get("path", "")))
        if not is_folder(folder):
            return web.json_response([]) if folder == self._folder.resolve() else refused(404, "no such folder")
        found = await asyncio.to_thread(_entries_below, folder, self._folder.resolve())
        return web.json_response(found)

    async def _read(self, request: web.Request) -> web.StreamResponse:
        path = self._path(request, "file")
        if not is_regular(path):
            return refused(404, "no such file")
        response = send_file(path)
        response.headers["Content-Disposition"] = "attachment"
        if path == self._folder.resolve() / "user.css":  # the user's own style sheet, which the editor links to
            response.headers["Content-Disposition"], response.headers["Content-Type"] = "inline", "text/css"
        return response

    async def _write(self, request: web.Request) -> web.Response:
        path = self._path(request, "file", to_write=True)
        if request.query.get("overwrite") == "false" and path.exists():
            return refused(409, "a file of this name exists")
        if is_folder(path):
            return refused(400, "a folder of this name exists")
        content = await read_body(request)
        async with self._writing:
            if request.query.get("overwrite") == "false" and path.exists():
                return refused(409, "a file of this name exists")
            with disk_space(self._base, len(content)):
                await asyncio.to_thread(write_atomic, path, content)
        return self._described(path, request)

    async def _remove(self, request: web.Request) -> web.Response:
        path = self._path(request, "file")
        if not is_regular(path):
            return refused(404, "no such file")
        async with self._writing:
            await asyncio.to_thread(set_aside, self._base, [path], path.name)
        return web.Response(status=204)

    async def _move(self, request: web.Request) -> web.Response:
        source, target = self._path(request, "file"), self._path(request, "dest", to_write=True)
        if not is_regular(source):
            return refused(404, "no such file")
        async with self._writing:
            # On case-insensitive file systems, a rename may change only the case.
            is_other = target.exists() and not target.samefile(source)
            if request.query.get("overwrite") == "false" and is_other:
                return refused(409, "a file of this name exists")
            if is_folder(target):
                return refused(400, "a folder of this name exists")
            if is_other:
                await asyncio.to_thread(set_aside, self._base, [target], target.name)
            ensure_folder(target.parent)
            await asyncio.to_thread(os.replace, source, target)
        return self._described(target, request)

    def _path(self, request: web.Request, name: str, *, to_write: bool = False) -> Path:
        """The file named in the address; some clients encode it twice."""
        path = contained(self._folder, unquote(request.match_info[name]), to_write=to_write)
        if path == self._folder.resolve():
            raise OutsideError("a file must be named")
        return path

    def _described(self, path: Path, request: web.Request) -> web.Response:
        full = request.query.get("full_info", "").casefold() == "true"
        root = self._folder.resolve()
        return web.json_response(_info(path, root) if full else path.relative_to(root).as_posix())


_FLAGS = ("recurse", "full_info", "split")
_MOST_FILES = 20_000


def _files_below(folder: Path, recurse: bool) -> list[Path]:
    """The regular files of a folder, except links that lead out of it."""
    found: list[Path] = []
    for path in sorted(folder.rglob("*") if recurse else folder.iterdir()):
        with contextlib.suppress(OutsideError, OSError):
            if is_regular(path) and contained(folder, path.relative_to(folder).as_posix()):
                found.append(path)
        if len(found) == _MOST_FILES:
            break
    return found


def _entries_below(folder: Path, root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in folder.rglob("*"):
        entry: dict[str, Any] = {"name": path.name, "path": path.relative_to(root).as_posix(), "type": "directory"}
        if is_regular(path):
            status = path.stat()
            entry |= {"type": "file", "size": status.st_size, "modified": status.st_mtime}
        found.append(entry)
        if len(found) == _MOST_FILES:
            break
    return sorted(found, key=lambda entry: (entry["type"] != "directory", entry["name"].casefold()))


def _info(path: Path, root: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": path.relative_to(root).as_posix(),
        "size": status.st_size,
        "modified": int(status.st_mtime * 1000),
        "created": int(status.st_ctime * 1000),
    }
