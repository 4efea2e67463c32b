"""Questions about sweeps: those of the page, and those of the command line, which have a queue in `<base>/runs`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.files import ensure_folder, is_regular
from lorasmith.core.folders import Folders
from lorasmith.runs.queue import Job, jobs_in
from lorasmith.runs.run_page import without_places
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.sweep_file import check_held_out, grid_values
from lorasmith.runs.sweep_results import SweepEntry, result_in, sweep_record
from lorasmith.runs.sweep_run import QUEUE
from lorasmith.runs.training_jobs import spec_of
from lorasmith.server.datasets.dataset_folders import UnknownFileError, is_name
from lorasmith.server.datasets.dataset_shapes import SkippedFile
from lorasmith.server.jobs.job_shapes import SweepAnswer, SweepList, SweepRow, SweepRunRow
from lorasmith.server.questions import question, shaped
from lorasmith.server.runs.run_list_answers import is_below, row_of, run_folder_of
from lorasmith.training.storage.run_folder import new_run_folder

_RUNS = "runs"
_MOST_RUNS = 100


@question
def sweep_requests(folders: Folders, spec: RunSpec, grid: dict[str, list[Any]]) -> dict[str, Any]:
    """The id of a new sweep, with an empty folder, and the request and varied settings of each of its runs: `spec` with
    each combination of values in `grid`. Raises OptionError, LoraError and DataError.
    """
    settings = spec.settings
    if "folder" in grid:
        raise OptionError("a sweep of the page has one dataset, got folder in grid; run lorasmith sweep")
    varied = grid_values(grid, settings)
    if len(varied) > _MOST_RUNS:
        raise OptionError(f"a sweep of the page has at most {_MOST_RUNS} runs, got {len(varied)}; give fewer values")
    specs = {run: replace(spec, settings={**settings, **values}).requested(folders) for run, values in varied.items()}
    check_held_out((_placed(folders, spec) for spec in specs.values()), where="the settings")
    runs = ensure_folder(folders.base / _RUNS)
    while True:
        place = new_run_folder(runs, f"{spec.name}-sweep")
        try:
            place.mkdir()
            break
        except FileExistsError:
            continue
    jobs = [
        {"request": {**run_spec.to_request(), "output": f"{_RUNS}/{place.name}/{run}"}, "varied": dict(varied[run])}
        for run, run_spec in specs.items()
    ]
    return {"id": place.name, "jobs": jobs}


@question
def sweeps(folders: Folders, *, queued: Mapping[str, Mapping[str, int]]) -> SweepList:
    """All sweeps; `queued` are the numbers of runs by state of those in the server's queue."""
    rows = [SweepRow(id=id, runs=sum(states.values()), states=dict(states)) for id, states in queued.items()]
    damaged = []
    parent = folders.base / _RUNS
    names = sorted((entry.name for entry in os.scandir(parent)), reverse=True) if parent.is_dir() else []
    for id in names:
        try:
            states: Counter[str] = Counter(job.state for job in _jobs(folders, id))
        except UnknownFileError:
            continue
        except LorasmithError as error:
            damaged.append(SkippedFile(file=id, reason=str(error)))
            continue
        if id not in queued:
            rows.append(SweepRow(id=id, runs=states.total(), states=dict(states)))
    return SweepList(sweeps=tuple(rows), damaged=tuple(damaged))


@question
def sweep(folders: Folders, id: str, *, queued: tuple[Mapping[str, Any], ...] = ()) -> SweepAnswer:
    """A sweep with the results of its runs; `queued` are `{request, varied, failure}` of those in the server's queue.
    Raises UnknownFileError, and StoreError for a damaged queue.
    """
    entries_by_name = {PurePath(str(job["request"].get("output", ""))).name: job for job in queued}
    if not queued:
        entries_by_name = {
            job.id: {"request": job.request, "varied": job.varied, "failure": job.failure} for job in _jobs(folders, id)
        }
    entries = [
        _entry(folders, id, number, name, entry)
        for number, (name, entry) in enumerate(entries_by_name.items(), start=1)
    ]
    record = sweep_record(id, entries)
    rows = (
        shaped(
            SweepRunRow,
            run,
            run=f"{_RUNS}/{id}/{run.name}",
            settings=dict(run.settings),
            error=without_places(run.error, (folders.base, Path.home())),
            cover=_cover(folders, f"{_RUNS}/{id}/{run.name}"),
        )
        for run in record.runs
    )
    return SweepAnswer(id=id, comparable=record.comparable, runs=tuple(rows))


def _cover(folders: Folders, run: str) -> str | None:
    """The picture that a run is shown by; None where it has none or cannot be read."""
    try:
        return row_of(run, run_folder_of(folders, run), {}).cover
    except LorasmithError:
        return None


def _entry(folders: Folders, id: str, number: int, name: str, job: Mapping[str, Any]) -> SweepEntry:
    waiting = SweepEntry(number=number, name=name, state="waiting", settings=dict(job["varied"]))
    folder = run_folder_of(folders, f"{_RUNS}/{id}/{name}", is_begun=False)
    try:
        return result_in(folder, waiting, _placed(folders, spec_of(job["request"])), job["failure"])
    except LorasmithError as error:
        return replace(waiting, state="failed", error=str(error))


def _placed(folders: Folders, spec: RunSpec) -> RunSpec:
    """A spec whose sources do not depend on the current folder."""
    sources = tuple(replace(source, path=str(folders.base / source.path)) for source in spec.sources)
    return replace(spec, sources=sources)


def _jobs(folders: Folders, id: str) -> list[Job]:
    """The jobs of a sweep of the command line. Raises UnknownFileError without one, and StoreError."""
    path = folders.base / _RUNS / id / QUEUE
    if not (is_name(id) and is_regular(path) and is_below(folders, path, _RUNS)):
        raise UnknownFileError(f"there is no sweep {id!r}; choose one of the list")
    return [job for job in jobs_in(path) if is_name(job.id)]
