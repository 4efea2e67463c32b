"""The runs of the base folder as rows of a list: where they are, what is kept of each, what somebody wrote of them (in
`marks.json` of their folder), and their removal and return.

A row is read again when its files have changed. In a long list that is looked at for the rows that are shown alone;
the others keep their places, and one that was never read has that of its record's time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from lorasmith.core.cancellation import check_wanted
from lorasmith.core.errors import OptionError, OutputError, TrainingError
from lorasmith.core.files import Stamp, entry_is_link, is_folder, is_regular, stamp_of, write_atomic
from lorasmith.core.folders import Folders
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import printable
from lorasmith.core.typed_json import typed
from lorasmith.data.captions import one_line
from lorasmith.evaluation.evaluation_record import EVALUATION, EVALUATION_RECORD, Evaluation, read_evaluation
from lorasmith.runs.drawing import EXPERTS
from lorasmith.runs.presets import guessed_kind
from lorasmith.runs.run_images import images_in, subject_words, thumbnail_of
from lorasmith.runs.run_log import LoggedRun, followed, read_run
from lorasmith.runs.run_page import is_own
from lorasmith.runs.view import RunView, preview_file
from lorasmith.server.datasets.dataset_folders import UnknownFileError, is_name, stays_in
from lorasmith.server.datasets.dataset_shapes import RemovedAnswer, SkippedFile
from lorasmith.server.questions import question
from lorasmith.server.runs.run_shapes import RunList, RunMarks, RunPhase, RunRow, Taught
from lorasmith.server.server_disk import disk_space, put_folder_back, removed_folder, set_aside
from lorasmith.training.storage.records import EVENTS, RECORD, RunRecord
from lorasmith.training.storage.run_folder import RunFolder

MARKS = "marks.json"
PLACES = ("runs", "output/runs")  # parents of runs, relative to the base folder

_MOST_TITLE, _MOST_NOTE = 100, 4_000  # characters
_CHANGING = threading.Lock()
_LARGE_BYTES = 2**20  # of logs that are kept, to be read on


@question
def runs(folders: Folders, *, jobs: Mapping[str, str] | None = None, limit: int | None = None) -> RunList:
    """All runs, the newest first, or the first `limit`, starred ones before others; `jobs` are the running jobs by run
    id.
    """
    found = _all_runs(folders)
    is_part = limit is not None
    rows, damaged = [], []
    for run in sorted(found, key=lambda run: (is_part and run.starred, run.started), reverse=True)[:limit]:
        check_wanted()
        try:
            rows.append(run.row(jobs or {}))
        except OptionError:  # it is gone
            _known.pop(run.id, None)
        except TrainingError as error:
            damaged.append(SkippedFile(file=run.id, reason=str(error)))
    rows.sort(key=lambda row: (is_part and row.starred, row.started or 0.0), reverse=True)
    return RunList(runs=tuple(rows), damaged=tuple(damaged), total=len(found))


def row_of(id: str, folder: Path, jobs: Mapping[str, str]) -> RunRow:
    """A run in the list. Raises OptionError and TrainingError, as `read_record`."""
    return _found(id, str(folder), 0.0).row(jobs)


@dataclass
class _Run:
    """What is kept of a run."""

    id: str
    path: str
    started: float  # that of its record's file until the run is read
    starred: bool = False
    stamp: tuple[Stamp, ...] = ()  # the state of the files that `facts` were read from
    facts: Mapping[str, Any] = field(default_factory=dict)

    def row(self, jobs: Mapping[str, str]) -> RunRow:
        folder = Path(self.path)
        stamp = tuple(stamp_of(folder / name) for name in (RECORD, EVENTS, f"{EVALUATION}/{EVALUATION_RECORD}"))
        if self.stamp != stamp:
            is_large = stamp[1][1] > _LARGE_BYTES
            with followed(folder) if is_large else contextlib.nullcontext(read_run(folder)) as run:
                self.facts, self.stamp = _facts(run), stamp
        marks, facts, job = marks_of(folder), self.facts, jobs.get(self.id)
        self.started, self.starred = facts["started"] or 0.0, marks.starred
        outcome: str | None = facts["outcome"]
        is_running = job is not None or (outcome is None and RunFolder(folder).is_training)
        place = next(place for place in PLACES if self.id.startswith(f"{place}/"))
        return RunRow(
            id=self.id,
            state=cast(RunPhase, "running" if is_running else outcome or "interrupted"),
            job=job,
            cover=_cover(folder, facts),
            label=marks.title or self.id.removeprefix(f"{place}/"),
            starred=marks.starred,
            note=marks.note,
            **{key: facts[key] for key in _FACTS},
        )


_known: dict[str, _Run] = {}  # by id


def _found(id: str, path: str, modified: float) -> _Run:
    known = _known.get(id)
    if known is None or known.path != path:
        known = _known[id] = _Run(id, path, modified)
    return known


_FACTS = (
    "name", "started", "seconds", "step", "steps", "model", "family", "loss", "loss_label", "held_out", "subject",
    "teaches",
)  # fmt: skip


def _facts(run: LoggedRun) -> dict[str, Any]:
    """What a row has of the run's record and log."""
    record, view = run.record, run.view
    planned = record.config.get("steps")
    return {
        "outcome": None if view.outcome is None else view.outcome.value,
        "name": printable(record.title or run.folder.name),
        "started": run.log.starts[0].at if run.log.starts else None,
        "seconds": view.seconds,
        "step": view.step,
        "steps": planned if isinstance(planned, int) else None,
        "model": printable(record.model.name),
        "family": printable(record.model.family),
        "loss": view.loss.mean,
        "loss_label": view.loss.label,
        "held_out": None if view.best is None else view.best.loss,
        "subject": printable(one_line(subject_words(record))),
        "teaches": _taught(record),
        "covers": [*_covers(view, evaluation_of(run.folder)), f"{record.title}.png"],
    }


def _taught(record: RunRecord) -> Taught:
    """What the pictures of a run teach."""
    if record.consequences.is_slider:
        return "slider"
    if record.consequences.learns_no_subject:
        return ""
    images = [image for image in images_in(record.data) if image.use != "class"]
    if any(image.controls for image in images):
        return "edit"
    if (kind := record.source.get("kind")) in ("subject", "style"):
        return cast(Taught, kind)
    return guessed_kind([image.caption for image in images], str(record.source.get("trigger") or ""))[0]


def _covers(view: RunView, evaluation: Evaluation | None) -> list[str]:
    """The first prompt's pictures, the best first: with the recommended LoRA, at its full strength, the newest."""
    best = None if evaluation is None or evaluation.verdict.best is None else evaluation.loras[evaluation.verdict.best]
    step = None if best is None else best.step
    shots = sorted(
        (preview for preview in view.previews.values() if preview.paths),
        key=lambda picture: (step in (None, picture.step), picture.strength == 1, picture.strength, picture.step),
        reverse=True,
    )
    drawn = [] if best is None else [f"{EVALUATION}/{picture}" for picture in best.pictures[:1]]
    at_best = sum(shot.step == step for shot in shots)
    files = [preview_file(shot.paths[0]) for shot in shots]
    return [*files[:at_best], *drawn, *files[at_best:]]


def evaluation_of(run: Path) -> Evaluation | None:
    """The stored evaluation of a run's LoRAs."""
    folder = run / EVALUATION
    return read_evaluation(folder) if stays_in(folder, run.resolve()) else None


def _cover(folder: Path, facts: Mapping[str, Any]) -> str | None:
    candidates = [*facts["covers"], thumbnail_of(Path(), 0).as_posix()]
    return next((candidate for candidate in candidates if is_own(folder / candidate, folder)), None)


def marks_of(folder: Path) -> RunMarks:
    """What somebody keeps of a run, as it is shown; a file that is damaged or a link counts as none."""
    return _marks_once(str(folder), stamp_of(folder / MARKS)) if is_own(folder / MARKS, folder) else RunMarks()


@functools.lru_cache(maxsize=2000)
def _marks_once(folder: str, stamp: Stamp) -> RunMarks:
    try:
        return shown_marks(typed(parse_foreign_json((Path(folder) / MARKS).read_bytes()), RunMarks))
    except (OSError, ValueError):
        return RunMarks()


def shown_marks(marks: RunMarks) -> RunMarks:
    """Marks in printable text; the title is on one line."""
    return replace(marks, title=printable(one_line(marks.title)), note=printable(marks.note.strip(), keep="\n"))


@question
def mark_run(
    folders: Folders, id: str, *, title: str | None = None, starred: bool | None = None, note: str | None = None
) -> RunMarks:
    """Store what a run is called (empty: its folder's name), whether it is starred, and a note; None leaves each as it
    is. Raises UnknownFileError, OptionError for long texts, and OutputError.
    """
    folder = run_folder_of(folders, id)
    for name, text, most in (("title", title, _MOST_TITLE), ("note", note, _MOST_NOTE)):
        if text is not None and len(text) > most:
            raise OptionError(f"a {name} must have at most {most:,} characters, got {len(text):,}; shorten it")
    with _CHANGING:
        there = marks_of(folder)
        run_marks = shown_marks(
            RunMarks(
                title=there.title if title is None else title,
                starred=there.starred if starred is None else starred,
                note=there.note if note is None else note,
            )
        )
        text = json.dumps(asdict(run_marks), ensure_ascii=False)
        with disk_space(folder, len(text)):
            write_atomic(folder / MARKS, text + "\n")
    return run_marks


@question
def remove_run(folders: Folders, id: str) -> RemovedAnswer:
    """Move a run to the removed things. Raises UnknownFileError, and OutputError while a process trains it."""
    folder = run_folder_of(folders, id)
    if RunFolder(folder).is_training:
        raise OutputError(f"{id} is being trained; stop it first")
    with _CHANGING:
        removed = set_aside(folders.base, [folder], folder.name)
    return RemovedAnswer(removed=(removed / folder.name).relative_to(folders.base).as_posix())


@question
def restore_run(folders: Folders, id: str, *, removed: str) -> RunMarks:
    """Move a removed run back to its place. Raises UnknownFileError, and OutputError if another run is there now."""
    parent, target = removed_folder(folders.base), folders.base / id
    place, _, name = id.rpartition("/")
    outer, _, _ = place.rpartition("/")
    is_place = is_name(name) and (place in PLACES or (outer in PLACES and is_folder(target.parent)))
    stored, _, last = removed.rpartition("/")
    with _CHANGING:
        try:
            if not is_place or last != name:
                raise FileNotFoundError
            put_folder_back(folders.base, stored, target, is_run=True)
        except FileNotFoundError:
            raise UnknownFileError(f"there is no removed run {removed!r} of {id!r}; look into {parent}") from None
        except FileExistsError:
            raise OutputError(
                f"there is another run {id} now; move the removed one back by hand, from {folders.base / removed}"
            ) from None
    return marks_of(target)


def run_folder_of(folders: Folders, id: str, *, is_begun: bool = True) -> Path:
    """The folder of a run; unless `is_begun`, its record need not exist yet. Raises UnknownFileError."""
    place, _, name = id.rpartition("/")
    names: tuple[str, ...] = (name,)
    if place not in PLACES:
        place, _, outer = place.rpartition("/")
        names = (outer, name)
    folder = folders.base.joinpath(place, *names)
    is_there = place in PLACES and all(map(is_name, names)) and (is_regular(folder / RECORD) or not is_begun)
    if is_there and is_below(folders, folder, place):
        return folder
    raise UnknownFileError(f"there is no run {id!r}; choose one of the list")


def is_below(folders: Folders, path: Path, place: str) -> bool:
    """Whether a path leads into the base folder, or to where its folder `place` leads."""
    roots = (folders.base.resolve(), (folders.base / place).resolve())
    return any(path.resolve().is_relative_to(root) for root in roots)


def _all_runs(folders: Folders) -> list[_Run]:
    """Every run. Those that are known are not looked at, but for their folders being there."""
    found = []
    for place in PLACES:
        parent = folders.base / place
        for entry in os.scandir(parent) if parent.is_dir() else ():
            id = f"{place}/{entry.name}"
            known = _known.get(id)
            if known is not None and known.path == entry.path and not entry_is_link(entry):
                found.append(known)
                continue
            for each, path in ((id, entry.path), *((f"{id}/{expert}", f"{entry.path}/{expert}") for expert in EXPERTS)):
                modified = _modified(f"{path}/{RECORD}")
                if modified is not None and (not entry_is_link(entry) or is_below(folders, Path(path), place)):
                    found.append(_found(each, path, modified))
    kept = {run.id for run in found}
    for id in [id for id in list(_known) if id not in kept]:
        _known.pop(id, None)
    return found


def _modified(path: str) -> float | None:
    """When a file was changed; None unless it is one."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a path for each of thousands takes as long as everything else
    except (OSError, ValueError):
        return None
    return status.st_mtime if stat.S_ISREG(status.st_mode) else None
