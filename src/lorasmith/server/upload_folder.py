"""Where the files of a request are until they are checked and moved: `<base>/user/lorasmith/uploads`."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lorasmith.core.errors import OutputError
from lorasmith.server.error_answers import TooManyError
from lorasmith.server.server_config import FOLDER

__all__ = ["MOST_UPLOADS", "SPARE_BYTES", "upload_folder"]

MOST_UPLOADS = 16
"""Requests at once."""
SPARE_BYTES = 2**30
"""Of the disk that uploads leave free."""

_OLD_S = 24 * 3600
_open: set[object] = set()


@contextlib.contextmanager
def upload_folder(base: Path) -> Iterator[Path]:
    """A folder for the files of a request, on the disk of the base folder; it is removed afterwards.

    Raises:
        TooManyError: there are too many uploads at once.
        OutputError: the disk is nearly full, or cannot be written.
    """
    if len(_open) >= MOST_UPLOADS:
        raise TooManyError(f"there must be at most {MOST_UPLOADS} uploads at once; wait for the others")
    key = object()
    _open.add(key)
    try:
        with _new_folder(base / FOLDER / "uploads") as place:
            yield Path(place)
    finally:
        _open.discard(key)


def _new_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(parent).free < SPARE_BYTES:
            raise OutputError(f"the disk of {parent} has less than {SPARE_BYTES // 2**30} GiB left; free some space")
        for left in parent.iterdir():  # by a server that was killed
            if left.stat().st_mtime < time.time() - _OLD_S:
                shutil.rmtree(left, ignore_errors=True)
        return tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"uploads cannot be written to {parent} ({error.strerror}); check its permissions") from error
