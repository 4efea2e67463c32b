"""Follows a run's log: its complete lines after a place, as events.

A place is `<file>-<offset>`, where `file` is the inode. A resumed run rewrites its log without the events that it
repeats: that is another file, which is read from its start.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.core.files import open_regular
from lorasmith.training.events import MOST_LINE_BYTES

_BLOCK = 2**20  # bytes read at a time


@dataclass(frozen=True)
class LoggedEvent:
    """An event: the place after it, and its JSON object with finite numbers."""

    place: str
    data: dict[str, Any]


class LogTail:
    """Reads new events from a log, which need not exist yet, after a place (from the start if empty or of another
    file). `begins_again`: the last `read` began at the start because the file was replaced.
    """

    def __init__(self, path: Path, after: str = "") -> None:
        self._path = path
        number, _, offset = after.partition("-")
        is_place = len(after) < 50 and number.isdecimal() and offset.isdecimal()
        self._number = int(number) if is_place else 0
        self._offset = int(offset) if is_place else 0
        self.begins_again = False

    def read(self) -> list[LoggedEvent]:
        """The events of complete lines in the next block; none at the end, or if the file cannot be read."""
        self.begins_again = False
        try:
            with open_regular(self._path) as file:
                number = os.fstat(file.fileno()).st_ino
                size = file.seek(0, 2)
                if number != self._number or size < self._offset:
                    self.begins_again = self._offset > 0
                    self._number, self._offset = number, 0
                file.seek(self._offset)
                content = file.read(_BLOCK)
                if b"\n" not in content and len(content) == _BLOCK:
                    content += file.read(MOST_LINE_BYTES)
        except OSError:
            return []
        end = content.rfind(b"\n") + 1
        if not end and len(content) > MOST_LINE_BYTES:
            end = len(content)
        events = []
        for line in content[:end].splitlines(keepends=True):
            self._offset += len(line)
            if (data := _object(line)) is not None:
                events.append(LoggedEvent(f"{self._number}-{self._offset}", data))
        return events


def end_of_log(path: Path) -> str:
    """The place at the end of a log; empty if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_ino}-{status.st_size}"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line, parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None
