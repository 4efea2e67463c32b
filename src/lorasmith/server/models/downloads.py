"""Downloads of the server, one at a time in a child process, apart from the queue, so that they wait for no training.

They outlive the pages that show them. What arrived of one that failed or was cancelled, or whose server ended, is on
the disk (`HubFile.part`); starting it again continues there.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasmith.core.errors import LorasmithError
from lorasmith.runs.child_process import ChildProcess
from lorasmith.server.hub import LogBook
from lorasmith.server.models.model_shapes import DownloadAnswer
from lorasmith.server.questions import shaped
from lorasmith.server.server_config import ServerConfig
from lorasmith.server.server_disk import SPARE_BYTES

COMMAND = (sys.executable, "-P", "-m", "lorasmith.runs.hub_download")
_MOST_KEPT = 20  # downloads that have ended
_GRACE_S = 2.0
_SILENCE_S = 60.0
_STALLED_S = 5.0  # without progress, after which the speed is 0


class DownloadStateError(LorasmithError):
    """A download is in a state in which this cannot be done."""


class UnknownDownloadError(LorasmithError):
    """There is no download of this id."""


@dataclass
class _Download:
    """What is known of a download, and its process while it runs."""

    id: str
    subject: str  # what it is for; two downloads for the same make no sense
    title: str
    files: Sequence[Mapping[str, str]]
    state: str = "waiting"
    progress: dict[str, Any] = field(default_factory=dict)
    heard: float = 0.0  # when it last reported progress, by `time.monotonic`
    error: dict[str, Any] | None = None
    child: ChildProcess | None = None

    @property
    def has_ended(self) -> bool:
        return self.state not in ("waiting", "running")


class Downloads:
    """The downloads since the server started."""

    def __init__(self, config: ServerConfig, log: LogBook) -> None:
        self._config = config
        self._log = log
        self._all: dict[str, _Download] = {}
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    def add(self, subject: str, title: str, files: Sequence[Mapping[str, str]]) -> DownloadAnswer:
        """Start to download files (`repository`, `file`, `path`), after those that were added before. Raises
        DownloadStateError if the same is downloaded already.
        """
        if any(download.subject == subject and not download.has_ended for download in self._all.values()):
            raise DownloadStateError(f"{title} is being downloaded already; wait for it")
        for download in [download for download in self._all.values() if download.subject == subject]:
            del self._all[download.id]  # this one continues it
        added = _Download(str(next(self._ids)), subject, title, files)
        self._all[added.id] = added
        self._next()
        return _answer(added)

    def list(self) -> tuple[DownloadAnswer, ...]:
        """All of them, the last first."""
        return tuple(_answer(download) for download in reversed(self._all.values()))

    def cancel(self, id: str) -> DownloadAnswer:
        """Stop a download that waits or runs. Raises UnknownDownloadError, and DownloadStateError if it has ended."""
        download = self._known(id)
        if download.has_ended:
            raise DownloadStateError("this download has ended; there is nothing to cancel")
        was_running, download.state = download.state == "running", "cancelled"
        if was_running and download.child is not None:
            self._apart(download.child.close(_GRACE_S))
        self._next()
        return _answer(download)

    def forget(self, id: str) -> None:
        """Remove one that has ended from the list. Raises UnknownDownloadError and DownloadStateError."""
        if not self._known(id).has_ended:
            raise DownloadStateError("this download has not ended; cancel it first")
        del self._all[id]

    async def stop(self) -> None:
        """Stop the process; what has arrived stays."""
        self._is_stopping = True
        for download in self._all.values():
            if download.child is not None:
                await download.child.close(_GRACE_S)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _known(self, id: str) -> _Download:
        if id not in self._all:
            raise UnknownDownloadError(f"there is no download {id[:40]!r}; look at the list")
        return self._all[id]

    def _next(self) -> None:
        """Start the one that waits longest, if none runs."""
        for download in [download for download in self._all.values() if download.has_ended][:-_MOST_KEPT]:
            del self._all[download.id]
        if self._is_stopping or any(download.child is not None for download in self._all.values()):
            return
        first = next((download for download in self._all.values() if download.state == "waiting"), None)
        if first is not None:
            first.state = "running"
            first.child = ChildProcess(
                COMMAND, _Owner(self, first), cwd=self._config.base, silence_s=_SILENCE_S, environment={}
            )
            self._apart(self._start(first, first.child))

    async def _start(self, download: _Download, child: ChildProcess) -> None:
        start = {
            "type": "start",
            "files": list(download.files),
            "spare_bytes": SPARE_BYTES,
            "log": str(self._config.log),
        }
        try:
            await child.start(start)
        except OSError as error:
            self.ended(download, f"it cannot be started, {error}")

    def _apart(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def line(self, text: str) -> None:
        self._log.add("download", text)

    def reported(self, download: _Download, head: Mapping[str, Any]) -> None:
        """A message of its process."""
        if head["type"] == "progress":
            download.progress = {key: value for key, value in head.items() if key != "type"}
            download.heard = time.monotonic()
        elif head["type"] == "ended" and not download.has_ended:
            download.state, download.error = head["state"], head.get("error")

    def ended(self, download: _Download, why: str) -> None:
        """Its process has ended."""
        download.child = None
        if not download.has_ended:
            message = f"the download ended ({why}); get it again to continue"
            download.state, download.error = (
                "failed",
                {"kind": "InternalError", "message": str(LorasmithError(message))},
            )
        self._next()


class _Owner:
    """Hears the process of a download."""

    def __init__(self, downloads: Downloads, download: _Download) -> None:
        self._downloads = downloads
        self._download = download

    def on_message(self, head: dict[str, Any], body: bytes) -> None:
        self._downloads.reported(self._download, head)

    def on_line(self, line: str) -> None:
        self._downloads.line(line)

    def on_end(self, why: str) -> None:
        self._downloads.ended(self._download, why)


def _answer(download: _Download) -> DownloadAnswer:
    error = download.error or {}
    heard = {
        "file": "",
        "done_bytes": 0,
        "total_bytes": 0,
        "bytes_per_s": 0.0,
        "is_checking": False,
        **download.progress,
    }
    if time.monotonic() - download.heard >= _STALLED_S:
        heard["bytes_per_s"] = 0.0
    accept = (error.get("details") or {}).get("accept", "")
    return shaped(DownloadAnswer, download, **heard, error=error.get("message", ""), accept=accept)
