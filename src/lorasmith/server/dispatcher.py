"""The server's queue: what its API does with jobs, and their reports to the hub."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorasmith.core.errors import LorasmithError
from lorasmith.runs.queue import ACTIVE, Job, JobKind, JobState, JobStateError, JobStore, StoreError
from lorasmith.runs.supervisor import AGAIN_S, Supervisor
from lorasmith.server.assistant import Assistant
from lorasmith.server.hub import Hub, LogBook, Notice
from lorasmith.server.job_reporter import graph_end
from lorasmith.server.server_config import ServerConfig
from lorasmith.server.server_disk import disk_space


class Dispatcher:
    """Queues, starts, stops and continues jobs. Methods raise StoreError, without any change, if the database fails."""

    def __init__(self, config: ServerConfig, store: JobStore, hub: Hub, assistant: Assistant, log: LogBook) -> None:
        self._config = config
        self._store = store
        self._hub = hub
        self._assistant = assistant
        self._log = log
        self._supervisor = Supervisor(config.workers, store, self)
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the workers in the background, as soon as the devices are known."""
        self._starting = asyncio.create_task(self._start_workers())

    async def stop(self) -> None:
        """Stop the running jobs, which save their runs and become interrupted, and the workers."""
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._starting
        await self._supervisor.stop()

    def kill(self) -> None:
        """Kill the workers; a running job becomes interrupted."""
        self._supervisor.kill()

    def submit(self, kind: JobKind, request: Mapping[str, Any], **more: Any) -> Job:
        """Queue a job, as `JobStore.add`. Raises QueueFullError, DuplicateJobError, DiskFullError and StoreError."""
        with disk_space(self._config.folder, len(json.dumps(request))):
            job = self._store.add(kind, request, **more)
        self.changed(job)
        self._supervisor.dispatch()
        return self._store.get(job.id)

    def cancel(self, id: str, *, pause: bool = False) -> bool:
        """Stop a waiting or running job, or give up a paused or interrupted one; returns whether there is one. A
        running job saves its run and ends later; a second cancel after `patience_s` kills its worker.
        """
        job = self._store.find(id)
        if job is None:
            return False
        state: JobState = "paused" if pause else "cancelled"
        if job.state == "running":
            return self._supervisor.cancel(id, state)  # without a worker, its end is being recorded
        if job.state == "pending" or (job.state in ("paused", "interrupted") and job.state != state):
            job = self._store.finish(
                id, state, outputs=job.outputs, messages=job.messages, error=job.error if pause else None
            )
            self.changed(job)
            return True
        return False

    def proceed(self, id: str) -> Job:
        """Continue a job that is paused, interrupted or cancelled, or one that failed, from its last run state. Raises
        UnknownJobError, and JobStateError in other states or without a run state.
        """
        job = self._store.get(id)
        if job.state not in ("paused", "interrupted", "cancelled", "failed"):
            raise JobStateError(
                "a job can be continued when it is paused, interrupted or cancelled or has failed, and this one is "
                f"{job.state}"
            )
        states = None if job.run is None else self._config.base / job.run / "states"
        if job.state == "failed" and not (states and states.is_dir() and any(states.iterdir())):
            raise JobStateError("a job that failed can be continued from a run state, and this one has none; repeat it")
        job = self._store.requeue(id)
        self.changed(job)
        self._supervisor.dispatch()
        return self._store.get(id)

    def retry(self, id: str) -> Job:
        """Queue a new job with the request of an ended one. Raises UnknownJobError, JobStateError, QueueFullError."""
        job = self._store.get(id)
        if job.state in ACTIVE:
            raise JobStateError(f"a job can be repeated when it has ended, and this one is {job.state}")
        more = {"sweep": job.sweep, "varied": job.varied, "client_id": job.client_id}
        return self.submit(job.kind, job.request, **more)

    def move(self, id: str, front: bool) -> Job:
        """Move a waiting job to the front or the end. Raises UnknownJobError and JobStateError."""
        job = self._store.move(id, front)
        self.changed(job)
        return job

    def remove(self, ids: Sequence[str]) -> list[str]:
        """Remove jobs that are not running from queue and history; returns the removed ids."""
        removed = self._store.remove(ids)
        for id in removed:
            self._hub.publish(Notice(kind="job", job_id=id, data={"id": id, "removed": True}, droppable=True))
        self._publish_queue()
        return removed

    def interrupt(self) -> bool:
        """Cancel every running job; returns whether there is one."""
        stopped = [self.cancel(next(iter(worker.jobs))) for worker in self._supervisor.workers if worker.jobs]
        return any(stopped)

    def free(self, *, unload_models: bool = False, free_memory: bool = False) -> None:
        """Ask the workers to release what they cache for the next job."""
        if unload_models or free_memory:
            for worker in self._supervisor.workers:
                worker.process.send({"type": "free"})

    def devices(self) -> list[dict[str, Any]]:
        """`{name, title, memory_bytes, free_bytes, state, job}` of each device, as far as known."""
        return [
            {**worker.device, "state": worker.state, "job": next(iter(worker.jobs), None)}
            for worker in self._supervisor.workers
        ]

    def worker_pids(self) -> list[int]:
        """Used by tests."""
        return [worker.process.pid for worker in self._supervisor.workers if worker.process.pid is not None]

    def changed(self, job: Job) -> None:
        self._hub.publish(Notice(kind="job", job_id=job.id, data=job.summary(), client_id=job.client_id))
        self._publish_queue()

    def notice(self, job: Job, head: Mapping[str, Any], body: bytes) -> None:
        self._hub.publish(
            Notice(
                kind=head["kind"],
                job_id=job.id,
                data=head["data"],
                binary=body or None,
                client_id=job.client_id,
                droppable=head.get("droppable", False),
            )
        )

    def line(self, text: str, jobs: Sequence[Job]) -> None:
        self._log.add("worker", text)

    def trouble(self, error: StoreError) -> None:
        self._log.add("server", str(error))

    def lost(self, job: Job, error: Mapping[str, Any] | None) -> dict[str, Any]:
        if job.kind != "graph":
            return {}
        last, message = graph_end(job.id, error)
        return {"last": last, "messages": [message]}

    async def _start_workers(self) -> None:
        devices = self._config.devices
        while devices is None:
            try:
                devices = await self._assistant.ask("devices")
            except LorasmithError as error:
                self._log.add("server", f"the devices are not known: {error}")
                await asyncio.sleep(AGAIN_S)
        await self._supervisor.start(devices)

    def _publish_queue(self) -> None:
        try:
            self._hub.publish(Notice(kind="queue", data=self._store.queue_counts()))
        except StoreError as error:
            self.trouble(error)
