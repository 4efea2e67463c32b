"""The server's side of one worker: its process, restarted when it ends, and its job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from lorasmith.core.launched import VISIBLE_GPUS
from lorasmith.server.child_process import ChildProcess, RestartPause
from lorasmith.server.jobs import Job
from lorasmith.server.server_config import ServerConfig

WorkerState: TypeAlias = Literal["starting", "waiting", "loading", "ready", "busy", "gone"]
"""`waiting`: for the worker of an earlier server, which is still saving. `loading`: importing torch. `gone`: the
process has ended and is being restarted.
"""


class WorkerLink:
    """One worker and the job that it runs; `number` is part of its lock file's name. `on_message` receives its messages
    about jobs, `on_lost` the job and a reason if the process ends during one.
    """

    def __init__(
        self,
        config: ServerConfig,
        number: int,
        device: Mapping[str, Any],
        *,
        on_line: Callable[[str], None],
        on_message: Callable[[WorkerLink, dict[str, Any], bytes], None],
        on_change: Callable[[], None],
        on_lost: Callable[[Job, str], None],
    ) -> None:
        self._config = config
        self._number = number
        self._on_line = on_line
        self._on_message = on_message
        self._on_change = on_change
        self._on_lost = on_lost
        self._child: ChildProcess | None = None
        self._restart: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._pause = RestartPause()
        self._asked_at: float | None = None
        self.device = dict(device)
        self.job: Job | None = None
        self.state: WorkerState = "starting"

    @property
    def name(self) -> str:
        return f"worker {self._number} ({self.device['name']})"

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    @property
    def has_lock(self) -> bool:
        """Whether no worker of another server can be running in its place."""
        return self.state not in ("starting", "waiting")

    async def start(self) -> None:
        """Start the process; it is ready some seconds later."""
        config, name = self._config, str(self.device["name"])
        self.state = "starting"
        visible = {VISIBLE_GPUS: self.device["visible"]} if "visible" in self.device else {}
        self._child = ChildProcess(
            config.worker_command,
            cwd=config.base,
            silence_s=config.silence_s,
            on_message=self._hear,
            on_line=self._on_line,
            on_end=self._on_end,
            environment=visible,
        )
        try:
            await self._child.start(
                {
                    **config.first_message,
                    "lock": str(config.folder / f"worker-{self._number}.lock"),
                    "grace_s": config.grace_s,
                    "device": name,
                }
            )
        except OSError as error:
            self._on_end(f"it cannot be started, {error}")

    def run(self, job: Job) -> None:
        assert self._child is not None
        self.job, self.state, self._asked_at = job, "busy", None
        request = {"id": job.id, "kind": job.kind, "request": job.request, "run": job.run}
        self._child.send({"type": "job", **request})

    def cancel(self) -> None:
        """Ask the worker to stop its job and save; a second call after `patience_s` seconds kills it."""
        if self._child is None or self.job is None:
            return
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._child.send({"type": "cancel", "id": self.job.id})
        elif now - self._asked_at >= self._config.patience_s:
            self._child.kill("it did not stop when its job was cancelled")

    def free(self, *, models: bool, memory: bool) -> None:
        """Ask the worker to release cached models or memory when it is idle."""
        if self._child is not None:
            self._child.send({"type": "free", "models": models, "memory": memory})

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill("the server was ended at once")

    async def stop(self) -> None:
        """Stop the process; a running job is saved."""
        self._is_stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self._child is not None:
            # The worker exits by itself after the grace; then it is killed.
            await self._child.close(self._config.grace_s + 2)

    def _hear(self, head: dict[str, Any], body: bytes) -> None:
        match head["type"]:
            case "waiting" | "loading":
                self.state = head["type"]
                self._on_change()
            case "ready":
                self._pause.reset()
                self.device.update(head.get("device", {}))
                self.state = "ready"
                self._on_message(self, head, body)
                self._on_change()
            case "ended":
                if self.job is not None and head["id"] == self.job.id:
                    self.device.update(head.get("device", {}))
                    self._on_message(self, head, body)
                    self.job, self.state = None, "ready"
                    self._on_change()
            case _:
                if self.job is not None:
                    self._on_message(self, head, body)

    def _on_end(self, why: str) -> None:
        self.state = "gone"
        job, self.job, self._child = self.job, None, None
        self._on_line(f"{self.name} ended: {why}")
        if job is not None:
            self._on_lost(job, why)
        if not self._is_stopping:
            self._restart = asyncio.create_task(self._start_again())
        self._on_change()

    async def _start_again(self) -> None:
        await self._pause.wait()
        await self.start()
