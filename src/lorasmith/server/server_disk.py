"""The disk of the server: requests leave 1 GiB free for run states and the database, and delete nothing.

Files that are removed or replaced are moved to `<base>/user/lorasmith/removed`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path

from lorasmith.core.errors import OutputError
from lorasmith.core.files import ensure_folder
from lorasmith.core.folders import safe_name
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
        try:
            shutil.move(path, target / path.name)
        except OSError as error:
            raise OutputError(
                f"{path.name} cannot be moved away ({error.strerror or error}); close programs that use it"
            ) from error
    return target


def keep_captions(base: Path, dataset: str, captions: Mapping[str, str]) -> None:
    """Append replaced captions, by picture, to one file for each dataset, as a page saves while the user types."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S")
    lines = [json.dumps({"at": at, "file": file, "caption": text}) for file, text in captions.items()]
    with (ensure_folder(base / _REMOVED) / f"{safe_name(dataset)}-captions.jsonl").open("a") as log:
        log.write("".join(f"{line}\n" for line in lines))
