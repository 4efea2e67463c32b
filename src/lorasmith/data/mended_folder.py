"""A folder of images written again without the faults that can be mended; the original is only read.

    fixed/
      1.jpg, 1.txt        upright, in 8 bits, no larger than training needs; the caption in UTF-8
      10_sks dog/         folders with repeats are kept
      duplicates/         copies and look-alikes of others, as they were
      unused/             files that cannot be trained on, as they were; REASONS.txt says why

Files that need no change are copied byte for byte.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

from PIL import Image

from lorasmith.core.errors import DataError, OptionError, OutputError
from lorasmith.core.files import ensure_folder, is_folder, open_regular
from lorasmith.core.safe_names import plain_name, safe_name
from lorasmith.data.captions import CAPTION_SUFFIXES, read_caption
from lorasmith.data.folder import MAX_ASPECT, MIN_EDGE, ImageFile
from lorasmith.data.folder_listing import REASONS, SET_APART
from lorasmith.data.image_files import ImageError, image_header, open_original
from lorasmith.data.preflight import Preflight, name_in

__all__ = ["Change", "MendedFolder", "write_mended"]

Change = Literal["reduced", "turned upright", "converted", "renamed", "set apart", "unused", "left out"]

_MOST_AREA = 2.0  # of the square that pictures are scaled to
_PLAIN_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA"))
_QUALITY = 95
_MOST_THREADS = 8


@dataclass(frozen=True)
class MendedFolder:
    """What was written.

    Attributes:
        folder: the new folder.
        pictures: number of pictures to train on.
        captions: number of caption files beside them.
        changes: names of the new files by what was done, in order; unchanged ones are not listed.
        reasons: name in the old folder and reason of each file that is not among the pictures.
    """

    folder: Path
    pictures: int
    captions: int
    changes: Mapping[Change, tuple[str, ...]]
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """A picture and where it goes.

    Attributes:
        source: the file.
        name: its path relative to the original folder.
        folder: relative to the new one.
        stem: new name without suffix.
        image: facts about it; None for a file that training does not read.
    """

    source: Path
    name: str
    folder: Path
    stem: str
    image: ImageFile | None = None


@dataclass(frozen=True)
class _Written:
    name: str
    changes: tuple[Change, ...] = ()
    has_caption: bool = False


def write_mended(check: Preflight, target: Path, *, progress: Callable[[int, int], None] | None = None) -> MendedFolder:
    """Write a mended copy of a checked folder. The folder appears when it is complete.

    Args:
        check: of the original.
        target: the new folder; an existing one must be empty.
        progress: called with (images done, all images).

    Raises:
        OptionError: the target holds something, is a file or is inside of the original.
        ImageError: an image can no longer be read.
        OutputError: the target cannot be written.
    """
    _check_target(target, check.folder)
    ensure_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}.", dir=target.parent) as temporary:
        draft = Path(temporary, "folder")
        try:
            draft.mkdir()
            mended = _filled(draft, check, target, progress)
            if target.exists():
                target.rmdir()
            draft.rename(target)
        except OSError as error:
            raise OutputError(
                f"{target} was not written ({error.strerror or error}); check the disk's space and permissions"
            ) from error
    return mended


def _check_target(target: Path, original: Path) -> None:
    if target.resolve().is_relative_to(original.resolve()):
        raise OptionError(f"the mended folder must be outside of the original, got {target}; choose another")
    if target.exists() and (not is_folder(target) or any(target.iterdir())):
        raise OptionError(f"{target} must be a new or empty folder, but holds something; choose another")


def _filled(draft: Path, check: Preflight, target: Path, progress: Callable[[int, int], None] | None) -> MendedFolder:
    names = _Names()
    apart = {index: check.images[group.best].name for group in check.alike for index in group.others}
    jobs = [
        _Job(one.file.path, one.name, *names.place(one.name), one.file)
        for index, one in enumerate(check.images)
        if index not in apart
    ]
    # Files that training does not read come last, so that they take no name of an image.
    foreign = [(path, reason) for path, reason in check.skipped if not _stays(path, check.folder)]
    foreign_names = [name_in(check.folder, path) for path, _ in foreign]
    convertible = [_Job(path, name, *names.place(name)) for (path, _), name in zip(foreign, foreign_names, strict=True)]
    most = int(_MOST_AREA * max(check.resolutions) ** 2)
    written: list[_Written] = []
    reasons = {name_in(check.folder, path): reason for path, reason in check.skipped if _stays(path, check.folder)}
    left = list(reasons)
    # Around all threads, as each file that is opened suspends warnings too.
    with (
        warnings.catch_warnings(action="ignore"),
        ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), "write images") as pool,
    ):
        for done, one in enumerate(pool.map(lambda job: _write_image(job, draft, most), jobs), start=1):
            written.append(one)
            if progress:
                progress(done, len(jobs))
        converted = list(pool.map(lambda job: _convert(job, draft, most), convertible))
    written += [one for one in converted if one is not None]
    duplicates, unused = SET_APART
    unread = [pair for pair, one in zip(foreign, converted, strict=True) if one is None]
    copies = {check.images[index].file.path: f"shows what {best} shows" for index, best in sorted(apart.items())}
    set_apart = _keep(draft / duplicates, copies, check.folder)
    not_used = _keep(draft / unused, dict(unread), check.folder)
    reasons |= {name_in(check.folder, path): why for path, why in (*copies.items(), *unread)}
    changes: dict[Change, tuple[str, ...]] = {
        kind: tuple(one.name for one in written if kind in one.changes)
        for kind in ("reduced", "turned upright", "converted", "renamed")
    }
    changes |= {"set apart": set_apart, "unused": not_used, "left out": tuple(left)}
    return MendedFolder(
        target,
        len(written),
        sum(one.has_caption for one in written),
        {kind: done for kind, done in changes.items() if done},
        reasons,
    )


def _stays(path: Path, original: Path) -> bool:
    """Whether a file or folder that is not used is not copied either: folders, and links out of the original."""
    root = original if is_folder(original) else original.parent
    return is_folder(path) or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _write_image(job: _Job, draft: Path, most: int) -> _Written:
    """Write a picture with its caption and mask, changed as far as needed."""
    assert job.image is not None
    header = image_header(job.source)
    changes: list[Change] = []
    if job.image.width * job.image.height > most:
        changes.append("reduced")
    if not header.is_upright:
        changes.append("turned upright")
    if header.mode not in _PLAIN_MODES:
        changes.append("converted")
    folder = ensure_folder(draft / job.folder)
    suffix = job.source.suffix.lower() if job.source.suffix.lower() in header.suffixes else header.suffixes[0]
    if changes:
        picture, profile = open_original(job.source)
        suffix = suffix if header.format == "JPEG" and picture.mode == "RGB" else ".png"
        _save(_reduced(picture, most), folder / f"{job.stem}{suffix}", profile)
    else:
        _copy(job.source, folder / f"{job.stem}{suffix}")
    name = (job.folder / f"{job.stem}{suffix}").as_posix()
    if name.rpartition(".")[0] != job.name.rpartition(".")[0]:
        changes.append("renamed")
    if job.image.mask is not None:
        _copy(job.image.mask, folder / f"{job.stem}.mask{job.image.mask.suffix}")
    has_caption = _write_caption(job.source, job.image, folder / job.stem)
    return _Written(name, tuple(changes), has_caption)


def _convert(job: _Job, draft: Path, most: int) -> _Written | None:
    """Write a file that training does not read as a PNG; None if it cannot be read or trained on."""
    try:
        picture, profile = open_original(job.source, any_format=True)
    except ImageError:
        return None
    if min(picture.size) < MIN_EDGE or max(picture.size) > MAX_ASPECT * min(picture.size):
        return None
    target = ensure_folder(draft / job.folder) / f"{job.stem}.png"
    _save(_reduced(picture, most), target, profile)
    has_caption = _write_caption(job.source, None, target.with_suffix(""))
    return _Written((job.folder / target.name).as_posix(), ("converted",), has_caption)


def _reduced(picture: Image.Image, most: int) -> Image.Image:
    """The picture with at most `most` pixels."""
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


def _write_caption(source: Path, image: ImageFile | None, stem: Path) -> bool:
    """Write the caption as UTF-8; whether there is one."""
    text = "\n".join(image.captions) if image is not None else ""
    if not text:
        try:
            caption = read_caption(source)
        except DataError:  # of a file that is no image, where it is not read before
            caption = None
        text = caption.text if caption is not None else ""
    if text:
        Path(f"{stem}{CAPTION_SUFFIXES[0]}").write_text(f"{text}\n", encoding="utf-8", newline="\n")
    return bool(text)


def _keep(folder: Path, files: Mapping[Path, str], original: Path) -> tuple[str, ...]:
    """Copy files as they are with their captions, and write why they are here; their names in the new folder."""
    names, kept, reasons = _Names(), [], []
    for path, reason in files.items():
        _, stem = names.place(name_in(original, path).replace("/", "_"))
        target = ensure_folder(folder) / f"{stem}{plain_name(path.suffix)}"
        try:
            open_regular(path).close()
        except OSError as error:  # no permission, a pipe, or gone since
            reasons.append(f"{name_in(original, path)} (not copied, {error.strerror}): {reason}")
            continue
        _copy(path, target)
        _write_caption(path, None, target.with_suffix(""))
        kept.append(f"{folder.name}/{target.name}")
        reasons.append(f"{target.name}: {reason}")
    if reasons:
        text = "\n".join((*reasons, "")).encode("utf-8", "backslashreplace")
        (ensure_folder(folder) / REASONS).write_bytes(text)
    return tuple(kept)


def _copy(source: Path, target: Path) -> None:
    with open_regular(source) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)


class _Names:
    """Names in the new folder: safe, and different from each other even without their suffix and in any case."""

    def __init__(self) -> None:
        self._taken: set[str] = {name.casefold() for name in SET_APART}

    def place(self, name: str) -> tuple[Path, str]:
        """Folder and stem for a file of this name, relative to the new folder."""
        *folders, file = name.split("/")
        folder = Path(*map(safe_name, folders))
        stem = wanted = safe_name(Path(file).stem)
        for number in count(2):
            if (folder / stem).as_posix().casefold() not in self._taken:
                break
            stem = f"{wanted}-{number}"
        self._taken.add((folder / stem).as_posix().casefold())
        return folder, stem
