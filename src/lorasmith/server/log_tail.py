"""The views of runs from their logs, each read on from where it was read to.

A resumed run rewrites its log without the events that it repeats: that is another file, which is read from its start.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

from lorasmith.core.files import open_regular
from lorasmith.runs.view import RunView
from lorasmith.training.events import MOST_LINE_BYTES, decoded
from lorasmith.training.storage.records import MOST_EVENTS


def view_of_log(path: Path) -> dict[str, Any]:
    """The view of a log as JSON; the log need not exist yet."""
    tail = _tail(path)
    with tail.lock:
        tail.read()
        return tail.view.to_json()


class LogTail:
    """The view of a log; `read` takes the complete lines that are new."""

    def __init__(self, path: Path) -> None:
        self.view = RunView()
        self.lock = threading.Lock()  # questions are answered in several threads
        self._path = path
        self._inode = self._offset = self._events = 0

    def read(self) -> None:
        try:
            with open_regular(self._path) as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset, self._events, self.view = status.st_ino, 0, 0, RunView()
                file.seek(self._offset)
                while self._events < MOST_EVENTS and (line := file.readline(MOST_LINE_BYTES)):
                    if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                        break  # it is being written
                    self._offset += len(line)
                    self._take(line)
        except OSError:
            return

    def _take(self, line: bytes) -> None:
        try:
            event = decoded(line.decode(errors="replace"))
        except ValueError:
            return
        self._events += 1
        self.view.take(event)


@functools.lru_cache(maxsize=4)
def _tail(path: Path) -> LogTail:
    return LogTail(path)
