"""Pictures that lie elsewhere, as folders on this disk: those at a URL that fsspec opens, and those in a ZIP archive.

    s3://bucket/fox        every file below it
    https://host/fox.zip   an archive, unpacked

A folder is fetched once for each state of its files, which are compared by name, size and the version that the store
gives, and kept in a cache. Names of a stranger's store or archive never lead out of it.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from lorasmith.core.errors import DataError, LorasmithError
from lorasmith.core.files import ensure_folder, folder_once, is_folder
from lorasmith.core.printable import printable
from lorasmith.core.stores import checked_name, is_url, open_store, reached
from lorasmith.data.data_config import ARCHIVE, DataConfig, ImageSource
from lorasmith.data.encoding_cache import key_of

_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified", "last_modified", "Content-MD5")
_MOST_FILES, _MOST_GROWTH, _SMALL = 200_000, 20, 2**26  # of an archive: members, times its size, bytes in any case
_KEPT_S = 24 * 3600.0  # a folder that was used since then may be in use
_PREFIX = "fetched-"


def local_folder(path: str, cache: Path, *, limit_gib: float) -> Path:
    """The folder in `cache` with the pictures of a URL or an archive.

    Folders that were not used for a day are removed, the oldest first, until the cache has at most `limit_gib`. Raises
    DataError if the pictures cannot be had, OutputError if they cannot be written.
    """
    if not is_url(path):
        file = Path(path)
        state = file.stat()
        folder = _made(cache, path, [str(file.resolve()), state.st_size, state.st_mtime_ns], _unpacking(file, path))
    else:
        folder = _fetched(path, cache)
    os.utime(folder)
    _keep_limit(cache, limit_gib * 2**30)
    # As most programs pack a folder, not its files.
    inner = [entry for entry in folder.iterdir() if not _is_hidden(entry.name)]
    return inner[0] if len(inner) == 1 and is_folder(inner[0]) else folder


def local_sources(sources: Iterable[ImageSource], config: DataConfig, cache: Path) -> tuple[ImageSource, ...]:
    """The sources, with the folders in `cache` of those that lie elsewhere; errors are those of `local_folder`."""
    return tuple(
        replace(source, path=str(local_folder(source.path, cache, limit_gib=config.cache_limit)))
        if source.lies_elsewhere
        else source
        for source in sources
    )


def _fetched(url: str, cache: Path) -> Path:
    store, root = open_store(url, DataError)
    with reached(url, DataError):
        files = _files(store, root, url)

    def fetch(target: Path) -> None:
        with reached(url, DataError):
            for name, info in files.items():
                place = target / name
                ensure_folder(place.parent)
                store.get_file(info["name"], str(place))
                if info.get("size") not in (None, place.stat().st_size):
                    raise EOFError(f"{name} has not all of its bytes")
        if root.lower().endswith(ARCHIVE) and len(files) == 1:
            (archive,) = (target / name for name in files)
            _unpacking(archive, url)(target)
            archive.unlink()

    state = {name: [info.get("size"), *(str(info.get(key)) for key in _VERSIONS)] for name, info in files.items()}
    return _made(cache, url, state, fetch)


def _files(store: Any, root: str, url: str) -> Mapping[str, Mapping[str, Any]]:
    """The files at an address, by their names below it. Raises DataError if one leads out of it, or there are none."""
    if root.startswith("http"):  # has no folders
        if not urlsplit(root).path.lower().endswith(ARCHIVE):
            raise DataError(f"an address of the web must be that of a {ARCHIVE} file, got {url}; pack the pictures")
        return {f"archive{ARCHIVE}": store.info(root)}
    found = store.find(root, detail=True)
    files = {}
    for path, info in found.items():
        name = PurePosixPath(path).name if path == root else path.removeprefix(root).lstrip("/")
        if not name or name.endswith("/") or _is_hidden(name):  # markers of folders
            continue
        files[checked_name(name, url, DataError)] = {"name": path, **info}
    if not files:
        raise DataError(f"{url} has no files; correct the address")
    return files


def _unpacking(file: Path, shown: str) -> Callable[[Path], None]:
    """What unpacks an archive into a folder; DataError, also for one that would fill a disk."""

    def unpack(target: Path) -> None:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [
                    member
                    for member in archive.infolist()
                    if not member.is_dir()
                    and not _is_hidden(member.filename)
                    and not stat.S_ISLNK(member.external_attr >> 16)
                ]
                most = max(_MOST_GROWTH * file.stat().st_size, _SMALL)
                if len(members) > _MOST_FILES or sum(member.file_size for member in members) > most:
                    raise DataError(
                        f"{shown} unpacks to more than {_MOST_GROWTH} times its size, or to more than {_MOST_FILES:,} "
                        "files; pack pictures and captions alone"
                    )
                for member in members:
                    place = target / checked_name(member.filename, shown, DataError)
                    ensure_folder(place.parent)
                    with archive.open(member) as source, place.open("xb") as written:
                        shutil.copyfileobj(source, written)
        except LorasmithError:
            raise
        except Exception as error:  # of any kind, as the file is untrusted
            raise DataError(f"{shown} cannot be unpacked ({printable(error, limit=100)}); pack it again") from error

    return unpack


def _made(cache: Path, source: str, state: object, make: Callable[[Path], None]) -> Path:
    """The folder of a source in a state."""
    target = cache / f"{_PREFIX}{key_of(source=source, state=state)[:24]}"
    return folder_once(target, f"{source} is being fetched to {target}", make)


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


def _keep_limit(cache: Path, limit_bytes: float) -> None:
    folders = []
    for folder in cache.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another process removes it
            if folder.is_dir():
                size = sum(file.stat().st_size for file in folder.rglob("*"))
                folders.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in folders)
    for modified, size, folder in sorted(folders):
        if total <= limit_bytes or time.time() - modified < _KEPT_S:
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= size
