"""What child processes print: the last lines in memory, all of them in a file, each to whoever listens."""

from __future__ import annotations

import contextlib
from collections import deque
from datetime import datetime
from pathlib import Path

from lorasmith.core.files import ensure_folder
from lorasmith.core.printable import printable
from lorasmith.server.hub import Hub, Notice

__all__ = ["LogBook"]

_REMEMBERED = 500
_LONGEST = 4_000
_MOST_BYTES = 10 * 2**20


class LogBook:
    """The log of a server.

    Args:
        path: the file; when it is 10 MiB long, it becomes `<name>.1`. None for no file.
        hub: receives each line as a notice of kind `log`.

    Attributes:
        entries: the last lines, each `{"t": ISO time, "m": text}`.
    """

    def __init__(self, path: Path | None, hub: Hub) -> None:
        self.path = path
        self._hub = hub
        self.entries: deque[dict[str, str]] = deque(maxlen=_REMEMBERED)
        if path is not None:
            ensure_folder(path.parent)

    def add(self, source: str, text: str) -> None:
        """Add a line.

        Args:
            source: name of the process.
            text: the line.
        """
        entry = {"t": datetime.now().isoformat(timespec="milliseconds"), "m": printable(text, limit=_LONGEST)}
        self.entries.append(entry)
        if self.path is not None:
            with contextlib.suppress(OSError):  # a full disk costs log entries, not the server
                if self.path.exists() and self.path.stat().st_size > _MOST_BYTES:
                    self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{entry['t']} {source}: {entry['m']}\n")
        self._hub.publish(Notice(kind="log", data=entry, droppable=True))
