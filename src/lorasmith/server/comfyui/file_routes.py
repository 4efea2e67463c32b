"""Files: pictures of the input, output and temp folders, viewed and uploaded; and the editor's user files (saved
workflows, settings, style sheet) below `<base>/user/default`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import BodyPartReader, web

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.files import atomic_path, ensure_folder, is_folder, is_regular, read_regular, write_atomic
from lorasmith.core.folders import BUILT_IN_BASE, PLACES, Folders, annotated
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.server.contained_files import (
    UNTRUSTED,
    OutsideError,
    checked_name,
    contained,
    find_contained,
    send_file,
)
from lorasmith.server.dispatcher import Assistant
from lorasmith.server.request_handling import (
    MAX_JSON_BYTES,
    MAX_UPLOAD_BYTES,
    TooLargeError,
    blocks,
    form_parts,
    read_body,
    read_json,
    read_object,
    received,
    refused,
    table,
    upload_folder,
)
from lorasmith.server.server_disk import disk_space, set_aside

_MOST_FIELDS, _LONGEST_FIELD = 20, 20_000
_MOST_COPIES = 10_000


def place_folders(folders: Folders, place: str) -> list[Path]:
    """The folders in which a place's files are searched; `input` includes the built-in pictures."""
    return [folders.base / place, *([BUILT_IN_BASE / "input"] if place == "input" else [])]


class FileRoutes:
    """The routes of pictures; `assistant` reads and writes them."""

    def __init__(self, folders: Folders, assistant: Assistant) -> None:
        self._folders = folders
        self._assistant = assistant
        self._naming = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return table(
            [
                ("GET", "/view", self._view),
                ("POST", "/upload/image", self._upload),
                ("POST", "/upload/mask", self._upload_mask),
                ("GET", "/internal/files/{place}", self._list),
            ]
        )

    async def _view(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        path = self._existing(query.get("filename", ""), query.get("subfolder", ""), query.get("type"))
        if path is None:
            return refused(404, "there is no such file")
        channel, preview = query.get("channel", "rgba"), query.get("preview")
        if preview is None and channel not in ("rgb", "a"):
            return send_file(path)
        kind, quality = _preview(preview, channel)
        content = await self._assistant.ask(
            "encoded_picture",
            path=str(path),
            channel=channel if channel in ("rgb", "a") else "rgba",
            format=kind,
            quality=quality,
        )
        headers = {"Content-Security-Policy": UNTRUSTED, "Cache-Control": "no-cache"}
        return web.Response(body=content, content_type=f"image/{kind}", headers=headers)

    def _existing(self, name: str, subfolder: str, place: str | None) -> Path | None:
        """The file of a reference, or None. Raises OutsideError and OptionError."""
        name, named = annotated(name)
        if not name:
            raise OptionError("filename must name a file, got none")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise OptionError("filename must stay inside its folder; use a relative name")
        return find_contained(place_folders(self._folders, _place(named or place, "output")), subfolder, name)

    async def _upload(self, request: web.Request) -> web.Response:
        with upload_folder(self._folders.base) as folder:
            form = await self._received(request, folder)
            return await self._store(form, form.file)

    async def _upload_mask(self, request: web.Request) -> web.Response:
        with upload_folder(self._folders.base) as folder:
            form = await self._received(request, folder)
            try:
                reference = parse_foreign_json(form.values.get("original_ref", ""))
                original = self._existing(*(str(reference.get(key) or "") for key in ("filename", "subfolder", "type")))
            except (ValueError, AttributeError):
                raise OptionError("original_ref must be an object with the filename of a picture") from None
            if original is None:
                return refused(404, "there is no such original picture")
            masked = folder / "masked.png"
            content = await self._assistant.ask("masked_picture", original=str(original), mask=str(form.file))
            with disk_space(folder, len(content)):
                await asyncio.to_thread(masked.write_bytes, content)
            return await self._store(form, masked)

    async def _received(self, request: web.Request, folder: Path) -> _Form:
        values: dict[str, str] = {}
        file: Path | None = None
        name = ""
        async for part in form_parts(request):
            if part.name == "image" and file is None:
                name = checked_name(part.filename or "")
                file = folder / "file"
                await received(part, file, at_most=MAX_UPLOAD_BYTES, read_at_most=MAX_UPLOAD_BYTES)
            elif len(values) < _MOST_FIELDS:
                values[str(part.name)] = (await _limited(part)).decode(errors="replace")
            else:
                raise TooLargeError(f"an upload must have at most {_MOST_FIELDS} fields; send less")
        if file is None:
            raise OptionError("an upload must have a file named image")
        return _Form(values, file, name)

    async def _store(self, form: _Form, content: Path) -> web.Response:
        """Move an upload to its place, renamed unless the existing file is identical or may be overwritten."""
        place = _place(form.values.get("type"), "input")
        subfolder = form.values.get("subfolder", "").replace("\\", "/").strip("/")
        folder = contained(self._folders.base / place, subfolder, to_write=True)
        is_overwriting = form.values.get("overwrite", "").casefold() in ("true", "1")
        async with self._naming:
            ensure_folder(folder)
            name = form.name if is_overwriting else await asyncio.to_thread(_free_name, folder, form.name, content)
            target = contained(folder, name)
            if target.is_dir():
                return refused(400, "a folder of this name exists; rename the file")
            await asyncio.to_thread(self._put, content, target, keep=place != "temp")
        return web.json_response({"name": name, "subfolder": subfolder, "type": place})

    def _put(self, content: Path, target: Path, *, keep: bool) -> None:
        """Move a file to its place, unless it is there; with `keep`, the file that it replaces is set aside."""
        if target.exists():
            if _is_same(content, target):
                return
            if keep:
                set_aside(self._folders.base, [target], target.name)
        content.chmod(0o644)
        try:
            content.replace(target)
        except OSError:  # on another disk
            with atomic_path(target) as temporary:
                shutil.copyfile(content, temporary)

    async def _list(self, request: web.Request) -> web.Response:
        place = request.match_info["place"]
        if place not in PLACES:
            return refused(400, f"a folder must be {', '.join(PLACES)}, got {place[:40]!r}")
        found = await asyncio.to_thread(_newest_first, self._folders.base / place)
        return web.json_response([f"{name} [{place}]" for name in found])


@dataclass(frozen=True)
class _Form:
    """A form: its values by name, and the path and name of its file."""

    values: dict[str, str]
    file: Path
    name: str


def _place(name: str | None, default: str) -> str:
    if name is None or name == "":
        return default
    if name not in PLACES:
        raise OptionError(f"type must be one of {', '.join(PLACES)}, got {name[:40]!r}")
    return name


def _preview(text: str | None, channel: str) -> tuple[str, int]:
    """Format and quality of `webp;90`; one channel is PNG unless a preview is requested."""
    if text is None:
        return "png", 90
    kind, _, quality = text.partition(";")
    number = int(quality) if quality.isdecimal() and len(quality) < 4 else 90
    return kind if kind in ("webp", "jpeg") and "a" not in channel.replace("rgba", "") else "webp", number


async def _limited(part: BodyPartReader) -> bytes:
    content = b""
    async for chunk in blocks(part):
        content += chunk
        if len(content) > _LONGEST_FIELD:
            raise TooLargeError(f"a field of a form must have at most {_LONGEST_FIELD:,} bytes; send less")
    return content


def _free_name(folder: Path, name: str, content: Path) -> str:
    """`name`, numbered if a file with other content has it, ignoring case."""
    stem, dot, suffix = name.rpartition(".")
    stem, suffix = (stem, dot + suffix) if stem else (name, "")
    taken = {entry.name.casefold(): entry.name for entry in os.scandir(folder)}
    for number in range(_MOST_COPIES):
        candidate = f"{stem} ({number}){suffix}" if number else name
        if (there := taken.get(candidate.casefold())) is None:
            return candidate
        if _is_same(content, folder / there):
            return there
    raise OutputError(f"{_MOST_COPIES:,} files have the name {name!r} already; rename it")


def _is_same(content: Path, path: Path) -> bool:
    is_as_long = is_regular(path) and path.stat().st_size == content.stat().st_size
    return is_as_long and _digest(path) == _digest(content)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _newest_first(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # a link to itself, or a deleted file
            if not entry.name.startswith(".") and entry.is_file():
                found.append((-entry.stat().st_mtime, entry.name))
    return [name for _, name in sorted(found)]


FIRST_SETTINGS: dict[str, Any] = {"Comfy.Notification.ShowVersionUpdates": False}
"""Defaults of the editor's settings; it does not check for its own updates."""


class UserFiles:
    """The routes of the user's files."""

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
        changes = await read_object(request)
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
        recurse, full, split = (request.query.get(flag, "").casefold() == "true" for flag in _FLAGS)
        paths = await asyncio.to_thread(_files_below, folder, recurse)
        if full:
            return web.json_response([_info(path, folder) for path in paths])
        names = [path.relative_to(folder).as_posix() for path in paths]
        return web.json_response([[name, *name.split("/")] for name in names] if split else names)

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
    paths: list[Path] = []
    for path in sorted(folder.rglob("*") if recurse else folder.iterdir()):
        with contextlib.suppress(OutsideError, OSError):
            if is_regular(path) and contained(folder, path.relative_to(folder).as_posix()):
                paths.append(path)
        if len(paths) == _MOST_FILES:
            break
    return paths


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
