"""What child processes and packages say: the last lines in memory, all of them in a file, each to whoever listens."""

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

    @contextlib.contextmanager
    def receiving(self, *packages: str) -> Iterator[None]:
        """Inside the context, log records of packages become lines here, whose file has a limit, and are not printed.

        For the event loop's thread. What a client does wrong, such as malformed requests, is left out.
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
        """Add the lines of a text.

        Args:
            source: name of the process.
            text: the lines.
        """
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
