"""The disk of the server: requests leave 1 GiB free for run states and the database, and delete nothing.

Files that are removed or replaced are moved to `<base>/user/lorasmith/removed`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Literal

from lorasmith.core.errors import OutputError
from lorasmith.core.files import ensure_folder, is_folder, is_regular
from lorasmith.core.folders import RUN_RECORD, safe_name
from lorasmith.server.server_config import FOLDER

SPARE_BYTES = 2**30

_promised: dict[object, int] = {}  # reservations of writes in progress


class DiskFullError(OutputError):
    """A request would leave too little free disk space."""


@contextlib.contextmanager
def disk_space(folder: Path, size: int = 0) -> Iterator[None]:
    """Reserve bytes on the disk of a folder. Raises DiskFullError if less than `SPARE_BYTES` would remain."""
    if shutil.disk_usage(folder).free - sum(_promised.values()) - size < SPARE_BYTES:
        least = f"{SPARE_BYTES // 2**30} GiB"
        raise DiskFullError(f"less than {least} of the disk of {folder} would be left; free some space")
    key = object()
    _promised[key] = size
    try:
        yield
    finally:
        del _promised[key]


_REMOVED = FOLDER / "removed"


def removed_folder(base: Path) -> Path:
    """The folder with what was removed."""
    return base / _REMOVED


def set_aside(base: Path, paths: Iterable[Path], name: str) -> Path:
    """Move files or folders to a new folder among the removed ones, and return it. Raises OutputError."""
    parent = ensure_folder(base / _REMOVED)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_name(name)}"
    for number in count(1):
        target = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            target.mkdir()
            break
        except FileExistsError:
            continue
    for path in paths:
        move(path, target / path.name, "away")
    return target


def move(path: Path, target: Path, where: Literal["away", "back"]) -> None:
    """Move a file or folder. Raises OutputError."""
    try:
        shutil.move(path, target)
    except OSError as error:
        raise OutputError(
            f"{path.name} cannot be moved {where} ({error.strerror or error}); close programs that use it"
        ) from error


def put_back(base: Path, removed: str, name: str, folder: Path) -> int:
    """Move the files that `set_aside` put into `removed`, relative to `base`, under `name`, back into a folder; returns
    how many.

    Raises FileNotFoundError if that holds no files of this name, FileExistsError with a name that is in use, and
    OutputError.
    """
    files = [path for path in sorted(_removed(base, removed, name).iterdir()) if is_regular(path)]
    if not files:
        raise FileNotFoundError(removed)
    if taken := next((file.name for file in files if os.path.lexists(folder / file.name)), None):
        raise FileExistsError(taken)
    for file in files:
        move(file, folder / file.name, "back")
    return len(files)


def put_folder_back(base: Path, removed: str, folder: Path, *, is_run: bool = False) -> None:
    """Move a folder that `set_aside` put into `removed` back to its place.

    Raises FileNotFoundError if it is missing, or holds a run where `is_run` is False or none where it is True,
    FileExistsError if its place is taken, and OutputError.
    """
    parent = _removed(base, removed, folder.name)
    source = parent / folder.name
    if not is_folder(source) or source.is_symlink() or is_regular(source / RUN_RECORD) is not is_run:
        raise FileNotFoundError(removed)
    if os.path.lexists(folder):
        raise FileExistsError(folder.name)
    move(source, folder, "back")
    if not any(parent.iterdir()):
        parent.rmdir()


def _removed(base: Path, removed: str, name: str) -> Path:
    """The folder that `set_aside` made for a name. Raises FileNotFoundError for any other."""
    place = base / removed
    wanted = re.compile(rf"[0-9]{{8}}-[0-9]{{6}}-{re.escape(safe_name(name))}(-[0-9]+)?")
    if place.parent != base / _REMOVED or not wanted.fullmatch(place.name) or not place.is_dir():
        raise FileNotFoundError(removed)
    return place


def keep_captions(base: Path, dataset: str, captions: Mapping[str, str]) -> None:
    """Append replaced captions, by picture, to one file for each dataset, as a page saves while the user types."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S")
    lines = [json.dumps({"at": at, "file": file, "caption": text}) for file, text in captions.items()]
    with (ensure_folder(base / _REMOVED) / f"{safe_name(dataset)}-captions.jsonl").open("a") as log:
        log.write("".join(f"{line}\n" for line in lines))
