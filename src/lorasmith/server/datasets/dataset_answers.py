"""Questions about datasets: their list, contents and pictures, and the check of one, worded for the page.

A dataset is one folder of images in `<base>/input`, such as `input/dog`, which `lorasmith train` accepts as well. Links
are followed as `Folders` and `DataConfig.follow_links` allow. Pictures in its subfolders are counted in notes and not
shown.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasmith.core.cancellation import report_progress
from lorasmith.core.errors import DataError
from lorasmith.core.files import Stamp, is_folder, is_regular, stamp_of
from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.data.captions import Caption, CaptionError, read_caption_file
from lorasmith.data.data_config import CAPTION_SUFFIXES, DataConfig, ImageSource
from lorasmith.data.findings import Finding, FindingKind
from lorasmith.data.folder_listing import ListedFolder, Skipped, control_folder, list_folders, stem_of
from lorasmith.data.image_files import ImageError, header_size, image_suffixes, open_mask, open_reduced
from lorasmith.data.preflight import Preflight, name_in
from lorasmith.data.source_files import Candidate, ScanNotes, candidates
from lorasmith.families.locating import ModelFiles
from lorasmith.report.pictures import thinned
from lorasmith.runs.data_check import TITLES, DataCheck, check_folder, said_of
from lorasmith.runs.spec import RunSpec
from lorasmith.server.datasets.dataset_folders import (
    MASK,
    UnknownFileError,
    dataset_folder,
    is_builtin,
    is_name,
    stays_in,
    subfolders,
)
from lorasmith.server.datasets.dataset_originals import original_of
from lorasmith.server.datasets.dataset_shapes import (
    CheckedPicture,
    ControlRow,
    Crop,
    DataCheckAnswer,
    DatasetAnswer,
    DatasetList,
    DatasetRow,
    FindingFacts,
    PictureRow,
    Severity,
    SkippedFile,
)
from lorasmith.server.questions import question
from lorasmith.training.adapter_settings import lora_settings

CONTROL = control_folder(0)  # folder of the pictures before an edit
MOST_THUMBNAIL = 2048  # pixels of the longest edge


@question
def datasets(folders: Folders, *, name: str | None = None) -> DatasetList:
    """All datasets by name, or the one of a `name`: folders with pictures, and empty ones."""
    rows = {}
    for root in (BUILT_IN_BASE / "input", folders.place("input")):
        for folder in subfolders(root):
            if name in (None, folder.name) and folders.is_here(folder) and (row := _row(folder)) is not None:
                rows[folder.name] = row
    return DatasetList(datasets=tuple(sorted(rows.values(), key=lambda row: (row.builtin, row.name.casefold()))))


@question
def dataset(folders: Folders, name: str) -> DatasetAnswer:
    """The pictures of a dataset with their captions, in natural order. Raises UnknownFileError."""
    folder = dataset_folder(folders, name)
    pictures, skipped, notes = pictures_in(folders, folder)
    used = {path for picture in pictures for path in picture.controls}
    return DatasetAnswer(
        name=name,
        folder=str(folder),
        images=tuple(map(picture_row, pictures)),
        controls=tuple(_control_row(control, folder) for control in controls_in(folder) if control not in used),
        builtin=is_builtin(folder),
        notes=tuple(notes),
        skipped=tuple(SkippedFile(file=name_in(folder, path), reason=reason) for path, reason in skipped),
    )


@question
def thumbnail(
    folders: Folders,
    name: str,
    file: str,
    width: int = 256,
    *,
    control: bool = False,
    original: bool = False,
    mask: bool = False,
) -> bytes:
    """A picture or control as WebP, upright, its longest edge at most `width` pixels; of a cropped one its `original`;
    or the `mask` of a picture, white inside. Raises UnknownFileError and ImageError.
    """
    path = _shown_file(folders, name, file, control=control, original=original, mask=mask)
    return reduced(path, width, is_mask=mask)


def reduced(path: Path, width: int, *, is_mask: bool = False) -> bytes:
    """A picture as WebP, upright, its longest edge at most `width` pixels. Raises ImageError."""
    longest = max(16, min(width, MOST_THUMBNAIL))
    picture = open_mask(path) if is_mask else open_reduced(path, longest)
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, format="webp", quality=82, method=2, lossless=is_mask)
    return buffer.getvalue()


@question
def picture_file(
    folders: Folders, name: str, file: str, *, control: bool = False, original: bool = False, mask: bool = False
) -> str:
    """The path of a picture or control, of a cropped one that of its `original`, or of a picture's `mask`. Raises
    UnknownFileError.
    """
    return str(_shown_file(folders, name, file, control=control, original=original, mask=mask).resolve())


def _shown_file(folders: Folders, name: str, file: str, *, control: bool, original: bool, mask: bool) -> Path:
    folder = dataset_folder(folders, name)
    if mask:
        return mask_of(folder, file)
    path = picture_of(folder, file, control=control)
    found = original_of(path, stamp_of(path)) if original else None
    return path if found is None or not stays_in(found.path, folder.resolve()) else found.path


def _row(folder: Path) -> DatasetRow | None:
    """A folder as a dataset; None if it has only other files."""
    try:
        listed = next(list_folders(str(folder)))
        is_empty = not listed.images and all(path.name.startswith((".", CONTROL)) for path in folder.iterdir())
    except (DataError, OSError):
        return None
    inner = [] if listed.images else [inner_folder for inner_folder in _inner(folder) if inner_folder.images]
    if not (listed.images or inner or is_empty):
        return None
    stems = set(listed.captions)
    return DatasetRow(
        name=folder.name,
        images=len(listed.images),
        captions=sum(stem_of(image) in stems for image in listed.images),
        modified=folder.stat().st_mtime,
        cover=next(iter(listed.images), None),
        covers=tuple(thinned(list(listed.images), 4)),
        builtin=is_builtin(folder),
    )


def _inner(folder: Path) -> list[ListedFolder]:
    """Subfolders of a dataset whose pictures are trained on as well."""
    try:
        return list(list_folders(str(folder)))[1:]
    except DataError:
        return []


def picture_row(candidate: Candidate) -> PictureRow:
    """A picture as the page shows it, with its faults."""
    path = candidate.path  # made from its name each time
    stamp = stamp_of(path)
    width, height, problem = _measured(path, stamp)
    caption, fault = caption_of(candidate)
    original = original_of(path, stamp)
    return PictureRow(
        file=candidate.name,
        width=width,
        height=height,
        bytes=stamp[1],
        caption=caption,
        has_caption=bool(caption),
        problem=problem or fault,
        controls=tuple(_control_row(path, Path(candidate.folder.path)) for path in candidate.controls),
        crop=None if original is None else original.crop,
        mask=next(iter(candidate.folder.masks.get(stem_of(candidate.name), ())), ""),
    )


def _control_row(path: Path, folder: Path) -> ControlRow:
    fixed = path.parent != folder / CONTROL or not stays_in(path, folder.resolve())
    width, height, problem = (None, None, "") if fixed else _measured(path, stamp_of(path))
    return ControlRow(file=str(path) if fixed else path.name, width=width, height=height, fixed=fixed, problem=problem)


def controls_in(folder: Path) -> list[Path]:
    """The pictures in the folder of controls of a dataset, by name."""
    place = folder / CONTROL
    if not is_folder(place) or not stays_in(place, folder.resolve()):
        return []
    return [place / name for name in next(list_folders(str(place))).images]


def _measured(path: Path, stamp: Stamp) -> tuple[int | None, int | None, str]:
    """Width and height of a picture in pixels, and why it cannot be read."""
    try:
        return *_size_of(str(path), stamp), ""
    except ImageError as error:
        return None, None, error.reason
    except OSError as error:
        return None, None, f"cannot be read ({error.strerror})"


@functools.lru_cache(maxsize=20_000)
def _size_of(path: str, stamp: Stamp) -> tuple[int, int]:
    """Width and height in pixels, cached by file state. An ImageError is not cached."""
    return header_size(Path(path))


def pictures_in(folders: Folders, folder: Path) -> tuple[list[Candidate], Skipped, list[str]]:
    """The pictures directly in a folder, its skipped files, and notes."""
    skipped: Skipped = []
    scan_notes = ScanNotes()
    config = DataConfig(follow_links=folders.follow_links)
    try:
        all_candidates = list(
            candidates(ImageSource(str(folder)), config, cache=None, skipped=skipped, notes=scan_notes)
        )
    except DataError as error:
        return [], [], [str(error)]
    own = [candidate for candidate in all_candidates if not candidate.folder.inside]
    inner = {candidate.folder.inside: 0 for candidate in all_candidates if candidate.folder.inside}
    for candidate in all_candidates:
        if candidate.folder.inside:
            inner[candidate.folder.inside] += 1
    notes = [
        f"{number:,} pictures in the folder {inside} are trained on as well, and not shown here."
        for inside, number in inner.items()
    ]
    real = folder.resolve()
    shown = [
        candidate for candidate in own if candidate.name not in candidate.folder.links or stays_in(candidate.path, real)
    ]
    if len(shown) < len(own):
        use = "trained on, and not shown" if folders.follow_links else "neither trained on nor shown"
        notes.append(f"{len(own) - len(shown):,} pictures are links to other folders: {use} here.")
    return shown, skipped, [*notes, *scan_notes.sentences()]


def picture_of(folder: Path, file: str, *, control: bool = False) -> Path:
    """A picture of a dataset, or one in its folder of controls. Raises UnknownFileError."""
    path = folder / CONTROL / file if control else folder / file
    if not is_name(file) or path.suffix.lower() not in image_suffixes() or not is_regular(path):
        raise UnknownFileError(f"there is no picture {file!r} in {folder.name}; load the page again")
    if not stays_in(path, folder.resolve()):
        raise UnknownFileError(
            f"{file} in {folder.name} is a link to somewhere else and is not shown; copy the picture"
        )
    return path


def caption_of(candidate: Candidate) -> tuple[str, str]:
    """The caption of a picture, line by line, and its fault."""
    if candidate.barred:
        return "", candidate.barred
    if candidate.caption_file:
        try:
            path = candidate.folder.file(candidate.caption_file)
            caption = _caption_once(path, stamp_of(path))
        except CaptionError as error:
            return "", f"has a caption file {error.path.name} that {error.reason}"
        if caption.text:
            return "\n".join(caption.lines), ""
    return "\n".join(candidate.entry), ""


@functools.lru_cache(maxsize=20_000)
def _caption_once(path: Path, stamp: Stamp) -> Caption:
    """A caption file, cached by its state. A CaptionError is not cached."""
    return read_caption_file(path)


def masks_beside(picture: Path) -> list[Path]:
    """The masks of a picture, by its name."""
    stem = f"{stem_of(picture.name)}{MASK}."
    return [path for path in picture.parent.glob(f"*{MASK}.*") if path.name.startswith(stem) and is_regular(path)]


def mask_of(folder: Path, file: str) -> Path:
    """The mask of a picture of a dataset. Raises UnknownFileError."""
    found = masks_beside(picture_of(folder, file))
    if not found or not stays_in(found[0], folder.resolve()):
        raise UnknownFileError(f"{file} in {folder.name} has no mask; load the page again")
    return found[0]


def caption_file(candidate: Candidate) -> Path:
    """The path of a picture's caption file, which need not exist."""
    return candidate.folder.file(candidate.caption_file or f"{stem_of(candidate.name)}{CAPTION_SUFFIXES[0]}")


_SEVERITIES: dict[FindingKind, Severity] = {
    "unused files": "problem",
    "empty pictures": "problem",
    "tiny pictures": "problem",
    "missing controls": "problem",
    "unchanged pairs": "problem",
    "swapped pairs": "problem",
    "other aspects": "remark",
    "missing captions": "problem",
    "known trigger": "remark",
    "dropped captions": "remark",
    "shared tags": "remark",
    "much alike": "remark",
}

_REMOVED: tuple[FindingKind, ...] = ("empty pictures", "copies", "look-alikes")
"""Findings that are mended by removing their pictures; of copies and look-alikes the one to keep is not among them."""

_REMEDIES: dict[FindingKind, str] = {  # where the command line's remedy names a flag
    "unused files": "replace or remove what cannot be used",
    "tiny pictures": "use larger pictures, or a lower resolution",
    "enlarged pictures": "use larger pictures, or a lower resolution",
    "cut pictures": "crop them yourself to what matters",
    "copies": "remove all but one of each",
    "look-alikes": "remove all but one of each, as a picture that is there twice is learnt twice",
    "empty pictures": "remove them, unless that is the subject",
    "missing controls": "add a file of the same name to the folder of controls, or choose controls optional",
    "swapped pairs": "check that the edited pictures are trained on and the controls are those before, or move the "
    "captions",
    "missing captions": "write captions, or give a trigger word that names the subject",
    "empty captions": "write the captions",
    "dropped captions": "choose a caption dropout of at most 0.1",
}


@question
def check_dataset(
    folders: Folders,
    name: str,
    *,
    model: str | None = None,
    edit: str | None = None,
    trigger: str = "",
    settings: Mapping[str, Any] | None = None,
) -> DataCheckAnswer:
    """Check a dataset with the sizes and tokenizer of a model (None: common sizes) and settings of data and training.
    `edit` is the edit variant that the model is.
    Raises UnknownFileError, and LorasmithErrors for the model or settings.
    """
    folder = dataset_folder(folders, name)
    others = {key: value for key, value in (settings or {}).items() if key not in lora_settings()}
    spec = RunSpec(settings={**others, **({"trigger": trigger} if trigger else {})}).requested(folders)
    try:
        checked = check_folder(
            folder,
            spec.data,
            files=None if model is None else ModelFiles(model, edit=edit),
            folders=folders,
            batch=spec.config.samples_per_step,
            validation_share=spec.config.validation_share,
            progress=report_progress,
        )
    except DataError as error:
        pictures, skipped, notes = pictures_in(folders, folder)
        reasons = [
            *skipped,
            *((picture.path, problem) for picture in pictures if (problem := picture_row(picture).problem)),
        ]
        finding = FindingFacts(
            kind="no pictures",
            message=str(error),
            files=tuple(picture.name for picture in pictures),
            severity="problem",
        )
        return DataCheckAnswer(
            findings=(finding,) if pictures or skipped else (),
            images={},
            skipped=tuple(SkippedFile(file=name_in(folder, path), reason=reason) for path, reason in reasons),
            notes=tuple(notes),
        )
    return _check_answer(checked)


def _check_answer(checked: DataCheck) -> DataCheckAnswer:
    preflight = checked.preflight
    return DataCheckAnswer(
        findings=tuple(_finding(finding, preflight) for finding in preflight.findings),
        images={
            image.name: CheckedPicture(
                problems=tuple(text for texts in said_of(preflight, index) for text in texts),
                crop=_crop(image.crop, image.file.width, image.file.height),
                trained=image.bucket,
                tokens=image.tokens,
            )
            for index, image in enumerate(preflight.images)
        },
        skipped=tuple(
            SkippedFile(file=name_in(preflight.folder, path), reason=reason) for path, reason in preflight.skipped
        ),
        notes=preflight.notes,
        resolutions=preflight.resolutions,
        assumed=checked.is_size_assumed,
        held_out=preflight.epoch.held_out,
        samples_per_epoch=preflight.epoch.samples,
    )


def _finding(finding: Finding, preflight: Preflight) -> FindingFacts:
    text = replace(finding, remedy=_REMEDIES.get(finding.kind, finding.remedy)).sentence
    files = tuple(preflight.images[index].name for index in finding.images)
    return FindingFacts(
        kind=finding.kind,
        title=TITLES[finding.kind],
        message=f"{text[:1].upper()}{text[1:]}.",
        files=files,
        severity=_SEVERITIES.get(finding.kind, "warning"),
        removes=_unreadable(preflight) if finding.kind == "unused files" else files if finding.kind in _REMOVED else (),
    )


def _unreadable(preflight: Preflight) -> tuple[str, ...]:
    """The pictures of the folder that are damaged or hold no picture."""
    paths = (
        path for path, reason in preflight.skipped if reason.kind == "unreadable" and path.parent == preflight.folder
    )
    return tuple(path.name for path in paths if path.suffix.lower() in image_suffixes())


def _crop(box: tuple[float, float, float, float], width: int, height: int) -> Crop:
    left, top, right, bottom = box
    shares = (left / width, top / height, (right - left) / width, (bottom - top) / height)
    x, y, across, down = (round(share, 5) for share in shares)
    return Crop(x=x, y=y, width=across, height=down)
