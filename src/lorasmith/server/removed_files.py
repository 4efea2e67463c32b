"""Files that the server removes or replaces are moved to `<base>/user/lorasmith/removed`, never deleted."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from lorasmith.core.errors import OutputError
from lorasmith.core.files import ensure_folder
from lorasmith.core.folders import safe_name
from lorasmith.server.server_config import FOLDER

_REMOVED = FOLDER / "removed"


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
