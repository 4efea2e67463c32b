"""The runs of a sweep as processes: each is `lorasmith train` in a folder of its own, one at a time on each device.

    OUTPUT/NAME/            the run
    OUTPUT/logs/NAME.txt    its output
    OUTPUT/logs/NAME.json   how its process ended (`RunEnd`)

A process that crashes ends its run alone. However the sweep ends, the state of a run is in its files, none of which is
written by two processes; results are read from there (`sweep_results`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Protocol, TypeVar

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.files import ensure_folder, read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.launched import VISIBLE_GPUS, gpu_variable
from lorasmith.core.placement import chosen_device
from lorasmith.core.typed_json import typed
from lorasmith.runs.command_lines import command_line
from lorasmith.runs.sweep_file import SweepRun

LORASMITH = (sys.executable, "-P", "-m", "lorasmith")  # -P: modules are not imported from the current folder
"""The command, as this process was started."""

LOGS = "logs"  # folder of a sweep for what its runs print; a run has another name, as a hyphen is in each

Work = TypeVar("Work")  # a run, or several that train together

_POLL_S = 0.1
_TAIL_BYTES = 4000


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How the process of a run ended."""

    exit_code: int  # 0 for a complete run; negative for the signal that killed it
    error: str = ""  # a sentence; empty for a run that is complete or was stopped


class Started(Protocol):
    """A run in a process."""

    def poll(self) -> RunEnd | None:
        """How it ended; None while it runs."""

    def stop(self) -> None:
        """Ask it to end after its step and save; the second call ends it at once."""


def sweep_folder(output: Path) -> Path:
    """The folder of a sweep, created. OutputError if it is a run's, or cannot be made."""
    if (output / "run.json").exists():
        raise OutputError(f"output must be a folder for runs, but {output} holds a run itself; choose another")
    ensure_folder(output)
    ensure_folder(output / LOGS)
    return output


def log_of(output: Path, run: SweepRun) -> Path:
    """The file with the output of a run."""
    return output / LOGS / f"{run.name}.txt"


def end_of(output: Path, run: SweepRun) -> RunEnd | None:
    """How the process of a run last ended; None if it did not, was killed with the sweep, or the file is damaged."""
    try:
        return typed(parse_foreign_json(read_regular(_end_file(output, run))), RunEnd)
    except (OSError, ValueError):
        return None


def keep_end(output: Path, run: SweepRun, end: RunEnd) -> None:
    """Write how a run ended. Raises OutputError."""
    write_atomic(_end_file(output, run), json.dumps(asdict(end)) + "\n")


def forget_end(output: Path, run: SweepRun, arguments: Sequence[str]) -> None:
    """Delete a run's last end and write the command of its next start to its log. Raises OSError."""
    _end_file(output, run).unlink(missing_ok=True)
    with log_of(output, run).open("ab") as log:
        log.write(f"$ {command_line(['lorasmith', *arguments])}\n".encode())


def sweep_devices(given: str | None) -> tuple[str, ...]:
    """The devices to train on: those named, separated by commas, else all GPUs, or the CPU.

    Allocates nothing on a GPU. OptionError if a device does not exist or is named twice.
    """
    import torch

    count = torch.cuda.device_count()
    there = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    if given is None:
        return tuple(there)
    names = [one.strip() for one in given.split(",")]
    names = ["cuda:0" if one == "cuda" else one for one in names]
    if len(set(names)) < len(names):
        raise OptionError(f"--devices must name each device once, as it trains one run at a time, got {given!r}")
    for name in names:
        if name.startswith("cuda") and name not in there:
            raise OptionError(f"device must be one that is here ({', '.join(there)}), got {name!r}; name one of these")
        if not name.startswith("cuda"):
            chosen_device(name)
    return tuple(names)


def train_command(run: SweepRun, output: Path, *, device: str | None = None, also: Sequence[str] = ()) -> list[str]:
    """The arguments of `lorasmith` for a run of a sweep. A GPU is chosen by the environment of the process instead."""
    named = None if device is None or device.startswith("cuda") else device
    _, *arguments = replace(run.spec, device=named).command()
    return [*arguments, "--output", str(output / run.name), *also]


class RunProcess:
    """A run of a sweep in a process of its own, started at once. OutputError if the files beside it cannot be written.

    `device` is as `sweep_devices` returns it; None for the first GPU that the process sees, or the CPU.
    """

    def __init__(self, run: SweepRun, output: Path, device: str | None = None, also: Sequence[str] = ()) -> None:
        arguments = train_command(run, output, device=device, also=also)
        self._run, self._output = run, output
        self._is_stopping = False
        self._document = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
        try:
            forget_end(output, run, arguments)
            self._process = process_started(
                [*LORASMITH, *arguments, "--json"], device, stdout=self._document, log=log_of(output, run)
            )
        except OSError as error:
            self._document.close()
            raise OutputError(
                f"run {run.name} cannot be started ({error.strerror or error}); check {output}"
            ) from error

    def poll(self) -> RunEnd | None:
        """How it ended, which is also written beside it; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if not self._document.closed:
            self._document.seek(0)
            said = self._document.read()
            self._document.close()
            is_stopped = code and self._is_stopping
            self._end = RunEnd(exit_code=code, error="" if not code or is_stopped else self._error(code, said))
            keep_end(self._output, self._run, self._end)
        return self._end

    def stop(self) -> None:
        self._is_stopping = True
        stop_process(self._process)

    def _error(self, code: int, said: bytes) -> str:
        """The sentence that the command printed, else what is known of its end."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(json.loads(said)["error"]["message"])
        return error_of_process(code, log_of(self._output, self._run))


def process_started(
    command: Sequence[str], device: str | None, *, log: Path, stdout: IO[bytes] | int, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """A process that sees one device, all if None, with standard error appended to the log. Raises OSError."""
    environment = dict(os.environ)
    if device is not None and device.startswith("cuda:"):
        environment[VISIBLE_GPUS] = gpu_variable(int(device.removeprefix("cuda:")))
    with log.open("ab") as errors:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=errors,
            env=environment,
            # The terminal's Ctrl-C reaches only this process, which forwards it once.
            start_new_session=True,
        )


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Signal a process to end after its step and save; the second time, at once."""
    if sys.platform != "win32":  # where Ctrl-C reaches every process of a console
        process.terminate()  # not SIGINT, which Ray's workers and shells in the background block or ignore


def error_of_process(code: int, log: Path) -> str:
    """An error sentence for a process that printed none; `code` is its exit code, or minus the signal's number."""
    what = f"exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            what = signal.Signals(-code).name
        what += ", as where the system has no memory left" if -code == getattr(signal, "SIGKILL", 9) else ""
    return f"the process of a run must end by itself, but ended with {what}; {log.name} ends with: {_last_line(log)}"


def run_all(
    runs: Sequence[Work],
    devices: Sequence[str | None],
    start: Callable[[Work, str | None], Started],
    *,
    on_start: Callable[[Work, str | None], None] = lambda run, device: None,
    on_end: Callable[[Work, RunEnd], None] = lambda run, end: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Run each of the runs, or groups of runs, one at a time on each device, in their order.

    `on_end` is called when the run's device has the next one. If `cancelled` returns True, or on an exception such as
    KeyboardInterrupt, the runs stop and save, and no others start; an exception after `cancelled` ends the runs at
    once.
    """
    waiting = deque(runs)
    running: dict[str | None, tuple[Work, Started]] = {}
    is_stopping = False
    with _all_stopped(running, on_end):
        while waiting or running:
            ended = [(device, run, end) for device, (run, one) in running.items() if (end := one.poll()) is not None]
            for device, _, _ in ended:
                del running[device]
            if not is_stopping and cancelled():
                is_stopping = True
                waiting.clear()
                for _, started in running.values():
                    started.stop()
            for device in devices:
                if waiting and device not in running:
                    run = waiting.popleft()
                    running[device] = run, start(run, device)
                    on_start(run, device)
            for _, run, end in ended:
                on_end(run, end)
            time.sleep(_POLL_S if running else 0)


@contextlib.contextmanager
def _all_stopped(
    running: Mapping[str | None, tuple[Work, Started]], on_end: Callable[[Work, RunEnd], None]
) -> Iterator[None]:
    """However the context ends, the runs in `running` are stopped, and their ends are known."""
    try:
        yield
    finally:
        for _, started in running.values():
            started.stop()
        for run, started in running.values():
            while (end := started.poll()) is None:
                time.sleep(_POLL_S)
            on_end(run, end)


def _end_file(output: Path, run: SweepRun) -> Path:
    return output / LOGS / f"{run.name}.json"


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return "nothing"
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
