"""Reserved disk space: requests leave 1 GiB free for run states and the database."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorasmith.core.errors import OutputError

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
