"""Reports of a job to the server, from the worker process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.server.child_process import BlockingChannel
from lorasmith.server.event_json import PROGRESS, finite


class JobReporter:
    """Sends a job's reports. A closed channel is ignored here; it cancels the job. Run ids are relative to `base`."""

    def __init__(self, channel: BlockingChannel, base: Path) -> None:
        self._channel = channel
        self._base = base
        self._run = ""

    def notice(self, kind: str, data: Mapping[str, Any], *, droppable: bool = False, picture: bytes = b"") -> None:
        head = {"type": "notice", "kind": kind, "data": finite(data), "droppable": droppable}
        with contextlib.suppress(OSError):
            self._channel.send(head, picture)

    def run(self, folder: Path) -> None:
        folder = folder.resolve()
        is_inside = folder.is_relative_to(self._base)
        run = folder.relative_to(self._base).as_posix() if is_inside else folder.as_posix()
        if run != self._run:
            self._run = run
            with contextlib.suppress(OSError):
                self._channel.send({"type": "run", "run": run})

    def training(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "RunStarted" and event["folder"]:
            self.run(Path(event["folder"]))
        self.notice("training", event, droppable=event["event"] in PROGRESS)
