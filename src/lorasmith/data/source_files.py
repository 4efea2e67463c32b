"""The image files of a source, each with its caption file, metadata entry, mask and controls; all by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lorasmith.core.errors import DataError
from lorasmith.core.files import is_folder, is_regular
from lorasmith.data.clips import OpenedFile
from lorasmith.data.data_config import MAX_REPEATS, DataConfig, ImageSource
from lorasmith.data.folder_listing import LINK, ListedFolder, Reason, Skipped, control_folder, list_folders, stem_of
from lorasmith.data.hub_datasets import is_saved_dataset, unpacked_folder
from lorasmith.data.metadata_files import METADATA_SUFFIXES, Metadata, MetadataError, preferred_metadata, read_metadata

_ABOUT = frozenset(
    ("about", "authors", "changes", "copying", "credits", "licence", "license", "notice", "readme", "sources")
)
"""Names of text files about a folder."""


@dataclass(slots=True)
class Candidate:
    """An image file, not opened yet."""

    folder: ListedFolder
    name: str
    repeats: int  # occurrences in an epoch
    weight: float  # of its loss
    clips: bool = False  # animations are clips
    caption_file: str | None = None  # None where such files are not used
    metadata: str = ""  # name of the metadata file with its entry, or that cannot be read
    entry: tuple[str, ...] = ()  # captions in the metadata file
    refused: str = ""  # why `entry` cannot be used, a clause; empty if it can
    entry_first: bool = False  # `entry` precedes the caption file
    mask: Path | None = None
    controls: tuple[Path, ...] = ()
    lost_control: str = ""  # why its controls in the metadata file cannot be used, a clause
    opened: OpenedFile | None = None  # what its file would not say: a clip that was in memory
    barred: Reason | None = None  # why it is skipped, if one of its files is a link that is not followed

    @property
    def path(self) -> Path:
        return self.folder.file(self.name)


def candidates(
    source: ImageSource,
    config: DataConfig,
    *,
    cache: Path | None,
    skipped: Skipped,
    notes: ScanNotes,
    unread: list[Candidate] | None = None,
    clips: bool = False,
) -> Iterator[Candidate]:
    """The image files of a source in natural order, those of inner folders last.

    `cache` is the folder for images of saved `datasets`. `skipped` receives files and folders that are not used,
    `unread` pictures in formats that are not read. With `clips`, videos are included. DataError if the source cannot be
    read.
    """
    root, only = source.path, None
    if is_saved_dataset(Path(root)):
        if cache is None:
            raise DataError(f"{root} was saved by datasets and needs a folder for its images, got none; name a cache")
        root = str(unpacked_folder(Path(root), cache, follow_links=config.follow_links))
    elif Path(root).suffix.lower() in METADATA_SUFFIXES and is_regular(Path(root)):
        only = _Known(str(Path(root).parent), "", Path(root).name, _required(Path(root)))
        root = str(Path(root).parent)
    from_files = config.captions == "files"
    metadata = _MetadataFiles(only, skipped, notes)
    masks = _Masks(root, config, notes)
    controls = _Controls(root, config, notes)
    for folder in list_folders(
        root,
        recursive=config.recursive or only is not None,
        masks=config.masks == "files",
        excluding=[
            *([config.mask_folder] if config.masks == "files" and config.mask_folder else []),
            *controls.folders,
        ],
        skipped=skipped,
        follow_links=config.follow_links,
        clips=clips,
    ):
        if folder.repeats * source.repeats > MAX_REPEATS:
            reason = Reason(f"repeats its images more than {MAX_REPEATS:,} times; rename it", "folder")
            skipped.append((Path(folder.path), reason))
            continue
        if from_files:
            metadata.enter(folder)
        else:
            _note_origin(folder, only, notes)
        foreign = {path.name: reason for path, reason in folder.foreign}
        stems = {stem_of(name) for name in folder.images}
        for name in (*folder.images, *foreign):
            stem = stem_of(name)
            candidate = Candidate(folder, name, folder.repeats * source.repeats, source.weight, clips)
            is_named = metadata.give(candidate)
            if (
                metadata.controls
                and controls.are_read
                and not candidate.metadata
                and candidate.path in metadata.controls
            ):
                continue
            if not is_named:
                notes.add(NoteKind.UNNAMED, name, int(name not in foreign))
                continue
            if not from_files:  # it only selects images
                candidate.entry, candidate.refused = (), ""
            if (mask := masks.of(folder, stem)) is not None:
                place, mask_name = mask
                candidate.mask = place.file(mask_name)
                candidate.barred = _barred(place, mask_name, "mask")
            controls.give(candidate, stems)
            if from_files and (files := folder.captions.get(stem)):
                candidate.caption_file = files[0]
                candidate.barred = _barred(folder, files[0], "caption file") or candidate.barred
                notes.add(NoteKind.SECOND_FILE, files[-1], len(files) - 1)
            candidate.barred = _barred(folder, name) or candidate.barred
            if name not in foreign:
                yield candidate
                continue
            skipped.append((candidate.path, foreign[name]))
            if unread is not None:
                unread.append(candidate)
        if only is None and from_files:
            _note_orphans(folder, notes)
        _note_case(folder, notes)
        masks.leave(folder)
    metadata.finish()
    masks.finish()
    controls.finish()


class NoteKind(Enum):
    """A kind of remark: the start of its sentence in singular and plural, and the rest of it."""

    LATIN_1 = (
        "caption file is",
        "caption files are",
        "not UTF-8 and read as latin-1, such as {}; check the accents or save as UTF-8",
    )
    SECOND_FILE = (
        "caption file is",
        "caption files are",
        "not used, such as {}, as the image has another one; remove one of them",
    )
    NO_IMAGE = (
        "caption file has",
        "caption files have",
        "no image of the same name, such as {}; rename or remove what is not needed",
    )
    ORIGIN = ("file with captions is", "files with captions are", "not used, such as {}; they are with captions files")
    DIFFERENT = ("image has", "images have", "different captions in a caption file and in a metadata file; {}")
    NO_ENTRY = ("entry of metadata files has", "entries of metadata files have", "no image here, such as {}")
    OUTSIDE = (
        "entry of metadata files is",
        "entries of metadata files are",
        "not used, such as {}, as they name files outside of the folder",
    )
    UNNAMED = ("image is", "images are", "not used, such as {}, as the metadata file does not name them")
    MASKS_OFF = ("mask is", "masks are", "not used, such as {}; they are with masks files")
    MASK = ("mask is", "masks are", "not used, such as {}, as there is no image of the name, or another mask")
    CONTROL = ("control is", "controls are", "not used, such as {}, as there is no image of the name")
    LEFT_OUT = ("image is", "images are", "left out by image_repeats, such as {}")
    TWICE = ("image is", "images are", "in several sources, such as {}, and counted for each")
    CASE = (
        "image has",
        "images have",
        "the name of another one but for case, such as {}; rename them, as Windows and macOS take them for one",
    )
    LINKS = ("file is a link", "files are links", "to outside of the folder, such as {}")


class ScanNotes:
    """Notes of a scan, counted by kind."""

    def __init__(self) -> None:
        self._found: dict[NoteKind, tuple[int, str]] = {}

    def add(self, kind: NoteKind, example: str, count: int = 1) -> None:
        """Count notes of a kind, of which the first example is kept."""
        if count:
            before, first = self._found.get(kind, (0, example))
            self._found[kind] = (before + count, first)

    def sentences(self) -> tuple[str, ...]:
        return tuple(_sentence(kind, *self._found[kind]) for kind in NoteKind if kind in self._found)


@dataclass(slots=True)
class _Known:
    folder: str
    inside: str  # folder relative to the source
    name: str
    content: Metadata | MetadataError  # or why it cannot be read
    used: set[str] = field(default_factory=set)  # keys of entries with an image


def _controls_in(known: _Known) -> set[Path]:
    named = () if isinstance(known.content, MetadataError) else known.content.controls.values()
    return {Path(known.folder, name) for names in named for name in names}


class _MetadataFiles:
    """The metadata files of a source, of which the nearest above an image is used."""

    def __init__(self, only: _Known | None, skipped: Skipped, notes: ScanNotes) -> None:
        self._only, self._skipped, self._notes = only, skipped, notes
        self._known = {"": only} if only else {}
        self._above: list[_Known] = [only] if only else []
        self.controls = _controls_in(only) if only else set[Path]()  # in the files that were read

    def enter(self, folder: ListedFolder) -> None:
        """Read a folder's file, unless one file covers the whole source."""
        if self._only:
            return
        if folder.metadata:
            name = preferred_metadata(folder.metadata)
            for other in folder.metadata:
                if other != name:
                    reason = Reason(f"is not read besides {name}; keep one of them", "metadata")
                    self._skipped.append((folder.file(other), reason))
            path = folder.file(name)
            if real := folder.outside(name):
                self._notes.add(NoteKind.LINKS, f"{name} to {real}")
            try:
                if folder.refuses(name):
                    raise MetadataError(LINK)
                content: Metadata | MetadataError = read_metadata(path)
            except MetadataError as error:
                content = error
                self._skipped.append((path, Reason(f"{error}; repair or remove it", "metadata")))
            known = self._known[folder.inside] = _Known(folder.path, folder.inside, name, content)
            self.controls |= _controls_in(known)
        inside, self._above = folder.inside, []
        while self._known:
            if inside in self._known:
                self._above.append(self._known[inside])
            if not inside:
                break
            inside = inside.rpartition("/")[0]

    def give(self, image: Candidate) -> bool:
        """Add an image's metadata; False if a source that is a metadata file does not name it."""
        for known in self._above:
            content = known.content
            if isinstance(content, MetadataError):
                if content.damaged and not image.metadata:
                    image.metadata, image.refused = known.name, str(content)
                continue
            key = image.folder.key(image.name).removeprefix(f"{known.inside}/" if known.inside else "")
            entry = content.entry(key)
            if entry is None:
                continue
            known.used.add(entry)
            if not image.metadata:
                image.metadata, image.entry = known.name, content.captions.get(entry, ())
                image.controls = tuple(Path(known.folder, name) for name in content.controls.get(entry, ()))
                image.lost_control = content.lost_controls.get(entry, "")
                image.refused = content.refused.get(entry, "")
                image.entry_first = self._only is not None
        return self._only is None or bool(image.metadata)

    def finish(self) -> None:
        for known in self._known.values():
            if isinstance(known.content, Metadata):
                missing = [*(known.content.captions.keys() | known.content.refused.keys()) - known.used]
                self._notes.add(NoteKind.NO_ENTRY, min(missing, default=""), len(missing))
                outside = known.content.outside
                self._notes.add(NoteKind.OUTSIDE, min(outside, default=""), len(outside))


class _Masks:
    """Masks beside the images, or in a folder of their own."""

    def __init__(self, root: str, config: DataConfig, notes: ScanNotes) -> None:
        self._on, self._notes = config.masks == "files", notes
        self._elsewhere: dict[str, tuple[ListedFolder, str]] = {}
        self._used: set[Path] = set()
        folder = config.mask_folder if self._on else None
        if folder is not None:
            if not is_folder(Path(folder)):
                raise DataError(f"mask_folder must be a folder, got {folder}; check the path")
            if Path(folder).resolve() == Path(root).resolve():
                raise DataError(
                    f"mask_folder must be another folder than that of the images, got {folder}; leave it out"
                )
            for listed in list_folders(folder, recursive=True, masks=True, follow_links=config.follow_links):
                named = [(stem_of(name), name) for name in listed.images]
                named += [(stem, name) for stem, names in listed.masks.items() for name in names]
                for stem, name in named:
                    self._elsewhere.setdefault(listed.key(stem), (listed, name))

    def of(self, folder: ListedFolder, stem: str) -> tuple[ListedFolder, str] | None:
        """Folder and name of an image's mask."""
        if not self._on:
            return None
        beside = folder.masks.get(stem)
        listed_mask = (
            (folder, beside[0]) if beside else self._elsewhere.get(folder.key(stem)) or self._elsewhere.get(stem)
        )
        if listed_mask is not None:
            self._used.add(listed_mask[0].file(listed_mask[1]))
        return listed_mask

    def leave(self, folder: ListedFolder) -> None:
        kind = NoteKind.MASK if self._on else NoteKind.MASKS_OFF
        for names in folder.masks.values():
            for name in names:
                if folder.file(name) not in self._used:
                    self._notes.add(kind, name)

    def finish(self) -> None:
        for listed, name in self._elsewhere.values():
            if listed.file(name) not in self._used:
                self._notes.add(NoteKind.MASK, name)


class _Controls:
    """Controls by the names of their images, in folders of their own or in those that a source has for them."""

    def __init__(self, root: str, config: DataConfig, notes: ScanNotes) -> None:
        self.are_read, self._notes, self._follow_links = config.controls != "none", notes, config.follow_links
        self.folders: list[str] = []
        if self.are_read:
            own = [Path(root, control_folder(place)) for place in range(_MOST_CONTROLS)]
            self.folders = [*config.control] or [str(folder) for folder in own if is_folder(folder)]
        self._files: list[dict[str, list[tuple[int, ListedFolder, str]]]] = []
        self._used: set[Path] = set()
        for path in self.folders:
            if not is_folder(Path(path)):
                raise DataError(f"control must be a folder, got {path}; check the path")
            if Path(path).resolve() == Path(root).resolve():
                raise DataError(f"control must be another folder than that of the images, got {path}; move them apart")
            files: dict[str, list[tuple[int, ListedFolder, str]]] = {}
            for listed in list_folders(path, recursive=True, follow_links=config.follow_links):
                for name in listed.images:
                    stem = stem_of(name)
                    files.setdefault(listed.key(stem), []).append((-1, listed, name))
                    if numbered := _NUMBERED.fullmatch(stem):
                        files.setdefault(listed.key(numbered[1]), []).append((int(numbered[2]), listed, name))
            self._files.append(files)

    def give(self, image: Candidate, stems: Collection[str]) -> None:
        """Add an image's controls: those in folders, else those that a metadata file names. `stems` of its folder."""
        if not self.are_read:
            image.controls = ()
            return
        stem = stem_of(image.name)
        paths = []
        for files in self._files:
            there = files.get(image.folder.key(stem)) or files.get(stem) or ()
            # dog_1 is of the image dog_1, if there is one, and a further one of dog if not
            own = [control for control in there if control[0] < 0 or stem_of(control[2]) not in stems]
            for _, listed, name in sorted(own, key=lambda control: control[0]):
                paths.append(listed.file(name))
                self._used.add(listed.file(name))
                image.barred = image.barred or _barred(listed, name, "control")
        image.controls = tuple(paths) or image.controls
        if not paths and image.lost_control:
            image.barred = Reason(f"is left out because {image.lost_control}", "control")
        if not paths and not self._follow_links:
            for path in image.controls:
                if not path.resolve().is_relative_to(image.folder.source):
                    image.barred = Reason(f"is left out because its control {path.name} {LINK}; copy that file", "link")

    def finish(self) -> None:
        for files in self._files:
            there = {listed.file(name) for file in files.values() for _, listed, name in file}
            for path in sorted(there - self._used):
                self._notes.add(NoteKind.CONTROL, path.name)


_MOST_CONTROLS = 10  # folders of them in a source
_NUMBERED = re.compile(r"(.+)_([0-9]{1,9})", re.DOTALL)


def _barred(folder: ListedFolder, name: str, kind: str = "") -> Reason | None:
    """Why an image is skipped if a file of it is a link that is not followed."""
    if not folder.refuses(name):
        return None
    clause = f"is left out because its {kind} {name} {LINK}; copy that file here" if kind else f"{LINK}; copy it here"
    return Reason(clause, "link")


def _required(path: Path) -> Metadata:
    try:
        return read_metadata(path)
    except MetadataError as error:
        raise DataError(f"metadata file {path} {error}; repair it, or use another one") from error


def _note_origin(folder: ListedFolder, only: _Known | None, notes: ScanNotes) -> None:
    """Report files with captions that are not used."""
    stems = {stem_of(name) for name in folder.images}
    unused = [name for stem, names in folder.captions.items() if stem in stems for name in names]
    unused += [] if only else folder.metadata
    notes.add(NoteKind.ORIGIN, unused[0] if unused else "", len(unused))


def _note_case(folder: ListedFolder, notes: ScanNotes) -> None:
    """Report images whose names, or caption files, differ in case only."""
    first: dict[str, str] = {}
    for name in folder.images:
        other = first.setdefault(stem_of(name).casefold(), name)
        if stem_of(other) != stem_of(name) or (other != name and other.casefold() == name.casefold()):
            notes.add(NoteKind.CASE, f"{other} and {name}")


def _note_orphans(folder: ListedFolder, notes: ScanNotes) -> None:
    """Report caption files without an image, unless a picture in another format was reported already."""
    stems = {stem_of(name) for name in folder.images}
    stems.update(path.stem for path, _ in folder.foreign)
    for stem, names in folder.captions.items():
        if stem not in stems and stem.lower() not in _ABOUT:
            notes.add(NoteKind.NO_IMAGE, names[0], len(names))


def _sentence(kind: NoteKind, count: int, example: str) -> str:
    singular, several, rest = kind.value
    return f"{count:,} {singular if count == 1 else several} {rest.replace('{}', example)}"
