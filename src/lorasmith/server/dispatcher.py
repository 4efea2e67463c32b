"""The server's side of its workers: jobs and their reports to the hub, and questions for code that imports torch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from lorasmith.core.errors import LorasmithError
from lorasmith.core.processor import has_no_gpu
from lorasmith.runs.queue import ACTIVE, Job, JobKind, JobState, JobStateError, JobStore, StoreError
from lorasmith.runs.supervisor import AGAIN_S, RestartedProcess, Supervisor, WorkerConfig, queued_again
from lorasmith.server.hub import Hub, LogBook, Notice
from lorasmith.server.job_reporter import graph_end
from lorasmith.server.meter import Meter
from lorasmith.server.server_config import ServerConfig
from lorasmith.server.server_disk import disk_space
from lorasmith.server.tokens import CALLER


class RefusedError(LorasmithError):
    """A question raised an error in the assistant: the error's class name as `kind` (`InternalError` for a bug), its
    message, and JSON `details`, such as findings.
    """

    def __init__(self, kind: str, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = str(self)
        self.details = details


class UnavailableError(LorasmithError):
    """The assistant cannot answer now."""


class Assistant:
    """A worker without a device; `on_line` receives each line of its log."""

    def __init__(self, config: WorkerConfig, *, on_line: Callable[[str], None] = lambda line: None) -> None:
        self._log = config.log
        self.on_line = on_line
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[Mapping[str, Any], asyncio.Future[Any], int]] = {}
        self._progress: dict[int, Callable[[int, int], object]] = {}  # of open questions
        self._process = RestartedProcess(config, self, {})
        self._is_stopping = False
        self.is_ready = False  # questions wait until it is

    async def start(self) -> None:
        """Start the process; it is ready some seconds later."""
        await self._process.start()

    async def stop(self) -> None:
        """Stop the process; open questions fail."""
        self._is_stopping = True
        for _, answer, _ in self._open.values():
            _fail(answer, "the server is stopping; try again")
        self._open.clear()
        await self._process.stop(grace_s=2)

    async def ask(
        self, question: str, on_progress: Callable[[int, int], object] | None = None, /, **arguments: Any
    ) -> Any:
        """Call a `question` with JSON arguments; returns a JSON value, or bytes. `on_progress`
        receives (done, total) while it works, if the function reports it. Raises
        RefusedError if the call fails, and UnavailableError if the process ends twice during it or the server stops.
        """
        if self._is_stopping:
            raise UnavailableError("the server is stopping; start it again")
        number = next(self._numbers)
        head = {"type": "ask", "question": question, "arguments": arguments}
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[number] = head, answer, 0
        if on_progress is not None:
            self._progress[number] = on_progress
        if self.is_ready:
            self._process.send({**head, "number": number})
        try:
            return await answer
        except asyncio.CancelledError:  # whoever asked is gone
            if self.is_ready:
                self._process.send({"type": "give up", "number": number})
            raise
        finally:
            self._open.pop(number, None)
            self._progress.pop(number, None)

    def on_message(self, head: dict[str, Any], body: bytes) -> None:
        if head["type"] == "ready":
            self.is_ready = True
            for number, (asked, *_) in self._open.items():
                self._process.send({**asked, "number": number})
        if head["type"] == "progress" and (on_progress := self._progress.get(head["number"])) is not None:
            on_progress(head["done"], head["total"])
        if head["type"] != "answer":
            return
        _, answer, _ = self._open.get(head["number"], (None, None, 0))
        if answer is None or answer.done():  # the caller was cancelled
            return
        if (error := head.get("error")) is not None:
            answer.set_exception(RefusedError(error["kind"], error["message"], error.get("details")))
        else:
            answer.set_result(body if head.get("is_bytes") else head.get("result"))

    def on_end(self, why: str) -> None:
        was_ready, self.is_ready = self.is_ready, False
        if self._is_stopping:
            return
        self.on_line(f"the assistant ended: {why}; it is started again")
        for number, (head, answer, failures) in list(self._open.items()):
            if failures or not was_ready:
                _fail(answer, f"the server's assistant ended ({why}); try again, the log is {self._log}")
                self._open.pop(number)
            else:  # retried once
                self._open[number] = head, answer, failures + 1


def _fail(answer: asyncio.Future[Any], message: str) -> None:
    if not answer.done():
        answer.set_exception(UnavailableError(message))


_CLOCK_S = 1.0  # between looks at deadlines and minutes
_AGAIN: tuple[JobKind, ...] = ("train", "evaluate", "caption")
"""Kinds that wait again by themselves when their worker has ended. The client of a graph was told that it failed."""


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
        self._evaluating: set[asyncio.Task[None]] = set()
        self._displaced: set[str] = set()  # evaluations that make room, and wait again afterwards
        self._pages = 0  # that are open
        self._noted: dict[str, set[str]] = {}  # pictures that a notice was stored of, by running job
        self._clock: asyncio.Task[None] | None = None
        self._over: set[str] = set()  # running jobs that are stopped as they went beyond their limits
        self.meter = Meter()
        self.drained = asyncio.Event()  # it was drained, and no job runs any more

    async def start(self) -> None:
        """Start the workers in the background, as soon as the devices are known."""
        self._starting = asyncio.create_task(self._start_workers())
        self._clock = asyncio.create_task(self._look_at_clock())

    async def stop(self) -> None:
        """Stop the running jobs, which save their runs and become interrupted, and the workers."""
        for running in (self._starting, self._clock):
            if running is not None:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running
        for task in self._evaluating:
            task.cancel()
        await self._supervisor.stop()

    def kill(self) -> None:
        """Kill the workers; a running job becomes interrupted."""
        self._supervisor.kill()

    @property
    def is_draining(self) -> bool:
        return self._supervisor.is_draining

    def drain(self, *, drains: bool = True) -> None:
        """Start no further jobs, until this is called with False; sets `drained` when those that run have ended."""
        self._supervisor.is_draining = drains
        if drains:
            self._note_drained()
        else:
            self.drained.clear()
            self._supervisor.dispatch()

    def _note_drained(self) -> None:
        if self.is_draining and not any(worker.jobs for worker in self._supervisor.workers):
            self.drained.set()

    def submit(self, kind: JobKind, request: Mapping[str, Any], **more: Any) -> Job:
        """Queue a job, as `JobStore.add`. Raises QueueFullError, DuplicateJobError, DiskFullError and StoreError."""
        more = {"notify": self._config.notify, "submitter": CALLER.get() or None, **more}
        with disk_space(self._config.folder, len(json.dumps(request))):
            job = self._store.add(kind, request, **more)
        return self._queued(job)

    def _queued(self, job: Job) -> Job:
        """Start a job that waits now, if a device is free; else one that nobody asked for makes room."""
        self.changed(job)
        self._supervisor.dispatch()
        job = self._store.get(job.id)
        if job.state == "pending" and not job.gives_way:
            others = [
                running for running in self._store.running() if running.gives_way and running.id not in self._displaced
            ]
            if others:
                other = min(others, key=lambda running: running.kind != "measure")
                if other.kind == "evaluate":
                    self._displaced.add(other.id)
                self.cancel(other.id, pause=other.kind == "evaluate")
        return job

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
        return self._queued(self._store.requeue(id))

    def retry(self, id: str) -> Job:
        """Queue a new job with the request of an ended one, outside of the sweep if that run of it is complete. Raises
        UnknownJobError, JobStateError, QueueFullError.
        """
        job = self._store.get(id)
        if job.state in ACTIVE:
            raise JobStateError(f"a job can be repeated when it has ended, and this one is {job.state}")
        if job.sweep is not None and job.state == "completed":  # its folder holds the complete run
            return self.submit(job.kind, {**job.request, "output": None}, client_id=job.client_id)
        more = {
            "sweep": job.sweep,
            "varied": job.varied,
            "client_id": job.client_id,
            "priority": job.priority,
            "limits": job.limits,
            "notify": job.notify,
        }
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

    def set_draft(self, dataset: str, draft: Mapping[str, Any] | None) -> int:
        """Store what is chosen for a training on a dataset, None to forget it, and publish it; returns its version."""
        with disk_space(self._config.folder, 0 if draft is None else len(json.dumps(draft))):
            version = self._store.set_draft(dataset, draft)
        self._hub.publish(Notice(kind="draft", data={"dataset": dataset, "draft": draft, "version": version}))
        return version

    def interrupt(self) -> bool:
        """Cancel every running job; returns whether there is one."""
        stopped = [self.cancel(next(iter(worker.jobs))) for worker in self._supervisor.workers if worker.jobs]
        return any(stopped)

    def free(self, *, unload_models: bool = False, free_memory: bool = False) -> None:
        """Ask the workers to release what they cache for the next job."""
        if unload_models or free_memory:
            for worker in self._supervisor.workers:
                worker.process.send({"type": "free"})

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the context, a page is open. As long as nothing was ever queued, the first worker has the built-in
        model ready for a first click, and gives it back when the last page is closed.
        """
        self._pages += 1
        if self._pages == 1:
            self._prepare("warm")
        try:
            yield
        finally:
            self._pages -= 1
            if not self._pages:
                self._prepare("free")

    def _prepare(self, what: Literal["warm", "free"]) -> None:
        with contextlib.suppress(StoreError):  # whoever uses the queue next says it
            if not any(self._store.counts().values()):
                for worker in self._supervisor.workers[:1]:
                    worker.process.send({"type": what})

    def devices(self) -> list[dict[str, Any]]:
        """`{name, title, memory_bytes, free_bytes, state, job}` of each device, as far as known."""
        return [
            {**worker.device, "state": worker.state, "job": next(iter(worker.jobs), None)}
            for worker in self._supervisor.workers
        ]

    def device(self) -> dict[str, Any]:
        """The one that plans are for, the first; empty as long as none is known."""
        return next(iter(self.devices()), {})

    def worker_pids(self) -> list[int]:
        """Used by tests."""
        return [worker.process.pid for worker in self._supervisor.workers if worker.process.pid is not None]

    def changed(self, job: Job) -> None:
        self.meter.changed(job)
        self._log.note_job(job)
        self._note_drained()
        if job.state != "running":
            self._over.discard(job.id)
            self._noted.pop(job.id, None)
        if job.state == "interrupted":
            job = self._waiting_again(job)
        if job.id in self._displaced and job.state != "running":
            self._displaced.discard(job.id)
            if job.state == "paused":
                job = self._store.requeue(job.id)
        self._hub.publish(Notice(kind="job", job_id=job.id, data=job.summary(), client_id=job.client_id))
        self._publish_queue()
        if job.kind == "train" and job.request.get("evaluate") and job.run and job.state in ("completed", "cancelled"):
            task = asyncio.create_task(self._evaluate(job.run))
            self._evaluating.add(task)
            task.add_done_callback(self._evaluating.discard)

    def notice(self, job: Job, head: Mapping[str, Any], body: bytes) -> None:
        if head["kind"] == "view":
            self.meter.viewed(job, head["data"]["view"])
            self._check_limits(job, head["data"]["view"])
            if job.notify is not None:
                self._note_pictures(job, head["data"]["view"])
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
        self._log.add("worker", text, jobs=[job.id for job in jobs])

    def trouble(self, error: StoreError) -> None:
        self._log.add("server", str(error))

    def lost(self, job: Job, error: Mapping[str, Any] | None) -> dict[str, Any]:
        if job.kind != "graph":
            return {}
        last, message = graph_end(job.id, error)
        return {"last": last, "messages": [message]}

    def _waiting_again(self, job: Job) -> Job:
        """A job that has lost its worker, queued again if it is of a kind that can be and it makes progress."""
        if job.kind not in _AGAIN:
            return job
        try:
            job = queued_again(self._store, job, None if job.run is None else self._config.base / job.run)
        except StoreError as error:  # it stays interrupted, to be continued
            self.trouble(error)
        if job.state == "pending":
            self._log.note_job(job)
            asyncio.get_running_loop().call_soon(self._supervisor.dispatch)
        return job

    async def _look_at_clock(self) -> None:
        while True:
            await asyncio.sleep(_CLOCK_S)
            for worker in self._supervisor.workers:
                for job in list(worker.jobs.values()):
                    self._check_limits(job)
            try:
                for job in self._store.overdue():
                    self.changed(self._store.finish(job.id, "failed", error=_beyond(job)))
            except StoreError as error:
                self.trouble(error)

    def _note_pictures(self, job: Job, view: Mapping[str, Any]) -> None:
        """Store a notice of each preview that a run has drawn since the last view of this attempt."""
        noted = self._noted.setdefault(job.id, set())
        for preview in view.get("previews", ()):
            if preview["file"] not in noted:
                noted.add(preview["file"])
                with contextlib.suppress(StoreError):
                    self._store.add_notice(job, {"kind": "picture", "run": view.get("run"), **preview})

    def _check_limits(self, job: Job, view: Mapping[str, Any] | None = None) -> None:
        """Stop a running job that went beyond one of its limits; it saves its run."""
        if job.id not in self._over and (error := _beyond(job, view)) is not None:
            self._over.add(job.id)
            self._supervisor.cancel(job.id, "failed", error, alone=True)

    async def _evaluate(self, run: str) -> None:
        """Queue the evaluation of a run behind all other jobs, unless it has one or cannot be evaluated."""
        try:
            request = await self._assistant.ask("evaluation_afterwards", id=run)
            waiting = any(
                queued.request.get("gives_way") for queued in self._store.about(run) if queued.state in ACTIVE
            )
            if request is not None and not waiting:
                self.submit("evaluate", {**request, "gives_way": True})
        except LorasmithError as error:
            self._log.add("server", f"{run} is not evaluated: {error}")

    async def _start_workers(self) -> None:
        devices = self._config.devices
        if devices is None and has_no_gpu():  # asking takes as long as torch takes to be imported
            devices = [{"name": "cpu", "title": "CPU"}]
        while devices is None:
            try:
                devices = await self._assistant.ask("devices")
            except LorasmithError as error:
                self._log.add("server", f"the devices are not known: {error}")
                await asyncio.sleep(AGAIN_S)
        await self._supervisor.start(devices)
        if self._pages:
            self._prepare("warm")

    def _publish_queue(self) -> None:
        try:
            self._hub.publish(Notice(kind="queue", data=self._store.queue_counts()))
        except StoreError as error:
            self.trouble(error)


def _beyond(job: Job, view: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The error of a job that went beyond its deadline or one of its limits; `view` is the last one of its run."""
    now, limits = time.time(), job.limits
    if job.deadline is not None and now >= job.deadline:
        at = datetime.fromtimestamp(job.deadline).isoformat(sep=" ", timespec="seconds")
        message = f"the job had to end by {at}, its deadline, and did not; queue it with a later one to train on"
        return {"kind": "DeadlineError", "message": message}
    found: tuple[str, float, float] | None = None
    spent = job.spent_s + (now - job.started if job.started is not None else 0.0)
    if (most := limits.get("minutes")) is not None and job.state == "running" and spent >= 60 * most:
        found = "minutes", spent / 60, most
    shown = {metric["name"]: metric["value"] for metric in (view or {}).get("metrics", ())}
    shown["steps"] = (view or {}).get("steps", 0)
    for limit, name in (("steps", "steps"), ("memory_bytes", "memory")):
        if (most := limits.get(limit)) is not None and shown.get(name, 0) > most:
            found = limit, shown[name], most
    if found is None:
        return None
    name, value, most = found
    message = (
        f"the job may have at most {most:,} {name}, its limit, and came to {value:,.4g}; queue it with a higher one"
    )
    return {"kind": "LimitError", "message": message}
