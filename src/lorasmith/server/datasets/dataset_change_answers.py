"""Changes of datasets: creating and removing them, their pictures and captions."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.files import atomic_path, ensure_folder, is_regular, stamp_of, write_atomic
from lorasmith.core.folders import BUILT_IN_BASE, Folders, plain_name, safe_name
from lorasmith.data.captioners import CAPTIONERS, TRANSFORMERS
from lorasmith.data.captions import MAX_CAPTION, CaptionError, one_line, read_caption_file
from lorasmith.data.data_config import CAPTION_SUFFIXES
from lorasmith.data.folder_listing import VIDEO_SUFFIXES, foreign_reason, foreign_suffixes, stem_of
from lorasmith.data.image_files import (
    MAX_ASPECT,
    ImageError,
    ImageHeader,
    file_digest,
    image_header,
    image_size,
    image_suffixes,
    open_original,
)
from lorasmith.runs.captioner_shelf import captioner_folders, named_captioner
from lorasmith.server.datasets.dataset_answers import (
    CONTROL,
    caption_file,
    caption_of,
    controls_in,
    mask_of,
    masks_beside,
    picture_of,
    pictures_in,
)
from lorasmith.server.datasets.dataset_folders import MASK, UnknownFileError, dataset_folder, is_name, stays_in
from lorasmith.server.datasets.dataset_originals import forget_original, keep_original, original_of, originals_folder
from lorasmith.server.datasets.dataset_shapes import (
    CaptionEdit,
    Changed,
    Crop,
    CroppedAnswer,
    DatasetRow,
    FormatsAnswer,
    RemovedAnswer,
)
from lorasmith.server.questions import question
from lorasmith.server.server_disk import disk_space, keep_captions, put_back, put_folder_back, set_aside

MOST_IMAGES = 2000  # in a dataset filled by the page

_NO_VIDEOS = (
    "is a video, which the page does not take; save it as an animated WebP file for a model of videos, or add pictures "
    "of it"
)
_CHANGING = threading.Lock()  # held from reading a dataset until its change is complete


class TakenNameError(OptionError):
    """A new name is already in use."""


class StaleCaptionError(OptionError):
    """A caption changed after it was read; `details` has the current captions by picture."""

    def __init__(self, details: dict[str, str]) -> None:
        more = f", and {len(details) - 1:,} more were" if len(details) > 1 else ""
        super().__init__(
            f"the caption of {next(iter(details))} was changed elsewhere{more}, and nothing was stored; look at what "
            "is there now, and store yours again"
        )
        self.details = details


@question
def check_changes(folders: Folders, name: str) -> bool:
    """True if a dataset may be changed. Raises UnknownFileError and OutputError, as `dataset_folder`."""
    return dataset_folder(folders, name, to_change=True).is_dir()


@question
def formats(folders: Folders) -> FormatsAnswer:
    """Which files can be added to datasets, by their suffixes."""
    return FormatsAnswer(
        pictures=tuple(sorted(image_suffixes())),
        captions=CAPTION_SUFFIXES,
        refused={suffix: _refusal(suffix) for suffix in foreign_suffixes()},
    )


def _refusal(suffix: str) -> str:
    """Why files with this suffix are not added; empty if their content decides."""
    return _NO_VIDEOS if suffix in VIDEO_SUFFIXES else foreign_reason(suffix) or ""


@question
def create_dataset(folders: Folders, name: str) -> DatasetRow:
    """Create a dataset; its name must be a portable folder name. Raises OptionError if it is taken."""
    if not name.strip():
        raise OptionError("a dataset must have a name, got an empty one; name it after its subject")
    folder = ensure_folder(folders.place("input")) / safe_name(name.strip())
    with _CHANGING:
        taken = {path.name.casefold() for path in (*folder.parent.iterdir(), *(BUILT_IN_BASE / "input").glob("*"))}
        if folder.name.casefold() in taken:
            raise TakenNameError(f"there is a dataset {folder.name!r} already; choose another name, or add to that one")
        ensure_folder(folder)
    return DatasetRow(name=folder.name, images=0, captions=0, modified=folder.stat().st_mtime, cover=None)


@question
def remove_dataset(folders: Folders, name: str) -> RemovedAnswer:
    """Move a dataset to the removed files. Raises UnknownFileError, OutputError."""
    return _removed(folders, [dataset_folder(folders, name, to_change=True)], name)


@question
def add_image(folders: Folders, name: str, *, file: str, temporary: str) -> dict[str, str]:
    """Move an uploaded picture from `temporary` into a dataset, renamed if its name is taken. Returns `added` with its
    name, or `skipped` with the reason, and for a duplicate `same`, the existing picture. A `file` in a folder `control`
    is a control, `added` as `control/1.png`; one of its name is moved to `replaced`. Raises UnknownFileError and
    OutputError.
    """
    folder, source = dataset_folder(folders, name, to_change=True), Path(temporary)
    if reason := _refusal(Path(file).suffix.lower()):
        return {"skipped": reason}
    try:
        image_size(source)  # decodes the whole picture
        suffixes = image_header(source).suffixes
    except ImageError as error:
        return {"skipped": error.reason}
    path = Path(file)
    suffix = path.suffix.lower() if path.suffix.lower() in suffixes else suffixes[0]
    stem = safe_name(_file_name(file).removesuffix(path.suffix))
    if re.search(r"(^|[\\/])control[\\/]", file):
        return _added_control(folders, name, folder, source, f"{stem}{plain_name(suffix)}")
    with _CHANGING:
        names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
        pictures = [name for name in names if Path(name).suffix.lower() in image_suffixes()]
        if (same := _same_content(folder, pictures, source)) is not None:
            return {"skipped": f"is in the dataset already, as {same}", "same": same}
        if len(pictures) >= MOST_IMAGES:
            return {"skipped": f"is one too many: a dataset has at most {MOST_IMAGES:,} pictures"}
        target = folder / f"{_free_stem(stem, pictures)}{plain_name(suffix)}"
        _move(source, target)
    return {"added": target.name}


def _added_control(folders: Folders, name: str, folder: Path, source: Path, file: str) -> dict[str, str]:
    with _CHANGING:
        place = ensure_folder(folder / CONTROL)
        if not stays_in(place, folder.resolve()):
            raise OutputError(f"the folder {CONTROL} of {name} is a link to somewhere else; replace it by a folder")
        there = controls_in(folder)
        replaced = [control for control in there if stem_of(control.name).casefold() == stem_of(file).casefold()]
        if len(there) - len(replaced) >= MOST_IMAGES:
            return {"skipped": f"is one too many: a dataset has at most {MOST_IMAGES:,} controls"}
        aside = {"replaced": _removed(folders, replaced, name).removed} if replaced else {}
        _move(source, place / file)
    return {"added": f"{CONTROL}/{file}", **aside}


@question
def pair_control(folders: Folders, name: str, control: str, image: str = "", former: str = "") -> Changed:
    """Give a control to a picture, by its name, or back its `former` name; if that has one in the folder of controls,
    both change places. Raises UnknownFileError and OutputError.
    """
    folder = dataset_folder(folders, name, to_change=True)
    moved = picture_of(folder, control, control=True)
    stem = stem_of(safe_name(_file_name(former)) if former else picture_of(folder, image).name)
    with _CHANGING:
        there = [control for control in controls_in(folder) if stem_of(control.name).casefold() == stem.casefold()]
        if moved in there:
            return Changed(changed=0)
        apart = [(control, control.with_stem(f"{control.stem}.moving")) for control in there]
        for one, aside in apart:
            one.rename(aside)
        moved.rename(moved.with_stem(stem))
        for one, aside in apart:
            aside.rename(one.with_stem(moved.stem))
    return Changed(changed=1 + len(there))


@question
def remove_control(folders: Folders, name: str, file: str) -> RemovedAnswer:
    """Move a control to the removed files. Raises UnknownFileError and OutputError."""
    folder = dataset_folder(folders, name, to_change=True)
    with _CHANGING:
        return _removed(folders, [picture_of(folder, file, control=True)], name)


@question
def add_caption(folders: Folders, name: str, *, file: str, temporary: str, image: str = "") -> dict[str, str]:
    """Keep an uploaded text as the caption of `image`, or of the picture with the stem of `file`. Returns `added` with
    the name of the caption file, or `skipped` with the reason. Raises UnknownFileError and OutputError.
    """
    folder = dataset_folder(folders, name, to_change=True)
    try:
        caption = read_caption_file(Path(temporary))
    except CaptionError as error:
        return {"skipped": error.reason}
    stem = _file_name(file).removesuffix(Path(file).suffix).casefold()
    with _CHANGING:
        pictures = {picture.name: picture for picture in pictures_in(folders, folder)[0]}
        of = (
            pictures.get(image)
            if image
            else next((picture for key, picture in pictures.items() if stem_of(key).casefold() == stem), None)
        )
        if of is None:
            return {"skipped": "has no picture of the same name; add that too"}
        target = caption_file(of)
        if of.caption_file and read_caption_file(target).text != caption.text:
            return {"skipped": f"is left out, as {of.name} has another caption; change that instead"}
        write_atomic(target, "\n".join(caption.lines) + "\n")
        return {"added": target.name}


@question
def add_mask(folders: Folders, name: str, *, file: str, temporary: str, image: str = "") -> dict[str, str]:
    """Move an uploaded mask, such as `1.mask.png`, beside its picture: `image`, or the one with the stem of `file`.
    Returns `added` with its name and `replaced` with where former masks were moved to, or `skipped` with the reason.
    Raises UnknownFileError and OutputError.
    """
    folder, source = dataset_folder(folders, name, to_change=True), Path(temporary)
    try:
        image_size(source)
        suffixes = image_header(source).suffixes
    except ImageError as error:
        return {"skipped": error.reason}
    suffix, stem = Path(_file_name(file)).suffix.lower(), stem_of(stem_of(_file_name(file)))
    with _CHANGING:
        names = [picture.name for picture in pictures_in(folders, folder)[0]]
        of = next(
            (name for name in names if image == name or (not image and stem_of(name).casefold() == stem.casefold())),
            None,
        )
        if of is None:
            return {"skipped": f"is a mask, and no photo is called {stem}; add that too"}
        former = masks_beside(folder / of)
        target = folder / f"{stem_of(of)}{MASK}{plain_name(suffix if suffix in suffixes else suffixes[0])}"
        aside = {"replaced": _removed(folders, former, name).removed} if former else {}
        _move(source, target)
    return {"added": target.name, **aside}


@question
def remove_mask(folders: Folders, name: str, file: str) -> RemovedAnswer:
    """Move the masks of a picture to the removed files. Raises UnknownFileError and OutputError."""
    folder = dataset_folder(folders, name, to_change=True)
    with _CHANGING:
        return _removed(folders, [mask_of(folder, file)], name)


@question
def remove_image(folders: Folders, name: str, file: str) -> RemovedAnswer:
    """Move a picture, its caption and its mask to the removed files. Raises UnknownFileError and OutputError."""
    return remove_images(folders, name, files=(file,))


@question
def remove_images(folders: Folders, name: str, files: Sequence[str]) -> RemovedAnswer:
    """Move pictures with their captions and masks to the removed files, all or none, from where they return together.
    Raises UnknownFileError and OutputError.
    """
    folder = dataset_folder(folders, name, to_change=True)
    with _CHANGING:
        paths = [picture_of(folder, file) for file in dict.fromkeys(files)]
        beside = [file_beside for path in paths for file_beside in (*_captions_beside(path), *masks_beside(path))]
        return _removed(folders, [*paths, *dict.fromkeys(beside)], name)


def _captions_beside(picture: Path) -> list[Path]:
    found = (picture.with_name(f"{stem_of(picture.name)}{suffix}") for suffix in CAPTION_SUFFIXES)
    return [file for file in found if is_regular(file)]


@question
def crop_image(
    folders: Folders, name: str, file: str, *, x: float, y: float, width: float, height: float
) -> CroppedAnswer:
    """Replace a picture by a part of its original, in shares of that; by the original itself if the part is all of it.
    Its suffix is `.png` then, unless it is a JPEG file. Raises UnknownFileError, ImageError, OptionError for a part
    that cannot be trained on and for pictures of more than one file, and OutputError.
    """
    folder, part = dataset_folder(folders, name, to_change=True), Crop(x=x, y=y, width=width, height=height)
    if not (0 <= x < x + width <= 1.001 and 0 <= y < y + height <= 1.001):
        raise OptionError(f"a crop must be a part of the picture, got {asdict(part)}; draw it again")
    with _CHANGING:
        path = picture_of(folder, file)
        original = original_of(path, stamp_of(path))
        source = path if original is None else original.path
        if min(width, height) > _WHOLE:
            return CroppedAnswer(file=path.name if original is None else _uncropped(folder, path, source))
        header = image_header(source)
        _check_alone(folders, folder, path, header)
        picture, profile = open_original(source)
        box = _pixels_of(part, picture.size)
        is_jpeg = header.format == "JPEG"
        target = _free(folder / (source.name if is_jpeg else f"{stem_of(source.name)}.png"), path)
        with disk_space(folder, _CROP_BYTES * picture.width * picture.height), atomic_path(target) as temporary:
            options: dict[str, Any] = {"quality": 95, "subsampling": 0} if is_jpeg else {}
            cut = picture.convert("RGB") if is_jpeg else picture
            cut.crop(box).save(temporary, "JPEG" if is_jpeg else "PNG", icc_profile=profile, **options)
            if original is None:
                source = originals_folder(folder) / path.name
                if not stays_in(source.parent, folder.resolve()):
                    raise OutputError(f"the folder {source.parent.name} of {name} is a link; replace it by a folder")
                if source.exists():  # of another picture, which had the name before
                    set_aside(folders.base, [source], name)
                shutil.copy2(path, source)
            keep_original(source, target, part, file_digest(temporary))
        if target != path:
            path.unlink()
            forget_original(path)
    return CroppedAnswer(file=target.name)


_WHOLE = 0.9995  # share of both sides from which nothing is cut
_CROP_BYTES = 8  # reserved for a pixel: the part as PNG, and its original
_LEAST_SIDE = 16  # pixels: narrower pictures are not trained on


def _check_alone(folders: Folders, folder: Path, path: Path, header: ImageHeader) -> None:
    """Raise OptionError for a picture that is not cropped by itself."""
    listed = next((picture for picture in pictures_in(folders, folder)[0] if picture.name == path.name), None)
    others = [*masks_beside(path), *(listed.controls if listed else ())]
    if others:
        raise OptionError(
            f"{path.name} belongs to {others[0].name}, which would have to be cropped alike; crop both files yourself"
        )
    if header.is_animated:
        raise OptionError(f"{path.name} is an animation, which is not cropped here; crop the file yourself")


def _pixels_of(part: Crop, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part in pixels: left, top, right, bottom. Raises OptionError if it is too narrow."""
    shares = (part.x, part.y, part.x + part.width, part.y + part.height)
    left, top, right, bottom = (
        min(round(share * side), side) for share, side in zip(shares, (*size, *size), strict=True)
    )
    width, height = right - left, bottom - top
    if min(width, height) < _LEAST_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise OptionError(
            f"a crop must have sides of at least {_LEAST_SIDE} pixels and be at most {MAX_ASPECT} times as long as "
            f"wide, got {width}×{height}; draw a larger one"
        )
    return left, top, right, bottom


def _free(target: Path, picture: Path) -> Path:
    """The path, which no other file but this picture may have. Raises OptionError."""
    if target.name != picture.name and os.path.lexists(target):
        raise TakenNameError(f"there is a file {target.name} in {target.parent.name} already; rename one of them")
    return target


def _uncropped(folder: Path, path: Path, original: Path) -> str:
    """Put an original back in place of its part; returns its name."""
    target = _free(folder / original.name, path)
    original.replace(target)
    if target != path:
        path.unlink()
    forget_original(path)
    return target.name


@question
def restore_removed(folders: Folders, name: str, *, removed: str, control: bool = False) -> Changed:
    """Move files that were removed from a dataset back into it, with `control` into its folder of controls; or all of
    the dataset, if there is none. Raises UnknownFileError, TakenNameError if one of their names is in use again, and
    OutputError.
    """
    is_whole = is_name(name) and not os.path.lexists(folders.place("input") / name)
    folder = folders.place("input") / name if is_whole else dataset_folder(folders, name, to_change=True)
    with _CHANGING:
        try:
            if is_whole:
                put_folder_back(folders.base, removed, folder)
                return Changed(changed=1)
            return Changed(changed=put_back(folders.base, removed, name, folder / CONTROL if control else folder))
        except FileNotFoundError:
            raise UnknownFileError(
                f"there is nothing in {removed!r} that was removed from {name}; look for it in the removed files"
            ) from None
        except FileExistsError as error:
            raise TakenNameError(f"there is a file {error} in {name} again; rename it first") from None


@question
def set_captions(folders: Folders, name: str, captions: Mapping[str, CaptionEdit]) -> Changed:
    """Write captions by picture, all or none; an empty string deletes the caption. Replaced captions are kept. Raises
    UnknownFileError, OptionError for a long caption, StaleCaptionError and OutputError.
    """
    folder = dataset_folder(folders, name, to_change=True)
    for edit in captions.values():
        if len(edit.caption) > MAX_CAPTION or "\x00" in edit.caption:
            raise OptionError(
                f"a caption must be text of at most {MAX_CAPTION:,} characters, got {len(edit.caption):,}; shorten it"
            )
    with _CHANGING:
        pictures = {picture.name: picture for picture in pictures_in(folders, folder)[0]}
        if unknown := next((file for file in captions if file not in pictures), None):
            raise UnknownFileError(f"there is no picture {unknown!r} in {name}; load the page again")
        there = {file: caption_of(pictures[file]) for file in captions}
        new = {file: _as_stored(edit.caption) for file, edit in captions.items()}
        changed = [file for file in captions if new[file] != there[file][0] or there[file][1]]
        stale = {file: there[file][0] for file in changed if not _is_seen(captions[file], there[file][0])}
        if stale:
            raise StaleCaptionError(stale)
        for file in changed:
            target = caption_file(pictures[file])
            if not pictures[file].caption_file and os.path.lexists(target):
                raise OptionError(
                    f"{file} has no caption file of its own, as {target.name} is there already: where case is ignored "
                    "it may be that of another picture; rename one of them"
                )
        on_disk = [file for file in changed if pictures[file].caption_file]
        keep_captions(folders.base, name, {file: there[file][0] for file in on_disk if there[file][0]})
        if away := [caption_file(pictures[file]) for file in on_disk if there[file][1] or not new[file]]:
            set_aside(folders.base, away, name)
        for file in changed:
            if new[file]:
                write_atomic(caption_file(pictures[file]), f"{new[file]}\n")
    return Changed(changed=len(changed))


@question
def captioning_request(
    folders: Folders,
    name: str,
    *,
    captioner: str,
    files: Sequence[str] = (),
    overwrite: bool = False,
    trigger: str = "",
) -> dict[str, Any]:
    """The request of a job that writes captions: of photos without one, of all with `overwrite`, with the captions that
    are there now. Raises UnknownFileError, and OptionError if the captioner is not here, or there is nothing to do.
    """
    folder = dataset_folder(folders, name, to_change=True)
    model = named_captioner(folders, captioner)
    # Requests name neither folders nor models of the hub, which only who types on this machine may.
    if model == captioner and (captioner == TRANSFORMERS or captioner not in CAPTIONERS):
        known = ", ".join(captioner_folders(folders)) or "none"
        raise OptionError(f"there is no captioner {captioner!r} here, known are {known}; choose another one")
    pictures = {picture.name: picture for picture in pictures_in(folders, folder)[0]}
    if unknown := next((file for file in files if file not in pictures), None):
        raise UnknownFileError(f"there is no picture {unknown!r} in {name}; load the page again")
    there = {file: caption_of(pictures[file]) for file in files or pictures}
    photos = {file: text for file, (text, fault) in there.items() if not fault and (overwrite or not text)}
    if not photos:
        raise OptionError(f"no photo of {name} lacks a caption; choose to replace those that are there")
    sources = [{"path": str(folder)}]  # by which the dataset of a job is known
    return {"name": name, "captioner": model, "photos": photos, "trigger": one_line(trigger), "sources": sources}


def _as_stored(text: str) -> str:
    """A caption without its blank lines, as it will be read."""
    return "\n".join(filter(None, map(one_line, text.splitlines())))


def _is_seen(edit: CaptionEdit, there: str) -> bool:
    """Whether a caption may be replaced: the client read this one, or did not send what it read."""
    return edit.seen is None or _as_stored(edit.seen) == there


def _removed(folders: Folders, paths: list[Path], name: str) -> RemovedAnswer:
    return RemovedAnswer(removed=set_aside(folders.base, paths, name).relative_to(folders.base).as_posix())


def _file_name(sent: str) -> str:
    """The name in a sent file name, which may be a path."""
    return sent.replace("\\", "/").rpartition("/")[2]


def _free_stem(wanted: str, pictures: list[str]) -> str:
    """A stem that no picture has, ignoring case: pictures with the same stem would share a caption."""
    taken = {stem_of(picture).casefold() for picture in pictures}
    stems = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
    return next(stem for stem in stems if stem.casefold() not in taken)


def _same_content(folder: Path, pictures: list[str], source: Path) -> str | None:
    """The picture whose file is byte for byte that of `source`."""
    size = source.stat().st_size
    alike = [
        picture for picture in pictures if is_regular(folder / picture) and (folder / picture).stat().st_size == size
    ]
    if not alike:
        return None
    digest = file_digest(source)
    return next((name for name in alike if file_digest(folder / name) == digest), None)


def _move(source: Path, target: Path) -> None:
    """Move a file to a free path, also on another disk. Raises OutputError."""
    try:
        if target.exists():
            raise OutputError(f"{target.name} is there already; send it under another name")
        source.rename(target)
    except OSError:
        with disk_space(target.parent, source.stat().st_size), atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        source.unlink(missing_ok=True)
    target.chmod(0o644)
