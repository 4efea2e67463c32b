"""The JSON of data sets: msgspec validates and describes it. Numbers are finite, or null if unknown.

The server imports this module, so it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

Severity = Literal["problem", "warning", "remark"]


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A folder of images below input/."""

    name: Annotated[str, "of the folder"]
    images: Annotated[int, "number of its pictures"]
    captions: Annotated[int, "number of those with a caption"]
    modified: Annotated[float, "time of the last change, in seconds since the epoch"]
    cover: Annotated[str | None, "a picture of it; null if there is none"]
    covers: Annotated[tuple[str, ...], "up to four of its pictures, evenly spaced"] = ()
    builtin: Annotated[bool, "whether it belongs to the package, so that it cannot be changed"] = False


@dataclass(frozen=True, kw_only=True)
class DatasetList:
    """All folders of images."""

    datasets: tuple[DatasetRow, ...]


@dataclass(frozen=True, kw_only=True)
class FormatsAnswer:
    """Which files can be added to datasets, by their suffixes: in lower case, with their dot."""

    pictures: Annotated[tuple[str, ...], "of pictures, which are checked by their content when they are added"]
    captions: Annotated[tuple[str, ...], "of texts, each beside a picture of the same name"]
    refused: Annotated[dict[str, str], "why files with other known suffixes are not added"]


@dataclass(frozen=True, kw_only=True)
class NameBody:
    """A name to give; it is made one that every system has files for."""

    name: str


@dataclass(frozen=True, kw_only=True)
class SkippedFile:
    """A file that is not used, and why."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ControlRow:
    """A picture that an edit model gets beside a caption: the picture before the edit."""

    file: Annotated[str, "its name in the folder control of the dataset; its path if it is elsewhere"]
    width: Annotated[int | None, "in pixels, upright; null if it cannot be read"]
    height: Annotated[int | None, "in pixels, upright; null if it cannot be read"]
    fixed: Annotated[bool, "whether it is elsewhere, so that it can be neither shown nor changed here"] = False
    problem: Annotated[str, "why it cannot be read; empty if it can"] = ""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A part of an upright picture, as shares of its width and height."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """A picture of a dataset."""

    file: Annotated[str, "its name"]
    width: Annotated[int | None, "in pixels, upright; null if it cannot be read"]
    height: Annotated[int | None, "in pixels, upright; null if it cannot be read"]
    bytes: Annotated[int, "size of the file"]
    caption: Annotated[str, "its text; empty if it has none"]
    has_caption: Annotated[bool, "whether it has a text of its own"]
    problem: Annotated[str, "why picture or caption cannot be read; empty if they can"] = ""
    controls: Annotated[tuple[ControlRow, ...], "pictures before the edit, for edit models"] = ()
    crop: Annotated[Crop | None, "the part of its original that it is, if it was cropped; null if it was not"] = None
    mask: Annotated[str, "name of the mask beside it; empty without one"] = ""


@dataclass(frozen=True, kw_only=True)
class CroppedAnswer:
    """A picture that was cropped."""

    file: Annotated[str, "its name, whose suffix may be another one now"]


@dataclass(frozen=True, kw_only=True)
class DatasetAnswer:
    """A folder of images."""

    name: Annotated[str, "of the folder"]
    folder: Annotated[str, "its path"]
    images: Annotated[tuple[PictureRow, ...], "those directly in it"]
    builtin: Annotated[bool, "whether it belongs to the package, so that it cannot be changed"] = False
    notes: Annotated[tuple[str, ...], "what else is to be said, such as of folders in it"] = ()
    skipped: Annotated[tuple[SkippedFile, ...], "files that training would not use"] = ()
    controls: Annotated[tuple[ControlRow, ...], "those in the folder control that belong to no picture"] = ()


@dataclass(frozen=True, kw_only=True)
class PairBody:
    """Which picture a control belongs to; the controls of both change places if that one has one."""

    control: Annotated[str, "its name in the folder control"]
    image: Annotated[str, "name of the picture"] = ""
    former: Annotated[str, "in place of a picture: the name that the control had before, which it gets back"] = ""


@dataclass(frozen=True, kw_only=True)
class FilesBody:
    """Pictures of a dataset."""

    files: Annotated[tuple[str, ...], "their names"]


@dataclass(frozen=True, kw_only=True)
class UploadAnswer:
    """What became of uploaded files."""

    added: Annotated[tuple[str, ...], "names of the new files, pictures and captions"]
    skipped: Annotated[tuple[SkippedFile, ...], "files that were not kept"] = ()
    renamed: Annotated[dict[str, str], "names of new files by those that they were sent under, where they differ"] = (
        field(default_factory=dict)
    )
    replaced: Annotated[dict[str, str], "where files were moved to that new ones replaced, by the names of these"] = (
        field(default_factory=dict)
    )


@dataclass(frozen=True, kw_only=True)
class RemovedAnswer:
    """Where something was moved to, relative to the base folder."""

    removed: str


@dataclass(frozen=True, kw_only=True)
class RestoreBody:
    """What is moved back."""

    removed: Annotated[str, "where it was moved to, as the answer to its removal says"]
    control: Annotated[bool, "whether it was in the folder control"] = False


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Number of files that were changed."""

    changed: int


@dataclass(frozen=True, kw_only=True)
class CaptionEdit:
    """A caption to store."""

    caption: Annotated[str, "the text; an empty string deletes the caption"]
    seen: Annotated[
        str | None,
        "the caption that it replaces, as it was shown: 409 if there is another one now. Null to replace any.",
    ] = None


CaptionBody = dict[str, str | CaptionEdit]
"""Captions by name of the picture."""


@dataclass(frozen=True, kw_only=True)
class FindingFacts:
    """Something to look at before training."""

    kind: Annotated[str, "what it is"]
    message: Annotated[str, "a sentence with its remedy"]
    files: Annotated[tuple[str, ...], "the pictures concerned"]
    severity: Annotated[
        Severity, "problem: it costs pictures or spoils the LoRA; warning: better mended; remark: worth knowing"
    ]
    title: Annotated[str, "what it is, for people"] = ""
    removes: Annotated[tuple[str, ...], "pictures that mend it when they are removed, such as copies"] = ()


@dataclass(frozen=True, kw_only=True)
class CheckedPicture:
    """A picture that was checked."""

    problems: Annotated[tuple[str, ...], "about it, in a word or a sentence each"]
    crop: Annotated[Crop, "the part that is trained, of what the picture is now"]
    trained: Annotated[tuple[int, int], "width and height at which it is trained"]
    tokens: Annotated[int | None, "of its caption; null if they were not counted"] = None


@dataclass(frozen=True, kw_only=True)
class DataCheckAnswer:
    """A checked folder of images."""

    findings: Annotated[tuple[FindingFacts, ...], "the gravest first"]
    images: Annotated[dict[str, CheckedPicture], "by name of the file"]
    skipped: Annotated[tuple[SkippedFile, ...], "files that training would not use"]
    notes: Annotated[tuple[str, ...], "other remarks"] = ()
    resolutions: Annotated[tuple[int, ...], "sides in pixels of the squares whose area pictures are scaled to"] = ()
    assumed: Annotated[bool, "whether the resolution is a guess, as no model was named"] = False
    held_out: Annotated[tuple[str, ...], "pictures that are held out for validation"] = ()
    samples_per_epoch: Annotated[int, "number of samples in an epoch"] = 0


@dataclass(frozen=True, kw_only=True)
class CaptioningBody:
    """Which photos a captioner describes."""

    captioner: Annotated[str, "its name"]
    files: Annotated[tuple[str, ...], "names of the pictures; all of the dataset if it is empty"] = ()
    overwrite: Annotated[bool, "whether captions that are there are replaced; they can be brought back"] = False
    trigger: Annotated[str, "phrase that is put in front of captions that lack it"] = ""
