"""The JSON of models and downloads: msgspec validates and describes it. Numbers are finite, or null if unknown.

The server imports this module, so it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True, kw_only=True)
class MissingPart:
    """A part that a model lacks, and the common name of the file to get."""

    part: str
    usual_file: str
    on_hub: Annotated[bool, "whether the server can download it"] = False


@dataclass(frozen=True, kw_only=True)
class _ForThisMachine:
    """What rows of models say of a LoRA on this machine."""

    seconds: Annotated[
        float | None, "of a LoRA of 20 photos by the usual preset on this machine, about; null if unknown"
    ] = None
    seconds_per_picture: Annotated[float | None, "of a step on one picture, about"] = None
    best: Annotated[bool, "whether it is the one for this machine"] = False
    clips: Annotated[bool, "whether it makes clips"] = False


@dataclass(frozen=True, kw_only=True)
class ModelRow(_ForThisMachine):
    """A model that can be trained on."""

    name: Annotated[str, "by which a run names it"]
    title: Annotated[str, "for people"]
    family: Annotated[str, "its architecture"]
    place: Annotated[str, "its folder"]
    size_bytes: Annotated[int, "of the file"]
    precision: Annotated[str, "number format of most of its weights"]
    builtin: Annotated[bool, "whether it belongs to the package: a small one, to try things out"]
    ready: Annotated[bool, "whether all its parts are there"]
    missing: Annotated[tuple[MissingPart, ...], "those that are not"]
    edits: Annotated[tuple[str, ...], "edit variants that it may be, as they have its tensors"] = ()
    edit: Annotated[str, "the one of them that it is; empty for none"] = ""
    recognised_by: Annotated[str, "what says so: its name or its tensors"] = "name"
    takes_controls: Annotated[bool, "whether it gets pictures beside a caption, as that variant"] = False


@dataclass(frozen=True, kw_only=True)
class OtherFile:
    """A file in the model folders that is not a model: what it is, or why it is not recognised."""

    name: str
    place: str
    what: str
    size_bytes: int
    recognised: Annotated[bool, "whether it is a part of models that are not here"] = True


@dataclass(frozen=True, kw_only=True)
class ModelListAnswer:
    """The models in the model folders, and what else is there."""

    models: tuple[ModelRow, ...]
    other: tuple[OtherFile, ...]
    notes: Annotated[tuple[str, ...], "what is not installed, with the command that installs it"]


@dataclass(frozen=True, kw_only=True)
class ShelfFileRow:
    """A file of a released model."""

    part: Annotated[str, "denoiser, or the part that it is"]
    file: str
    size_bytes: Annotated[int, "about; exactly the hub says"]
    kept_bytes: Annotated[int, "that an earlier download left"]
    found: Annotated[bool, "whether this file, or one that does the same, is in the model folders"]


@dataclass(frozen=True, kw_only=True)
class ShelfRow(_ForThisMachine):
    """A released model to begin with."""

    name: Annotated[str, "by which it is downloaded"]
    title: Annotated[str, "for people"]
    family: Annotated[str, "its architecture"]
    about: Annotated[str, "what it is good for"]
    licence: str
    card: Annotated[str, "address of the page with the licence"]
    gated: Annotated[bool, "whether the licence is to be accepted there first"]
    files: tuple[ShelfFileRow, ...]
    edits: Annotated[bool, "whether it edits pictures"] = False
    least_memory_bytes: Annotated[int | None, "of a card that trains it, with the cheapest settings"] = None
    fits: Annotated[bool | None, "whether this device has that; null if unknown"] = None


@dataclass(frozen=True, kw_only=True)
class ShelfAnswer:
    """Released models to begin with."""

    models: Annotated[tuple[ShelfRow, ...], "the smallest first"]


@dataclass(frozen=True, kw_only=True)
class ReleaseMemory:
    """The memory of training a released model at the defaults."""

    memory_bytes: int
    fits: Annotated[bool | None, "on this device; null if its memory is not known"]
    encoders_fit: Annotated[
        bool | None, "whether its text encoders do at once, before training; if not, captions take seconds each"
    ]


@dataclass(frozen=True, kw_only=True)
class DownloadBody:
    """What to download: a released model, what a model in the folders lacks, or a captioner."""

    kind: Literal["release", "model", "captioner"]
    name: Annotated[str, "on the shelf, in the list of models, or in that of captioners"]


@dataclass(frozen=True, kw_only=True)
class CaptionerRow:
    """Something that writes captions: in the model folders, of another package, or to be downloaded."""

    name: Annotated[str, "by which jobs name it"]
    title: Annotated[str, "for people"]
    found: Annotated[bool, "whether it is here; otherwise it can be downloaded"]
    about: Annotated[str, "what it says of a picture"] = ""
    licence: str = ""
    card: Annotated[str, "address of its page"] = ""
    size_bytes: Annotated[int, "about; exactly the hub says"] = 0
    kept_bytes: Annotated[int, "that an earlier download left"] = 0


@dataclass(frozen=True, kw_only=True)
class CaptionerList:
    """Captioners, those that are here first."""

    captioners: tuple[CaptionerRow, ...]
    notes: Annotated[tuple[str, ...], "what is not installed, with the command that installs it"] = ()


@dataclass(frozen=True, kw_only=True)
class FileToGet:
    """A file on the hub."""

    file: str
    repository: Annotated[str, "owner/name"]
    folder: Annotated[str, "where it goes"]
    size_bytes: int
    kept_bytes: Annotated[int, "that an earlier download left"]


@dataclass(frozen=True, kw_only=True)
class DownloadCheck:
    """What the hub says of a download."""

    title: str
    files: tuple[FileToGet, ...]
    free_bytes: Annotated[int, "on the disk of the model folder"]


@dataclass(frozen=True, kw_only=True)
class DownloadAnswer:
    """A download since the server started."""

    id: str
    subject: Annotated[str, "kind and name of what is downloaded, with a colon between them"]
    title: str
    state: Annotated[str, "waiting, running, completed, cancelled or failed"]
    file: Annotated[str, "that is downloaded now"]
    done_bytes: int
    total_bytes: Annotated[int, "0 before the hub has answered"]
    bytes_per_s: Annotated[float, "of the last seconds"]
    is_checking: Annotated[bool, "whether the digest of the file is computed"]
    error: Annotated[str, "why it failed"] = ""
    accept: Annotated[str, "address where a licence is to be accepted first"] = ""


@dataclass(frozen=True, kw_only=True)
class DownloadList:
    """All downloads since the server started, the last first."""

    downloads: tuple[DownloadAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class HubTokenBody:
    """An access token of the hub."""

    token: str


@dataclass(frozen=True, kw_only=True)
class StoredToken:
    """A token is stored."""

    stored: bool


@dataclass(frozen=True, kw_only=True)
class AddedModel:
    """A model file that was sent."""

    file: str
    place: Annotated[str, "its folder"]
    model: Annotated[str, "its name in the list of models; empty for a part"]


@dataclass(frozen=True, kw_only=True)
class RemovedDownload:
    """A download that was removed from the list."""

    id: str
