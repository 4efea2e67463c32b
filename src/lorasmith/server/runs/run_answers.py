"""Questions about a run: its report as data and as a page, its files and LoRAs; the list is in `run_list_answers`.

Runs are in `<base>/runs` (of the page and the command line) and in `<base>/output/runs` (of graphs). A run's id is its
folder relative to the base folder, such as `runs/dog-001`. Runs of two experts of a model share a folder, such as
`runs/dog-001/high_noise`, and so do those of a sweep, which are in its list alone.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.core.files import Stamp, is_regular, stamp_of
from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.core.options import options_of
from lorasmith.core.printable import count_text
from lorasmith.formats.metadata import sha256_file
from lorasmith.report.contact_sheet import pair_stems
from lorasmith.report.pictures import thinned
from lorasmith.report.run_report import UNJUDGED, RunReport
from lorasmith.runs.evaluate import candidates_of, plain_sentence
from lorasmith.runs.run_images import images_in, left_out_in, thumbnail_of
from lorasmith.runs.run_log import LoggedRun, followed, view_of_log
from lorasmith.runs.run_page import is_own, lora_of_run, loras_of_run, page_of, report_of
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.view import RunView, preview_file
from lorasmith.server.datasets.dataset_answers import reduced
from lorasmith.server.datasets.dataset_folders import UnknownFileError, is_name
from lorasmith.server.datasets.dataset_shapes import SkippedFile
from lorasmith.server.questions import question, shaped
from lorasmith.server.runs.run_list_answers import evaluation_of, row_of, run_folder_of
from lorasmith.server.runs.run_shapes import (
    AskedPrompt,
    DrawnPrompt,
    LikenessFacts,
    LoraFacts,
    PairFacts,
    PictureAdvice,
    PreviewFacts,
    RecommendedLora,
    RunAnswer,
    RunNote,
    RunPicture,
    RunSetting,
    SavedLora,
    ValidationFacts,
)
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Outcome
from lorasmith.training.run_requests import drawings_waiting
from lorasmith.training.storage.records import RunRecord
from lorasmith.training.storage.run_folder import RunFolder

_POINTS, _FILES = 2000, 2000


@question
def run(folders: Folders, id: str, *, jobs: Mapping[str, str] | None = None) -> RunAnswer:
    """A run with the data of its report; `jobs` as in `runs`. Raises UnknownFileError and TrainingError."""
    with followed(run_folder_of(folders, id)) as found:
        return _answer(folders, id, found, jobs or {})


def _answer(folders: Folders, id: str, run: LoggedRun, jobs: Mapping[str, str]) -> RunAnswer:
    folder, record, view, report = run.folder, run.record, run.view, report_of(run)
    row = row_of(id, folder, jobs)
    points = [point for point in view.points if math.isfinite(point.loss)]
    rates = [(point.step, point.rate) for point in view.points if math.isfinite(point.rate)]
    best = view.best
    saves = list(saves_of(folder, record))
    return RunAnswer(
        **vars(row),
        status=report.status,
        mood=report.mood,
        settings=(*(RunSetting(**vars(setting)) for setting in report.settings), *_data_settings(record)),
        changed=_changed(record),
        trigger=_text(record.source.get("trigger")),
        losses=tuple((point.step, point.loss) for point in thinned(points, _POINTS)),
        smooth=tuple((point.step, point.mean) for point in thinned(points, _POINTS)),
        rates=tuple(thinned(rates, _POINTS)),
        validations=tuple(
            shaped(ValidationFacts, validation, best=validation is best) for validation in view.validations
        ),
        base_loss=report.curves.base_loss,
        likenesses=tuple(shaped(LikenessFacts, likeness) for likeness in view.likenesses),
        previews=tuple(_previews(folder, view)),
        pairs=tuple(_pairs(folder, max((len(preview.prompts) for preview in view.previews.values()), default=0))),
        drawn=tuple(
            DrawnPrompt(**{**drawing, "pictures": tuple(drawing["pictures"])}) for drawing in view.prompts_drawn()
        ),
        asked=tuple(shaped(AskedPrompt, drawing, id=id) for id, drawing in drawings_waiting(folder).items()),
        images=tuple(_pictures(run, report)),
        advice=tuple(shaped(PictureAdvice, image, file=image.name) for image in report.advice.images),
        advice_summary=report.advice.summary,
        left_out=tuple(SkippedFile(file=skipped.name, reason=skipped.reason) for skipped in left_out_in(record.data)),
        lora=_lora(folders, folder, record),
        saves=tuple(saves),
        recommended=_recommended(run),
        best_step=None if best is None else best.step,
        verdict=report.verdict,
        facts=dict(report.facts),
        sentences=tuple(filter(None, (report.verdict, report.summary))),
        notes=tuple(RunNote(kind=kind, message=text, step=step) for kind, text, step in report.notes),
        use=dict(report.programs),
        command=report.commands.get("Repeat the run", ""),
        commands=dict(report.commands),
        files=tuple(_files(folder)),
        folder=str(folder),
        is_trainable_on=is_trainable_on(run),
        dataset=_dataset(folders, record),
    )


@question
def run_file(folders: Folders, id: str, path: str) -> str:
    """The path of a file in a run folder; links out of it are refused. Raises UnknownFileError."""
    folder = run_folder_of(folders, id)
    found = folder / path
    if not all(map(is_name, path.split("/"))) or not is_regular(found) or not is_own(found, folder):
        raise UnknownFileError(f"there is no file {path!r} in {id}; choose one of its list")
    return str(found.resolve())


@question
def run_thumbnail(folders: Folders, id: str, path: str, width: int) -> bytes:
    """A picture of a run as WebP, its longest edge at most `width` pixels. Raises UnknownFileError and ImageError."""
    return reduced(Path(run_file(folders, id, path)), width)


@question
def run_view(folders: Folders, id: str, *, is_begun: bool = True) -> dict[str, Any]:
    """The `RunView` of a run's log, which need not exist yet; `is_begun` as in `run_folder_of`."""
    return {**view_of_log(run_folder_of(folders, id, is_begun=is_begun)), "run": id}


@question
def run_page(folders: Folders, id: str) -> bytes:
    """The report of a run as HTML, made again from its records: the one in its folder is untrusted."""
    with followed(run_folder_of(folders, id)) as run:
        page = page_of(run)
    return page.encode("utf-8", "backslashreplace")


def _previews(folder: Path, view: RunView) -> Iterator[PreviewFacts]:
    """The existing pictures of the last preview of each step and strength."""
    for _, event in sorted(view.previews.items()):
        for number, (prompt, path) in enumerate(zip(event.prompts, event.paths, strict=False), start=1):
            file = preview_file(path)
            if is_own(folder / file, folder):
                yield PreviewFacts(step=event.step, strength=event.strength, prompt=prompt, number=number, file=file)


def _pairs(folder: Path, prompts: int) -> Iterator[PairFacts]:
    """What the prompts of previews edit, and what was trained of it."""
    for stem in pair_stems(folder / "samples"):
        for number in range(1, prompts + 1):
            file = f"samples/{stem}-{number}.png"
            if is_own(folder / file, folder):
                yield PairFacts(title=stem.replace("-", " "), number=number, file=file)


def _pictures(run: LoggedRun, report: RunReport) -> Iterator[RunPicture]:
    standings = {image.name: image.standing for image in report.images if image.standing != UNJUDGED}
    for index, image in enumerate(images_in(run.record.data)):
        small = thumbnail_of(Path(), index).as_posix()
        yield shaped(
            RunPicture,
            image,
            file=image.name,
            thumbnail=small if is_own(run.folder / small, run.folder) else None,
            standing=standings.get(image.name, ""),
        )


def _lora(folders: Folders, folder: Path, record: RunRecord) -> LoraFacts | None:
    path = lora_of_run(folder, record)
    if path is None:
        return None
    return LoraFacts(file=path.name, bytes=path.stat().st_size, installed=_installed(folders, path))


def _recommended(run: LoggedRun) -> RecommendedLora | None:
    """The LoRA that an evaluation recommends, else the last one."""
    view = run.view
    if (path := lora_of_run(run.folder, run.record)) is None:
        return None
    saves = candidates_of(run.folder, run.record.title)
    evaluation = evaluation_of(run.folder)
    best = (
        None
        if evaluation is None or evaluation.verdict.best is None
        else evaluation.loras[evaluation.verdict.best].file
    )
    chosen = next((save for save in saves if save.path.name == best), None)
    is_style = run.record.source.get("kind") == "style"
    return RecommendedLora(
        sentence=_plain_end(view) if evaluation is None else plain_sentence(evaluation, is_style=is_style),
        is_judged=chosen is not None,
        step=view.step if chosen is None else chosen.step,
        file=path.name if chosen is None else chosen.path.name,
        bytes=(path if chosen is None else chosen.path).stat().st_size,
    )


def _plain_end(view: RunView) -> str:
    """How a run ended that was not evaluated, and how alike its last previews are to the photos."""
    sentence = _ENDS[view.outcome].format(step=f"{view.step:,}", steps=count_text(view.step, "step"))
    last = view.likeness
    if last is None or not math.isfinite(last.likeness):
        return sentence
    own = "" if last.own is None else f" (your photos among themselves: {last.own:.2f})"
    return f"{sentence} How much it looks like your photos: {last.likeness:.2f}{own}."


_ENDS = {
    None: "Interrupted at step {step}.",
    Outcome.FINISHED: "Trained for {steps}.",
    Outcome.STOPPED: "Stopped by itself after {steps}.",
    Outcome.CANCELLED: "Stopped at step {step}, kept.",
    Outcome.FAILED: "Failed at step {step}.",
}


def _installed(folders: Folders, lora: Path) -> str | None:
    """The name in models/loras of a copy of a LoRA."""
    parent, size = folders.base / "models" / "loras", lora.stat().st_size
    alike = [path for path in sorted(parent.glob("*.safetensors")) if is_regular(path) and path.stat().st_size == size]
    return next((path.name for path in alike if digest_of(path) == digest_of(lora)), None)


def _files(folder: Path) -> list[str]:
    """Paths of the files in a run folder, except hidden and linked ones."""
    found = []
    for parent, inner, names in os.walk(folder):
        inner[:] = sorted(inner_name for inner_name in inner if not inner_name.startswith("."))
        paths = (Path(parent, name) for name in sorted(names) if not name.startswith("."))
        found += [path.relative_to(folder).as_posix() for path in paths if is_own(path, folder)]
        if len(found) >= _FILES:
            break
    return found[:_FILES]


def _dataset(folders: Folders, record: RunRecord) -> str | None:
    try:
        path = Path(RunSpec.from_record(record.source, {}).folder)
    except ValueError:
        return None
    roots = (folders.place("input"), folders.place("input").resolve(), BUILT_IN_BASE / "input")
    return path.name if path.parent in roots else None


def _data_settings(record: RunRecord) -> Sequence[RunSetting]:
    try:
        data = RunSpec.from_record(record.source, {}).data
    except ValueError:
        return ()
    return [shaped(RunSetting, setting, value=getattr(data, name)) for name, setting in options_of(type(data)).items()]


def _changed(record: RunRecord) -> dict[str, Any]:
    options = options_of(TrainConfig)
    asked = {name: value for name, value in record.asked.items() if name in options and value != options[name].default}
    data = {setting.name: setting.value for setting in _data_settings(record) if setting.value != setting.default}
    return {**data, **asked}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def saves_of(folder: Path, record: RunRecord) -> Iterator[SavedLora]:
    """The saved LoRAs of a run, ordered by step."""
    for path, step in loras_of_run(folder, record.title):
        best = path.stem == f"{record.title}-best"
        yield SavedLora(step=step, file=path.name, bytes=path.stat().st_size, best=best)


def is_trainable_on(run: LoggedRun) -> bool:
    """Whether a longer run can continue from the end of a run."""
    is_complete = run.view.outcome is not None and run.view.outcome.is_final
    return is_complete and run.record.source.get("command") == "train" and bool(RunFolder(run.folder).states().paths())


def digest_of(path: Path) -> str:
    """SHA-256 of a file, cached until it changes."""
    return _digest_once(str(path), stamp_of(path))


@functools.lru_cache(maxsize=1000)
def _digest_once(path: str, stamp: Stamp) -> str:
    return sha256_file(Path(path))
