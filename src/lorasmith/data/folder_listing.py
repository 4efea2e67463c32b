"""What a folder of images holds, by name only: images, caption files, masks and metadata files of each folder.

Names stay text until an image is used: listing 100,000 of them takes about a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorasmith.core.errors import DataError
from lorasmith.core.files import entry_is_folder, entry_is_link, is_regular
from lorasmith.core.folders import RUN_LOG, RUN_RECORD
from lorasmith.data.captions import one_line
from lorasmith.data.data_config import CAPTION_SUFFIXES, MAX_REPEATS
from lorasmith.data.image_files import image_suffixes
from lorasmith.data.metadata_files import is_metadata_name

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".webm", ".mkv", ".flv")
"""File suffixes that are taken for videos, in lower case."""

ReasonKind = Literal[
    "unreadable", "format", "video", "size", "caption", "mask", "control", "metadata", "folder", "link"
]


class Reason(str):
    """Why a file or folder is not used, with its remedy: a clause, by which reasons of a kind are counted."""

    kind: ReasonKind

    def __new__(cls, clause: str, kind: ReasonKind = "unreadable") -> Reason:
        reason = super().__new__(cls, clause)
        reason.kind = kind
        return reason


NO_CLIPS = Reason(
    "is a video, on which models of pictures are not trained; choose a model of videos, or remove it", "video"
)
"""Why a video is left out."""

LINK = Reason("is a link out of its folder, which is read with --follow-links alone", "link")
"""Why a file or folder is left out."""

SET_APART = ("duplicates", "unused")
"""Folders in a mended folder that are not trained on; each has a file `REASONS`."""

REASONS = "REASONS.txt"

CHANGES = "CHANGES.txt"  # in a mended folder: what was done to each file


def control_folder(place: int) -> str:
    """Name of the folder beside images that has their controls at a place among several, from 0."""
    return f"control_{place}" if place else "control"


Skipped = list[tuple[Path, Reason]]  # unused files and folders, with reason and remedy


@dataclass(slots=True)
class ListedFolder:
    """The names in a folder."""

    path: str  # as the caller named it, or a folder inside
    inside: str  # path relative to the source, with slashes; empty for the source itself
    source: Path  # with links resolved
    follow_links: bool
    repeats: int = 1  # from the name of the nearest folder that has them
    caption: str = ""  # the rest of that name
    images: list[str] = field(default_factory=list)  # in natural order, without masks
    captions: dict[str, list[str]] = field(default_factory=dict)  # by stem, the preferred file first
    masks: dict[str, list[str]] = field(default_factory=dict)  # `stem.mask.png`, by stem
    metadata: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)  # names that are links
    foreign: Skipped = field(default_factory=list)  # pictures in formats that are not read
    is_inside: bool = field(init=False)  # inside the source when links are resolved

    def __post_init__(self) -> None:
        self.is_inside = _resolved(self.path).is_relative_to(self.source)

    def file(self, name: str) -> Path:
        return Path(self.path, name)

    def outside(self, name: str) -> str | None:
        """The resolved path of a file that a link leads out of the source; else None."""
        if name not in self.links and self.is_inside:
            return None
        real = _resolved(str(self.file(name)))
        return None if real.is_relative_to(self.source) else str(real)

    def refuses(self, name: str) -> bool:
        """Whether a name is a link out of the source that is not followed."""
        return not self.follow_links and self.outside(name) is not None

    def key(self, name: str) -> str:
        """The path of a file relative to the source."""
        return f"{self.inside}/{name}" if self.inside else name


def list_folders(
    root: str,
    *,
    recursive: bool = False,
    masks: bool = False,
    excluding: Collection[str] = (),
    skipped: Skipped | None = None,
    follow_links: bool = False,
    clips: bool = False,
) -> Iterator[ListedFolder]:
    """A folder and the folders inside it that are read, each once, in natural order.

    Without `recursive` those are the folders in `root` named `<repeats>_<name>`. Folders in `apart`, those in
    `SET_APART` and those of runs are omitted. With `masks`, `*.mask.*` are masks even without a picture of that name.
    With `follow_links` folders and files outside `root` are read; with `clips` videos are among the images. `skipped`
    receives folders that are not read. DataError if `root` is missing, is a file, or cannot be read.
    """

    skipped = [] if skipped is None else skipped

    def skip(folder: Path, reason: str, kind: ReasonKind = "folder") -> None:
        skipped.append((folder, Reason(reason, kind)))

    omitted = set(map(_identity, excluding))
    seen = {_identity(root)} | omitted
    source = _resolved(root)
    ahead = [ListedFolder(root, "", source, follow_links)]
    while ahead:
        listed = ahead.pop()
        try:
            subfolders = _list(listed, masks=masks, clips=clips)
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError):  # a zero byte or half of a surrogate pair in the name
                error = FileNotFoundError()
            if listed.path == root:
                raise _unreadable(root, error) from None
            skip(Path(listed.path), f"cannot be read ({error.strerror}); check its permissions")
            continue
        yield listed
        folders = []
        for name in subfolders:
            path = Path(listed.path, name)
            if (name in SET_APART and Path(path, REASONS).is_file()) or _is_run(path):
                continue
            if omitted and _identity(str(path)) in omitted:
                continue
            repeats, caption = _repeats(name) or (None, "")
            if repeats is not None and repeats > MAX_REPEATS:
                skip(path, f"repeats its images more than {MAX_REPEATS:,} times; rename it")
            elif repeats == 0 and recursive:
                skip(path, "repeats its images 0 times; rename it to 1_name to include it")
            elif not repeats and not recursive and not listed.inside:
                skip(path, "is a folder without repeats in its name; rename it to 1_name or add recursive")
            elif listed.inside and not recursive:
                skip(path, "is a folder inside of another one; add recursive to include it")
            elif listed.refuses(name):
                skip(path, f"{LINK}; move the pictures here, or name it as a folder of its own", "link")
            elif (identity := _identity(str(path))) in seen:
                skip(path, "is a link to a folder that is read already")
            else:
                seen.add(identity)
                if not repeats:
                    repeats, caption = listed.repeats, listed.caption
                folders.append(ListedFolder(str(path), listed.key(name), source, follow_links, repeats, caption))
        ahead += reversed(folders)


def foreign_reason(suffix: str) -> Reason | None:
    """Why pictures with this suffix (lower case, with dot) are not read; None if they are, or it is not a picture's."""
    if suffix in VIDEO_SUFFIXES:
        return NO_CLIPS
    if suffix not in _FOREIGN_SUFFIXES or suffix in image_suffixes():
        return None
    plug_in = f"{command} reads it, or " if (command := reader_install(suffix)) else ""
    clause = f"is a {suffix[1:].upper()} file, which is not read here; {plug_in}convert it to PNG or JPEG"
    return Reason(clause, "format")


def foreign_suffixes() -> list[str]:
    """All suffixes, in lower case with their dot, that `foreign_reason` has a reason for."""
    return sorted(suffix for suffix in (*VIDEO_SUFFIXES, *_FOREIGN_SUFFIXES) if foreign_reason(suffix))


def reader_install(suffix: str) -> str:
    """The command that installs a reader for this suffix; empty if there is none or it is installed."""
    missing = suffix in _HEIC_SUFFIXES and suffix not in image_suffixes()
    return 'pip install "lorasmith[heic]"' if missing else ""


def name_without_repeats(name: str) -> str:
    """The name of a folder without kohya's leading number."""
    return (_repeats(name) or (0, one_line(name)))[1]


def stem_of(name: str) -> str:
    """The name of a file without its suffix; ten times faster than `Path.stem`."""
    return name.rpartition(".")[0] or name


def _suffix(name: str) -> str:
    return "".join(name.rpartition(".")[1:]).lower() if "." in name else ""


def _list(listed: ListedFolder, *, masks: bool, clips: bool) -> list[str]:
    """Fill in the names of a folder and return those of its subfolders. Hidden ones are omitted."""
    readable = image_suffixes() | (set(VIDEO_SUFFIXES) if clips else set())
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(listed.path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            (folders if entry_is_folder(entry) else files).append(entry.name)
            if entry_is_link(entry):
                listed.links.add(entry.name)
    pictures = []
    for name in sorted(files, key=natural_order):
        stem, suffix = stem_of(name), _suffix(name)
        if suffix in readable:
            pictures.append((name, stem))
        elif suffix in CAPTION_SUFFIXES:
            listed.captions.setdefault(stem, []).append(name)
        elif reason := foreign_reason(suffix):
            listed.foreign.append((listed.file(name), reason))
        elif is_metadata_name(name):
            listed.metadata.append(name)
    for names in listed.captions.values():
        if len(names) > 1:
            names.sort(key=lambda name: CAPTION_SUFFIXES.index(_suffix(name)))
    stems = {stem for _, stem in pictures}
    for name, stem in pictures:
        of, dot, mask = stem.rpartition(".")
        if dot and mask.lower() == "mask" and (masks or of in stems):
            listed.masks.setdefault(of, []).append(name)
        else:
            listed.images.append(name)
    return sorted(folders, key=natural_order)


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's, whose previews are not training images."""
    return is_regular(path / RUN_RECORD) and is_regular(path / RUN_LOG)


def _resolved(path: str) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # a name that nothing can have, or a loop
        return Path(path)


def _identity(path: str) -> tuple[int, int] | str:
    """Identifies a folder, whatever path leads to it."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return path
    return status.st_dev, status.st_ino


def _repeats(name: str) -> tuple[int, str] | None:
    """Repeats and the rest of a name such as `10_sks dog`."""
    named = re.fullmatch(r"([0-9]+)_(.*)", name, re.DOTALL)
    return (int(named[1]), one_line(named[2])) if named else None


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares digits as numbers; the name itself breaks ties such as `1.png` and `01.png`."""
    pieces: list[str | int] = [*_DIGITS.split(name.casefold())]  # every second one is a number
    pieces[1::2] = map(int, pieces[1::2])
    return pieces, name


_DIGITS = re.compile(r"([0-9]+)")


def _unreadable(folder: str, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"image folder {folder} does not exist; check the path")
    if isinstance(error, NotADirectoryError):
        return DataError(f"images must be in a folder, but {folder} is a file; use the folder it is in")
    return DataError(f"image folder {folder} cannot be read ({error.strerror}); check its permissions")


_HEIC_SUFFIXES = frozenset((".heic", ".heif"))

# Picture formats that are reported as skipped; other files (notes, ...) are ignored.
# fmt: off
_FOREIGN_SUFFIXES = frozenset((
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".hdr",
    ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
))
# fmt: on
