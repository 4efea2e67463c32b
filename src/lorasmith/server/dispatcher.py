"""Runs the queue: sends jobs to workers, and their reports to the hub and the database.

A `WorkerLink` is the server's side of one worker: its process, restarted when it ends, and its job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from lorasmith.core.errors import LorasmithError
from lorasmith.core.launched import VISIBLE_GPUS, gpu_variable
from lorasmith.server.assistant import Assistant
from lorasmith.server.child_process import ChildProcess, RestartPause
from lorasmith.server.hub import Hub, LogBook, Notice
from lorasmith.server.job_reporter import graph_end
from lorasmith.server.jobs import Job, JobKind, JobState, JobStateError, JobStore, StoreError
from lorasmith.server.server_config import ServerConfig

_STOPPED = "the server was stopped while the job was running; continue it"

_AGAIN_S = 5.0  # seconds between attempts to record the end of a job on a full disk


class Dispatcher:
    """Queues, starts, stops and continues jobs. Methods raise StoreError, without any change, if the database fails."""

    def __init__(self, config: ServerConfig, store: JobStore, hub: Hub, assistant: Assistant, log: LogBook) -> None:
        self._config = config
        self._store = store
        self._hub = hub
        self._assistant = assistant
        self._log = log
        self._workers: list[WorkerLink] = []
        self._stops: dict[str, JobState] = {}  # by job: the state that replaces "cancelled"
        self._unrecorded: dict[str, dict[str, Any]] = {}
        self._recording: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def start(self) -> None:
        """Start the workers in the background, as soon as the devices are known."""
        self._starting = asyncio.create_task(self._start_workers())

    async def stop(self) -> None:
        """Stop the running jobs, which save their runs and become interrupted, and the workers."""
        self._is_stopping = True
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._starting
        for worker in self._workers:
            if worker.job is not None:
                self._stops.setdefault(worker.job.id, "interrupted")
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        if self._recording is not None:
            self._recording.cancel()

    def kill(self) -> None:
        """Kill the workers; a running job becomes interrupted."""
        for worker in self._workers:
            worker.kill()

    def submit(
        self,
        kind: JobKind,
        request: Mapping[str, Any],
        *,
        id: str | None = None,
        client_id: str | None = None,
        front: bool = False,
        number: float | None = None,
    ) -> Job:
        """Queue a job, as `JobStore.add`. Raises QueueFullError, DuplicateJobError and StoreError."""
        job = self._store.add(kind, request, id=id, client_id=client_id, front=front, number=number)
        self._changed(job)
        self._dispatch()
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
            if worker := next((one for one in self._workers if one.job is not None and one.job.id == id), None):
                self._stops[id] = state
                worker.cancel()
                return True
            return False  # its end is being recorded
        if job.state == "pending" or (job.state in ("paused", "interrupted") and job.state != state):
            job = self._store.finish(
                id, state, outputs=job.outputs, messages=job.messages, error=job.error if pause else None
            )
            self._changed(job)
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
        self._changed(job)
        self._dispatch()
        return self._store.get(id)

    def retry(self, id: str) -> Job:
        """Queue a new job with the request of an ended one. Raises UnknownJobError, JobStateError, QueueFullError."""
        job = self._store.get(id)
        if job.state in ("pending", "running"):
            raise JobStateError(f"a job can be repeated when it has ended, and this one is {job.state}")
        return self.submit(job.kind, job.request, client_id=job.client_id)

    def move(self, id: str, front: bool) -> Job:
        """Move a waiting job to the front or the end. Raises UnknownJobError and JobStateError."""
        job = self._store.move(id, front)
        self._changed(job)
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
        running = [one.job.id for one in self._workers if one.job is not None]
        stopped = [self.cancel(id) for id in running]
        return any(stopped)

    def free(self, *, unload_models: bool = False, free_memory: bool = False) -> None:
        """Ask the workers to release what they cache for the next job."""
        for worker in self._workers:
            worker.free(models=unload_models, memory=free_memory)

    def devices(self) -> list[dict[str, Any]]:
        """`{name, title, memory_bytes, free_bytes, state, job}` of each device, as far as known."""
        return [
            {
                **{key: value for key, value in worker.device.items() if key != "visible"},
                "state": worker.state,
                "job": None if worker.job is None else worker.job.id,
            }
            for worker in self._workers
        ]

    def worker_pids(self) -> list[int]:
        """Used by tests."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def _start_workers(self) -> None:
        devices = self._config.devices
        while devices is None:
            try:
                devices = await self._assistant.ask("devices")
            except LorasmithError as error:
                self._log.add("server", f"the devices are not known: {error}")
                await asyncio.sleep(_AGAIN_S)
        gpus = 0
        for number, device in enumerate(devices):
            seen: dict[str, Any] = {}
            if str(device["name"]).startswith("cuda"):
                seen = {"visible": gpu_variable(gpus)}
                gpus += 1
            link = WorkerLink(
                self._config,
                number,
                {**device, **seen},
                on_line=lambda line: self._log.add("worker", line),
                on_message=self._hear,
                on_change=self._dispatch,
                on_lost=self._lost,
            )
            self._workers.append(link)
        await asyncio.gather(*(worker.start() for worker in self._workers))

    def _dispatch(self) -> None:
        # A worker left by a killed server may still be saving the run that one of the jobs continues.
        if self._is_stopping or not all(worker.has_lock for worker in self._workers):
            return
        for worker in self._workers:
            if worker.state == "ready":
                try:
                    job = self._store.claim(worker.name)
                except StoreError as error:
                    self._log.add("server", str(error))
                    asyncio.get_running_loop().call_later(_AGAIN_S, self._dispatch)
                    return
                if job is None:
                    return
                worker.run(job)
                self._changed(job)

    def _hear(self, worker: WorkerLink, head: dict[str, Any], body: bytes) -> None:
        job = worker.job
        match head["type"]:
            case "notice" if job is not None:
                self._publish(job, head, body)
            case "run" if job is not None:
                with self._logged():
                    self._store.set_run(job.id, head["run"])
                    self._changed(self._store.get(job.id))
            case "ended" if job is not None:
                self._end(job, head)

    def _publish(self, job: Job, head: Mapping[str, Any], body: bytes) -> None:
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

    def _end(self, job: Job, head: Mapping[str, Any]) -> None:
        state: JobState = head["state"]
        stop = self._stops.pop(job.id, None)
        error = head.get("error")
        if state == "cancelled":
            state = stop or "interrupted"  # not requested: the worker is stopping
            error = {"kind": "Interrupted", "message": _STOPPED} if state == "interrupted" else None
        if head.get("found") is not None:
            with self._logged():
                self._store.set_measurement(head["found"]["subject"], head["found"]["values"])
        self._record(
            job,
            {
                "state": state,
                "outputs": head.get("outputs") or {},
                "error": error,
                "messages": head.get("messages") or [],
            },
            head.get("last"),
        )

    def _lost(self, job: Job, why: str) -> None:
        """Ends a job whose worker has ended."""
        state = self._stops.pop(job.id, "interrupted")
        message = f"the worker ended while the job was running: {why}; continue the job, the log is {self._config.log}"
        error = {"kind": "WorkerEnded", "message": message} if state == "interrupted" else None
        last, said = graph_end(job.id, error)
        is_graph = job.kind == "graph"
        self._record(
            job, {"state": state, "error": error, "messages": [said] if is_graph else []}, last if is_graph else None
        )

    def _record(self, job: Job, end: dict[str, Any], last: Mapping[str, Any] | None) -> None:
        """Record the end of a job, later if the disk is full; then publish its last notice."""
        try:
            job = self._store.finish(job.id, **end)
        except StoreError as error:
            self._log.add("server", str(error))
            self._unrecorded[job.id] = {"job": job, "end": end, "last": last}
            if self._recording is None or self._recording.done():
                self._recording = asyncio.create_task(self._record_again())
            return
        if last is not None:
            self._publish(job, last, b"")
        self._changed(job)

    async def _record_again(self) -> None:
        while self._unrecorded:
            await asyncio.sleep(_AGAIN_S)
            waiting, self._unrecorded = self._unrecorded, {}
            for one in waiting.values():
                self._record(one["job"], one["end"], one["last"])

    def _changed(self, job: Job) -> None:
        self._hub.publish(Notice(kind="job", job_id=job.id, data=job.summary(), client_id=job.client_id))
        self._publish_queue()

    def _publish_queue(self) -> None:
        with self._logged():
            self._hub.publish(Notice(kind="queue", data=self._store.queue_counts()))

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """Log StoreErrors; the job continues."""
        try:
            yield
        except StoreError as error:
            self._log.add("server", str(error))


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
