"""Pictures and other files of the input, output and temp folders: viewing and uploading."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from aiohttp import BodyPartReader, web

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.files import atomic_path, ensure_folder, is_regular
from lorasmith.core.folders import ASSETS, PLACES, Folders, annotated
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.server.assistant import Assistant
from lorasmith.server.comfyui.answers import refused, table
from lorasmith.server.contained_files import UNTRUSTED, checked_name, contained, find_contained, send_file
from lorasmith.server.request_handling import (
    MAX_UPLOAD_BYTES,
    TooLargeError,
    blocks,
    form_parts,
    received,
    upload_folder,
)
from lorasmith.server.server_disk import disk_space, set_aside

_MOST_FIELDS, _LONGEST_FIELD = 20, 20_000
_MOST_COPIES = 10_000


def place_folders(folders: Folders, place: str) -> list[Path]:
    """The folders in which a place's files are searched; `input` includes the built-in pictures."""
    return [folders.base / place, *([ASSETS / "input"] if place == "input" else [])]


class FileRoutes:
    """The routes; `assistant` reads and writes pictures, and an upload has at most `most_bytes`."""

    def __init__(self, folders: Folders, assistant: Assistant, *, most_bytes: int = MAX_UPLOAD_BYTES) -> None:
        self._folders = folders
        self._assistant = assistant
        self._most_bytes = most_bytes
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
                await received(part, file, at_most=self._most_bytes, read_at_most=self._most_bytes)
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


class _Form:
    """A form: its values by name, and the path and name of its file."""

    def __init__(self, values: dict[str, str], file: Path, name: str) -> None:
        self.values = values
        self.file = file
        self.name = name


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
