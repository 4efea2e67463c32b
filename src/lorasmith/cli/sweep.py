"""`lorasmith sweep`: many runs from one file, ranked by their held-out loss."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.console import StopRequest, console, echo, heading, print_note, print_result, stoppable
from lorasmith.cli.flags import BaseDir, ExtraModelPaths, FollowLinks, folders_of
from lorasmith.cli.together import check_alone
from lorasmith.core.errors import OptionError
from lorasmith.core.files import check_writable
from lorasmith.core.printable import count_text
from lorasmith.runs.child_process import RAY_VARIABLE

if TYPE_CHECKING:
    from rich.table import Table

    from lorasmith.runs.sweep_file import Sweep
    from lorasmith.runs.sweep_results import SweepEntry, SweepRecord


class _Launcher(StrEnum):
    """Where the processes of the runs are started."""

    LOCAL = "local"
    SLURM = "slurm"
    RAY = "ray"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep")(sweep)


def sweep(
    file: Annotated[
        Path, typer.Argument(help="Settings in TOML as for train --config, with a table [grid] or [random].")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of all runs. Default: that of the file's name under runs/.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Such as cuda:0,cuda:1, one run at a time on each. Default: all GPUs, or the CPU."
        ),
    ] = None,
    together: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            metavar="K",
            help="Train up to K runs over one model in one process, where their settings allow it: less memory.",
        ),
    ] = 1,
    launcher: Annotated[
        _Launcher,
        typer.Option(
            help="Start the runs on this machine, as an array of Slurm jobs, or on the Ray cluster at RAY_ADDRESS."
        ),
    ] = _Launcher.LOCAL,
    slurm_options: Annotated[
        str, typer.Option(metavar="TEXT", help="Arguments of sbatch, such as '--gpus=1 --time=04:00:00'.")
    ] = "--gpus=1",
    only: Annotated[int | None, typer.Option(metavar="N", help="Run the run of this number alone.")] = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="Start nothing: list all runs with their results, and write the page.")
    ] = False,
    follow_links: FollowLinks = False,
    base_dir: BaseDir = None,
    extra_model_paths: ExtraModelPaths = None,
) -> None:
    """Train many runs with different settings, and rank them by their held-out loss.

    Each run is that of train, in a folder of its own; one that fails ends no other. Ctrl-C stops
    and saves; the same command continues: complete runs are kept, and failed ones tried again. Results are printed, and
    written to sweep.json and the page sweep.html. The exit code is 1 if a run failed.
    """
    check_alone("sweep")
    from lorasmith.runs.run import RUNS
    from lorasmith.runs.sweep_file import check_held_out, read_sweep
    from lorasmith.runs.sweep_run import LOGS, run_sweep, sweep_devices, sweep_folder

    if launcher is not _Launcher.LOCAL and (devices is not None or only is not None):
        raise OptionError(f"--launcher {launcher} decides where all runs are; leave --devices and --only out")
    if launcher is _Launcher.SLURM and together > 1:
        raise OptionError(
            "--together trains runs in one process, and each task of Slurm is one run, got it with --launcher slurm; "
            "leave one out"
        )
    folders_of(base_dir, extra_model_paths)
    sweep_read = read_sweep(file, follow_links=follow_links)
    if only is not None and not 1 <= only <= len(sweep_read.runs):
        raise OptionError(f"--only must be the number of a run, from 1 to {len(sweep_read.runs)}, got {only}")
    chosen = sweep_devices(devices or sweep_read.device) if launcher is _Launcher.LOCAL and not list_runs else ()
    place = check_writable((output or sweep_read.output or RUNS / file.stem).absolute())
    if only is None and not list_runs:  # otherwise checked when the sweep was started
        check_held_out(sweep_read.runs.values(), where=str(sweep_read.file))
    folder = sweep_folder(place)
    where = {"base_dir": base_dir, "extra_model_paths": extra_model_paths}
    models = {name: path.absolute() for name, path in where.items() if path is not None}
    progress = _Progress(sweep_read, folder)
    if list_runs:
        progress.print_all()
        raise typer.Exit(progress.exit_code)
    names = progress.pending([list(sweep_read.runs)[only - 1]] if only is not None else list(sweep_read.runs))
    if launcher is _Launcher.SLURM and names:
        _submit(sweep_read, names, folder, models, slurm_options, follow_links=follow_links)
        return
    cluster = os.environ.get(RAY_VARIABLE, "auto") if launcher is _Launcher.RAY else None
    if cluster is not None and names:
        from lorasmith.runs.ray_cluster import devices_on

        with console.status("Checking the machines of the cluster"):
            chosen = tuple(str(device["name"]) for device in devices_on(cluster, folder / LOGS))
    heading(f"{len(names)} of {count_text(len(sweep_read.runs), 'run')}", f"to do in {folder}")
    if names:
        with _stopped_runs_shown(progress) as stop:
            run_sweep(
                sweep_read,
                names,
                folder,
                chosen,
                progress,
                models=models,
                together=together,
                alone=only is None,
                cluster=cluster,
                cancelled=stop.is_set,
            )
    progress.print_all()
    raise typer.Exit(progress.exit_code)


@contextlib.contextmanager
def _stopped_runs_shown(progress: _Progress) -> Iterator[StopRequest]:
    """Inside the context, Ctrl-C stops the runs; afterwards their results are printed, and the command ends."""
    with stoppable() as stop:
        try:
            yield stop
        except KeyboardInterrupt as interrupted:
            interrupted.add_note("the runs keep what they have saved")
            raise
    if stop.is_set():
        progress.print_all()
        stop.exit_if_set()


def _submit(
    sweep: Sweep, names: Sequence[str], folder: Path, models: Mapping[str, Path], options: str, *, follow_links: bool
) -> None:
    import shlex

    from lorasmith.runs.command_lines import arguments_for
    from lorasmith.runs.sweep_launch import LORASMITH, submit_to_slurm

    try:
        words = shlex.split(options)
    except ValueError as error:
        raise OptionError(f"--slurm-options must be arguments as in a shell, got {options!r} ({error})") from error
    links = ["--follow-links"] if follow_links else []
    also = [*links, *arguments_for(models)]
    command = [*LORASMITH, "sweep", str(sweep.file.absolute()), "--output", str(folder), *also]
    numbers = [number for number, name in enumerate(sweep.runs, start=1) if name in names]
    job, script = submit_to_slurm(numbers, folder, command, words)

    def show() -> None:
        echo(f"Submitted {count_text(len(names), 'run')} as job {job}, by {script}.")
        echo("The same command with --list shows what came of them, and without it submits again what is not complete.")

    print_result(lambda: {"job": job, "script": script, "runs": numbers}, show)


class _Progress:
    """Prints the progress of the runs, and keeps `sweep.json` and the page up to date."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        from lorasmith.runs.sweep_results import result_of
        from lorasmith.runs.sweep_run import failures_in

        self._sweep, self._folder = sweep, folder
        self._about = list(sweep.runs)
        self._left = 0
        with console.status("Reading the runs"):
            failures = failures_in(folder)
            self._entries = {name: result_of(sweep, name, folder, failures.get(name)) for name in sweep.runs}

    def pending(self, names: list[str]) -> list[str]:
        """The runs that are neither complete nor running in another process; prints a note about the latter."""
        states = {name: self._entries[name].state for name in names}
        for name in names:
            if states[name] == "running":
                print_note(f"{name} is running in another process and is left to it.")
        found = [name for name in names if states[name] not in ("complete", "running")]
        self._about, self._left = names, len(found)
        return found

    def started(self, name: str, device: str) -> None:
        echo(f"Started   {name} on {device}")
        self._entries[name] = replace(self._entries[name], state="running", error="")

    def ended(self, name: str, failure: str | None) -> None:
        from lorasmith.runs.sweep_results import result_of

        entry = self._entries[name] = result_of(self._sweep, name, self._folder, failure)
        if entry.state == "waiting":  # cancelled before it was started
            return
        self._left -= 1
        echo(f"{entry.state.capitalize():<10}{name}{_result_in_words(entry)} ({self._left} to go)")
        self.record()

    def record(self) -> tuple[SweepRecord, Path]:
        """Write the results so far; returns them and the page."""
        from lorasmith.runs.sweep_results import sweep_record, write_results

        record = sweep_record(self._sweep.file.name, self._entries.values())
        return record, write_results(record, self._folder)

    def print_all(self) -> None:
        record, page = self.record()
        print_result(
            lambda: {"folder": self._folder, "page": page, **vars(record)}, lambda: _print(record, self._folder, page)
        )

    @property
    def exit_code(self) -> int:
        """1 if one of this command's runs failed."""
        return int(any(self._entries[name].state == "failed" for name in self._about))


def _result_in_words(entry: SweepEntry) -> str:
    from lorasmith.report.run_report import change

    if entry.error:
        return f": {entry.error}"
    if entry.loss is None or entry.base_loss is None:
        return f" at step {entry.steps:,}" if entry.steps else ""
    return f": held out {change(entry.loss, entry.base_loss)} at step {entry.best_step:,}"


def _print(record: SweepRecord, folder: Path, page: Path) -> None:
    ranked = [run for run in record.runs if run.place is not None]
    if ranked:
        echo()
        console.print(_table(ranked, folder), soft_wrap=True)
        if not record.comparable:
            print_note("The runs were judged by different images, captions or sizes: ranked by the change in percent.")
    others = [run for run in record.runs if run.place is None]
    if others:
        echo()
        heading("Not ranked")
        for other in others:
            echo(f"  {other.number:>4}  {other.state:<9} {other.name}{_result_in_words(other)}")
    echo()
    echo(f"{'Page':<8}{page}")


def _table(ranked: list[SweepEntry], folder: Path) -> Table:
    import math

    from rich.table import Table

    from lorasmith.report.run_report import change, number
    from lorasmith.runs.run_page import duration

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "Held-out loss", "Change", "Best step", "Time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Run", overflow="fold")
    for run in ranked:
        loss, base = run.loss or math.nan, run.base_loss or math.nan
        cells = (str(run.place), number(loss), change(loss, base), f"{run.best_step:,}", duration(run.seconds))
        table.add_row(*cells, str(_shortened(folder / run.name)))
    return table


def _shortened(path: Path) -> Path:
    """The path relative to the current folder, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
