"""Scanning a folder of images and captions: usable images, and skipped files with the reason.

    photos/
      1.jpg, 1.txt        an image and its caption
      2.png               an image without caption file: the trigger is its caption
      10_sks dog/         kohya's convention: images in here occur ten times per epoch; the rest of the name is their
                          caption if there is neither a caption file nor a trigger

Hidden files and folders are ignored, and so is everything that is not an image; other folders are listed as skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasmith.core.errors import DataError
from lorasmith.core.files import is_folder
from lorasmith.data.captions import one_line, read_caption, with_trigger
from lorasmith.data.image_files import ImageError, image_size, image_suffixes

__all__ = ["MAX_ASPECT", "MAX_REPEATS", "MIN_EDGE", "CaptionSource", "FolderScan", "ImageFile", "scan_folder"]

MIN_EDGE = 16
"""Minimum of an image's shorter edge in pixels."""

MAX_ASPECT = 8
"""Maximum ratio of an image's longer to its shorter edge, beyond which a crop or bucket keeps too little."""

MAX_REPEATS = 10_000
"""Maximum number of an image's occurrences in an epoch."""

CaptionSource = Literal["file", "trigger", "folder", "none"]


@dataclass(frozen=True)
class ImageFile:
    """An image that can be trained on.

    Attributes:
        path: the file.
        width, height: of the upright picture, in pixels.
        caption: for the text encoder, trigger included, without what is drawn; may be empty.
        caption_source: origin of the caption, the trigger aside.
        repeats: number of its occurrences in an epoch.
        captions: each caption as its source has it, of which one is drawn; empty for none.
        weight: of its loss.
        mask: file of its mask, where `masks` is files and there is one.
        is_class: whether it shows the subject's class, for prior preservation.
    """

    path: Path
    width: int
    height: int
    caption: str
    caption_source: CaptionSource
    repeats: int = 1
    captions: tuple[str, ...] = ()
    weight: float = 1.0
    mask: Path | None = None
    is_class: bool = False


@dataclass(frozen=True)
class FolderScan:
    """The content of a folder.

    Attributes:
        images: usable images in natural order (`2.png` before `10.png`), those of subfolders last.
        skipped: unused files and folders, with reason and remedy.
        missing_captions: usable images without a caption file, or with an empty one.
        notes: other remarks for the user, one sentence each.
    """

    images: tuple[ImageFile, ...]
    skipped: tuple[tuple[Path, str], ...]
    missing_captions: tuple[Path, ...]
    notes: tuple[str, ...]


def scan_folder(path: Path, *, trigger: str = "") -> FolderScan:
    """Scan a folder; every image file is read once to check it, none is kept in memory.

    Args:
        path: the folder.
        trigger: put in front of captions that lack it; replaces missing captions.

    Raises:
        DataError: the folder is missing, is a file, cannot be read, or holds no usable image; a caption file cannot be
            read.
    """
    images: list[ImageFile] = []
    skipped: list[tuple[Path, str]] = []
    missing: list[Path] = []
    notes: list[str] = []
    captions: list[Path] = []
    for found in _walk(path, skipped):
        try:
            width, height = _usable_size(found.path)
        except ImageError as error:
            skipped.append((error.path, error.reason))
            continue
        caption = read_caption(found.path)
        captions += [caption.path] if caption else []
        text = caption.text if caption else ""
        if not text:
            missing.append(found.path)
        if caption and caption.note:
            notes.append(caption.note)
        images.append(
            ImageFile(found.path, width, height, *_caption(text, trigger, found.folder_caption), found.repeats)
        )
    if not images:
        raise DataError(_nothing_usable(path, skipped))
    notes += _note_of_links(path, [*(image.path for image in images), *captions])
    return FolderScan(tuple(images), tuple(skipped), tuple(missing), tuple(notes))


def _note_of_links(folder: Path, files: list[Path]) -> list[str]:
    """What is read from elsewhere: data sets of links are usual, but a stranger's file may be a link as well."""
    outside = [file for file in files if not file.resolve().is_relative_to(folder.resolve())]
    if not outside:
        return []
    first = outside[0]
    return [f"{len(outside)} files are links to outside of the folder, such as {first.name} to {first.resolve()}"]


@dataclass(frozen=True)
class _Found:
    path: Path
    repeats: int = 1
    folder_caption: str = ""


def _walk(folder: Path, skipped: list[tuple[Path, str]]) -> Iterator[_Found]:
    """Image files of a folder and of its `<repeats>_<name>` subfolders; appends other entries to `skipped`."""
    subfolders = []
    for entry in _entries(folder):
        if is_folder(entry):
            subfolders.append(entry)
        elif _is_image(entry, skipped):
            yield _Found(entry)
    for subfolder in subfolders:
        named = re.fullmatch(r"([0-9]+)_(.*)", subfolder.name, re.DOTALL)
        if named and int(named[1]) > MAX_REPEATS:
            skipped.append((subfolder, f"repeats its images more than {MAX_REPEATS:,} times; rename it"))
            continue
        if not named or int(named[1]) == 0:
            skipped.append((subfolder, "is a folder without repeats in its name; rename it to 1_name to include it"))
            continue
        for entry in _entries(subfolder):
            if not is_folder(entry) and _is_image(entry, skipped):
                yield _Found(entry, int(named[1]), one_line(named[2]))


def _entries(folder: Path) -> list[Path]:
    """Entries of a folder except hidden ones, in natural order."""
    try:
        return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=_natural)
    except FileNotFoundError:
        raise DataError(f"image folder {folder} does not exist; check the path") from None
    except NotADirectoryError:
        raise DataError(f"images must be in a folder, but {folder} is a file; use the folder it is in") from None
    except OSError as error:
        raise DataError(f"image folder {folder} cannot be read ({error.strerror}); check its permissions") from error


def _is_image(entry: Path, skipped: list[tuple[Path, str]]) -> bool:
    suffix = entry.suffix.lower()
    if suffix in image_suffixes():
        return True
    if suffix in _FOREIGN_SUFFIXES:
        skipped.append((entry, f"is a {suffix[1:].upper()} file, which is not read here; convert it to PNG or JPEG"))
    return False


# Picture formats that are reported as skipped; other files (captions, notes, ...) are ignored.
# fmt: off
_FOREIGN_SUFFIXES = frozenset((
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".hdr",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
    ".mp4", ".mov", ".webm", ".avi", ".mkv",
))
# fmt: on


def _usable_size(path: Path) -> tuple[int, int]:
    width, height = image_size(path)
    if min(width, height) < MIN_EDGE:
        raise ImageError(path, f"is {width}×{height} px, but its shorter edge must be {MIN_EDGE} px; use a larger one")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(path, f"is {width}×{height} px, longer than {MAX_ASPECT}:1; crop it or cut it into pieces")
    return width, height


def _caption(text: str, trigger: str, folder_caption: str) -> tuple[str, CaptionSource]:
    if text:
        return with_trigger(text, trigger), "file"
    if trigger.strip():
        return with_trigger("", trigger), "trigger"
    return (folder_caption, "folder") if folder_caption else ("", "none")


def _nothing_usable(folder: Path, skipped: list[tuple[Path, str]]) -> str:
    if not skipped:
        known = ", ".join(sorted(suffix[1:] for suffix in image_suffixes()))
        return f"{folder} holds no images; put some in it ({known})"
    path, reason = skipped[0]
    others = f" ({len(skipped) - 1} more were skipped)" if len(skipped) > 1 else ""
    return f"{folder} holds no usable image: {path.name} {reason}{others}"


def _natural(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort key with digits as numbers; the plain name breaks ties such as `1.png` and `01.png`."""
    pieces = re.split(r"([0-9]+)", path.name.casefold())
    return [
        (not piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in pieces if piece
    ], path.name
