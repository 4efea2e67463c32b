"""Request and response types of the HTTP API, declared once: msgspec validates and describes them.

The server imports this module, so it imports no torch. Numbers are finite; what is unknown is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lorasmith.evaluation.evaluation_record import Evaluation, Grid
from lorasmith.runs.presets import Preset

Severity = Literal["problem", "warning", "remark"]
SettingType = Literal["integer", "number", "text", "boolean"]
RunPhase = Literal["running", "finished", "stopped", "cancelled", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class ErrorFacts:
    """What went wrong."""

    kind: Annotated[str, "name of the kind of error, such as OptionError"]
    message: Annotated[str, "a sentence with rule, value and remedy"]
    details: Annotated[Any, "more about it, such as a list of findings; null if there is no more"] = None


@dataclass(frozen=True, kw_only=True)
class ErrorAnswer:
    """The answer to a request that was not carried out."""

    error: ErrorFacts


@dataclass(frozen=True, kw_only=True)
class QueueCounts:
    """Jobs that wait and that run."""

    pending: int
    running: int


@dataclass(frozen=True, kw_only=True)
class TrainingDevice:
    """A device that trains."""

    name: Annotated[str, "such as cuda:0 or cpu"]
    title: Annotated[str, "name by its maker"] = ""
    memory_bytes: Annotated[int | None, "size of its memory; null if unknown"] = None
    free_bytes: Annotated[int | None, "free memory; null if unknown"] = None


@dataclass(frozen=True, kw_only=True)
class StatusAnswer:
    """The state of the server."""

    version: Annotated[str, "of Lorasmith"]
    ready: Annotated[bool, "whether the assistant answers; until then, what needs it is answered with 503"]
    base_dir: Annotated[str, "the base folder"]
    devices: Annotated[tuple[TrainingDevice, ...], "that train"]
    queue: Annotated[QueueCounts, "number of jobs"]
    disk_free_bytes: Annotated[int, "of the base folder's disk"]


@dataclass(frozen=True, kw_only=True)
class SettingAnswer:
    """A setting of data or training."""

    name: Annotated[str, "as on the command line, with underscores"]
    label: Annotated[str, "in words"]
    type: Annotated[SettingType, "of the value"]
    default: Annotated[bool | int | float | str | None, "null if the run decides it"]
    help: Annotated[str, "its meaning"]
    min: Annotated[float | None, "smallest number; null for no limit"] = None
    max: Annotated[float | None, "largest number; null for no limit"] = None
    step: Annotated[float | None, "granularity of a number; null for none"] = None
    choices: Annotated[tuple[str, ...], "allowed values of a text; empty if any text is allowed"] = ()
    main: Annotated[bool, "whether it is shown before the others"] = False


@dataclass(frozen=True, kw_only=True)
class SettingGroup:
    """Settings under one heading."""

    title: str
    settings: tuple[SettingAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class SettingsAnswer:
    """Every setting that a page offers, and the choices for who asks for none."""

    groups: tuple[SettingGroup, ...]
    presets: tuple[Preset, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A folder of images below input/."""

    name: Annotated[str, "of the folder"]
    images: Annotated[int, "number of its pictures"]
    captions: Annotated[int, "number of those with a caption"]
    modified: Annotated[float, "time of the last change, in seconds since the epoch"]
    cover: Annotated[str | None, "a picture of it; null if there is none"]
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
class Draft:
    """What is chosen for a training on a dataset that is not queued yet. All pages share it."""

    name: Annotated[str, "of the LoRA"] = ""
    trigger: Annotated[str, "phrase for the subject or style"] = ""
    model: Annotated[str | None, "its name in the list of models"] = None
    edit: Annotated[str | None, "edit variant that the model is, or none; null if its name says so"] = None
    is_chosen: Annotated[bool, "whether somebody chose the model, so that no other is suggested"] = False
    pairs: Annotated[bool | None, "whether it trains on pairs; null if the pictures say so"] = None
    preset: Annotated[str, "name of a preset"] = "balanced"
    settings: Annotated[dict[str, Any], "those that differ from the preset's, by name"] = field(default_factory=dict)
    measurement: Annotated[str | None, "id of the job that measures a step for it"] = None


@dataclass(frozen=True, kw_only=True)
class DraftBody:
    """A draft to store."""

    draft: Draft
    seen: Annotated[
        Draft | None,
        "the draft that it was made from. What others changed since then stays, and 409 where both changed the same. "
        "Null to replace all.",
    ] = None


@dataclass(frozen=True, kw_only=True)
class DraftAnswer:
    """The draft of a dataset."""

    draft: Draft
    version: Annotated[int, "how often it was stored; 0 for one that nobody has stored"]


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
class MissingPart:
    """A part that a model lacks, and the common name of the file to get."""

    part: str
    usual_file: str
    on_hub: Annotated[bool, "whether the server can download it"] = False


@dataclass(frozen=True, kw_only=True)
class ModelRow:
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
class ShelfRow:
    """A released model to begin with."""

    name: Annotated[str, "by which it is downloaded"]
    title: Annotated[str, "for people"]
    family: Annotated[str, "its architecture"]
    about: Annotated[str, "what it is good for"]
    licence: str
    card: Annotated[str, "address of the page with the licence"]
    gated: Annotated[bool, "whether the licence is to be accepted there first"]
    files: tuple[ShelfFileRow, ...]


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
class CaptioningBody:
    """Which photos a captioner describes."""

    captioner: Annotated[str, "its name"]
    files: Annotated[tuple[str, ...], "names of the pictures; all of the dataset if it is empty"] = ()
    overwrite: Annotated[bool, "whether captions that are there are replaced; they can be brought back"] = False
    trigger: Annotated[str, "phrase that is put in front of captions that lack it"] = ""


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


@dataclass(frozen=True, kw_only=True)
class MeasurementBody:
    """What to measure: some steps on a model, on made-up pictures."""

    model: Annotated[str, "its name in the list of models"]
    settings: Annotated[dict[str, Any], "of data and training, by name"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlanBody(MeasurementBody):
    """The run to plan."""

    dataset: Annotated[str | None, "name of a dataset"] = None
    folder: Annotated[str | None, "path of a folder of images, in place of a dataset"] = None
    trigger: Annotated[str, "phrase for the subject or style"] = ""
    edit: Annotated[str | None, "edit variant that the model is, or none; null if its name says so"] = None


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """The plan of a run."""

    steps: Annotated[int, "updates"]
    epochs: Annotated[float, "how often each picture is seen"]
    rank: Annotated[int, "of the LoRA"]
    resolution: Annotated[int, "side in pixels of the square whose area pictures are scaled to"]
    images: Annotated[int, "number of pictures"]
    held_out: Annotated[int, "number of those that are held out for validation"]
    parameters: Annotated[int, "number of trained parameters"]
    memory_bytes: Annotated[int | None, "needed at the peak of a step, with `memory_settings`"]
    fits: Annotated[bool | None, "whether the device has it; null if its memory is unknown"]
    memory_settings: Annotated[
        dict[str, Any], "that should be added to the run so that it fits; they are the cheapest ones"
    ] = field(default_factory=dict)
    seconds_per_step: Annotated[float | None, "measured on this device; null if it was not"] = None
    seconds: Annotated[float | None, "of all steps"] = None
    measured_at: Annotated[float | None, "when that was measured, in seconds since the epoch; null if it was not"] = (
        None
    )
    notes: Annotated[tuple[str, ...], "remarks, one sentence each"] = ()
    distilled: Annotated[str, "what training a model distilled to few steps needs; empty for others"] = ""
    usual_adapter: Annotated[str, "the LoRA made for that among those here; empty for none"] = ""


@dataclass(frozen=True, kw_only=True)
class JobBody(PlanBody):
    """The job to add to the queue."""

    kind: Annotated[Literal["train"], "train"] = "train"
    name: Annotated[str, "of the LoRA; that of the dataset if it is empty"] = ""
    front: Annotated[bool, "whether it goes before all others"] = False


@dataclass(frozen=True, kw_only=True)
class JobAnswer:
    """A job."""

    id: Annotated[str, "of the job"]
    kind: Annotated[str, "graph, train, measure or draw"]
    state: Annotated[str, "pending, running, completed, failed, cancelled, paused or interrupted"]
    number: Annotated[float, "order in the queue"]
    title: Annotated[str, "what it is, in some words"]
    name: Annotated[str | None, "of the LoRA that it trains; null for other jobs"]
    model: Annotated[str | None, "that it is about; null for graphs"]
    dataset: Annotated[str | None, "that it trains on; null for other folders and jobs"]
    created: Annotated[float, "when it was queued, in seconds since the epoch"]
    started: Annotated[float | None, "when it was last started; null before that"]
    ended: Annotated[float | None, "when it ended; null before that"]
    outputs: Annotated[
        dict[str, Any], "of a graph's nodes, by their ids; of a drawing its `pictures`, without and with the LoRA"
    ]
    error: Annotated[dict[str, Any] | None, "why it failed"]
    run: Annotated[str | None, "id of the run that it trains or has trained"]
    attempts: Annotated[int, "how often it was started"]
    about: Annotated[str | None, "id of the run whose LoRAs it draws with or evaluates; null for other jobs"] = None
    wish: Annotated[str | None, "what the grid that it draws is asked for; null for other jobs"] = None
    request: Annotated[dict[str, Any], "what it does"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobList:
    """Some jobs: those that run and wait in order, then those that ended, the last first; and the number of all."""

    jobs: tuple[JobAnswer, ...]
    total: int


@dataclass(frozen=True, kw_only=True)
class RemovedJob:
    """The id of a job that is no longer there."""

    id: str


@dataclass(frozen=True, kw_only=True)
class CancelBody:
    """Whether the job only pauses, to be continued later."""

    pause: bool = False


@dataclass(frozen=True, kw_only=True)
class MoveBody:
    """Where a waiting job goes: before all others, or behind them."""

    front: bool = True


@dataclass(frozen=True, kw_only=True)
class RunMarks:
    """What somebody keeps of a run, in marks.json of its folder."""

    title: Annotated[str, "what it is called; empty for the name of its folder"] = ""
    starred: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class MarksBody:
    """What to change of a run's marks; null leaves each as it is."""

    title: Annotated[str | None, "of at most 100 characters; empty for the name of its folder"] = None
    starred: bool | None = None
    note: Annotated[str | None, "of at most 4,000 characters"] = None


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run."""

    id: Annotated[str, "its folder, relative to the base folder"]
    name: Annotated[str, "of its LoRA"]
    state: Annotated[
        RunPhase, "how it ended; running if a process trains it, interrupted if it ended without saying so"
    ]
    started: Annotated[float | None, "in seconds since the epoch; null before the first step"]
    seconds: Annotated[float, "of training"]
    step: Annotated[int, "updates taken"]
    steps: Annotated[int | None, "updates planned; null if unknown"]
    model: Annotated[str, "name of the base model"]
    family: Annotated[str, "name of its family"]
    loss: Annotated[float | None, "training loss, as in the report"]
    loss_label: Annotated[str, "what this number is"]
    held_out: Annotated[float | None, "lowest loss on held-out images; null without them"]
    cover: Annotated[str | None, "picture of it, a path among its files"]
    job: Annotated[str | None, "id of the job that trains it"] = None
    label: Annotated[str, "what it is called: the title that somebody gave it, or its folder's name"] = ""
    starred: Annotated[bool, "whether somebody starred it"] = False
    note: Annotated[str, "what somebody wrote about it"] = ""


@dataclass(frozen=True, kw_only=True)
class RunList:
    """All runs below the base folder, the newest first, and the folders that look like runs and cannot be read."""

    runs: tuple[RunRow, ...]
    damaged: tuple[SkippedFile, ...] = ()
    total: Annotated[int, "number of all runs, of which a limit may leave out some"] = 0


@dataclass(frozen=True, kw_only=True)
class ValidationFacts:
    """A validation."""

    step: Annotated[int, "updates taken"]
    loss: Annotated[float | None, "on the held-out images"]
    base_loss: Annotated[float | None, "without the LoRA"]
    low: Annotated[float | None, "of the 95 % confidence interval of their difference"]
    high: Annotated[float | None, "of the same interval"]
    best: Annotated[bool, "whether no loss is lower"]


@dataclass(frozen=True, kw_only=True)
class LikenessFacts:
    """A preview compared with the training pictures, by image features."""

    step: Annotated[int, "updates taken"]
    likeness: Annotated[float, "mean cosine of the previews with the training pictures"]
    own: Annotated[float | None, "mean cosine of two of the training pictures; null for a single one"]
    adherence: Annotated[float | None, "how well prompts are followed, from 0 to 1; null where it is not watched"]


@dataclass(frozen=True, kw_only=True)
class PreviewFacts:
    """A picture of a preview: the step and strength of the LoRA, its prompt with its place among them (from 1), and its
    path among the run's files.
    """

    step: int
    strength: float
    prompt: str
    number: int
    file: str


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """What a prompt of previews edits, or what its picture was edited to: the prompt's place, and its path."""

    title: Annotated[str, "control, control 2, ... or target"]
    number: int
    file: str


@dataclass(frozen=True, kw_only=True)
class RunPicture:
    """A picture that was trained on."""

    file: Annotated[str, "its name"]
    caption: Annotated[str, "for the text encoder"]
    use: Annotated[str, "trained, held out or class"] = "trained"
    thumbnail: Annotated[str | None, "a small version among the run's files; null if there is none"] = None
    standing: Annotated[str, "what its training losses say, in a word or two; empty if unknown"] = ""
    controls: Annotated[int, "number of the pictures before it, which are beside it in the small version"] = 0


@dataclass(frozen=True, kw_only=True)
class PictureAdvice:
    """What to do about a picture of a run, from its training losses."""

    file: Annotated[str, "name of the picture"]
    finding: Annotated[Literal["never learnt", "learnt by heart"], "what its losses say"]
    reason: Annotated[str, "why, in a sentence with numbers"]
    remedy: Annotated[str, "what to do, in a sentence"]
    drawn_less: Annotated[str, "rule of image_repeats that draws it less often; empty where that is no remedy"] = ""


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """A LoRA file: its path among the run's files, its size, and its name in models/loras if it was copied there."""

    file: str
    bytes: int
    installed: str | None


@dataclass(frozen=True, kw_only=True)
class SavedLora:
    """A LoRA of a step."""

    step: Annotated[int, "updates taken"]
    file: Annotated[str, "its path among the run's files"]
    bytes: Annotated[int, "its size"]
    best: Annotated[bool, "whether it is the best one, on held-out images or by likeness"] = False


@dataclass(frozen=True, kw_only=True)
class RecommendedLora:
    """The LoRA to use."""

    sentence: Annotated[str, "the recommendation in plain words"]
    is_judged: Annotated[bool, "whether it is that of an evaluation; otherwise it is the last one"]
    step: Annotated[int | None, "updates taken; null if the file does not say"]
    file: Annotated[str, "its path among the run's files"]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RunSetting:
    """A setting of a run: its value, its default, its meaning and its heading."""

    name: str
    value: Any
    default: Any
    help: str
    group: str


@dataclass(frozen=True, kw_only=True)
class RunNote:
    """A remark on a run, in a sentence; step is null if it belongs to none."""

    kind: str
    message: str
    step: int | None = None


_SUBJECT = "what prompts call what was learnt: the trigger, else the words that all captions share; empty without any"


@dataclass(frozen=True, kw_only=True)
class RunAnswer(RunRow):
    """A run with all that its report says."""

    status: Annotated[str, "how it ended, in words"]
    mood: Annotated[str, "good, fair or bad, for the colour of the status"]
    settings: Annotated[tuple[RunSetting, ...], "all of them"]
    changed: Annotated[dict[str, Any], "those that differ from their defaults"]
    trigger: Annotated[str, "phrase for the subject"]
    subject: Annotated[str, _SUBJECT] = ""
    losses: Annotated[tuple[tuple[int, float | None], ...], "step and loss; of long runs a part of them, evenly spaced"]
    smooth: Annotated[
        tuple[tuple[int, float | None], ...], "step and mean of the losses before it; the last one is `loss`"
    ]
    rates: Annotated[tuple[tuple[int, float | None], ...], "step and learning rate"]
    validations: Annotated[tuple[ValidationFacts, ...], "all of them"]
    base_loss: Annotated[float | None, "of the held-out images without the LoRA"]
    likenesses: Annotated[tuple[LikenessFacts, ...], "of all previews that were measured"]
    previews: Annotated[tuple[PreviewFacts, ...], "pictures that were drawn"]
    pairs: Annotated[tuple[PairFacts, ...], "what they were drawn from, of edit models"]
    images: Annotated[tuple[RunPicture, ...], "that were trained on"]
    advice: Annotated[tuple[PictureAdvice, ...], "what to do about single pictures"]
    advice_summary: Annotated[str, "the same in a line, or why there is none; empty where losses do not say"]
    left_out: Annotated[tuple[SkippedFile, ...], "files that were not used"]
    lora: Annotated[LoraFacts | None, "the LoRA; null if none was saved"]
    saves: Annotated[tuple[SavedLora, ...], "all LoRAs that were saved"]
    recommended: Annotated[RecommendedLora | None, "the one to use; null if none was saved"]
    best_step: Annotated[int | None, "of the lowest loss on held-out images; null without them"]
    verdict: Annotated[str, "interpretation of the run, in a sentence"]
    facts: Annotated[dict[str, str], "the most important numbers, by their names"]
    sentences: Annotated[tuple[str, ...], "summary, and notes of the run"]
    notes: tuple[RunNote, ...]
    use: Annotated[dict[str, tuple[str, str]], "how the LoRA is used, by program: what to do, and text to copy"]
    command: Annotated[str, "that repeats the run; empty if it cannot be repeated by a command"]
    commands: Annotated[dict[str, str], "command lines to copy, by purpose"]
    files: Annotated[tuple[str, ...], "paths in the folder of the run"]
    folder: Annotated[str, "of the run"]
    is_trainable_on: Annotated[bool, "whether it can be trained on from its end"]
    dataset: Annotated[str | None, "name of the dataset that it was trained on; null if that is not one of the page's"]


@dataclass(frozen=True, kw_only=True)
class InstallBody:
    """Which LoRA is copied into models/loras: that of a step, or the last one; and under which name."""

    step: int | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class InstalledLora:
    """The LoRA's name in models/loras, and whether it was there before."""

    installed: str
    was_there: bool = False


@dataclass(frozen=True, kw_only=True)
class DrawingFacts:
    """What drawing with the LoRA of a run takes."""

    control: Annotated[Literal["none", "optional", "required"], "whether its model takes or needs a picture to edit"]
    least_strength: Annotated[float, "of the LoRA: 0, or -2 of a slider"] = 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationAnswer:
    """What was found out about the LoRAs of a run."""

    evaluation: Annotated[Evaluation | None, "null if they were not evaluated yet"]
    folder: Annotated[str, "of its pictures, among the files of the run"]
    subject: Annotated[str, _SUBJECT] = ""


@dataclass(frozen=True, kw_only=True)
class EvaluationBody:
    """What is evaluated."""

    subject: Annotated[str, "what to draw, for a run that has no subject"] = ""


@dataclass(frozen=True, kw_only=True)
class GalleryAnswer:
    """What there is of a run's gallery, and what can be drawn for it."""

    kinds: Annotated[dict[str, tuple[str, ...]], "what may be asked for beside the trigger, by kind"]
    steps: Annotated[tuple[int, ...], "of the LoRAs that are drawn"]
    strengths: Annotated[tuple[float, ...], "at which they are drawn"]
    grids: tuple[Grid, ...]
    subject: Annotated[str, _SUBJECT] = ""


@dataclass(frozen=True, kw_only=True)
class GalleryBody:
    """What is asked for beside the trigger; with the trigger in it, it is the whole prompt."""

    wish: Annotated[str, "of at most 1,000 characters"]
    subject: Annotated[str, "what to draw, for a run that has no subject"] = ""


@dataclass(frozen=True, kw_only=True)
class KeptControl:
    """A picture to edit, as it is stored."""

    control: Annotated[str, "its name in the folder `tried` of the run"]


@dataclass(frozen=True, kw_only=True)
class DrawingBody:
    """What is drawn with the LoRA of a run, and without it from the same noise."""

    prompt: Annotated[str, "of at most 10,000 characters"]
    strength: Annotated[float, "of the LoRA, from 0, or -2 of a slider, to 2"] = 1.0
    seed: Annotated[int, "of the noise, from 0 to 4294967295"] = 0
    control: Annotated[str, "the picture to edit or to begin with, by its name in `tried`; empty for none"] = ""
    lora: Annotated[str, "a file among the `saves` of the run; empty for the last one, or the weights as they are"] = ""


@dataclass(frozen=True, kw_only=True)
class RequestBody:
    """What is asked of a run that trains: previews, its LoRA as it is, or a drawing."""

    what: Literal["preview", "save", "drawing"]
    drawing: DrawingBody | None = None


@dataclass(frozen=True, kw_only=True)
class RequestAnswer:
    """The id of a request, by which the view of the run names what was drawn."""

    id: str


@dataclass(frozen=True, kw_only=True)
class TrainOnBody:
    """Steps of the longer run, those of the run included."""

    steps: int


@dataclass(frozen=True, kw_only=True)
class SweepBody(PlanBody):
    """The sweep to queue: a run for each combination of the values in `grid`."""

    name: Annotated[str, "of the LoRAs; that of the dataset if it is empty"] = ""
    grid: Annotated[dict[str, list[Any]], "the values to try of each further setting, by name"] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """A sweep in the list."""

    id: Annotated[str, "name of its folder in `runs`."]
    runs: Annotated[int, "their number."]
    states: Annotated[dict[str, int], "number of runs by the state of their jobs."]


@dataclass(frozen=True, kw_only=True)
class SweepList:
    """All sweeps, those of the page first, and the folders that look like one and cannot be read."""

    sweeps: tuple[SweepRow, ...]
    damaged: tuple[SkippedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepRunRow:
    """A run of a sweep."""

    name: Annotated[str, "of its folder in that of the sweep."]
    run: Annotated[str, "its id."]
    settings: Annotated[dict[str, Any], "the values that the sweep varies."]
    state: Annotated[str, "complete, failed, stopped, running, or waiting."]
    place: Annotated[
        int | None, "in the ranking, from 1; None for runs that are not complete or have no held-out loss."
    ] = None
    loss: Annotated[float | None, "the lowest held-out loss and its step."] = None
    best_step: Annotated[int | None, "the lowest held-out loss and its step."] = None
    change: Annotated[float | None, "of the loss relative to that of the base model, such as -0.05 for 5 % less."] = (
        None
    )
    steps: Annotated[int, "that were taken."] = 0
    error: Annotated[str, "of a failed run, in a sentence."] = ""


@dataclass(frozen=True, kw_only=True)
class SweepAnswer:
    """A sweep."""

    id: Annotated[str, "name of its folder in `runs`."]
    comparable: Annotated[
        bool, "whether all losses are of the same held-out images; if not, the ranking is by `change`."
    ]
    runs: Annotated[tuple[SweepRunRow, ...], "the best first, then those that are not ranked."]
