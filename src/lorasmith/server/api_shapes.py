"""What goes over the wire: the bodies that the API takes, and the answers that it gives.

Questions to the assistant return these types as JSON, routes pass them on, and the OpenAPI document describes them.
This module imports nothing that the server process must not import. Numbers are finite; what is unknown is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

Severity = Literal["problem", "warning", "remark"]
SettingType = Literal["integer", "number", "text", "boolean"]
RunState = Literal["running", "finished", "stopped", "cancelled", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class ErrorFacts:
    """What went wrong."""

    kind: Annotated[str, Meta(description="name of the kind of error, such as OptionError")]
    message: Annotated[str, Meta(description="a sentence with rule, value and remedy")]
    details: Annotated[Any, Meta(description="more about it, such as a list of findings; null if there is no more")] = (
        None
    )


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
class DeviceFacts:
    """A device that trains."""

    name: Annotated[str, Meta(description="such as cuda:0 or cpu")]
    title: Annotated[str, Meta(description="of its maker")] = ""
    memory_bytes: Annotated[int | None, Meta(description="of the device; null if unknown")] = None
    free_bytes: Annotated[int | None, Meta(description="of the device; null if unknown")] = None


@dataclass(frozen=True, kw_only=True)
class StatusAnswer:
    """The state of the server."""

    version: Annotated[str, Meta(description="of Lorasmith")]
    ready: Annotated[
        bool, Meta(description="whether the assistant answers; until then, what needs it is answered with 503")
    ]
    base_dir: Annotated[str, Meta(description="the base folder")]
    devices: Annotated[tuple[DeviceFacts, ...], Meta(description="that train")]
    queue: Annotated[QueueCounts, Meta(description="number of jobs")]
    disk_free_bytes: Annotated[int, Meta(description="of the base folder's disk")]


@dataclass(frozen=True, kw_only=True)
class SettingAnswer:
    """A setting of data or training."""

    name: Annotated[str, Meta(description="as on the command line, with underscores")]
    label: Annotated[str, Meta(description="in words")]
    type: Annotated[SettingType, Meta(description="of the value")]
    default: Annotated[bool | int | float | str | None, Meta(description="null if the run decides it")]
    help: Annotated[str, Meta(description="its meaning")]
    min: Annotated[float | None, Meta(description="of a number; null for no limit")] = None
    max: Annotated[float | None, Meta(description="of a number; null for no limit")] = None
    step: Annotated[float | None, Meta(description="of a number; null for no limit")] = None
    choices: Annotated[tuple[str, ...], Meta(description="allowed values of a text; empty if any text is allowed")] = ()
    main: Annotated[bool, Meta(description="whether it is shown before the others")] = False


@dataclass(frozen=True, kw_only=True)
class SettingGroup:
    """Settings under one heading."""

    title: str
    settings: tuple[SettingAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class PresetAnswer:
    """A choice of settings."""

    name: Annotated[str, Meta(description="of the choice")]
    title: Annotated[str, Meta(description="in words")]
    summary: Annotated[str, Meta(description="what it trades, in a sentence")]
    settings: Annotated[dict[str, Any], Meta(description="by name, for the number of images that was asked for")]
    steps_per_image: Annotated[int, Meta(description="from which the steps follow for another number")]
    least_steps: Annotated[int, Meta(description="from which the steps follow for another number")]
    most_steps: Annotated[int, Meta(description="from which the steps follow for another number")]


@dataclass(frozen=True, kw_only=True)
class SettingsAnswer:
    """Every setting that a page offers, and the choices for who asks for none."""

    groups: tuple[SettingGroup, ...]
    presets: tuple[PresetAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A folder of images below input/."""

    name: Annotated[str, Meta(description="of the folder")]
    images: Annotated[int, Meta(description="number of its pictures")]
    captions: Annotated[int, Meta(description="number of those with a caption")]
    modified: Annotated[float, Meta(description="time of the last change, in seconds since the epoch")]
    cover: Annotated[str | None, Meta(description="a picture of it; null if there is none")]
    builtin: Annotated[bool, Meta(description="whether it belongs to the package, so that it cannot be changed")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class DatasetList:
    """All folders of images."""

    datasets: tuple[DatasetRow, ...]


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
class PictureRow:
    """A picture of a dataset."""

    file: Annotated[str, Meta(description="its name")]
    width: Annotated[int | None, Meta(description="in pixels, upright; null if it cannot be read")]
    height: Annotated[int | None, Meta(description="in pixels, upright; null if it cannot be read")]
    bytes: Annotated[int, Meta(description="size of the file")]
    caption: Annotated[str, Meta(description="its text; empty if it has none")]
    has_caption: Annotated[bool, Meta(description="whether it has a text of its own")]
    problem: Annotated[str, Meta(description="why picture or caption cannot be read; empty if they can")] = ""


@dataclass(frozen=True, kw_only=True)
class DatasetAnswer:
    """A folder of images."""

    name: Annotated[str, Meta(description="of the folder")]
    folder: Annotated[str, Meta(description="its path")]
    images: Annotated[tuple[PictureRow, ...], Meta(description="those directly in it")]
    builtin: Annotated[bool, Meta(description="whether it belongs to the package, so that it cannot be changed")] = (
        False
    )
    notes: Annotated[tuple[str, ...], Meta(description="what else is to be said, such as of folders in it")] = ()
    skipped: Annotated[tuple[SkippedFile, ...], Meta(description="files that training would not use")] = ()


@dataclass(frozen=True, kw_only=True)
class UploadAnswer:
    """What became of uploaded files."""

    added: Annotated[tuple[str, ...], Meta(description="names of the new files, pictures and captions")]
    skipped: Annotated[tuple[SkippedFile, ...], Meta(description="files that were not kept")] = ()
    renamed: Annotated[
        dict[str, str], Meta(description="names of new files by those that they were sent under, where they differ")
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RemovedAnswer:
    """Where something was moved to, relative to the base folder."""

    removed: str


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Number of files that were changed."""

    changed: int


@dataclass(frozen=True, kw_only=True)
class CaptionEdit:
    """A caption to store."""

    caption: Annotated[str, Meta(description="the text; an empty one takes the caption away")]
    seen: Annotated[
        str | None,
        Meta(
            description="the caption that it replaces, as it was shown: 409 if there is another one now. Null to "
            "replace any."
        ),
    ] = None


CaptionBody = dict[str, str | CaptionEdit]
"""Captions by name of the picture."""


@dataclass(frozen=True, kw_only=True)
class FindingFacts:
    """Something to look at before training."""

    kind: Annotated[str, Meta(description="what it is")]
    message: Annotated[str, Meta(description="a sentence with its remedy")]
    files: Annotated[tuple[str, ...], Meta(description="the pictures concerned")]
    severity: Annotated[
        Severity,
        Meta(
            description="problem: it costs pictures or spoils the LoRA; warning: better mended; remark: worth knowing"
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The part of an upright picture that is trained, as shares of its width and height."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class CheckedPicture:
    """A picture that was checked."""

    problems: Annotated[tuple[str, ...], Meta(description="about it, in a word or a sentence each")]
    crop: Annotated[Crop, Meta(description="the part that is trained")]
    trained: Annotated[tuple[int, int], Meta(description="width and height at which it is trained")]
    tokens: Annotated[int | None, Meta(description="of its caption; null if they were not counted")] = None


@dataclass(frozen=True, kw_only=True)
class DataCheckAnswer:
    """A checked folder of images."""

    findings: Annotated[tuple[FindingFacts, ...], Meta(description="the gravest first")]
    images: Annotated[dict[str, CheckedPicture], Meta(description="by name of the file")]
    skipped: Annotated[tuple[SkippedFile, ...], Meta(description="files that training would not use")]
    notes: Annotated[tuple[str, ...], Meta(description="other remarks")] = ()
    resolutions: Annotated[
        tuple[int, ...], Meta(description="sides in pixels of the squares whose area pictures are scaled to")
    ] = ()
    assumed: Annotated[bool, Meta(description="whether the resolution is a guess, as no model was named")] = False
    held_out: Annotated[tuple[str, ...], Meta(description="pictures that are held out for validation")] = ()
    samples_per_epoch: Annotated[int, Meta(description="number of samples in an epoch")] = 0


@dataclass(frozen=True, kw_only=True)
class MissingPart:
    """A part that a model lacks, and the common name of the file to get."""

    part: str
    usual_file: str


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model that can be trained on."""

    name: Annotated[str, Meta(description="by which a run names it")]
    title: Annotated[str, Meta(description="for people")]
    family: Annotated[str, Meta(description="its architecture")]
    place: Annotated[str, Meta(description="its folder")]
    size_bytes: Annotated[int, Meta(description="of the file")]
    precision: Annotated[str, Meta(description="number format of most of its weights")]
    builtin: Annotated[bool, Meta(description="whether it belongs to the package: a small one, to try things out")]
    ready: Annotated[bool, Meta(description="whether all its parts are there")]
    missing: Annotated[tuple[MissingPart, ...], Meta(description="those that are not")]


@dataclass(frozen=True, kw_only=True)
class OtherFile:
    """A file in the model folders that is no model: what it is, or why it is not recognised."""

    name: str
    place: str
    what: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelListAnswer:
    """The models in the model folders, and what else is there."""

    models: tuple[ModelRow, ...]
    other: tuple[OtherFile, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """What a run is about."""

    model: Annotated[str, Meta(description="its name in the list of models")]
    dataset: Annotated[str | None, Meta(description="name of a dataset")] = None
    folder: Annotated[str | None, Meta(description="path of a folder of images, in place of a dataset")] = None
    trigger: Annotated[str, Meta(description="phrase for the subject or style")] = ""
    settings: Annotated[dict[str, Any], Meta(description="of data and training, by name")] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlanBody(DatasetSource):
    """The run to plan."""


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """The plan of a run."""

    steps: Annotated[int, Meta(description="updates")]
    epochs: Annotated[float, Meta(description="how often each picture is seen")]
    rank: Annotated[int, Meta(description="of the LoRA")]
    resolution: Annotated[int, Meta(description="side in pixels of the square whose area pictures are scaled to")]
    images: Annotated[int, Meta(description="number of pictures")]
    held_out: Annotated[int, Meta(description="number of those that are held out for validation")]
    parameters: Annotated[int, Meta(description="number of trained parameters")]
    memory_bytes: Annotated[int | None, Meta(description="needed at the peak of a step, with `memory_settings`")]
    fits: Annotated[bool | None, Meta(description="whether the device has it; null if its memory is unknown")]
    memory_settings: Annotated[
        dict[str, Any], Meta(description="that should be added to the run so that it fits; they are the cheapest ones")
    ] = field(default_factory=dict)
    seconds_per_step: Annotated[float | None, Meta(description="measured on this device; null if it was not")] = None
    seconds: Annotated[float | None, Meta(description="of all steps")] = None
    measured_at: Annotated[float | None, Meta(description="measured on this device; null if it was not")] = None
    notes: Annotated[tuple[str, ...], Meta(description="remarks, one sentence each")] = ()


@dataclass(frozen=True, kw_only=True)
class MeasurementBody:
    """What to measure: some steps on a model, on made-up pictures."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobBody(DatasetSource):
    """The job to add to the queue."""

    kind: Annotated[Literal["train"], Meta(description="train")] = "train"
    name: Annotated[str, Meta(description="of the LoRA; that of the dataset if it is empty")] = ""
    front: Annotated[bool, Meta(description="whether it goes before all others")] = False


@dataclass(frozen=True, kw_only=True)
class JobAnswer:
    """A job."""

    id: Annotated[str, Meta(description="of the job")]
    kind: Annotated[str, Meta(description="graph, train or measure")]
    state: Annotated[str, Meta(description="pending, running, completed, failed, cancelled, paused or interrupted")]
    number: Annotated[float, Meta(description="order in the queue")]
    title: Annotated[str, Meta(description="what it is, in some words")]
    name: Annotated[str | None, Meta(description="of the LoRA that it trains; null for other jobs")]
    model: Annotated[str | None, Meta(description="that it is about; null for graphs")]
    dataset: Annotated[str | None, Meta(description="that it trains on; null for other folders and jobs")]
    created: Annotated[float, Meta(description="in seconds since the epoch")]
    started: Annotated[float | None, Meta(description="in seconds since the epoch")]
    ended: Annotated[float | None, Meta(description="in seconds since the epoch")]
    outputs: Annotated[dict[str, Any], Meta(description="of its nodes, by their ids")]
    error: Annotated[dict[str, Any] | None, Meta(description="why it failed")]
    run: Annotated[str | None, Meta(description="id of the run that it trains or has trained")]
    attempts: Annotated[int, Meta(description="how often it was started")]
    request: Annotated[dict[str, Any], Meta(description="what it does")] = field(default_factory=dict)


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
class RunRow:
    """A run."""

    id: Annotated[str, Meta(description="its folder, relative to the base folder")]
    name: Annotated[str, Meta(description="of its LoRA")]
    state: Annotated[
        RunState,
        Meta(description="how it ended; running if a process trains it, interrupted if it ended without saying so"),
    ]
    started: Annotated[float | None, Meta(description="in seconds since the epoch; null before the first step")]
    seconds: Annotated[float, Meta(description="of training")]
    step: Annotated[int, Meta(description="updates taken and planned")]
    steps: Annotated[int | None, Meta(description="updates taken and planned")]
    model: Annotated[str, Meta(description="names of the base model and its family")]
    family: Annotated[str, Meta(description="names of the base model and its family")]
    loss: Annotated[float | None, Meta(description="training loss, as in the report")]
    loss_label: Annotated[str, Meta(description="what this number is")]
    held_out: Annotated[float | None, Meta(description="lowest loss on held-out images; null without them")]
    cover: Annotated[str | None, Meta(description="picture of it, a path among its files")]
    job: Annotated[str | None, Meta(description="id of the job that trains it")] = None


@dataclass(frozen=True, kw_only=True)
class RunList:
    """All runs below the base folder, the newest first, and the folders that look like runs and cannot be read."""

    runs: tuple[RunRow, ...]
    damaged: tuple[SkippedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ValidationFacts:
    """A validation."""

    step: Annotated[int, Meta(description="updates taken")]
    loss: Annotated[float | None, Meta(description="with and without the LoRA")]
    base_loss: Annotated[float | None, Meta(description="with and without the LoRA")]
    low: Annotated[float | None, Meta(description="95 % confidence interval of their difference")]
    high: Annotated[float | None, Meta(description="95 % confidence interval of their difference")]
    best: Annotated[bool, Meta(description="whether no loss is lower")]


@dataclass(frozen=True, kw_only=True)
class PreviewFacts:
    """A picture of a preview: the step and strength of the LoRA, its prompt, and its path among the run's files."""

    step: int
    strength: float
    prompt: str
    file: str


@dataclass(frozen=True, kw_only=True)
class RunPicture:
    """A picture that was trained on."""

    file: Annotated[str, Meta(description="its name")]
    caption: Annotated[str, Meta(description="for the text encoder")]
    use: Annotated[str, Meta(description="trained, held out or class")] = "trained"
    thumbnail: Annotated[
        str | None, Meta(description="a small version among the run's files; null if there is none")
    ] = None
    standing: Annotated[str, Meta(description="what its training losses say, in a word or two; empty if unknown")] = ""


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """A LoRA file: its path among the run's files, its size, and its name in models/loras if it was copied there."""

    file: str
    bytes: int
    installed: str | None


@dataclass(frozen=True, kw_only=True)
class SavedLora:
    """A LoRA of a step."""

    step: Annotated[int, Meta(description="updates taken")]
    file: Annotated[str, Meta(description="its path among the run's files")]
    bytes: Annotated[int, Meta(description="its size")]
    best: Annotated[bool, Meta(description="whether it is the best one on held-out images")] = False


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


@dataclass(frozen=True, kw_only=True)
class RunAnswer(RunRow):
    """A run with all that its report says."""

    status: Annotated[str, Meta(description="how it ended, in words")]
    mood: Annotated[str, Meta(description="good, fair or bad, for the colour of the status")]
    settings: Annotated[tuple[RunSetting, ...], Meta(description="all of them")]
    changed: Annotated[dict[str, Any], Meta(description="those that differ from their defaults")]
    trigger: Annotated[str, Meta(description="phrase for the subject")]
    losses: Annotated[
        tuple[tuple[int, float | None], ...],
        Meta(description="step and loss; of long runs a part of them, evenly spaced"),
    ]
    smooth: Annotated[
        tuple[tuple[int, float | None], ...],
        Meta(description="step and mean of the losses before it; the last one is `loss`"),
    ]
    rates: Annotated[tuple[tuple[int, float | None], ...], Meta(description="step and learning rate")]
    validations: Annotated[tuple[ValidationFacts, ...], Meta(description="all of them")]
    base_loss: Annotated[float | None, Meta(description="of the held-out images without the LoRA")]
    previews: Annotated[tuple[PreviewFacts, ...], Meta(description="pictures that were drawn")]
    images: Annotated[tuple[RunPicture, ...], Meta(description="that were trained on")]
    left_out: Annotated[tuple[SkippedFile, ...], Meta(description="files that were not used")]
    lora: Annotated[LoraFacts | None, Meta(description="the LoRA; null if none was saved")]
    saves: Annotated[tuple[SavedLora, ...], Meta(description="all LoRAs that were saved")]
    best_step: Annotated[int | None, Meta(description="of the lowest loss on held-out images; null without them")]
    verdict: Annotated[str, Meta(description="interpretation of the run, in a sentence")]
    facts: Annotated[dict[str, str], Meta(description="the most important numbers, by their names")]
    sentences: Annotated[tuple[str, ...], Meta(description="summary, and notes of the run")]
    notes: tuple[RunNote, ...]
    use: Annotated[
        dict[str, tuple[str, str]], Meta(description="how the LoRA is used, by program: what to do, and text to copy")
    ]
    command: Annotated[str, Meta(description="that repeats the run; empty if it cannot be repeated by a command")]
    commands: Annotated[dict[str, str], Meta(description="command lines to copy, by purpose")]
    files: Annotated[tuple[str, ...], Meta(description="paths in the folder of the run")]
    folder: Annotated[str, Meta(description="of the run")]
    is_trainable_on: Annotated[bool, Meta(description="whether it can be trained on from its end")]
    last_event: Annotated[
        str,
        Meta(description="up to which the above tells the run's events; the stream continues behind it with `?after=`"),
    ]
    dataset: Annotated[
        str | None,
        Meta(description="name of the dataset that it was trained on; null if that is not one of the page's"),
    ]


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
class TrainOnBody:
    """Steps of the longer run, those of the run included."""

    steps: int
