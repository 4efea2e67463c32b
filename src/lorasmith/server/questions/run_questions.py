"""Questions about runs: all runs below the base folder, one run with all that its report says, and what is made of it.

Runs are folders in `<base>/runs` (of the page and the command line) and in `<base>/output/runs` (of graphs). A run's id
is its folder relative to the base folder, such as `runs/dog-001`. Numbers and sentences are those of the report.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from lorasmith.app.folder_source import FolderSource, changed
from lorasmith.app.recorded_run import Rights, repeated
from lorasmith.app.run_images import images_in, left_out_in, thumbnail_of
from lorasmith.app.run_page import is_own, lora_of_run, report_of, validations_of
from lorasmith.core.errors import LorasmithError, OptionError, TrainingError
from lorasmith.core.files import atomic_path, ensure_folder, is_regular
from lorasmith.core.folders import ASSETS, Folders
from lorasmith.core.options import options_of
from lorasmith.core.safe_names import safe_name
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.hashes import sha256_file
from lorasmith.formats.metadata import steps_of
from lorasmith.report.loss_plot import recent_loss, trailing_means
from lorasmith.report.pictures import thinned
from lorasmith.report.run_report import RunReport, run_report
from lorasmith.server.api_shapes import (
    InstalledLora,
    LoraFacts,
    PreviewFacts,
    RunAnswer,
    RunList,
    RunNote,
    RunPicture,
    RunRow,
    RunSetting,
    RunState,
    SavedLora,
    SkippedFile,
    ValidationFacts,
)
from lorasmith.server.log_tail import end_of_log
from lorasmith.server.questions.dataset_folders import UnknownFileError, is_name
from lorasmith.server.questions.plan_questions import check_steps
from lorasmith.server.questions.run_graph import graph_of_run
from lorasmith.server.questions.shaped_questions import shaped
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Previewed, RunStarted
from lorasmith.training.runs.history import EVENTS, RECORD, RunHistory, read_history, read_record
from lorasmith.training.runs.records import RunRecord
from lorasmith.training.runs.run_folder import RunFolder

__all__ = [
    "install_run",
    "run",
    "run_file",
    "run_folder_of",
    "run_graph",
    "run_log",
    "run_page",
    "runs",
    "train_on_request",
]

PLACES = ("runs", "output/runs")
"""Parents of runs, relative to the base folder."""

_POINTS, _FILES = 2000, 2000


@shaped
def runs(folders: Folders, *, jobs: Mapping[str, str] | None = None) -> RunList:
    """All runs, the newest first.

    Args:
        folders: of the installation.
        jobs: the jobs that run now, by the id of their run.
    """
    rows, damaged = [], []
    for id, folder in _all(folders):
        try:
            rows.append(_row(id, folder, jobs or {}))
        except LorasmithError as error:
            damaged.append(SkippedFile(file=id, reason=str(error)))
    rows.sort(key=lambda row: row.started or 0.0, reverse=True)
    return RunList(runs=tuple(rows), damaged=tuple(damaged))


@shaped
def run(folders: Folders, id: str, *, jobs: Mapping[str, str] | None = None) -> RunAnswer:
    """A run with all that its report says.

    Args:
        folders: of the installation.
        id: of the run.
        jobs: the jobs that run now, by the id of their run.

    Raises:
        UnknownFileError: there is no such run.
        TrainingError: its record cannot be read.
    """
    folder = run_folder_of(folders, id)
    last_event = end_of_log(folder / EVENTS)  # before it is read, so that no event is left out
    history = read_history(folder)
    report, record = report_of(history), history.record
    row = _row(id, folder, jobs or {})
    losses = [(step, loss) for step, loss in enumerate(report.curves.losses, 1) if math.isfinite(loss)]
    means = trailing_means([loss for _, loss in losses])
    smooth = [(step, mean) for (step, _), mean in zip(losses, means, strict=True)]
    rates = [(step, rate) for step, rate in enumerate(report.curves.rates, 1) if math.isfinite(rate)]
    validations = validations_of(history)
    best = min((one for one in validations if math.isfinite(one.loss)), key=lambda one: one.loss, default=None)
    saves = list(_saves(folder, record))
    return RunAnswer(
        **vars(row),
        status=report.status,
        mood=report.mood,
        settings=(
            *(
                RunSetting(name=one.name, value=one.value, default=one.default, help=one.help, group=one.group)
                for one in report.settings
            ),
            *_data_settings(record),
        ),
        changed=_changed(record),
        trigger=_text(record.source.get("trigger")),
        losses=tuple(thinned(losses, _POINTS)),
        smooth=tuple(thinned(smooth, _POINTS)),
        rates=tuple(thinned(rates, _POINTS)),
        validations=tuple(
            ValidationFacts(
                step=one.step,
                loss=_finite(one.loss),
                base_loss=_finite(one.base_loss),
                low=_finite(one.low),
                high=_finite(one.high),
                best=one is best,
            )
            for one in validations
        ),
        base_loss=None if report.curves.base_loss is None else _finite(report.curves.base_loss),
        previews=tuple(_previews(history)),
        images=tuple(_pictures(history, report)),
        left_out=tuple(SkippedFile(file=one.name, reason=one.reason) for one in left_out_in(record.data)),
        lora=_lora(folders, history),
        saves=tuple(saves),
        best_step=None if best is None else best.step,
        verdict=report.verdict,
        facts=dict(report.facts),
        sentences=tuple(filter(None, (report.verdict, report.summary))),
        notes=tuple(RunNote(kind=one.kind, message=one.message, step=one.step) for one in report.notes),
        use={name: (what, text) for name, (what, text) in report.programs.items()},
        command=report.commands.get("Repeat the run", ""),
        commands=dict(report.commands),
        files=tuple(_files(folder)),
        folder=str(folder),
        is_trainable_on=_is_trainable_on(history),
        last_event=last_event,
        dataset=_dataset(folders, record),
    )


@shaped
def run_file(folders: Folders, id: str, path: str) -> str:
    """The path of a file of a run; links that leave its folder are not followed.

    Args:
        folders: of the installation.
        id: of the run.
        path: in its folder, with slashes.

    Raises:
        UnknownFileError: there is no such run or file.
    """
    folder = run_folder_of(folders, id)
    found = folder / path
    if not all(map(is_name, path.split("/"))) or not is_regular(found) or not is_own(found, folder):
        raise UnknownFileError(f"there is no file {path!r} in {id}; choose one of its list")
    return str(found.resolve())


@shaped
def run_log(folders: Folders, id: str, *, is_begun: bool = True) -> str:
    """The path of a run's events, which need not be there yet.

    Args:
        folders: of the installation.
        id: of the run.
        is_begun: whether the run must have written its record.

    Raises:
        UnknownFileError: there is no such run.
    """
    return str(run_folder_of(folders, id, is_begun=is_begun).resolve() / EVENTS)


@shaped
def run_page(folders: Folders, id: str) -> bytes:
    """The report of a run as HTML, made again from its records: what stands in its folder may be a stranger's."""
    return run_report(report_of(read_history(run_folder_of(folders, id)))).encode("utf-8", "backslashreplace")


@shaped
def run_graph(folders: Folders, id: str) -> dict[str, Any]:
    """`prompt`: the graph in API format that does the same as a run; `notes`: where it does not.

    Raises:
        UnknownFileError: there is no such run.
        LorasmithError: there is no such graph; the message says why.
    """
    prompt, notes = graph_of_run(read_record(run_folder_of(folders, id)), folders)
    return {"prompt": prompt, "notes": notes}


@shaped
def install_run(folders: Folders, id: str, *, step: int | None = None, name: str = "") -> InstalledLora:
    """Copy a LoRA of a run into `models/loras`, where other programs look for it; nothing there is replaced.

    Args:
        folders: of the installation.
        id: of the run.
        step: after which it was saved; None for the LoRA of the run.
        name: of the copy; that of the LoRA if it is empty.

    Raises:
        UnknownFileError: there is no such run.
        OptionError: no LoRA was saved, or none of this step.
        OutputError: the copy cannot be written.
    """
    folder = run_folder_of(folders, id)
    history = read_history(folder)
    lora = _lora_at(history, step)
    target = folders.base / "models" / "loras"
    stem = safe_name(name.strip().removesuffix(".safetensors") or lora.stem)
    for number in range(1, 10_000):
        copy = target / f"{stem if number == 1 else f'{stem}-{number}'}.safetensors"
        if not copy.exists():
            break
        if copy.stat().st_size == lora.stat().st_size and _digest(copy) == _digest(lora):
            return InstalledLora(installed=copy.name, was_there=True)
    _copy(lora, copy)
    picture = lora.with_suffix(".png")
    if is_own(picture, folder) and not copy.with_suffix(".png").exists():
        _copy(picture, copy.with_suffix(".png"))
    return InstalledLora(installed=copy.name)


@shaped
def train_on_request(folders: Folders, id: str, *, steps: int) -> dict[str, Any]:
    """The request of a job that trains on from the end of a run: a `RunFile` as JSON.

    The run's record may name files below the base folder and in the model folders alone.

    Args:
        folders: of the installation.
        id: of the run.
        steps: of the longer run, those of the run included.

    Raises:
        UnknownFileError: there is no such run.
        OptionError: it is not complete, has no run state, was not on a folder, or names more than it may.
    """
    check_steps(steps)
    folder = run_folder_of(folders, id)
    history = read_history(folder)
    record = history.record
    if record.source.get("command") != "train":
        raise OptionError(f"{id} was not trained on a folder; change the steps in its graph or script instead")
    if not _is_trainable_on(history):
        raise OptionError(f"{id} is not complete, or has no run state to start from; continue it first")
    before = record.config.get("steps")
    if isinstance(before, int) and steps <= before:
        raise OptionError(f"steps must be more than the {before:,} of the run, got {steps:,}; add some")
    try:
        mine = FolderSource.from_record(record.source)
        given = {
            "model": mine.model if _is_model(folders, mine.model) else None,
            "text_encoders": mine.text_encoders if all(_is_model(folders, one) for one in mine.text_encoders) else (),
            "vae": mine.vae if mine.vae and _is_model(folders, mine.vae) else None,
        }
        source, config = repeated(record, folder / RECORD, Rights(), **given)  # type: ignore[arg-type]
    except ValueError as error:
        raise TrainingError(
            f"{folder / RECORD} is damaged ({error}); restore it from a copy, or train again"
        ) from error
    state = RunFolder(folder).states().paths()[0].resolve()
    return {
        "sources": [{"path": one.path, "repeats": one.repeats, "weight": one.weight} for one in source.sources],
        "model": source.model,
        "text_encoders": list(source.text_encoders),
        "vae": source.vae,
        "name": source.name,
        "validation": source.validation,
        "device": source.device,
        "settings": {
            **changed(source.data),
            **changed(config),
            "steps": steps,
            "existing_state": str(state),
        },
    }


def run_folder_of(folders: Folders, id: str, *, is_begun: bool = True) -> Path:
    """The folder of a run.

    Args:
        folders: of the installation.
        id: of the run.
        is_begun: whether its record must be there; a worker names a run before that.

    Raises:
        UnknownFileError: there is none, or a link leads out of the base folder.
    """
    place, _, name = id.rpartition("/")
    folder = folders.base / place / name
    if place in PLACES and is_name(name):
        base = folders.base.resolve()
        roots = (base, (folders.base / place).resolve())
        if (is_regular(folder / RECORD) or not is_begun) and any(
            folder.resolve().is_relative_to(root) for root in roots
        ):
            return folder
    raise UnknownFileError(f"there is no run {id!r}; choose one of the list")


def _all(folders: Folders) -> Iterator[tuple[str, Path]]:
    for place in PLACES:
        parent = folders.base / place
        names = sorted(entry.name for entry in os.scandir(parent)) if parent.is_dir() else []
        for name in names:
            try:
                yield f"{place}/{name}", run_folder_of(folders, f"{place}/{name}")
            except UnknownFileError:
                continue


def _row(id: str, folder: Path, jobs: Mapping[str, str]) -> RunRow:
    facts = _facts(str(folder), _stamp(folder / RECORD), _stamp(folder / EVENTS))
    job = jobs.get(id)
    outcome: str | None = facts["outcome"]
    is_running = job is not None or (outcome is None and RunFolder(folder).is_busy)
    state = cast(RunState, "running" if is_running else outcome or "interrupted")
    return RunRow(id=id, state=state, job=job, cover=_cover(folder, facts), **{key: facts[key] for key in _FACTS})


_FACTS = ("name", "started", "seconds", "step", "steps", "model", "family", "loss", "loss_label", "held_out")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=2000)
def _facts(folder: str, record_stamp: tuple[int, int], events_stamp: tuple[int, int]) -> dict[str, Any]:
    """What a list says of a run, as its files were then."""
    history = read_history(Path(folder))
    record, steps = history.record, history.steps()
    recent = recent_loss([one.loss for one in steps])
    planned = record.config.get("steps")
    starts = history.of(RunStarted)
    held_out = [one.loss for one in validations_of(history) if math.isfinite(one.loss)]
    shots = [Path("samples", PureWindowsPath(path).name) for one in history.of(Previewed) for path in one.paths[:1]]
    return {
        "outcome": None if history.outcome is None else history.outcome.value,
        "name": record.title or Path(folder).name,
        "started": starts[0].at if starts else None,
        "seconds": history.seconds(),
        "step": steps[-1].step if steps else 0,
        "steps": planned if isinstance(planned, int) else None,
        "model": record.model.name,
        "family": record.model.family,
        "loss": _finite(recent.mean),
        "loss_label": recent.label,
        "held_out": min(held_out, default=None),
        "covers": [*(path.as_posix() for path in reversed(shots)), f"{record.title}.png"],
    }


def _cover(folder: Path, facts: Mapping[str, Any]) -> str | None:
    candidates = [*facts["covers"], thumbnail_of(Path(), 0).as_posix()]
    return next((one for one in candidates if is_own(folder / one, folder)), None)


def _previews(history: RunHistory) -> Iterator[PreviewFacts]:
    """The pictures of the last preview of each step and strength, as far as they are there."""
    shots = {(event.step, event.strength): event for event in history.of(Previewed)}
    for _, event in sorted(shots.items()):
        for prompt, path in zip(event.prompts, event.paths, strict=False):
            file = f"samples/{PureWindowsPath(path).name}"
            if is_own(history.folder / file, history.folder):
                yield PreviewFacts(step=event.step, strength=event.strength, prompt=prompt, file=file)


def _pictures(history: RunHistory, report: RunReport) -> Iterator[RunPicture]:
    standings = {one.name: one.standing for one in report.images}
    for index, image in enumerate(images_in(history.record.data)):
        small = thumbnail_of(Path(), index).as_posix()
        yield RunPicture(
            file=image.name,
            caption=image.caption,
            use=image.use,
            thumbnail=small if is_own(history.folder / small, history.folder) else None,
            standing=standings.get(image.name, ""),
        )


def _lora(folders: Folders, history: RunHistory) -> LoraFacts | None:
    path = lora_of_run(history)
    if path is None:
        return None
    return LoraFacts(file=path.name, bytes=path.stat().st_size, installed=_installed(folders, path))


def _installed(folders: Folders, lora: Path) -> str | None:
    """The name in models/loras of a copy of a LoRA."""
    parent, size = folders.base / "models" / "loras", lora.stat().st_size
    alike = [one for one in sorted(parent.glob("*.safetensors")) if is_regular(one) and one.stat().st_size == size]
    return next((one.name for one in alike if _digest(one) == _digest(lora)), None)


def _saves(folder: Path, record: RunRecord) -> Iterator[SavedLora]:
    """The LoRAs in the folder of a run by their steps."""
    own = re.compile(rf"{re.escape(record.title)}(-best|-step\d+)?")
    found = []
    for path in folder.glob("*.safetensors"):
        match = own.fullmatch(path.stem)
        if match and is_own(path, folder) and (step := _steps(str(path), _stamp(path))) is not None:
            found.append(SavedLora(step=step, file=path.name, bytes=path.stat().st_size, best=match[1] == "-best"))
    yield from sorted(found, key=lambda one: (one.step, one.file))


@functools.lru_cache(maxsize=5000)
def _steps(path: str, stamp: tuple[int, int]) -> int | None:
    """Steps of a LoRA; None if it cannot be read."""
    try:
        return steps_of(check_safetensors(Path(path)).metadata, Path(path).name)
    except LorasmithError:
        return None


def _lora_at(history: RunHistory, step: int | None) -> Path:
    if step is None:
        if (path := lora_of_run(history)) is None:
            raise OptionError(f"{history.folder.name} has saved no LoRA yet; continue it, or cancel it to save one")
        return path
    saves = list(_saves(history.folder, history.record))
    found = next((one for one in saves if one.step == step), None)
    if found is None:
        known = ", ".join(sorted({f"{one.step:,}" for one in saves})) or "none"
        raise OptionError(f"{history.folder.name} has LoRAs of the steps {known}, got {step:,}; choose one of these")
    return history.folder / found.file


def _copy(source: Path, target: Path) -> None:
    ensure_folder(target.parent)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _digest(path: Path) -> str:
    return _digest_once(str(path), _stamp(path))


@functools.lru_cache(maxsize=1000)
def _digest_once(path: str, stamp: tuple[int, int]) -> str:
    return sha256_file(Path(path))


def _files(folder: Path) -> list[str]:
    """Paths of the files in the folder of a run, without hidden ones and those that links lead to."""
    found = []
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(one for one in inner if not one.startswith("."))
        paths = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        found += [path.relative_to(folder).as_posix() for path in paths if is_own(path, folder)]
        if len(found) >= _FILES:
            break
    return found[:_FILES]


def _is_trainable_on(history: RunHistory) -> bool:
    is_complete = history.outcome is not None and history.outcome.is_final
    return (
        is_complete
        and history.record.source.get("command") == "train"
        and bool(RunFolder(history.folder).states().paths())
    )


def _is_model(folders: Folders, path: str) -> bool:
    """Whether a path is in one of the model folders, so that a record may name it."""
    kinds = ("checkpoints", "diffusion_models", "text_encoders", "vae")
    plain = Path(os.path.normpath(path))
    return any(plain.is_relative_to(root) for kind in kinds for root in folders.roots(kind) if root.is_absolute())


def _dataset(folders: Folders, record: RunRecord) -> str | None:
    """The dataset that a run was trained on."""
    try:
        path = Path(FolderSource.from_record(record.source).folder)
    except ValueError:
        return None
    roots = (folders.place("input"), folders.place("input").resolve(), ASSETS / "input")
    return path.name if path.parent in roots else None


def _data_settings(record: RunRecord) -> Sequence[RunSetting]:
    try:
        data = FolderSource.from_record(record.source).data
    except ValueError:
        return ()
    return [
        RunSetting(name=name, value=getattr(data, name), default=one.default, help=one.help, group=one.group)
        for name, one in options_of(type(data)).items()
    ]


def _changed(record: RunRecord) -> dict[str, Any]:
    """The settings that were asked for and differ from their defaults."""
    known = options_of(TrainConfig)
    asked = {name: one for name, one in record.asked.items() if name in known and one != known[name].default}
    data = {one.name: one.value for one in _data_settings(record) if one.value != one.default}
    return {**data, **asked}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
