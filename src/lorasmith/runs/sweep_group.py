"""Runs of a sweep that train together over one model, in one process (`training.joint`).

Folder, log and end of each run are where a process of its own would leave them (`sweep_run`), so results, resuming and
`lorasmith resume` are the same. The process is this module; it reads its runs as JSON from standard input:

    {"runs": [{"name": ..., "spec": ...}, ...], "output": ..., "device": ..., ...}
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorasmith.core.allocator import keep_freed_memory
from lorasmith.core.errors import LorasmithError, OutputError
from lorasmith.core.folders import Folders
from lorasmith.core.options import options_of
from lorasmith.core.printable import printable
from lorasmith.core.typed_json import typed
from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model_search import Completed, load_completed
from lorasmith.runs.command_lines import arguments_for
from lorasmith.runs.plan import FolderPlan, plan
from lorasmith.runs.run import Host
from lorasmith.runs.run import run as run_plan
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.sweep_file import SweepRun
from lorasmith.runs.sweep_run import (
    RunEnd,
    end_of,
    error_of_process,
    forget_end,
    keep_end,
    log_of,
    process_started,
    stop_process,
    train_command,
)
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, Outcome, StepDone
from lorasmith.training.joint import SHARED_SETTINGS, EngineMaker, StopOfAll, check_captions, train_jointly
from lorasmith.training.results import TrainResult

_COMMAND = (sys.executable, "-P", "-m", "lorasmith.runs.sweep_group")  # -P: not from the current folder
_STOPPED = 128 + signal.SIGTERM
_BETWEEN_LINES_S = 30.0
_OF_THE_MODEL = (*SHARED_SETTINGS, *(name for name, one in options_of(TrainConfig).items() if one.is_path), "strict")


def grouped(runs: Sequence[SweepRun], most: int) -> list[tuple[SweepRun, ...]]:
    """The runs in groups of at most `most` that can train together, in their order; the others are groups of one."""
    groups: list[tuple[SweepRun, ...]] = []
    filling: dict[object, int] = {}
    for run in runs:
        key = None if run.spec.config.compile else _model_of(run)
        place = filling.get(key)
        if key is None or place is None or len(groups[place]) == most:
            filling[key] = len(groups)
            groups.append((run,))
        else:
            groups[place] = (*groups[place], run)
    return groups


def _model_of(run: SweepRun) -> tuple[object, ...]:
    """The settings that runs must share to train over one model."""
    return run.spec.files, *(getattr(run.spec.config, name) for name in _OF_THE_MODEL)


class GroupProcess:
    """A group of runs in one process, started at once; `on_end` is called for each run that has ended.

    `device` is one of `sweep_devices`, `folders` the flags that say where models are, and errors those of `RunProcess`.
    """

    def __init__(
        self,
        runs: Sequence[SweepRun],
        output: Path,
        device: str | None = None,
        folders: Mapping[str, Path] | None = None,
        *,
        on_end: Callable[[SweepRun, RunEnd], None] = lambda run, end: None,
    ) -> None:
        self._left = list(runs)
        self._output, self._on_end = output, on_end
        self._log = log_of(output, runs[0])
        self._is_stopping = False
        named = None if device is None or device.startswith("cuda") else device
        given = {
            "runs": [{"name": run.name, "spec": asdict(run.spec)} for run in runs],
            "output": str(output),
            "device": named,
            **{name: str(path) for name, path in (folders or {}).items()},
        }
        try:
            for run in runs:
                forget_end(output, run, train_command(run, output, device=device, also=arguments_for(folders or {})))
            self._process = process_started(
                _COMMAND, device, log=self._log, stdout=subprocess.DEVNULL, stdin=subprocess.PIPE
            )
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
                pipe.write(json.dumps(given).encode())
        except OSError as error:
            raise OutputError(f"runs cannot be started ({error.strerror or error}); check {output}") from error

    def poll(self) -> RunEnd | None:
        """How the process ended; None while it runs. Reports runs that have ended since the last call."""
        code = self._process.poll()
        for run in list(self._left):
            end = end_of(self._output, run)
            if end is None and code is not None:
                error = "" if self._is_stopping else error_of_process(code, self._log)
                end = RunEnd(exit_code=code or 1, error=error)
                keep_end(self._output, run, end)
            if end is not None:
                self._left.remove(run)
                self._on_end(run, end)
        return None if code is None else RunEnd(exit_code=code)

    def stop(self) -> None:
        self._is_stopping = True
        stop_process(self._process)


def train_group(
    runs: Sequence[SweepRun], output: Path, *, folders: Folders | None, cancelled: Callable[[], bool]
) -> None:
    """Train runs of a sweep together on the device of their specs, and write how each ended.

    If `cancelled` returns True, all runs end after the same step and save; they have saved too on KeyboardInterrupt.
    """
    ready: list[tuple[SweepRun, FolderPlan, _MemberHost]] = []
    shared, stop = _Shared(), StopOfAll(cancelled)
    for member in runs:
        host = _MemberHost(log_of(output, member), folders, shared, stop)
        with _end_kept(member, output, host):
            planned = plan(replace(member.spec, output=str(output / member.name)), host)
            shared.samples[_encoded_alike(planned.spec)] = planned.data, planned.validation
            check_captions(planned.job, planned.data)
            ready.append((member, planned, host))

    def work(member: SweepRun, planned: FolderPlan, host: _MemberHost) -> Callable[[EngineMaker], TrainResult | None]:
        def train(engine: EngineMaker) -> TrainResult | None:
            result = None
            with _end_kept(member, output, host):
                result = run_plan(planned, host, engine)
                is_cancelled = result.reason is Outcome.CANCELLED
                keep_end(output, member, RunEnd(exit_code=_STOPPED if is_cancelled else 0))
            return result

        return train

    if not ready:
        return
    try:
        train_jointly([one.job for _, one, _ in ready], [work(*one) for one in ready], each_round=stop.look)
    except LorasmithError as error:
        for member, *_ in ready:
            keep_end(output, member, RunEnd(exit_code=1, error=str(error)))


@contextlib.contextmanager
def _end_kept(run: SweepRun, output: Path, log: _MemberHost) -> Iterator[None]:
    """An error inside the context ends one run, whose end is written; the others continue."""
    try:
        yield
    except KeyboardInterrupt:
        keep_end(output, run, RunEnd(exit_code=_STOPPED))
        raise
    except LorasmithError as error:
        log.write(f"error: {error}")
        keep_end(output, run, RunEnd(exit_code=1, error=str(error)))
    except Exception as error:  # a bug ends only this run
        log.write(traceback.format_exc())
        keep_end(output, run, RunEnd(exit_code=1, error=f"{type(error).__name__}: {error}"))


class _Shared:
    """Model and encodings that the runs of a group share."""

    def __init__(self) -> None:
        self.models: dict[ModelFiles, Completed] = {}
        self.samples: dict[object, tuple[EncodedDataset, EncodedDataset | None]] = {}


def _encoded_alike(spec: RunSpec) -> object:
    return spec.sources, spec.data, spec.validation


class _MemberHost(Host):
    """The host of a run: a log of its messages, and of its step from time to time."""

    def __init__(self, path: Path, folders: Folders | None, shared: _Shared, stop: StopOfAll) -> None:
        self.folders = folders
        self._path, self._shared, self._stop = path, shared, stop
        self._last = 0.0

    def load(self, files: ModelFiles, folders: Folders | None) -> Completed:
        if files not in self._shared.models:
            self._shared.models[files] = load_completed(files, folders)
        return self._shared.models[files]

    def samples(self, spec: RunSpec) -> tuple[EncodedDataset, EncodedDataset | None] | None:
        return self._shared.samples.get(_encoded_alike(spec))

    def cancelled(self) -> bool:
        return self._stop.is_set()

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            if time.monotonic() - self._last >= _BETWEEN_LINES_S:
                self._last = time.monotonic()
                self.write(f"Step {event.step:,}, loss {event.loss:#.4g}")
        elif message := getattr(event, "message", ""):
            self.write(str(message))

    def write(self, text: str) -> None:
        """Append lines; on a full disk they are dropped."""
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{printable(text, limit=sys.maxsize, keep=chr(10))}\n")


def main() -> None:
    """Train the runs in standard input. SIGTERM and Ctrl-C stop them after their step, the second at once."""
    keep_freed_memory()
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    given = json.load(sys.stdin)
    runs = [_run(number, one, given["device"]) for number, one in enumerate(given["runs"], start=1)]
    extra = given.get("extra_model_paths")
    folders = Folders.load(
        Path(given.get("base_dir") or Path.cwd()), extra_model_paths=None if extra is None else Path(extra)
    )
    try:
        train_group(runs, Path(given["output"]), folders=folders, cancelled=stop.is_set)
    except KeyboardInterrupt:
        sys.exit(_STOPPED)
    sys.exit(_STOPPED if stop.is_set() else 0)


def _run(number: int, given: Mapping[str, Any], device: str | None) -> SweepRun:
    spec = replace(typed(given["spec"], RunSpec), device=device)
    return SweepRun(number=number, name=given["name"], settings={}, spec=spec)


if __name__ == "__main__":
    main()
