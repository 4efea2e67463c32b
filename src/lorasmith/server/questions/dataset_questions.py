"""Questions about datasets: their list, contents, and pictures."""

from __future__ import annotations

import functools
import io
from pathlib import Path

from lorasmith.core.errors import DataError
from lorasmith.core.files import is_regular
from lorasmith.core.folders import ASSETS, Folders
from lorasmith.data.folder_listing import ListedFolder, list_folders, stem_of
from lorasmith.data.image_files import ImageError, header_size, open_reduced
from lorasmith.data.preflight import name_in
from lorasmith.data.source_files import Candidate
from lorasmith.server.api_shapes import DatasetAnswer, DatasetList, DatasetRow, PictureRow, SkippedFile
from lorasmith.server.questions.dataset_folders import (
    caption_of,
    dataset_folder,
    is_builtin,
    picture_of,
    pictures_in,
    subfolders,
)
from lorasmith.server.questions.question_registry import shaped

MOST_THUMBNAIL = 2048  # pixels of the longest edge


@shaped
def datasets(folders: Folders) -> DatasetList:
    """All datasets by name: folders with pictures, and empty ones."""
    rows = {}
    for root in (ASSETS / "input", folders.place("input")):
        for folder in subfolders(root):
            if folders.is_here(folder) and (row := _row(folder)) is not None:
                rows[folder.name] = row
    return DatasetList(datasets=tuple(sorted(rows.values(), key=lambda row: (row.builtin, row.name.casefold()))))


@shaped
def dataset(folders: Folders, name: str) -> DatasetAnswer:
    """The pictures of a dataset with their captions, in natural order. Raises UnknownFileError."""
    folder = dataset_folder(folders, name)
    found, skipped, notes = pictures_in(folders, folder)
    return DatasetAnswer(
        name=name,
        folder=str(folder),
        images=tuple(map(picture_row, found)),
        builtin=is_builtin(folder),
        notes=tuple(notes),
        skipped=tuple(SkippedFile(file=name_in(folder, path), reason=reason) for path, reason in skipped),
    )


@shaped
def thumbnail(folders: Folders, name: str, file: str, width: int = 256) -> bytes:
    """A picture as WebP, upright, its longest edge at most `width` pixels. Raises UnknownFileError and ImageError."""
    path = picture_of(dataset_folder(folders, name), file)
    buffer = io.BytesIO()
    open_reduced(path, max(16, min(width, MOST_THUMBNAIL))).save(buffer, format="webp", quality=82, method=2)
    return buffer.getvalue()


@shaped
def picture_file(folders: Folders, name: str, file: str) -> str:
    """The path of a picture. Raises UnknownFileError."""
    return str(picture_of(dataset_folder(folders, name), file).resolve())


def _row(folder: Path) -> DatasetRow | None:
    """A folder as a dataset; None if it has only other files."""
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
        builtin=is_builtin(folder),
    )


def _inner(folder: Path) -> list[ListedFolder]:
    """Subfolders of a dataset whose pictures are trained on as well."""
    try:
        return list(list_folders(str(folder), recursive=False, masks=False, mask_folder=None, skipped=[]))[1:]
    except DataError:
        return []


def picture_row(one: Candidate) -> PictureRow:
    """A picture as the page shows it, with its faults."""
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
    caption, fault = caption_of(one)
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
    """Width and height in pixels, cached by file state. An ImageError is not cached."""
    return header_size(Path(path))
