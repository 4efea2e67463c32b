"""Scanning folders of images and captions: usable images, and skipped files with the reason.

    photos/
      1.jpg, 1.txt        an image and its caption
      2.png               an image without caption file: the trigger is its caption
      3.png, 3.mask.png   an image and its mask, with masks files
      control/1.jpg       the control of 1.jpg, for edit models; control/1_2.jpg is a second one
      metadata.jsonl      captions of images without caption file (`metadata_files.py`)
      10_sks dog/         kohya's convention: images in here occur ten times per epoch; the rest of the name is their
                          caption if there is neither a caption file nor a trigger

Hidden files and folders are ignored, and so is everything that is not an image; other folders are listed as skipped, or
read as well with `recursive`. `folder_listing.py` lists the files, this module checks and combines them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lorasmith.core.errors import DataError
from lorasmith.data.captions import CaptionError, CaptionRules, caption_of_file_name, one_line, read_caption_file
from lorasmith.data.clips import is_video, open_file, seconds_read
from lorasmith.data.data_config import MAX_REPEATS, CaptionOrigin, DataConfig, ImageSource
from lorasmith.data.folder_listing import NO_CLIPS, Reason, Skipped, name_without_repeats, stem_of
from lorasmith.data.image_files import MAX_ASPECT, ImageError, file_digest, image_size, image_suffixes, in_threads
from lorasmith.data.memory_source import PictureItems, item_candidates
from lorasmith.data.source_files import Candidate, NoteKind, ScanNotes, candidates

MIN_EDGE = 16  # of the shorter edge, in pixels
_READERS = 4  # threads


CaptionSource = Literal["file", "metadata", "filename", "trigger", "folder", "class", "none"]


@dataclass(frozen=True)
class ImageFile:
    """An image or clip that can be trained on, `width` × `height` px when upright."""

    path: Path
    width: int
    height: int
    caption: str  # for the text encoder, with the trigger, without randomness; may be empty
    caption_source: CaptionSource  # the trigger aside
    repeats: int = 1  # occurrences in an epoch
    captions: tuple[str, ...] = ()  # verbatim, one of which is drawn; empty for none
    weight: float = 1.0  # of its loss
    mask: Path | None = None  # with masks files only
    is_class: bool = False  # shows the subject's class, for prior preservation
    digest: str = ""  # SHA-256 when it was scanned; empty if unknown
    times: tuple[float, ...] = ()  # as in `OpenedFile`
    controls: tuple[ImageFile, ...] = ()  # what an edit model is given beside the caption

    @property
    def name(self) -> str:
        """The file's name as text; undecodable bytes are question marks."""
        return self.path.name.encode("utf-8", "replace").decode()


@dataclass(frozen=True, repr=False)
class FolderScan:
    """The content of a folder, or of several sources."""

    images: tuple[ImageFile, ...]  # in natural order (`2.png` before `10.png`), those of subfolders last
    skipped: tuple[tuple[Path, Reason], ...]  # unused files and folders, with reason and remedy
    missing_captions: tuple[Path, ...]  # usable images that should have a caption and have none, or an empty one
    notes: tuple[str, ...]  # other notes for the user, one sentence each
    refused: tuple[Candidate, ...] = field(default=(), compare=False)  # the image files among `skipped`

    def __repr__(self) -> str:
        counts = {
            "images": self.images,
            "skipped": self.skipped,
            "without a caption": self.missing_captions,
            "notes": self.notes,
        }
        shown = [f"{len(found)} {what}" for what, found in counts.items() if found or what == "images"]
        return f"FolderScan({', '.join(shown)})"

    def of_pictures(self) -> FolderScan:
        """The scan without videos, animations as their first picture. DataError if only videos are left."""
        images = tuple(replace(image, times=()) for image in self.images if not is_video(image.path))
        videos = [image.path for image in self.images if is_video(image.path)]
        if not images:
            raise DataError(f"there is no usable image: {videos[0].name} {NO_CLIPS}")
        missing = tuple(path for path in self.missing_captions if not is_video(path))
        skipped = (*self.skipped, *((path, NO_CLIPS) for path in videos))
        return replace(self, images=images, skipped=skipped, missing_captions=missing)


def scan_folder(path: str | os.PathLike[str], config: DataConfig | None = None, *, clips: bool = False) -> FolderScan:
    """Scan a single `ImageSource` path; see `scan_sources`."""
    return scan_sources([ImageSource(os.fspath(path))], config, clips=clips)


def scan_sources(
    sources: Sequence[ImageSource | PictureItems],
    config: DataConfig | None = None,
    *,
    is_class: bool = False,
    cache: Path | None = None,
    clips: bool = False,
) -> FolderScan:
    """Scan sources of images in order; every image file is read once to check it, none is kept in memory.

    An image that cannot be used, or whose caption or mask cannot, is skipped with the reason. With `is_class` the
    images show the subject's class: they have no trigger, and those without a caption have `class_prompt`. `cache` is
    the folder for the images of saved `datasets`. Without `clips`, videos are skipped and animations are their first
    picture. DataError if a source is missing or cannot be read, or there is no usable image.
    """
    config = config or DataConfig()
    rules = CaptionRules.of(config, is_class=is_class)
    scanned: list[ImageFile] = []
    unusable: Skipped = []
    skipped: Skipped = []
    refused: list[Candidate] = []
    unread: list[Candidate] = []
    missing: list[Path] = []
    notes = ScanNotes()
    collected: list[Candidate] = []
    for source in sources:
        if isinstance(source, PictureItems):
            collected += item_candidates(source, config, clips=clips)
        else:
            collected += candidates(
                source, config, cache=cache, skipped=skipped, notes=notes, unread=unread, clips=clips
            )

    if (
        not is_class
        and config.image_repeats
        and (left_out := [candidate for candidate in collected if not config.repeat_factor(candidate.name)])
    ):
        if len(left_out) == len(collected):
            raise DataError(f"image_repeats leaves out each of {len(collected):,} images; give one a factor above 0")
        notes.add(NoteKind.LEFT_OUT, left_out[0].name, len(left_out))
        collected = [candidate for candidate in collected if config.repeat_factor(candidate.name)]

    def check(candidate: Candidate) -> _Checked | Reason:
        return _checked(candidate, config, rules, is_class=is_class)

    for candidate, checked in zip(collected, in_threads(check, collected, most=_READERS), strict=True):
        if isinstance(checked, Reason):
            unusable.append((candidate.path, checked))
            refused.append(candidate)
            continue
        scanned.append(checked.image)
        if checked.is_missing:
            missing.append(candidate.path)
        if checked.is_latin_1:
            notes.add(NoteKind.LATIN_1, str(candidate.caption_file))
        if checked.differs:
            used = candidate.metadata if candidate.entry_first else candidate.caption_file
            notes.add(NoteKind.DIFFERENT, f"of {candidate.name}, {used} is used")
        _note_links(candidate, notes)
    if not scanned:
        raise DataError(_nothing_usable(sources, unusable + skipped))
    if len(sources) > 1:
        _note_repetition(collected, notes)
    return FolderScan(
        tuple(scanned) if is_class or not config.image_repeats else _repeated(scanned, config),
        tuple(unusable + skipped),
        tuple(missing),
        notes.sentences(),
        tuple(refused + unread),
    )


def _repeated(images: Sequence[ImageFile], config: DataConfig) -> tuple[ImageFile, ...]:
    """Images with their repeats times `repeat_factor`, all multiplied by the least number that makes them whole.

    Raises DataError if one would occur more than `MAX_REPEATS` times.
    """
    wanted = [image.repeats * config.repeat_factor(image.name) for image in images]
    scale = math.lcm(*(fraction.denominator for fraction in wanted))
    repeats = [int(fraction * scale) for fraction in wanted]
    if (most := max(repeats)) > MAX_REPEATS:
        raise DataError(
            f"an image must occur at most {MAX_REPEATS:,} times in an epoch, but image_repeats makes "
            f"{images[repeats.index(most)].name} occur {most:,} times; use factors such as 0.5"
        )
    return tuple(replace(image, repeats=number) for image, number in zip(images, repeats, strict=True))


def checked_again(refused: Candidate, config: DataConfig) -> ImageFile | Reason:
    """An image that a scan refused only for its file format; else the reason why it was refused."""
    checked = _checked(refused, config, CaptionRules.of(config, is_class=False), is_class=False, any_format=True)
    return checked if isinstance(checked, Reason) else checked.image


def has_videos(sources: Sequence[ImageSource], config: DataConfig, *, cache: Path | None = None) -> bool:
    """Whether sources contain videos, by file name only. Raises DataError for a source that cannot be read."""
    return any(
        is_video(candidate.path)
        for source in sources
        for candidate in candidates(source, config, cache=cache, skipped=[], notes=ScanNotes(), clips=True)
    )


@dataclass(frozen=True, slots=True)
class _Checked:
    image: ImageFile
    is_missing: bool  # it has no caption and should have one
    is_latin_1: bool  # its caption file was read as latin-1
    differs: bool  # caption file and metadata file differ


def _checked(
    candidate: Candidate, config: DataConfig, rules: CaptionRules, *, is_class: bool, any_format: bool = False
) -> _Checked | Reason:
    """An image with its captions; or why it is skipped."""
    if candidate.barred:
        return candidate.barred
    file = None
    try:
        opened = candidate.opened or open_file(
            candidate.path, clips=candidate.clips, any_format=any_format, seconds=seconds_read(config)
        )
        width, height = opened.width, opened.height
        digest = file_digest(candidate.path)
        if fault := _size_fault(width, height):
            return Reason(fault, "size")
        if candidate.mask and (fault := _mask_fault(candidate.mask, width, height)):
            return Reason(fault, "mask")
        controls = []
        for path in candidate.controls:
            control = _control(path)
            if isinstance(control, Reason):
                return control
            controls.append(control)
        if candidate.caption_file:
            file = read_caption_file(candidate.folder.file(candidate.caption_file))
    except ImageError as error:
        return Reason(error.reason, "unreadable")
    except CaptionError as error:
        return Reason(f"is left out because its caption file {error.path.name} {error.reason}", "caption")
    of_file: tuple[str, ...] = ()
    of_entry = candidate.entry
    if file and file.text:
        of_file = file.lines if config.caption_lines else (file.text,)
    if config.caption_lines:
        of_entry = tuple(line for caption in of_entry for line in caption.splitlines())
    of_entry = tuple(filter(None, map(one_line, of_entry)))
    if candidate.refused and not of_file:
        return Reason(
            f"is left out because {candidate.metadata} {candidate.refused}; repair or remove that file", "metadata"
        )
    is_file = bool(of_file) and not (candidate.entry_first and of_entry)
    own = of_file if is_file else of_entry
    captions, source = _captions(candidate, own, "file" if is_file else "metadata", config, is_class)
    image = ImageFile(
        candidate.path,
        width,
        height,
        rules.plain(captions),
        source,
        candidate.repeats,
        captions,
        candidate.weight,
        candidate.mask,
        is_class,
        digest,
        opened.times,
        tuple(controls),
    )
    return _Checked(
        image,
        is_missing=source in _MISSING[config.captions],
        is_latin_1=file is not None and file.is_latin_1,
        differs=bool(of_file) and bool(of_entry) and of_file != of_entry,
    )


_MISSING: dict[CaptionOrigin, frozenset[CaptionSource]] = {
    "files": frozenset(("trigger", "folder", "none")),
    "filename": frozenset(("trigger", "none")),
    "folder": frozenset(("trigger", "none")),
    "none": frozenset(),
}
"""Caption sources that count as missing, by setting."""


def _captions(
    candidate: Candidate, own: tuple[str, ...], origin: CaptionSource, config: DataConfig, is_class: bool
) -> tuple[tuple[str, ...], CaptionSource]:
    """The captions of an image and their origin; `own` are those in files, from `origin`."""
    folder = candidate.folder
    match config.captions:
        case "files" if own:
            return own, origin
        case "filename" if caption := caption_of_file_name(stem_of(candidate.name)):
            return (caption,), "filename"
        case "folder" if caption := name_without_repeats(_name(folder.path)):
            return (caption,), "folder"
    if is_class and config.class_prompts:
        return config.class_prompts, "class"
    if not is_class and one_line(config.trigger):
        return (), "trigger"
    return ((folder.caption,), "folder") if config.captions == "files" and folder.caption else ((), "none")


def _name(folder: str) -> str:
    """The name of a folder, also where its path ends in dots."""
    name = Path(folder).name
    return name if name not in ("", "..") else Path(folder).resolve().name


def _size_fault(width: int, height: int) -> str:
    if min(width, height) < MIN_EDGE:
        return f"is {width}×{height} px, but its shorter edge must be {MIN_EDGE} px; use a larger one"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"is {width}×{height} px, longer than {MAX_ASPECT}:1; crop it or cut it into pieces"
    return ""


def _mask_fault(mask: Path, width: int, height: int) -> str:
    """Why a mask cannot be used: it cannot be read, or its aspect is not the picture's. Empty if it can."""
    try:
        across, down = image_size(mask)
    except ImageError as error:
        return f"is left out because its mask {mask.name} {error.reason}"
    if abs(across * height - down * width) > width + height:  # more than a pixel of the mask
        return (
            f"is left out because its mask {mask.name} is {across}×{down} px and the picture {width}×{height}; make "
            "both of one aspect ratio"
        )
    return ""


def _control(path: Path) -> ImageFile | Reason:
    """A control; or why its image is left out."""
    try:
        width, height = image_size(path)
        fault = _size_fault(width, height)
        digest = file_digest(path)
    except ImageError as error:
        fault = error.reason
    if fault:
        return Reason(f"is left out because its control {path.name} {fault}", "control")
    return ImageFile(path, width, height, "", "none", digest=digest)


def _note_links(image: Candidate, notes: ScanNotes) -> None:
    """Report files read from outside the folder: links are usual, but may also come with an untrusted folder."""
    mask = image.mask.name if image.mask and str(image.mask.parent) == image.folder.path else None
    for name in filter(None, (image.name, image.caption_file, mask)):
        if real := image.folder.outside(name):
            notes.add(NoteKind.LINKS, f"{name} to {real}")


def _note_repetition(candidates_read: Sequence[Candidate], notes: ScanNotes) -> None:
    seen: set[tuple[str, str]] = set()
    real: dict[str, str] = {}
    for candidate in candidates_read:
        folder = real.setdefault(candidate.folder.path, "") or os.path.realpath(candidate.folder.path)
        real[candidate.folder.path] = folder
        if (folder, candidate.name) in seen:
            notes.add(NoteKind.TWICE, candidate.name)
        seen.add((folder, candidate.name))


def _nothing_usable(sources: Sequence[ImageSource | PictureItems], skipped: Skipped) -> str:
    if not sources:
        return "a run needs images, got no source of them; name a folder"
    place = sources[0].path if len(sources) == 1 else f"each of {len(sources)} sources"
    if not skipped and isinstance(sources[0], PictureItems):
        return f"{place} must have pictures, got none; a list or dataset may be empty, a generator read before"
    if not skipped:
        known = ", ".join(sorted(suffix[1:] for suffix in image_suffixes()))
        return f"{place} holds no images; put some in it ({known})"
    path, reason = skipped[0]
    others = f" ({len(skipped) - 1} more were skipped)" if len(skipped) > 1 else ""
    return f"{place} holds no usable image: {path.name} {reason}{others}"
