"""The last GiB of the disk, which no request fills: what has no room on a full disk are run states and the database."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorasmith.core.errors import OutputError

SPARE_BYTES = 2**30
"""Of the disk that requests leave free."""

_promised: dict[object, int] = {}  # bytes that are being written, which the system does not count yet


class DiskFullError(OutputError):
    """A request would leave too little of the disk."""


@contextlib.contextmanager
def disk_space(folder: Path, size: int = 0) -> Iterator[None]:
    """Inside the context, `size` bytes may be written to the disk of a folder, which exists.

    Raises:
        DiskFullError: less than `SPARE_BYTES` would be left, with what others write now.
    """
    if shutil.disk_usage(folder).free - sum(_promised.values()) - size < SPARE_BYTES:
        least = f"{SPARE_BYTES // 2**30} GiB"
        raise DiskFullError(f"less than {least} of the disk of {folder} would be left; free some space")
    key = object()
    _promised[key] = size
    try:
        yield
    finally:
        del _promised[key]
