"""A worker without a model: it takes the jobs that the server hands out, and reports what a test has it report."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Mapping
from typing import Any

from lorasmith.runs.child_process import ChildOwner
from lorasmith.runs.queue import measurement_subject

SECONDS_PER_STEP = 0.42
"""As measured."""


class ScriptedProcess:
    """In place of a `ChildProcess`: the worker of a device, or the process of a download.

    Attributes:
        first: the message that it was started with.
        jobs: those that it has taken, but for measurements, which end at once.
        before_cancel: saves what it trains, when that is cancelled.
    """

    pid = None

    def __init__(self, owner: ChildOwner) -> None:
        self._owner = owner
        self.is_running = False
        self.first: Mapping[str, Any] = {}
        self.before_cancel: Callable[[], object] = lambda: None
        self.jobs: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()

    async def start(self, first: Mapping[str, Any]) -> None:
        self.first, self.is_running = first, True
        if "device" in first:
            self.tell("ready", device={"free_bytes": 40 * 2**30})

    def tell(self, type: str, **message: Any) -> None:
        """Send a message to the server."""
        if self.is_running:
            self._owner.on_message({"type": type, **message}, b"")

    def send(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        if head["type"] == "jobs":
            (job,) = head["jobs"]
            if job["kind"] == "measure":
                _soon(lambda: self._measured(job))
            else:
                self.jobs.put(job)
        elif head["type"] == "cancel":
            _soon(lambda: self._cancelled(head["id"]))

    def ended(self, id: str, state: str, **end: Any) -> None:
        """Report the end of a job, and be ready for the next one."""
        self.before_cancel = lambda: None
        self.tell("ended", id=id, state=state, **end)
        self.tell("ready")

    def _cancelled(self, id: str) -> None:
        self.before_cancel()
        self.ended(id, "cancelled")

    def kill(self, why: str) -> None:
        self.end(why)

    async def close(self, grace_s: float) -> None:
        self.end("it was stopped")

    def end(self, why: str = "") -> None:
        if self.is_running:
            self.is_running = False
            self._owner.on_end(why)

    def _measured(self, job: Mapping[str, Any]) -> None:
        request = job["request"]
        subject = measurement_subject(request["model"], request["settings"], self.first["device"])
        self.ended(job["id"], "completed", found={"subject": subject, "values": {"seconds_per_step": SECONDS_PER_STEP}})


def _soon(act: Callable[[], object]) -> None:
    asyncio.get_running_loop().call_soon(act)
