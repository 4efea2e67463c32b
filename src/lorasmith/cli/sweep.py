"""`lorasmith sweep`: many runs from one file, ranked by their held-out loss."""

from __future__ import annotations

import contextlib
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

if TYPE_CHECKING:
    from rich.table import Table

    from lorasmith.runs.sweep_file import Sweep, SweepRun
    from lorasmith.runs.sweep_results import SweepEntry, SweepRecord
    from lorasmith.runs.sweep_run import RunEnd


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
        typer.Option(help="Start the runs on this machine, as an array of Slurm jobs, or as tasks of Ray."),
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

    Each run is a process of its own, as of train, in a folder of its own; one that fails ends no other. Ctrl-C stops
    and saves; the same command continues: complete runs are kept, and failed ones tried again. Results are printed, and
    written to sweep.json and the page sweep.html. The exit code is 1 if a run failed.
    """
    check_alone("sweep")
    from lorasmith.runs.command_lines import arguments_for
    from lorasmith.runs.run import RUNS
    from lorasmith.runs.sweep_file import check_held_out, read_sweep
    from lorasmith.runs.sweep_run import LORASMITH, sweep_devices, sweep_folder

    if launcher is not _Launcher.LOCAL and (devices is not None or only is not None):
        raise OptionError(f"--launcher {launcher} decides where all runs are; leave --devices and --only out")
    if launcher is not _Launcher.LOCAL and together > 1:
        raise OptionError(
            f"--together trains runs in one process of this machine, got it with --launcher {launcher}; leave one out"
        )
    folders_of(base_dir, extra_model_paths)
    found = read_sweep(file, follow_links=follow_links)
    if only is not None and not 1 <= only <= len(found.runs):
        raise OptionError(f"--only must be the number of a run, from 1 to {len(found.runs)}, got {only}")
    chosen = sweep_devices(devices or found.device) if launcher is _Launcher.LOCAL and not list_runs else ()
    place = check_writable((output or found.output or RUNS / file.stem).absolute())
    if only is None and not list_runs:  # otherwise checked when the sweep was started
        check_held_out(found)
    folder = sweep_folder(place)
    where = {"base_dir": base_dir, "extra_model_paths": extra_model_paths}
    models = {name: path.absolute() for name, path in where.items() if path is not None}
    also = arguments_for(models)
    progress = _Progress(found, folder)
    if list_runs:
        progress.print_all()
        raise typer.Exit(progress.exit_code)
    runs = progress.pending([found.runs[only - 1]] if only is not None else found.runs)
    if launcher is _Launcher.SLURM and runs:
        links = ["--follow-links"] if follow_links else []
        command = [*LORASMITH, "sweep", str(file.absolute()), "--output", str(folder), *links, *also]
        _submit(runs, folder, command, slurm_options)
        return
    heading(f"{len(runs)} of {count_text(len(found.runs), 'run')}", f"to do in {folder}")
    if runs and together > 1:
        _train_together(runs, folder, models, chosen, progress, together)
    elif runs:
        _train(runs, folder, also, chosen if launcher is _Launcher.LOCAL else None, progress)
    progress.print_all()
    raise typer.Exit(progress.exit_code)


def _train(
    runs: Sequence[SweepRun], folder: Path, also: list[str], devices: Sequence[str] | None, progress: _Progress
) -> None:
    """`devices` is None on Ray."""
    from lorasmith.runs.sweep_launch import run_on_ray
    from lorasmith.runs.sweep_run import RunProcess, run_all

    with _stopped_runs_shown(progress) as stop:
        if devices is None:
            run_on_ray(runs, folder, also, on_end=progress.ended, cancelled=stop.is_set)
        else:
            run_all(
                runs,
                devices,
                lambda run, device: RunProcess(run, folder, device, also),
                on_start=progress.started,
                on_end=progress.ended,
                cancelled=stop.is_set,
            )


def _train_together(
    runs: Sequence[SweepRun],
    folder: Path,
    models: Mapping[str, Path],
    devices: Sequence[str],
    progress: _Progress,
    most: int,
) -> None:
    """Train in groups, each over one model in one process; runs that cannot share a model are groups of one."""
    from lorasmith.runs.command_lines import arguments_for
    from lorasmith.runs.sweep_group import GroupProcess, grouped
    from lorasmith.runs.sweep_run import RunProcess, Started, run_all

    def start(group: tuple[SweepRun, ...], device: str | None) -> Started:
        if len(group) == 1:
            return RunProcess(group[0], folder, device, arguments_for(models))
        return GroupProcess(group, folder, device, models, on_end=progress.ended)

    def started(group: tuple[SweepRun, ...], device: str | None) -> None:
        for run in group:
            progress.started(run, device)

    def ended(group: tuple[SweepRun, ...], end: RunEnd) -> None:
        if len(group) == 1:
            progress.ended(group[0], end)

    with _stopped_runs_shown(progress) as stop:
        groups = grouped(runs, most)
        run_all(groups, devices, start, on_start=started, on_end=ended, cancelled=stop.is_set)


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


def _submit(runs: Sequence[SweepRun], folder: Path, command: list[str], options: str) -> None:
    import shlex

    from lorasmith.runs.sweep_launch import submit_to_slurm

    try:
        words = shlex.split(options)
    except ValueError as error:
        raise OptionError(f"--slurm-options must be arguments as in a shell, got {options!r} ({error})") from error
    job, script = submit_to_slurm(runs, folder, command, words)

    def show() -> None:
        echo(f"Submitted {count_text(len(runs), 'run')} as job {job}, by {script}.")
        echo("The same command with --list shows what came of them, and without it submits again what is not complete.")

    print_result(lambda: {"job": job, "script": script, "runs": [run.number for run in runs]}, show)


class _Progress:
    """Prints the progress of the runs, and keeps `sweep.json` and the page up to date."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        from lorasmith.runs.sweep_results import result_of

        self._sweep, self._folder = sweep, folder
        self._about = [run.number for run in sweep.runs]
        self._left = 0
        with console.status("Reading the runs"):
            self._entries = {run.number: result_of(run, folder) for run in sweep.runs}

    def pending(self, runs: Sequence[SweepRun]) -> list[SweepRun]:
        """The runs that are neither complete nor running in another process; prints a note about the latter."""
        states = {run.number: self._entries[run.number].state for run in runs}
        for run in runs:
            if states[run.number] == "running":
                print_note(f"{run.name} is running in another process and is left to it.")
        found = [run for run in runs if states[run.number] not in ("complete", "running")]
        self._about, self._left = [run.number for run in runs], len(found)
        return found

    def started(self, run: SweepRun, device: str | None) -> None:
        echo(f"Started   {run.name} on {device}")
        self._entries[run.number] = replace(self._entries[run.number], state="running", error="")

    def ended(self, run: SweepRun, end: RunEnd) -> None:
        from lorasmith.runs.sweep_results import result_of

        entry = self._entries[run.number] = result_of(run, self._folder)
        if entry.state == "waiting":  # cancelled before it was started
            return
        self._left -= 1
        echo(f"{entry.state.capitalize():<10}{run.name}{_result_in_words(entry)} ({self._left} to go)")
        self.record()

    def record(self) -> tuple[SweepRecord, Path]:
        """Write the results so far; returns them and the page."""
        from lorasmith.runs.sweep_results import sweep_record, write_results

        record = sweep_record(self._sweep, self._entries.values())
        return record, write_results(record, self._folder)

    def print_all(self) -> None:
        record, page = self.record()
        print_result(
            lambda: {"folder": self._folder, "page": page, **vars(record)}, lambda: _print(record, self._folder, page)
        )

    @property
    def exit_code(self) -> int:
        """1 if one of this command's runs failed."""
        return int(any(self._entries[number].state == "failed" for number in self._about))


def _result_in_words(entry: SweepEntry) -> str:
    from lorasmith.report.run_report import change

    if entry.error:
        return f": {entry.error}"
    if entry.loss is None or entry.base_loss is None:
        return f" at step {entry.steps:,}" if entry.steps else ""
    return f": held out {change(entry.loss, entry.base_loss)} at step {entry.best_step:,}"


def _print(record: SweepRecord, folder: Path, page: Path) -> None:
    ranked = [one for one in record.runs if one.place is not None]
    if ranked:
        echo()
        console.print(_table(ranked, folder), soft_wrap=True)
        if not record.comparable:
            print_note("The runs were judged by different images, captions or sizes: ranked by the change in percent.")
    others = [one for one in record.runs if one.place is None]
    if others:
        echo()
        heading("Not ranked")
        for one in others:
            echo(f"  {one.number:>4}  {one.state:<9} {one.name}{_result_in_words(one)}")
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
    for one in ranked:
        loss, base = one.loss or math.nan, one.base_loss or math.nan
        cells = (str(one.place), number(loss), change(loss, base), f"{one.best_step:,}", duration(one.seconds))
        table.add_row(*cells, str(_shortened(folder / one.name)))
    return table


def _shortened(path: Path) -> Path:
    """The path relative to the current folder, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
