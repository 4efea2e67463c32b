"""A mended copy of a folder of images; the original is only read.

    fixed/
      1.jpg, 1.txt        upright, in 8 bits, no larger than training needs; the caption in UTF-8
      10_sks dog/         folders with repeats are kept
      control/, control_1/    the controls of the pictures, unchanged, under their new names
      duplicates/         copies and look-alikes of others, unchanged
      unused/             files that training refuses, unchanged, with caption and mask; REASONS.txt says why
      CHANGES.txt         what was done to each file, and what was left out

Files that need no change are copied byte for byte. What training refuses for its caption, its mask or its size is
refused here too: of refused files, only those in unreadable formats are converted to training images.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from lorasmith.core.choices import Fix
from lorasmith.core.errors import DataError, OptionError
from lorasmith.core.files import atomic_folder, check_writable, ensure_folder, is_folder, open_regular
from lorasmith.core.folders import plain_name, safe_name
from lorasmith.data.captions import read_caption
from lorasmith.data.clips import is_video
from lorasmith.data.data_config import CAPTION_SUFFIXES, DataConfig
from lorasmith.data.folder import ImageFile, checked_again
from lorasmith.data.folder_listing import CHANGES, REASONS, SET_APART, Reason, control_folder
from lorasmith.data.image_files import ImageHeader, image_header, open_original
from lorasmith.data.metadata_files import is_metadata_name
from lorasmith.data.preflight import Preflight, name_in

Change = Literal["reduced", "turned upright", "converted", "renamed", "set apart", "unused", "left out"]

_MOST_AREA = 2.0  # of the square that pictures are scaled to
_PLAIN_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA"))
_QUALITY = 95
_MOST_THREADS = 8


@dataclass(frozen=True)
class MendedFile:
    """A file of the original and its copy."""

    name: str  # in the original
    target: str | None  # in the copy; None if left out
    changes: tuple[Change, ...] = ()  # empty for a picture that was copied
    reason: str = ""  # why it is not among the pictures; empty if it is
    has_caption: bool = False  # a caption file was written beside it


@dataclass(frozen=True)
class MendedFolder:
    """The mended copy."""

    folder: Path
    files: tuple[MendedFile, ...]  # pictures first, then the others

    @property
    def pictures(self) -> int:
        return sum(not file.reason for file in self.files)

    @property
    def captions(self) -> int:
        return sum(file.has_caption for file in self.files)

    @property
    def changes(self) -> Mapping[Change, tuple[str, ...]]:
        """Names of the files by change; those of the copy, or else of the original."""
        found = {
            kind: tuple(file.target or file.name for file in self.files if kind in file.changes) for kind in _CHANGES
        }
        return {kind: names for kind, names in found.items() if names}

    @property
    def reasons(self) -> Mapping[str, str]:
        """Name in the original and reason of each file that is not among the pictures."""
        return {file.name: file.reason for file in self.files if file.reason}


_CHANGES: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True)
class _Job:
    image: ImageFile
    name: str  # path relative to the original folder
    folder: Path  # relative to the copy
    stem: str  # new name without suffix


@dataclass(frozen=True)
class _SetAside:
    """A file that is copied, but not trained on."""

    path: Path
    reason: str
    mask: Path | None = None


def write_mended(
    check: Preflight,
    config: DataConfig,
    target: Path,
    *,
    only: Collection[Fix] = get_args(Fix),
    progress: Callable[[int, int], None] | None = None,
) -> MendedFolder:
    """Write a mended copy of a checked folder, which appears when it is complete.

    `only` are the faults to mend; names and caption encodings always are. `progress` receives (images done, all
    images). OptionError if the target is a file, not empty or inside the original; ImageError if an image can no longer
    be read; OutputError if the target cannot be written.
    """
    check_target(target, check.folder)
    with atomic_folder(target) as draft:
        files = tuple(_filled(draft, check, config, only, progress))
        _write_changes(draft, files)
    return MendedFolder(target, files)


def check_target(target: Path, original: Path) -> None:
    """Check before a long check that `write_mended` could write to `target`. Raises OptionError or OutputError."""
    if target.resolve().is_relative_to(original.resolve()):
        raise OptionError(f"the mended folder must be outside of the original, got {target}; choose another")
    if target.exists() and (not is_folder(target) or any(target.iterdir())):
        raise OptionError(f"{target} must be a new or empty folder, but holds something; choose another")
    check_writable(target.parent)


def _filled(
    draft: Path,
    check: Preflight,
    config: DataConfig,
    only: Collection[Fix],
    progress: Callable[[int, int], None] | None,
) -> Iterator[MendedFile]:
    folder, names = check.folder, _Names()
    set_aside = dict(_repeated(check, only))
    # Warnings are suspended around all threads, as each file that is opened suspends them too.
    with (
        warnings.catch_warnings(action="ignore"),
        ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), "write images") as pool,
    ):
        refused = check.refused if "formats" in only else ()
        again = list(pool.map(lambda fault: checked_again(fault, config), refused))
        # Refused files come last, so that they take no other image's name.
        images = [image.file for index, image in enumerate(check.images) if index not in set_aside]
        images += [image for image in again if isinstance(image, ImageFile)]
        named = [(image, name_in(folder, image.path)) for image in images]
        jobs = [_Job(image, name, *names.place(name)) for image, name in named]
        most = int(_MOST_AREA * max(check.resolutions) ** 2)
        captioned = []
        for done, written in enumerate(pool.map(lambda job: _write_image(job, draft, most, only), jobs), start=1):
            yield written
            captioned += [images[done - 1]] if written.has_caption else []
            if progress:
                progress(done, len(jobs))
    duplicates, unused = SET_APART
    yield from _keep(draft / duplicates, [set_aside[index] for index in sorted(set_aside)], folder, "set apart")
    used, masks = {image.path for image in images}, {fault.path: fault.mask for fault in check.refused}
    # A picture in an unreadable format may also be refused for its caption or its mask.
    reasons = {fault.path: why for fault, why in zip(refused, again, strict=True) if isinstance(why, Reason)}
    deeper = {path: why for path, why in reasons.items() if why.kind != "unreadable"}
    skipped = [
        _SetAside(path, deeper.get(path, reason), masks.get(path)) for path, reason in check.skipped if path not in used
    ]
    left = [
        path_skipped
        for path_skipped in skipped
        if is_folder(path_skipped.path) or _leads_out(path_skipped.path, folder)
    ]
    yield from _keep(
        draft / unused, [path_skipped for path_skipped in skipped if path_skipped not in left], folder, "unused"
    )
    for path_skipped in left:
        yield MendedFile(name_in(folder, path_skipped.path), None, ("left out",), path_skipped.reason)
    for path in _others(images, captioned, [*set_aside.values(), *skipped]):
        yield MendedFile(name_in(folder, path), None, ("left out",), "belongs to no picture here, or is not used")


def _repeated(check: Preflight, only: Collection[Fix]) -> Iterator[tuple[int, _SetAside]]:
    """Pictures that are set apart, by their index."""
    for group in check.alike:
        copies = dict(group.copies)
        for index in group.others:
            is_copy_of_best = copies.get(index) == group.best
            if ("copies" in only and index in copies) or ("look-alikes" in only and not is_copy_of_best):
                shown = check.images[group.best if "look-alikes" in only else copies[index]].name
                file = check.images[index].file
                yield index, _SetAside(file.path, f"shows what {shown} shows", file.mask)


def _leads_out(path: Path, original: Path) -> bool:
    """Whether a link leads out of the original; its target must not be copied as unused."""
    root = original if is_folder(original) else original.parent
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _write_image(job: _Job, draft: Path, most: int, only: Collection[Fix]) -> MendedFile:
    image, folder = job.image, ensure_folder(draft / job.folder)
    changes: list[Change] = []
    if is_video(image.path):
        suffix = image.path.suffix.lower()
    else:
        header = image_header(image.path, any_format=True)
        changes += _changes(header, image, most, only)
        suffix = image.path.suffix.lower()
        suffix = suffix if suffix in header.suffixes else (*header.suffixes, ".png")[0]
    size = image.width, image.height
    if changes:
        suffix = suffix if header.format == "JPEG" else ".png"
        picture, profile = open_original(image.path, any_format=True)
        picture = _reduced(picture, most) if "reduced" in changes else picture
        size = picture.size
        _save(picture, folder / f"{job.stem}{suffix}", profile)
    else:
        _copy(image.path, folder / f"{job.stem}{suffix}")
    name = (job.folder / f"{job.stem}{suffix}").as_posix()
    if name != job.name and (not changes or name.rpartition(".")[0] != job.name.rpartition(".")[0]):
        changes.append("renamed")
    if image.mask is not None and "reduced" in changes:
        mask, _ = open_original(image.mask)
        _save(mask.resize(size), folder / f"{job.stem}.mask.png", None)
    elif image.mask is not None:
        _copy(image.mask, folder / f"{job.stem}.mask{image.mask.suffix}")
    for number, control in enumerate(image.controls):
        beside = ensure_folder(draft / control_folder(number) / job.folder)
        _copy(control.path, beside / f"{job.stem}{control.path.suffix}")
    return MendedFile(job.name, name, tuple(changes), has_caption=_write_caption(image, folder / job.stem))


def _changes(header: ImageHeader, image: ImageFile, most: int, only: Collection[Fix]) -> Iterator[Change]:
    if not header.suffixes:
        yield "converted"
    elif header.is_animated:  # all but one picture would be lost
        return
    elif "formats" in only and header.mode not in _PLAIN_MODES:
        yield "converted"
    if "sizes" in only and image.width * image.height > most:
        yield "reduced"
    if "rotation" in only and not header.is_upright:
        yield "turned upright"


def _reduced(picture: Image.Image, most: int) -> Image.Image:
    area = picture.width * picture.height
    if area <= most:
        return picture
    factor = math.sqrt(most / area)
    size = (max(1, int(picture.width * factor)), max(1, int(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _save(picture: Image.Image, target: Path, profile: bytes | None) -> None:
    if target.suffix == ".png":
        picture.save(target, "PNG", icc_profile=profile)
    else:
        picture.save(target, "JPEG", quality=_QUALITY, subsampling=0, icc_profile=profile)


def _write_caption(image: ImageFile, stem: Path) -> bool:
    """Write the captions as UTF-8, also those that this check ignores; whether there are any."""
    text = "\n".join(image.captions)
    if not text:
        try:
            caption = read_caption(image.path)
        except DataError:  # of an unused file, which is listed as left out
            caption = None
        text = caption.text if caption is not None else ""
    if text:
        Path(f"{stem}{CAPTION_SUFFIXES[0]}").write_text(f"{text}\n", encoding="utf-8", newline="\n")
    return bool(text)


def _keep(folder: Path, files: Sequence[_SetAside], original: Path, change: Change) -> Iterator[MendedFile]:
    """Copy files unchanged with captions and masks, and write the reasons."""
    names, lines = _Names(), []
    for file in files:
        name = name_in(original, file.path)
        _, stem = names.place(name.replace("/", "_"))
        target = ensure_folder(folder) / f"{stem}{plain_name(file.path.suffix)}"
        if (fault := _unreadable(file.path)) is not None:  # no permission, a pipe, or gone since
            lines.append(f"{name} (not copied, {fault}): {file.reason}")
            yield MendedFile(name, None, ("left out",), f"{file.reason} (not copied, {fault})")
            continue
        _copy(file.path, target)
        beside = {file.path.with_suffix(suffix): suffix for suffix in CAPTION_SUFFIXES}
        beside |= {file.mask: f".mask{plain_name(file.mask.suffix)}"} if file.mask else {}
        for path, suffix in beside.items():
            if _unreadable(path) is None and not _leads_out(path, original):
                _copy(path, folder / f"{stem}{suffix}")
        lines.append(f"{target.name}: {file.reason}")
        yield MendedFile(name, f"{folder.name}/{target.name}", (change,), file.reason)
    if lines:
        _write_lines(ensure_folder(folder) / REASONS, lines)


def _others(
    images: Sequence[ImageFile], captioned: Sequence[ImageFile], set_aside: Sequence[_SetAside]
) -> Iterator[Path]:
    """Files beside the images that are not in the copy: without a picture, or unused."""
    paths = {path for image in images for path in (image.path, image.mask)}
    paths |= {path for image in set_aside for path in (image.path, image.mask)}
    for aside in set_aside:
        paths.update(aside.path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    from_files = {
        image.path.with_suffix("") for image in captioned if image.caption_source == "file" or not image.captions
    }
    from_metadata = any(image.caption_source == "metadata" for image in captioned)
    for folder in sorted({image.path.parent for image in images}):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path in paths or not path.is_file():
                continue
            if path.suffix.lower() in CAPTION_SUFFIXES and path.with_suffix("") in from_files:
                from_files.remove(path.with_suffix(""))
            elif not (from_metadata and is_metadata_name(path.name)):
                yield path


def _write_changes(folder: Path, files: Sequence[MendedFile]) -> None:
    lines = [
        f"{file.name}: {', '.join(file.changes)}"
        + (f", is {file.target}" if file.target not in (None, file.name) else "")
        + (f"; {file.reason}" if file.reason else "")
        for file in files
        if file.changes
    ]
    if lines:
        _write_lines(folder / CHANGES, lines)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_bytes("\n".join((*lines, "")).encode("utf-8", "backslashreplace"))


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read; None if it can."""
    try:
        open_regular(path).close()
    except OSError as error:
        return str(error.strerror)
    return None


def _copy(source: Path, target: Path) -> None:
    with open_regular(source) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)


class _Names:
    """Unique safe names in the copy: different even without suffix and ignoring case."""

    def __init__(self) -> None:
        self._taken = {Path(name).stem.casefold() for name in (*SET_APART, REASONS, CHANGES)}

    def place(self, name: str) -> tuple[Path, str]:
        """Folder and stem for a file of this name, relative to the copy."""
        *folders, file = name.split("/")
        folder = Path(*map(safe_name, folders))
        stem = wanted = safe_name(Path(file).stem)
        for number in count(2):
            if (folder / stem).as_posix().casefold() not in self._taken:
                break
            stem = f"{wanted}-{number}"
        self._taken.add((folder / stem).as_posix().casefold())
        return folder, stem
