"""The log of child processes and packages: last lines in memory, all of them in a file, each published as a notice."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from aiohttp.http import HttpProcessingError

from lorasmith.core.files import ensure_folder
from lorasmith.core.printable import printable
from lorasmith.server.hub import Hub, Notice

_REMEMBERED = 500
_LONGEST = 4_000
_MOST_BYTES = 10 * 2**20


class LogBook:
    """The log of a server; `entries` are the last lines, each `{"t": ISO time, "m": text}`. At 10 MiB the file at
    `path` (None for none) is renamed to `<name>.1`. The hub receives each line as a `log` notice.
    """

    def __init__(self, path: Path | None, hub: Hub) -> None:
        self.path = path
        self._hub = hub
        self.entries: deque[dict[str, str]] = deque(maxlen=_REMEMBERED)
        if path is not None:
            ensure_folder(path.parent)

    @contextlib.contextmanager
    def receiving(self, *packages: str) -> Iterator[None]:
        """Inside the context, log records of packages are added here instead of printed, except errors of clients, such
        as malformed requests. Use it in the event loop's thread.
        """
        loop = asyncio.get_running_loop()
        handler = _Handler(lambda text: loop.call_soon_threadsafe(self.add, "server", text))
        loggers = [logging.getLogger(name) for name in packages]
        for one in loggers:
            one.addHandler(handler)
            one.propagate = False
        try:
            yield
        finally:
            for one in loggers:
                one.removeHandler(handler)
                one.propagate = True

    def add(self, source: str, text: str) -> None:
        """Add the lines of a text; `source` is the name of the process."""
        for line in text.splitlines():
            self._add(source, line)

    def _add(self, source: str, text: str) -> None:
        entry = {"t": datetime.now().isoformat(timespec="milliseconds"), "m": printable(text, limit=_LONGEST)}
        self.entries.append(entry)
        if self.path is not None:
            with contextlib.suppress(OSError):  # a full disk costs log entries, not the server
                if self.path.exists() and self.path.stat().st_size > _MOST_BYTES:
                    self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{entry['t']} {source}: {entry['m']}\n")
        self._hub.publish(Notice(kind="log", data=entry, droppable=True))


class _Handler(logging.Handler):
    def __init__(self, receive: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info or not isinstance(record.exc_info[1], HttpProcessingError):
            self._receive(self.format(record))
