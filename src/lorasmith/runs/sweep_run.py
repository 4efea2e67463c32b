"""The runs of a sweep as jobs of a queue in its folder, one at a time on each device, or several that train together.

    OUTPUT/NAME/            the run
    OUTPUT/logs/NAME.txt    its log
    OUTPUT/queue.sqlite3    the queue, with how each run ended

A run that crashes its worker ends that run alone. On a Ray cluster the workers are on other machines, and a run that
loses its machine continues on another one. Beside another process that runs the sweep, and in a task of Slurm, as
machines cannot share a database, the queue is in memory, and OUTPUT/logs/NAME.json has the end of a run. Earlier
versions wrote that file for every run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from lorasmith.core.errors import LorasmithError, OptionError, OutputError, TrainingError
from lorasmith.core.files import ensure_folder, locked, read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.options import options_of
from lorasmith.core.printable import printable
from lorasmith.runs.command_lines import arguments_for, command_line
from lorasmith.runs.queue import STATES, Job, JobStore, StoreError, jobs_in
from lorasmith.runs.ray_cluster import bridge_command
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.supervisor import WORKER_COMMAND, Supervisor, WorkerConfig, queued_again
from lorasmith.runs.sweep_file import Sweep
from lorasmith.training.config import TrainConfig
from lorasmith.training.joint import TRAINS_ALONE

LOGS = "logs"  # folder of a sweep for what its runs print; a run has another name, as a hyphen is in each
QUEUE = "queue.sqlite3"

_POLL_S = 0.1
_GRACE_S = 24 * 3600.0  # a sweep waits until its runs have saved
_MOST_FAILED_STARTS = 3
_MOST_FAILED_PLACES = 10  # on a cluster, minutes in which a head may start again
_OF_THE_MODEL = (
    *(name for name, setting in options_of(TrainConfig).items() if setting.of_model or setting.is_path),
    "strict",
)


class SweepListener(Protocol):
    """Receives what happens to the runs of a sweep."""

    def started(self, name: str, device: str) -> None:
        """A run was started on a device."""

    def ended(self, name: str, failure: str | None) -> None:
        """A run has ended, with an error in a sentence if there is one; None if it was never started."""


def sweep_folder(output: Path) -> Path:
    """The folder of a sweep, created. OutputError if it is a run's, or cannot be made."""
    if (output / "run.json").exists():
        raise OutputError(f"output must be a folder for runs, but {output} holds a run itself; choose another")
    ensure_folder(output)
    ensure_folder(output / LOGS)
    return output


def failures_in(output: Path) -> dict[str, str]:
    """How each run of a sweep last ended: a sentence, empty for one that completed or was stopped. Runs that have not
    ended, or were killed with the sweep, are not in it. Raises StoreError.
    """
    found = {} if not (output / QUEUE).exists() else {job.id: job.failure for job in jobs_in(output / QUEUE)}
    for path in (output / LOGS).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            error = parse_foreign_json(read_regular(path))["error"]
            found[path.stem] = error if isinstance(error, str) else None
    return {name: failure for name, failure in found.items() if failure is not None}


def sweep_devices(named: str | None) -> tuple[str, ...]:
    """The devices to train on: those named, separated by commas, else all GPUs, or the CPU.

    Allocates nothing on a GPU. OptionError if a device does not exist or is named twice.
    """
    import torch

    from lorasmith.core.placement import chosen_device

    count = torch.cuda.device_count()
    there = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    if named is None:
        return tuple(there)
    names = [device.strip() for device in named.split(",")]
    names = ["cuda:0" if name == "cuda" else name for name in names]
    if len(set(names)) < len(names):
        raise OptionError(f"--devices must name each device once, as it trains one run at a time, got {named!r}")
    for name in names:
        if name.startswith("cuda") and name not in there:
            raise OptionError(f"device must be one that is here ({', '.join(there)}), got {name!r}; name one of these")
        if not name.startswith("cuda"):
            chosen_device(name)
    return tuple(names)


def grouped(runs: Mapping[str, RunSpec], most: int) -> list[tuple[str, ...]]:
    """The runs in groups of at most `most` that can train together, in their order; the others are groups of one."""
    groups: list[tuple[str, ...]] = []
    filling: dict[object, int] = {}
    for name, spec in runs.items():
        alone = any(getattr(spec.config, setting) for setting in TRAINS_ALONE)
        key = None if alone else (spec.files, *(getattr(spec.config, setting) for setting in _OF_THE_MODEL))
        place = filling.get(key)
        if key is None or place is None or len(groups[place]) == most:
            filling[key] = len(groups)
            groups.append((name,))
        else:
            groups[place] = (*groups[place], name)
    return groups


def run_sweep(
    sweep: Sweep,
    names: Sequence[str],
    output: Path,
    devices: Sequence[str],
    progress: SweepListener,
    *,
    models: Mapping[str, Path] | None = None,
    together: int = 1,
    alone: bool = True,
    cluster: str | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Run some runs of a sweep in the folder of `sweep_folder`, one at a time on each device, in their order. With the
    address of a Ray `cluster`, the devices are those of `devices_on`.

    `models` are `base_dir` and `extra_model_paths`, where models are searched. Up to `together` runs that may share a
    model train together. `alone` is False for a task of Slurm. If `cancelled` returns True, or on an exception, the
    runs stop and save, and no others start; KeyboardInterrupt ends them at once.
    """
    models = models or {}
    extra = models.get("extra_model_paths")
    start = {
        "kinds": "runs",
        "base": str(models.get("base_dir") or Path.cwd()),
        "extra_model_paths": extra and str(extra),
        "follow_links": False,
        "logs": str(output / LOGS),
    }
    config = WorkerConfig(start=start, cwd=Path.cwd(), log=output / LOGS, command=WORKER_COMMAND, grace_s=_GRACE_S)
    if cluster is not None:
        attempts = ensure_folder(output / LOGS / "attempts")
        config = replace(config, command=bridge_command(cluster), fences=attempts, locks=attempts)
    with _queue(output, alone=alone) as queue:
        complete = [line.id for line in queue.lines(["completed"])]
        kept = {id for id in complete if id in sweep.runs and id not in names}
        queue.remove([line.id for line in queue.lines(STATES) if line.id not in kept])
        chosen = {name: sweep.runs[name] for name in names}
        for group in grouped(chosen, together):
            for name in group:
                request = asdict(replace(chosen[name], output=str(output / name)))
                label = group[0] if len(group) > 1 else None
                queue.add("train", request, id=name, sweep=output.name, varied=sweep.varied[name], together=label)
        again = None if cluster is None else queue
        listener = _Listener(
            sweep, output, progress, arguments_for(models), keeps_ends=queue.is_in_memory, waiting_again=again
        )
        supervisor = Supervisor(config, queue, listener)
        with asyncio.Runner() as runner:
            try:
                runner.run(_supervised(supervisor, queue, listener, devices, cancelled))
            except KeyboardInterrupt:  # raised anywhere in the loop; after the first one, all have saved
                supervisor.kill()
                runner.run(supervisor.stop())
                raise
            finally:
                listener.report()


async def _supervised(
    supervisor: Supervisor, queue: JobStore, listener: _Listener, devices: Sequence[str], cancelled: Callable[[], bool]
) -> None:
    try:
        most = _MOST_FAILED_STARTS if listener.waiting_again is None else _MOST_FAILED_PLACES
        await supervisor.start([{"name": name} for name in devices])
        while any(queue.queue_counts().values()) and not cancelled():
            await asyncio.sleep(_POLL_S)
            listener.report()
            if all(worker.process.failed_starts >= most for worker in supervisor.workers):
                raise TrainingError(f"a worker must start, but {listener.last_line}; lorasmith doctor may say why")
    except KeyboardInterrupt:  # raised in this task
        supervisor.kill()
        raise
    finally:
        await supervisor.stop()


@contextlib.contextmanager
def _queue(output: Path, *, alone: bool) -> Iterator[JobStore]:
    """The queue of a sweep, in its folder unless another process has it, or it is not to be alone there."""
    with contextlib.ExitStack() as held:
        try:
            if alone:
                held.enter_context(locked(output / LOGS / "sweep.lock", "locked"))
        except OutputError as error:
            if not str(error).startswith("locked"):
                raise
            alone = False
        queue = JobStore(output / QUEUE if alone else None)
        held.callback(queue.close)
        yield queue


class _Listener:
    """Writes the logs of the runs, and keeps what happens to them for `report`."""

    def __init__(
        self,
        sweep: Sweep,
        output: Path,
        progress: SweepListener,
        flags: Sequence[str],
        *,
        keeps_ends: bool,
        waiting_again: JobStore | None,
    ) -> None:
        self._sweep = sweep
        self._output = output
        self._progress = progress
        self._flags = flags
        self._keeps_ends = keeps_ends
        self.waiting_again = waiting_again  # the queue in which runs that lost their worker wait again
        self._unreported: deque[Job | LorasmithError] = deque()
        self.last_line = "it did not"

    def report(self) -> None:
        """Report what has happened. Raises what went wrong."""
        while self._unreported:
            event = self._unreported.popleft()
            if isinstance(event, LorasmithError):
                raise event
            if event.state == "running":
                self._progress.started(event.id, event.device or "")
            else:
                self._progress.ended(event.id, event.failure)

    def changed(self, job: Job) -> None:
        if job.state == "interrupted" and self.waiting_again is not None:
            try:
                job = queued_again(self.waiting_again, job, self._output / job.id)
            except StoreError as error:
                self.trouble(error)
            if job.state == "pending":
                return
        end = self._output / LOGS / f"{job.id}.json"
        try:
            if job.state == "running":
                end.unlink(missing_ok=True)
                self._write(job, f"$ {command_line(['lorasmith', *self._command(job)])}")
            else:
                if job.failure:
                    self._write(job, f"error: {job.failure}")
                if self._keeps_ends:
                    write_atomic(end, json.dumps({"error": job.failure}) + "\n")
        except OSError as error:
            why = error.strerror or error
            self._unreported.append(OutputError(f"run {job.id} cannot be started ({why}); check {self._output}"))
        except OutputError as error:
            self._unreported.append(error)
        self._unreported.append(job)

    def notice(self, job: Job, head: Mapping[str, Any], body: bytes) -> None:
        """Nothing: a worker writes the logs."""

    def line(self, text: str, jobs: Sequence[Job]) -> None:
        self.last_line = text
        for job in jobs[:1]:
            with contextlib.suppress(OSError):
                self._write(job, text)

    def trouble(self, error: StoreError) -> None:
        self._unreported.append(error)

    def lost(self, job: Job, error: Mapping[str, Any] | None) -> dict[str, Any]:
        return {}

    def _command(self, job: Job) -> list[str]:
        device = None if (job.device or "cuda").startswith("cuda") else job.device
        _, *arguments = replace(self._sweep.runs[job.id], device=device).command()
        return [*arguments, "--output", str(self._output / job.id), *self._flags]

    def _write(self, job: Job, text: str) -> None:
        with (self._output / LOGS / f"{job.id}.txt").open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{printable(text, limit=sys.maxsize, keep=chr(10))}\n")
