"""Folders of the encoding cache on disk: where they are, their files, and removing these.

Only files with the cache's own names are used; links are not followed. A file that is missing or cannot be removed is
not an error, as other processes work on the same folders.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path

from lorasmith.core.files import ensure_folder

_LEFT_SECONDS = 3600  # age from which a temporary file is a leftover of a killed process

_TEMPORARY_NAME = re.compile(r"\..+\.tmp")  # as `core.files.atomic_path` calls them


def system_cache() -> Path:
    """The folder in which programs keep what they can make again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def ensure_private(folder: Path) -> None:
    """Create a folder that only its owner can read, as latents can be decoded to pictures."""
    ensure_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)


def named_files(folder: Path, name: re.Pattern[str]) -> list[os.DirEntry[str]]:
    """Regular files whose names match, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            found = [one for one in entries if name.fullmatch(one.name) and one.is_file(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(found, key=lambda one: one.name)


def stat_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The entry's stat; None if the file is gone."""
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:
        return None


def removed(path: Path) -> bool:
    """Remove a file; whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that were killed while writing."""
    for file in named_files(folder, _TEMPORARY_NAME):
        stat = stat_of(file)
        if stat is not None and time.time() - stat.st_mtime > _LEFT_SECONDS:
            removed(Path(file.path))
