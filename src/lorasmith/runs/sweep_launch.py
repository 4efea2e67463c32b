"""A sweep on a Slurm cluster: its runs as the tasks of an array.

A task is one run on one device, on a machine where photographs, model and the sweep's folder have the same paths.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.files import write_atomic
from lorasmith.core.printable import printable
from lorasmith.runs.sweep_run import LOGS

_QUOTES = frozenset("\"'")
_SAVE_S = 120  # before a time limit, for the last step and its run state


LORASMITH = (sys.executable, "-P", "-m", "lorasmith")  # -P: modules are not imported from the current folder
"""The command, as this process was started."""


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


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3,7` for 1, 2, 3, 7."""
    grouped = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in grouped]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
