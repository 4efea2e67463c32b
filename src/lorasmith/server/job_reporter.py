"""What a job reports to the server, from the worker process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.server.channel import BlockingChannel
from lorasmith.server.event_json import PROGRESS, finite


class JobReporter:
    """Sends what one job reports to the server. A server that has gone ends nothing here; the job is cancelled then.

    Args:
        channel: to the server.
        base: base folder, to which ids of runs are relative.
    """

    def __init__(self, channel: BlockingChannel, base: Path) -> None:
        self._channel = channel
        self._base = base
        self._run = ""

    def notice(self, kind: str, data: Mapping[str, Any], *, droppable: bool = False, picture: bytes = b"") -> None:
        """Send a notice.

        Args:
            kind, data, droppable: as in `hub.Notice`.
            picture: encoded.
        """
        head = {"type": "notice", "kind": kind, "data": finite(data), "droppable": droppable}
        with contextlib.suppress(OSError):
            self._channel.send(head, picture)

    def run(self, folder: Path) -> None:
        """Send the id of the job's run."""
        folder = folder.resolve()
        is_inside = folder.is_relative_to(self._base)
        run = folder.relative_to(self._base).as_posix() if is_inside else folder.as_posix()
        if run != self._run:
            self._run = run
            with contextlib.suppress(OSError):
                self._channel.send({"type": "run", "run": run})

    def training(self, event: Mapping[str, Any]) -> None:
        """Send an event of training or of its preparation, from `event_json`."""
        if event["event"] == "RunStarted" and event["folder"]:
            self.run(Path(event["folder"]))
        self.notice("training", event, droppable=event["event"] in PROGRESS)
