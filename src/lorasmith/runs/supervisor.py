"""Carries out the jobs of a queue in worker processes, one for each device, without importing torch.

A worker is started again whenever it ends, at once and then after longer and longer pauses until it is ready; what it
was doing is `interrupted`. What jobs report, and what changes of them, goes to a `QueueListener`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from lorasmith.core.errors import OutputError
from lorasmith.core.files import write_atomic
from lorasmith.core.launched import VISIBLE_GPUS, gpu_variable
from lorasmith.runs.child_process import ChildOwner, ChildProcess
from lorasmith.runs.queue import WORKER_ENDED, Job, JobState, JobStore, StoreError

AGAIN_S = 5.0  # seconds between attempts to record the end of a job on a full disk

WORKER_COMMAND = (sys.executable, "-P", "-m", "lorasmith.runs.worker")
"""With -P: it may run in a folder whose files must not be imported."""


class _Stop(NamedTuple):
    """How a job ends that is stopped."""

    state: JobState
    error: Mapping[str, Any] | None = None


_STOPPED = {"kind": "Interrupted", "message": "the server was stopped while the job was running; continue it"}
_STOPPED_WITH = {"kind": "Interrupted", "message": "a job that trained with it had to stop; continue it"}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 60.0
MOST_LOSSES = 5  # workers that a job may lose in a row without a new run state, before it no longer waits again


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How worker processes are started, and how patient their supervisor is."""

    start: Mapping[str, Any]  # of their first message: `kinds`, and the folders of `folders_of_start`
    cwd: Path
    log: Path  # with their output, named in messages
    locks: Path | None = None  # folder of their locks; None if no worker of an earlier supervisor can be left
    fences: Path | None = None  # folder of the notes of `core.fence`; None for none
    command: Sequence[str] = WORKER_COMMAND
    silence_s: float = 60.0  # without a heartbeat, after which a worker is restarted
    patience_s: float = 10.0  # after a cancel, from which a second cancel kills the worker
    grace_s: float = 60.0  # for a worker to save its runs when it is to end


class QueueListener(Protocol):
    """What a supervisor tells; called in the event loop."""

    def changed(self, job: Job) -> None:
        """A job started, ended or has a run folder."""

    def notice(self, job: Job, head: Mapping[str, Any], body: bytes) -> None:
        """A report of a running job: `kind`, `data`, `droppable`."""

    def line(self, text: str, jobs: Sequence[Job]) -> None:
        """A line of a worker's stderr, or about its end, with the jobs that it runs."""

    def trouble(self, error: StoreError) -> None:
        """The database cannot be written; it is tried again later."""

    def lost(self, job: Job, error: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the end of a job whose worker ended has besides `state` and `error`, such as `messages`."""


class Supervisor:
    """Runs the jobs of a queue. What it reads and writes there raises StoreError, without any change."""

    def __init__(self, config: WorkerConfig, queue: JobStore, listener: QueueListener) -> None:
        self._config = config
        self._queue = queue
        self._listener = listener
        self._stops: dict[str, _Stop] = {}  # by job: how it ends in place of "cancelled"
        self._unrecorded: list[tuple[Job, dict[str, Any], Mapping[str, Any] | None]] = []
        self._recording: asyncio.Task[None] | None = None
        self._is_stopping = False
        self.is_draining = False  # no further jobs are started
        self.workers: list[Worker] = []

    async def start(self, devices: Sequence[Mapping[str, Any]]) -> None:
        """Start a worker for each device: `name`, such as `cpu` or `cuda:1`, and further facts."""
        self.workers = [Worker(self._config, number, device, self) for number, device in enumerate(devices)]
        await asyncio.gather(*(worker.process.start() for worker in self.workers))

    async def stop(self) -> None:
        """Stop the running jobs, which save their runs and become interrupted, and the workers."""
        self._is_stopping = True
        for worker in self.workers:
            for id in worker.jobs:
                self._stops.setdefault(id, _Stop("interrupted", _STOPPED))
        # A worker exits by itself after the grace; then it is killed.
        await asyncio.gather(*(worker.process.stop(self._config.grace_s + 2) for worker in self.workers))
        if self._recording is not None:
            self._recording.cancel()

    def kill(self) -> None:
        """Kill the workers; running jobs become interrupted."""
        for worker in self.workers:
            worker.process.kill("it was ended at once")

    def cancel(
        self, id: str, state: JobState = "cancelled", error: Mapping[str, Any] | None = None, *, alone: bool = False
    ) -> bool:
        """Stop a running job, and those that train with it; returns whether a worker has it. It saves its run and ends
        later, in this state and with this error, with `alone` the others as `interrupted`; a second cancel after
        `patience_s` kills its worker.
        """
        for worker in self.workers:
            if id in worker.jobs:
                others = {job for job in worker.jobs if alone and job != id}
                self._stops |= dict.fromkeys(worker.jobs.keys() - others, _Stop(state, error))
                self._stops |= dict.fromkeys(others, _Stop("interrupted", _STOPPED_WITH))
                worker.cancel()
                return True
        return False

    def dispatch(self) -> None:
        """Start waiting jobs on the workers that are ready."""
        # A worker left by a killed supervisor may still be saving the run that one of the jobs continues.
        if self._is_stopping or self.is_draining or not all(worker.has_lock for worker in self.workers):
            return
        for worker in self.workers:
            if worker.state == "ready":
                try:
                    jobs = self._queue.claim(str(worker.device["name"]))
                except StoreError as error:
                    self._listener.trouble(error)
                    asyncio.get_running_loop().call_later(AGAIN_S, self.dispatch)
                    return
                if not jobs:
                    return
                worker.run(jobs, self._fence(jobs))
                for job in jobs:
                    self._listener.changed(job)

    def _fence(self, jobs: Sequence[Job]) -> Path | None:
        """Note the attempt of jobs, that of the first one for all; None without a folder for notes."""
        if self._config.fences is None:
            return None
        note = self._config.fences / jobs[0].id
        try:
            write_atomic(note, str(jobs[0].attempts))
        except OutputError as error:  # the run will meet the same disk
            self._listener.trouble(StoreError(error))
            return None
        return note

    def on_job_message(self, job: Job, head: dict[str, Any], body: bytes) -> None:
        """A message of a worker about one of its jobs."""
        match head["type"]:
            case "notice":
                self._listener.notice(job, head, body)
            case "run":
                with self._reported():
                    self._queue.set_run(job.id, head["run"])
                    self._listener.changed(self._queue.get(job.id))
            case "ended":
                self._end(job, head)

    def line(self, text: str, jobs: Sequence[Job]) -> None:
        self._listener.line(text, jobs)

    def lost(self, job: Job, why: str) -> None:
        """A job whose worker has ended."""
        stop = self._stops.pop(job.id, None)
        message = f"the worker ended while the job was running: {why}; continue the job, the log is {self._config.log}"
        stop = stop or _Stop("interrupted", {"kind": WORKER_ENDED, "message": message})
        end = {"state": stop.state, "error": stop.error, **self._listener.lost(job, stop.error)}
        self._record(job, end, None)

    def _end(self, job: Job, head: Mapping[str, Any]) -> None:
        state: JobState = head["state"]
        stop = self._stops.pop(job.id, None)
        error = head.get("error")
        if state == "cancelled":
            state, error = stop or _Stop("interrupted", _STOPPED)  # not requested: the worker is stopping
        if head.get("found") is not None:
            with self._reported():
                self._queue.set_measurement(head["found"]["subject"], head["found"]["values"])
        end = {"outputs": head.get("outputs") or {}, "messages": head.get("messages") or []}
        self._record(job, {"state": state, "error": error, **end}, head.get("last"))

    def _record(self, job: Job, end: dict[str, Any], last: Mapping[str, Any] | None) -> None:
        """Record the end of a job, later if the disk is full; then publish its last notice."""
        last = end.pop("last", last)
        try:
            if self._config.fences is not None:
                with contextlib.suppress(OSError):
                    (self._config.fences / job.id).unlink(missing_ok=True)
            job = self._queue.finish(job.id, attempt=job.attempts, **end)
        except StoreError as error:
            self._listener.trouble(error)
            self._unrecorded.append((job, end, last))
            if self._recording is None or self._recording.done():
                self._recording = asyncio.create_task(self._record_again())
            return
        if last is not None:
            self._listener.notice(job, last, b"")
        self._listener.changed(job)

    async def _record_again(self) -> None:
        while self._unrecorded:
            await asyncio.sleep(AGAIN_S)
            waiting, self._unrecorded = self._unrecorded, []
            for job, end, last in waiting:
                self._record(job, end, last)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Report StoreErrors; the job continues."""
        try:
            yield
        except StoreError as error:
            self._listener.trouble(error)


def queued_again(queue: JobStore, job: Job, run: Path | None) -> Job:
    """The job, queued again if it has lost its worker and makes progress in its run folder. Raises StoreError."""
    if (job.error or {}).get("kind") != WORKER_ENDED:
        return job
    states = () if run is None else (run / "states").glob("*")
    newest = max((state.stat().st_mtime for state in states), default=0.0)
    losses = 0 if newest > (job.started or 0.0) else job.losses + 1
    return job if losses >= MOST_LOSSES else queue.requeue(job.id, losses=losses)


WorkerState: TypeAlias = Literal["starting", "waiting", "loading", "ready", "busy", "gone"]
"""`waiting`: for the worker of an earlier supervisor, which is still saving. `loading`: importing torch. `gone`: the
process has ended and is being restarted.
"""


class Worker:
    """One worker and the jobs that it runs: one, or those that train together."""

    def __init__(self, config: WorkerConfig, number: int, device: Mapping[str, Any], supervisor: Supervisor) -> None:
        self._config = config
        self._supervisor = supervisor
        self._cancelled_at: float | None = None
        self.name = f"worker {number} ({device['name']})"
        self.device = dict(device)
        self.jobs: dict[str, Job] = {}
        self.state: WorkerState = "starting"
        first = {"device": device["name"]}
        if config.locks is not None:
            first["lock"] = str(config.locks / f"worker-{number}.lock")
        self.process = RestartedProcess(config, self, first, _visible(str(device["name"])))

    @property
    def has_lock(self) -> bool:
        """Whether no worker of another supervisor can be running in its place."""
        return self._config.locks is None or self.state not in ("starting", "waiting")

    def run(self, jobs: Sequence[Job], fence: Path | None) -> None:
        self.jobs, self.state, self._cancelled_at = {job.id: job for job in jobs}, "busy", None
        more = {} if fence is None else {"fence": str(fence)}
        sent = [
            {"id": job.id, "kind": job.kind, "request": job.request, "run": job.run, "attempt": job.attempts, **more}
            for job in jobs
        ]
        self.process.send({"type": "jobs", "jobs": sent})

    def cancel(self) -> None:
        """Ask the worker to stop its jobs and save; a second call after `patience_s` seconds kills it."""
        now = time.monotonic()
        if self._cancelled_at is None:
            self._cancelled_at = now
            self.process.send({"type": "cancel", "id": next(iter(self.jobs))})
        elif now - self._cancelled_at >= self._config.patience_s:
            self.process.kill("it did not stop when its job was cancelled")

    def on_message(self, head: dict[str, Any], body: bytes) -> None:
        match head["type"]:
            case "waiting" | "loading":
                self.state = head["type"]
                self._supervisor.dispatch()
            case "ready":
                self.device.update(head.get("device", {}))
                self.state = "ready"
                self._supervisor.dispatch()
            case "ended":
                if (job := self.jobs.pop(head["id"], None)) is not None:
                    self._supervisor.on_job_message(job, head, body)
            case _:
                for job in list(self.jobs.values())[:1]:
                    self._supervisor.on_job_message(job, head, body)

    def on_line(self, line: str) -> None:
        self._supervisor.line(line, tuple(self.jobs.values()))

    def on_end(self, why: str) -> None:
        self.state = "gone"
        jobs, self.jobs = self.jobs, {}
        self._supervisor.line(f"{self.name} ended: {why}", tuple(jobs.values()))
        for job in jobs.values():
            self._supervisor.lost(job, why)
        self._supervisor.dispatch()


def _visible(device: str) -> dict[str, str]:
    """The environment in which a process sees one GPU, or all devices if it is none."""
    _, colon, index = device.partition("cuda:")
    return {VISIBLE_GPUS: gpu_variable(int(index))} if colon else {}


class RestartedProcess:
    """A worker process, started again whenever it ends: the pauses before double until it is ready. `first` are fields
    of its first message besides those of `config.start`.
    """

    def __init__(
        self,
        config: WorkerConfig,
        owner: ChildOwner,
        first: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._owner = owner
        self._first = {
            "type": "start",
            "beat_s": config.silence_s / 6,
            "grace_s": config.grace_s,
            "log": str(config.log),
            **config.start,
            **first,
        }
        self._environment = environment
        self._child: ChildProcess | None = None
        self._restart: asyncio.Task[None] | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._is_stopping = False
        self.failed_starts = 0  # since it was last ready

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Start the process; it is ready some seconds later."""
        config = self._config
        self._child = ChildProcess(
            config.command, self, cwd=config.cwd, silence_s=config.silence_s, environment=self._environment
        )
        try:
            await self._child.start(self._first)
        except OSError as error:
            self.on_end(f"it cannot be started, {error}")

    def send(self, head: Mapping[str, Any]) -> None:
        """Send a message; it is lost if the process has ended."""
        if self._child is not None:
            self._child.send(head)

    def kill(self, why: str) -> None:
        if self._child is not None:
            self._child.kill(why)

    async def stop(self, grace_s: float) -> None:
        """Stop the process; a running job is saved."""
        self._is_stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self._child is not None:
            await self._child.close(grace_s)

    def on_message(self, head: dict[str, Any], body: bytes) -> None:
        if head["type"] == "ready":
            self._pause_s, self.failed_starts = _FIRST_PAUSE_S, 0
        self._owner.on_message(head, body)

    def on_line(self, line: str) -> None:
        self._owner.on_line(line)

    def on_end(self, why: str) -> None:
        self._child = None
        self.failed_starts += 1
        self._owner.on_end(why)
        if not self._is_stopping:
            self._restart = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)
        await self.start()
