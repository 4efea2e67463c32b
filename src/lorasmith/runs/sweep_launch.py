"""A sweep on a cluster: its runs as the tasks of a Slurm array, or of Ray.

A task is one run on one device (`run_one`), on a machine where photographs, model and the sweep's folder have the same
paths.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import write_atomic
from lorasmith.core.printable import printable
from lorasmith.runs.sweep_file import Sweep
from lorasmith.runs.sweep_run import LOGS, SweepListener, failures_in, run_sweep, sweep_devices

_WAIT_S = 1.0
_QUOTES = frozenset("\"'")
_SAVE_S = 120  # before a time limit, for the last step and its run state


LORASMITH = (sys.executable, "-P", "-m", "lorasmith")  # -P: modules are not imported from the current folder
"""The command, as this process was started."""


def run_one(sweep: Sweep, name: str, output: Path, models: Mapping[str, Path]) -> str | None:
    """Run one run of a sweep to its end on the first GPU that is visible, or the CPU; returns its error, an empty text
    without one, and None if it has not ended. KeyboardInterrupt stops and saves it.
    """
    run_sweep(sweep, [name], output, sweep_devices(None)[:1], _Unseen(), models=models, alone=False)
    return failures_in(output).get(name)


class _Unseen:
    def started(self, name: str, device: str) -> None:
        """Nothing is drawn."""

    def ended(self, name: str, failure: str | None) -> None:
        """The folder of the sweep has it."""


def submit_to_slurm(
    numbers: Sequence[int], output: Path, command: Sequence[str], options: Sequence[str]
) -> tuple[str, Path]:
    """Submit runs by their numbers as an array of jobs with these options of sbatch; returns the job's number, and the
    script.

    `command` is that of the sweep, to which each task adds `--only` and its number. OptionError if there is no sbatch
    or a path has characters that are not safe in a script, TrainingError if sbatch refused the job.
    """
    if shutil.which("sbatch") is None:
        raise OptionError(
            "--launcher slurm needs the program sbatch, which is not on PATH; run this on a login node of the cluster"
        )
    for name in (str(output), *command):
        if printable(name, limit=len(name)) != name or (name == str(output) and not _QUOTES.isdisjoint(name)):
            raise OptionError(
                f"paths for --launcher slurm must have no control characters, and the output no quotes, got {name!r}; "
                "rename it"
            )
    script = output / "sweep.sbatch"
    write_atomic(script, slurm_script(numbers, output.name, command))
    # An argument, never a line of the script: the output may be named by an untrusted file.
    log = str(output / LOGS / "slurm-%A_%a.txt") if "%" not in str(output) else "/dev/null"
    ran = subprocess.run(
        ["sbatch", "--parsable", f"--output={log}", *options, str(script)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ran.returncode:
        trouble = " ".join(ran.stderr.split()) or f"exit code {ran.returncode}"
        raise TrainingError(
            f"sbatch must accept {script}, but it said: {trouble}; give what it needs with --slurm-options"
        )
    return ran.stdout.strip().partition(";")[0], script


def slurm_script(numbers: Sequence[int], name: str, command: Sequence[str]) -> str:
    """The script of an array of jobs, one for each number of a run. `command` is that of the sweep, without `--only`.

    A task that is preempted or near its time limit receives a signal to stop, and saves.
    """
    return "\n".join(
        (
            "#!/bin/bash",
            f"#SBATCH --job-name={re.sub(r'[^A-Za-z0-9_.-]', '_', name)}",
            f"#SBATCH --array={_ranges(numbers)}",
            "#SBATCH --requeue",
            f"#SBATCH --signal=B:TERM@{_SAVE_S}",
            f'exec {shlex.join(command)} --only "$SLURM_ARRAY_TASK_ID"',
            "",
        )
    )


def run_on_ray(
    sweep: Sweep,
    names: Sequence[str],
    output: Path,
    progress: SweepListener,
    *,
    models: Mapping[str, Path] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Run each of the runs as a task of a Ray cluster, with a GPU each if it has any. `output` is absolute.

    If `cancelled` returns True, all tasks stop and their runs save. OptionError if Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise OptionError(
            "--launcher ray needs the package ray, which is not installed; install it with pip install ray"
        )
    handler = signal.getsignal(signal.SIGTERM)
    ray: Any = importlib.import_module("ray")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init()  # the cluster of RAY_ADDRESS, or one of this machine
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)  # which Ray has replaced
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_gpus=gpus, max_retries=0)(run_one)
        waiting = {task.remote(sweep, name, output, models or {}): name for name in names}
        is_stopping = False
        try:
            while waiting:
                for reference in ray.wait(list(waiting), timeout=_WAIT_S)[0]:
                    progress.ended(waiting.pop(reference), _failure(ray, reference))
                if not is_stopping and cancelled():
                    is_stopping = True
                    for reference in waiting:
                        ray.cancel(reference, force=False)  # a KeyboardInterrupt there, on which the run saves
        finally:
            for reference in waiting:
                ray.cancel(reference, force=False)
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting))
    finally:
        if started_here:
            ray.shutdown()


def _failure(ray: Any, reference: Any) -> str | None:
    try:
        failure: str | None = ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return None
    except ray.exceptions.RayError as error:
        return f"the Ray task of the run failed: {error}"
    return failure


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3,7` for 1, 2, 3, 7."""
    grouped = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in grouped]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
