"""Questions about datasets, which are folders of images in `<base>/input`: what they hold, and changes of them.

A dataset is one folder, such as `input/dog`, that `lorasmith train` takes as it is. A link in `input` is followed where
it stays below the base folder. Pictures in its inner folders are counted in notes and not shown. What is removed is
moved to `<base>/user/lorasmith/removed`.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from lorasmith.app.data_check import DataCheck, check_folder
from lorasmith.app.data_check_page import said_of
from lorasmith.core.errors import DataError, OptionError, OutputError
from lorasmith.core.files import atomic_path, ensure_folder, is_folder, is_regular, write_atomic
from lorasmith.core.folders import ASSETS, Folders
from lorasmith.core.options import config_from, options_of
from lorasmith.core.safe_names import plain_name, safe_name
from lorasmith.data.captions import CAPTION_SUFFIXES, MAX_CAPTION, CaptionError, read_caption_file
from lorasmith.data.data_config import DataConfig
from lorasmith.data.findings import Finding, FindingKind
from lorasmith.data.folder_listing import ListedFolder, Skipped, foreign_reason, list_folders, stem_of
from lorasmith.data.folder_remarks import Remarks
from lorasmith.data.image_files import (
    ImageError,
    file_digest,
    header_size,
    image_header,
    image_size,
    image_suffixes,
    open_reduced,
)
from lorasmith.data.preflight import name_in
from lorasmith.data.source_files import Candidate, candidates
from lorasmith.data.sources import ImageSource
from lorasmith.families.model_search import ModelFiles
from lorasmith.server.api_shapes import (
    Changed,
    CheckedPicture,
    Crop,
    DataCheckAnswer,
    DatasetAnswer,
    DatasetList,
    DatasetRow,
    FindingFacts,
    PictureRow,
    RemovedAnswer,
    Severity,
    SkippedFile,
)
from lorasmith.server.questions.shaped_questions import shaped
from lorasmith.training.config import TrainConfig, settings_from_file

__all__ = [
    "MOST_IMAGES",
    "UnknownFileError",
    "add_caption",
    "add_image",
    "check_changes",
    "check_dataset",
    "create_dataset",
    "dataset",
    "dataset_folder",
    "datasets",
    "picture_file",
    "remove_dataset",
    "remove_image",
    "set_captions",
    "thumbnail",
]

MOST_IMAGES = 2000
"""Pictures of a dataset that the page fills."""

MOST_THUMBNAIL = 2048
"""Pixels of a small version's longest edge."""

REMOVED = Path("user", "lorasmith", "removed")
"""Where removed datasets, pictures and runs are moved to, relative to the base folder."""

_SEVERITIES: dict[FindingKind, Severity] = {
    "unused files": "problem",
    "empty pictures": "problem",
    "tiny pictures": "problem",
    "missing captions": "problem",
    "shared tags": "remark",
}
_REMEDIES: dict[FindingKind, str] = {  # where that of the command line names a flag
    "unused files": "replace or remove what cannot be used",
    "tiny pictures": "use larger pictures, or a lower resolution",
    "enlarged pictures": "use larger pictures, or a lower resolution",
    "cut pictures": "crop them yourself to what matters",
    "copies": "remove all but one of each",
    "look-alikes": "remove all but one of each, as a picture that is there twice is learnt twice",
    "missing captions": "write captions, or give a trigger word that names the subject",
    "empty captions": "write the captions",
}
_NAMING = threading.Lock()
"""Held while a free name is found and taken."""


class UnknownFileError(DataError):
    """There is no such dataset, picture or run."""


@shaped
def datasets(folders: Folders) -> DatasetList:
    """All datasets by name: folders with pictures, and empty ones that are to be filled."""
    rows = {}
    for root in (ASSETS / "input", folders.place("input")):
        for folder in _subfolders(root):
            if _is_here(folders, folder) and (row := _row(folder)) is not None:
                rows[folder.name] = row
    return DatasetList(datasets=tuple(sorted(rows.values(), key=lambda row: (row.builtin, row.name.casefold()))))


def dataset_folder(folders: Folders, name: str, *, to_change: bool = False) -> Path:
    """The folder of a dataset.

    Args:
        folders: of the installation.
        name: of the dataset.
        to_change: whether it will be changed, so that it must not be one of the package's.

    Raises:
        UnknownFileError: there is none, or a link leads out of the base folder.
        OutputError: it belongs to the package.
    """
    if _is_name(name):
        own = folders.place("input") / name
        if is_folder(own) and _is_here(folders, own):
            return own
        if is_folder(ASSETS / "input" / name):
            if to_change:
                raise OutputError(f"{name} belongs to Lorasmith and stays as it is; make a dataset of your own")
            return ASSETS / "input" / name
    raise UnknownFileError(f"there is no dataset {name!r}; choose one of the list, or make it")


@shaped
def check_changes(folders: Folders, name: str) -> bool:
    """True if a dataset may be changed. Raises UnknownFileError and OutputError, as `dataset_folder`."""
    return dataset_folder(folders, name, to_change=True).is_dir()


@shaped
def create_dataset(folders: Folders, name: str) -> DatasetRow:
    """Make a new dataset, with a name that every system has folders for. Raises OptionError if it is taken."""
    if not name.strip():
        raise OptionError("a dataset must have a name, got an empty one; name it after its subject")
    folder = ensure_folder(folders.place("input")) / safe_name(name.strip())
    with _NAMING:
        taken = {one.name.casefold() for one in (*folder.parent.iterdir(), *(ASSETS / "input").iterdir())}
        if folder.name.casefold() in taken:
            raise TakenNameError(f"there is a dataset {folder.name!r} already; choose another name, or add to that one")
        ensure_folder(folder)
    return DatasetRow(name=folder.name, images=0, captions=0, modified=folder.stat().st_mtime, cover=None)


class TakenNameError(OptionError):
    """The name of something new is taken."""


@shaped
def dataset(folders: Folders, name: str) -> DatasetAnswer:
    """The pictures of a dataset with their captions, in natural order. Raises UnknownFileError."""
    folder = dataset_folder(folders, name)
    found, skipped, notes = _listed(folder)
    return DatasetAnswer(
        name=name,
        folder=str(folder),
        images=tuple(map(_picture_row, found)),
        builtin=_is_builtin(folder),
        notes=tuple(notes),
        skipped=tuple(SkippedFile(file=name_in(folder, path), reason=reason) for path, reason in skipped),
    )


@shaped
def remove_dataset(folders: Folders, name: str) -> RemovedAnswer:
    """Move a dataset away. Raises UnknownFileError, OutputError."""
    return _moved_away(folders, [dataset_folder(folders, name, to_change=True)], name)


@shaped
def add_image(folders: Folders, name: str, *, file: str, temporary: str) -> dict[str, str]:
    """Move an uploaded picture into a dataset.

    The format is recognised by the content; what is already there stays as it is, and a picture of the same name gets
    another one.

    Args:
        folders: of the installation.
        name: of the dataset.
        file: name under which it was sent.
        temporary: where it is; the file is moved or left.

    Returns:
        `added` with its name, or `skipped` with the reason; of a copy also `same`, the name of the picture there.

    Raises:
        UnknownFileError: there is no such dataset.
        OutputError: the file cannot be moved.
    """
    folder, source = dataset_folder(folders, name, to_change=True), Path(temporary)
    if reason := foreign_reason(Path(file).suffix.lower()):
        return {"skipped": reason}
    try:
        image_size(source)  # reads all of it
        suffixes = image_header(source).suffixes
    except ImageError as error:
        return {"skipped": error.reason}
    asked = Path(file)
    suffix = asked.suffix.lower() if asked.suffix.lower() in suffixes else suffixes[0]
    stem = safe_name(_file_name(file).removesuffix(asked.suffix))
    with _NAMING:
        names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
        pictures = [one for one in names if Path(one).suffix.lower() in image_suffixes()]
        if (same := _same_content(folder, pictures, source)) is not None:
            return {"skipped": f"is in the dataset already, as {same}", "same": same}
        if len(pictures) >= MOST_IMAGES:
            return {"skipped": f"is one too many: a dataset has at most {MOST_IMAGES:,} pictures"}
        target = folder / f"{_free_stem(stem, pictures)}{plain_name(suffix)}"
        _move(source, target)
    return {"added": target.name}


@shaped
def add_caption(folders: Folders, name: str, *, file: str, temporary: str, image: str = "") -> dict[str, str]:
    """Keep an uploaded text as the caption of a picture.

    Args:
        folders: of the installation.
        name: of the dataset.
        file: name under which it was sent.
        temporary: where it is.
        image: name of the picture, if it was sent beside it; else that with the same stem.

    Returns:
        `added` with the name of the caption file, or `skipped` with the reason.

    Raises:
        UnknownFileError: there is no such dataset.
        OutputError: the caption cannot be written.
    """
    folder = dataset_folder(folders, name, to_change=True)
    try:
        caption = read_caption_file(Path(temporary))
    except CaptionError as error:
        return {"skipped": error.reason}
    stem = _file_name(file).removesuffix(Path(file).suffix).casefold()
    found = {one.name: one for one in _listed(folder)[0]}
    of = (
        found.get(image)
        if image
        else next((one for key, one in found.items() if stem_of(key).casefold() == stem), None)
    )
    if of is None:
        return {"skipped": "has no picture of the same name; add that too"}
    target = _caption_file(of)
    if of.caption_file and read_caption_file(target).text != caption.text:
        return {"skipped": f"is left out, as {of.name} has another caption; change that instead"}
    write_atomic(target, "\n".join(caption.lines) + "\n")
    return {"added": target.name}


@shaped
def remove_image(folders: Folders, name: str, file: str) -> RemovedAnswer:
    """Move a picture, its caption and its mask away.

    Args:
        folders: of the installation.
        name: of the dataset.
        file: of the picture.

    Raises:
        UnknownFileError: there is no such dataset or picture.
        OutputError: they cannot be moved.
    """
    folder = dataset_folder(folders, name, to_change=True)
    path = _file_of(folder, file)
    stem = stem_of(path.name)
    beside = [folder / f"{stem}{suffix}" for suffix in CAPTION_SUFFIXES]
    beside += [one for one in folder.glob("*.mask.*") if one.name.startswith(f"{stem}.mask.")]
    return _moved_away(folders, [path, *(one for one in beside if is_regular(one))], name)


@shaped
def set_captions(folders: Folders, name: str, captions: Mapping[str, str]) -> Changed:
    """Write captions; nothing is written if one of them cannot be.

    Args:
        folders: of the installation.
        name: of the dataset.
        captions: by the names of their pictures; an empty one takes the caption away.

    Raises:
        UnknownFileError: there is no such dataset or picture.
        OptionError: a caption is too long.
        OutputError: a file cannot be written.
    """
    folder = dataset_folder(folders, name, to_change=True)
    found = {one.name: one for one in _listed(folder)[0]}
    for file, text in captions.items():
        if file not in found:
            raise UnknownFileError(f"there is no picture {file!r} in {name}; load the page again")
        if len(text) > MAX_CAPTION or "\x00" in text:
            raise OptionError(
                f"a caption must be text of at most {MAX_CAPTION:,} characters, got {len(text):,}; shorten it"
            )
    changed = 0
    for file, text in captions.items():
        one, target = found[file], _caption_file(found[file])
        before = _caption_of(one)[0] if one.caption_file else None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines and one.caption_file:
            _moved_away(folders, [target], name)
        elif lines and before != "\n".join(lines):
            write_atomic(target, "\n".join(lines) + "\n")
        else:
            continue
        changed += 1
    return Changed(changed=changed)


@shaped
def thumbnail(folders: Folders, name: str, file: str, width: int = 256) -> bytes:
    """A small version of a picture as WebP, upright.

    Args:
        folders: of the installation.
        name: of the dataset.
        file: of the picture.
        width: pixels of its longest edge, at most.

    Raises:
        UnknownFileError: there is none.
        ImageError: it cannot be read.
    """
    path = _file_of(dataset_folder(folders, name), file)
    buffer = io.BytesIO()
    open_reduced(path, max(16, min(width, MOST_THUMBNAIL))).save(buffer, format="webp", quality=82, method=2)
    return buffer.getvalue()


@shaped
def picture_file(folders: Folders, name: str, file: str) -> str:
    """The path of a picture.

    Args:
        folders: of the installation.
        name: of the dataset.
        file: of the picture.

    Raises:
        UnknownFileError: there is no such dataset or picture.
    """
    return str(_file_of(dataset_folder(folders, name), file).resolve())


@shaped
def check_dataset(
    folders: Folders,
    name: str,
    *,
    model: str | None = None,
    trigger: str = "",
    settings: Mapping[str, Any] | None = None,
) -> DataCheckAnswer:
    """A dataset, checked.

    Args:
        folders: of the installation.
        name: of the dataset.
        model: whose sizes and tokenizer count; None for usual sizes.
        trigger: phrase in front of captions that lack it.
        settings: of data and training, by name; those of training decide how much is held out.

    Raises:
        UnknownFileError: there is no such dataset.
        LorasmithError: model or settings cannot be used.
    """
    folder = dataset_folder(folders, name)
    data, training = split_settings(settings or {}, trigger)
    try:
        checked = check_folder(
            folder,
            data,
            files=None if model is None else ModelFiles(model),
            folders=folders,
            batch=training.batch_size * training.grad_accumulation_steps,
            validation_share=training.validation_share,
        )
    except DataError as error:
        found, skipped, notes = _listed(folder)
        reasons = [*skipped, *((one.path, problem) for one in found if (problem := _picture_row(one).problem))]
        finding = FindingFacts(
            kind="no pictures", message=str(error), files=tuple(one.name for one in found), severity="problem"
        )
        return DataCheckAnswer(
            findings=(finding,) if found or skipped else (),
            images={},
            skipped=tuple(SkippedFile(file=name_in(folder, path), reason=reason) for path, reason in reasons),
            notes=tuple(notes),
        )
    return _check_answer(checked)


def split_settings(settings: Mapping[str, Any], trigger: str = "") -> tuple[DataConfig, TrainConfig]:
    """Settings by name as those of data and of training, of which they may choose among names alone.

    Args:
        settings: by name.
        trigger: phrase, if it is not among them.

    Raises:
        OptionError: one is unknown, or out of its range.
    """
    own = {key: value for key, value in settings.items() if key in options_of(DataConfig)}
    others = {key: value for key, value in settings.items() if key not in own}
    named = {"trigger": trigger} if trigger else {}
    return config_from(DataConfig, {**own, **named}), settings_from_file(others)


def _check_answer(checked: DataCheck) -> DataCheckAnswer:
    found = checked.preflight
    return DataCheckAnswer(
        findings=tuple(_finding(one, [image.name for image in found.images]) for one in found.findings),
        images={
            one.name: CheckedPicture(
                problems=tuple(text for said in said_of(found, index) for text in said),
                crop=_crop(one.crop, one.file.width, one.file.height),
                trained=one.bucket,
                tokens=one.tokens,
            )
            for index, one in enumerate(found.images)
        },
        skipped=tuple(SkippedFile(file=name_in(found.folder, path), reason=reason) for path, reason in found.skipped),
        notes=found.notes,
        resolutions=found.resolutions,
        assumed=checked.is_size_assumed,
        held_out=found.epoch.held_out,
        samples_per_epoch=found.epoch.samples,
    )


def _finding(one: Finding, names: list[str]) -> FindingFacts:
    said = replace(one, remedy=_REMEDIES.get(one.kind, one.remedy)).sentence
    return FindingFacts(
        kind=one.kind,
        message=f"{said[:1].upper()}{said[1:]}.",
        files=tuple(names[index] for index in one.images),
        severity=_SEVERITIES.get(one.kind, "warning"),
    )


def _crop(box: tuple[float, float, float, float], width: int, height: int) -> Crop:
    left, top, right, bottom = box
    shares = (left / width, top / height, (right - left) / width, (bottom - top) / height)
    x, y, across, down = (round(one, 5) for one in shares)
    return Crop(x=x, y=y, width=across, height=down)


def _subfolders(root: Path) -> Iterator[Path]:
    if is_folder(root):
        yield from (one for one in root.iterdir() if not one.name.startswith(".") and is_folder(one))


def _is_builtin(folder: Path) -> bool:
    return folder.is_relative_to(ASSETS)


def _is_here(folders: Folders, path: Path) -> bool:
    """Whether a path is where it seems to be: below the base folder, or below the input folder if that is a link."""
    try:
        real = path.resolve()
        roots = (folders.base.resolve(), folders.place("input").resolve(), ASSETS.resolve())
    except (OSError, RuntimeError):
        return False
    return any(real.is_relative_to(root) for root in roots)


def _is_name(name: str) -> bool:
    """Whether a text is a single name, so that a path made with it stays in its folder."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\x00:")


def _file_name(sent: str) -> str:
    """The name in what a browser sends as one, which may be a path."""
    return sent.replace("\\", "/").rpartition("/")[2]


def _row(folder: Path) -> DatasetRow | None:
    """A folder as a dataset; None if it holds other things alone."""
    try:
        listed = next(list_folders(str(folder), recursive=False, masks=False, mask_folder=None, skipped=[]))
        is_empty = not listed.images and not any(folder.iterdir())
    except (DataError, OSError):
        return None
    inner = [] if listed.images else [one for one in _inner(folder) if one.images]
    if not (listed.images or inner or is_empty):
        return None
    stems = set(listed.captions)
    return DatasetRow(
        name=folder.name,
        images=len(listed.images),
        captions=sum(stem_of(one) in stems for one in listed.images),
        modified=folder.stat().st_mtime,
        cover=next(iter(listed.images), None),
        builtin=_is_builtin(folder),
    )


def _inner(folder: Path) -> list[ListedFolder]:
    """Folders inside of a dataset whose pictures are trained on as well."""
    try:
        return list(list_folders(str(folder), recursive=False, masks=False, mask_folder=None, skipped=[]))[1:]
    except DataError:
        return []


def _listed(folder: Path) -> tuple[list[Candidate], Skipped, list[str]]:
    """The pictures directly in a folder, what is not used of it, and notes."""
    skipped: Skipped = []
    remarks = Remarks()
    try:
        found = list(candidates(ImageSource(str(folder)), DataConfig(), cache=None, skipped=skipped, remarks=remarks))
    except DataError as error:
        return [], [], [str(error)]
    own = [one for one in found if not one.folder.inside]
    inner = {one.folder.inside: 0 for one in found if one.folder.inside}
    for one in found:
        if one.folder.inside:
            inner[one.folder.inside] += 1
    notes = [
        f"{number:,} pictures in the folder {inside} are trained on as well, and not shown here."
        for inside, number in inner.items()
    ]
    real = folder.resolve()
    shown = [one for one in own if _stays(one.path, real)]
    if len(shown) < len(own):
        notes.append(f"{len(own) - len(shown):,} pictures are links to other folders: trained on, and not shown here.")
    return shown, skipped, [*notes, *remarks.sentences()]


def _stays(path: Path, real: Path) -> bool:
    """Whether a file is inside of a folder when links are resolved."""
    try:
        return path.resolve().is_relative_to(real)
    except (OSError, RuntimeError):
        return False


def _file_of(folder: Path, file: str) -> Path:
    """A picture of a dataset. Raises UnknownFileError."""
    path = folder / file
    if not _is_name(file) or path.suffix.lower() not in image_suffixes() or not is_regular(path):
        raise UnknownFileError(f"there is no picture {file!r} in {folder.name}; load the page again")
    if not _stays(path, folder.resolve()):
        raise UnknownFileError(
            f"{file} in {folder.name} is a link to somewhere else and is not shown; copy the picture"
        )
    return path


def _picture_row(one: Candidate) -> PictureRow:
    path, problem = one.path, ""
    width = height = None
    try:
        status = path.stat()
        width, height = _size_of(str(path), status.st_mtime_ns, status.st_size)
        size = status.st_size
    except ImageError as error:
        size, problem = path.stat().st_size if is_regular(path) else 0, error.reason
    except OSError as error:
        size, problem = 0, f"cannot be read ({error.strerror})"
    caption, fault = _caption_of(one)
    return PictureRow(
        file=one.name,
        width=width,
        height=height,
        bytes=size,
        caption=caption,
        has_caption=bool(caption),
        problem=problem or fault,
    )


@functools.lru_cache(maxsize=20_000)
def _size_of(path: str, modified: int, size: int) -> tuple[int, int]:
    """Width and height of a file as it was then. An ImageError is not remembered."""
    return header_size(Path(path))


def _caption_of(one: Candidate) -> tuple[str, str]:
    """The caption of a picture, line by line, and what is wrong with it."""
    if one.caption_file:
        try:
            caption = read_caption_file(one.folder.file(one.caption_file))
        except CaptionError as error:
            return "", f"has a caption file {error.path.name} that {error.reason}"
        if caption.text:
            return "\n".join(caption.lines), ""
    return "\n".join(one.entry), ""


def _caption_file(one: Candidate) -> Path:
    return one.folder.file(one.caption_file or f"{stem_of(one.name)}{CAPTION_SUFFIXES[0]}")


def _free_stem(wanted: str, pictures: list[str]) -> str:
    """A stem that no picture has, in any case: two pictures with one stem would share their caption."""
    taken = {stem_of(one).casefold() for one in pictures}
    stems = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
    return next(stem for stem in stems if stem.casefold() not in taken)


def _same_content(folder: Path, pictures: list[str], source: Path) -> str | None:
    """The picture whose file is byte for byte that of `source`."""
    size = source.stat().st_size
    alike = [one for one in pictures if is_regular(folder / one) and (folder / one).stat().st_size == size]
    if not alike:
        return None
    digest = file_digest(source)
    return next((one for one in alike if file_digest(folder / one) == digest), None)


def _move(source: Path, target: Path) -> None:
    """Move a file to where none is, also to another disk. Raises OutputError."""
    try:
        if target.exists():
            raise OutputError(f"{target.name} is there already; send it under another name")
        source.rename(target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        source.unlink(missing_ok=True)
    target.chmod(0o644)


def _moved_away(folders: Folders, paths: list[Path], name: str) -> RemovedAnswer:
    """Move files or folders of a dataset or run to those that were removed, each time into a folder of its own."""
    parent = ensure_folder(folders.base / REMOVED)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_name(name)}"
    for number in count(1):
        target = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            target.mkdir()
            break
        except FileExistsError:
            continue
    try:
        for path in paths:
            shutil.move(path, target / path.name)
    except OSError as error:
        raise OutputError(
            f"{paths[0].name} cannot be moved away ({error.strerror or error}); close programs that use it"
        ) from error
    return RemovedAnswer(removed=target.relative_to(folders.base).as_posix())
