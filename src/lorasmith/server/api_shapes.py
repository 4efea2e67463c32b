"""What goes over the wire: the bodies that the API takes, and the answers that it gives.

Questions to the assistant return these types as JSON, routes pass them on, and the OpenAPI document describes them.
This module imports nothing that the server process must not import. Numbers are finite; what is unknown is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["problem", "warning", "remark"]
SettingType = Literal["integer", "number", "text", "boolean"]
RunState = Literal["running", "finished", "stopped", "cancelled", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class ErrorFacts:
    """What went wrong.

    Attributes:
        kind: name of the kind of error, such as OptionError.
        message: a sentence with rule, value and remedy.
        details: more about it, such as a list of findings; null if there is no more.
    """

    kind: str
    message: str
    details: Any = None


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
    """A device that trains.

    Attributes:
        name: such as cuda:0 or cpu.
        title: of its maker.
        memory_bytes, free_bytes: of the device; null if unknown.
    """

    name: str
    title: str = ""
    memory_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class StatusAnswer:
    """The state of the server.

    Attributes:
        version: of Lorasmith.
        ready: whether the assistant answers; until then, what needs it is answered with 503.
        base_dir: the base folder.
        devices: that train.
        queue: number of jobs.
        disk_free_bytes: of the base folder's disk.
    """

    version: str
    ready: bool
    base_dir: str
    devices: tuple[DeviceFacts, ...]
    queue: QueueCounts
    disk_free_bytes: int


@dataclass(frozen=True, kw_only=True)
class SettingAnswer:
    """A setting of data or training.

    Attributes:
        name: as on the command line, with underscores.
        label: in words.
        type: of the value.
        default: null if the run decides it.
        min, max, step: of a number; null for no limit.
        choices: allowed values of a text; empty if any text is allowed.
        help: its meaning.
        main: whether it is shown before the others.
    """

    name: str
    label: str
    type: SettingType
    default: bool | int | float | str | None
    help: str
    min: float | None = None
    max: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    main: bool = False


@dataclass(frozen=True, kw_only=True)
class SettingGroup:
    """Settings under one heading."""

    title: str
    settings: tuple[SettingAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class PresetAnswer:
    """A choice of settings.

    Attributes:
        name: of the choice.
        title: in words.
        summary: what it trades, in a sentence.
        settings: by name, for the number of images that was asked for.
        steps_per_image, least_steps, most_steps: from which the steps follow for another number.
    """

    name: str
    title: str
    summary: str
    settings: dict[str, Any]
    steps_per_image: int
    least_steps: int
    most_steps: int


@dataclass(frozen=True, kw_only=True)
class SettingsAnswer:
    """Every setting that a page offers, and the choices for who asks for none."""

    groups: tuple[SettingGroup, ...]
    presets: tuple[PresetAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A folder of images below input/.

    Attributes:
        name: of the folder.
        images: number of its pictures.
        captions: number of those with a caption.
        modified: time of the last change, in seconds since the epoch.
        cover: a picture of it; null if there is none.
        builtin: whether it belongs to the package, so that it cannot be changed.
    """

    name: str
    images: int
    captions: int
    modified: float
    cover: str | None
    builtin: bool = False


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
    """A picture of a dataset.

    Attributes:
        file: its name.
        width, height: in pixels, upright; null if it cannot be read.
        bytes: size of the file.
        caption: its text; empty if it has none.
        has_caption: whether it has a text of its own.
        problem: why picture or caption cannot be read; empty if they can.
    """

    file: str
    width: int | None
    height: int | None
    bytes: int
    caption: str
    has_caption: bool
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class DatasetAnswer:
    """A folder of images.

    Attributes:
        name: of the folder.
        folder: its path.
        images: those directly in it.
        builtin: whether it belongs to the package, so that it cannot be changed.
        notes: what else is to be said, such as of folders in it.
        skipped: files that training would not use.
    """

    name: str
    folder: str
    images: tuple[PictureRow, ...]
    builtin: bool = False
    notes: tuple[str, ...] = ()
    skipped: tuple[SkippedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UploadAnswer:
    """What became of uploaded files.

    Attributes:
        added: names of the new files, pictures and captions.
        skipped: files that were not kept.
        renamed: names of new files by those that they were sent under, where they differ.
    """

    added: tuple[str, ...]
    skipped: tuple[SkippedFile, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


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
    """A caption to store.

    Attributes:
        caption: the text; an empty one takes the caption away.
        seen: the caption that it replaces, as it was shown: 409 if there is another one now. Null to replace any.
    """

    caption: str
    seen: str | None = None


CaptionBody = dict[str, str | CaptionEdit]
"""Captions by name of the picture."""


@dataclass(frozen=True, kw_only=True)
class FindingFacts:
    """Something to look at before training.

    Attributes:
        kind: what it is.
        message: a sentence with its remedy.
        files: the pictures concerned.
        severity: problem: it costs pictures or spoils the LoRA; warning: better mended; remark: worth knowing.
    """

    kind: str
    message: str
    files: tuple[str, ...]
    severity: Severity


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The part of an upright picture that is trained, as shares of its width and height."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class CheckedPicture:
    """A picture that was checked.

    Attributes:
        problems: about it, in a word or a sentence each.
        crop: the part that is trained.
        trained: width and height at which it is trained.
        tokens: of its caption; null if they were not counted.
    """

    problems: tuple[str, ...]
    crop: Crop
    trained: tuple[int, int]
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataCheckAnswer:
    """A checked folder of images.

    Attributes:
        findings: the gravest first.
        images: by name of the file.
        skipped: files that training would not use.
        notes: other remarks.
        resolutions: sides in pixels of the squares whose area pictures are scaled to.
        assumed: whether the resolution is a guess, as no model was named.
        held_out: pictures that are held out for validation.
        samples_per_epoch: number of samples in an epoch.
    """

    findings: tuple[FindingFacts, ...]
    images: dict[str, CheckedPicture]
    skipped: tuple[SkippedFile, ...]
    notes: tuple[str, ...] = ()
    resolutions: tuple[int, ...] = ()
    assumed: bool = False
    held_out: tuple[str, ...] = ()
    samples_per_epoch: int = 0


@dataclass(frozen=True, kw_only=True)
class MissingPart:
    """A part that a model lacks, and the common name of the file to get."""

    part: str
    usual_file: str


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model that can be trained on.

    Attributes:
        name: by which a run names it.
        title: for people.
        family: its architecture.
        place: its folder.
        size_bytes: of the file.
        precision: number format of most of its weights.
        builtin: whether it belongs to the package: a small one, to try things out.
        ready: whether all its parts are there.
        missing: those that are not.
    """

    name: str
    title: str
    family: str
    place: str
    size_bytes: int
    precision: str
    builtin: bool
    ready: bool
    missing: tuple[MissingPart, ...]


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
    """What a run is about.

    Attributes:
        model: its name in the list of models.
        dataset: name of a dataset.
        folder: path of a folder of images, in place of a dataset.
        trigger: phrase for the subject or style.
        settings: of data and training, by name.
    """

    model: str
    dataset: str | None = None
    folder: str | None = None
    trigger: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlanBody(DatasetSource):
    """The run to plan.

    Attributes:
        model: its name in the list of models.
        dataset: name of a dataset.
        folder: path of a folder of images, in place of a dataset.
        trigger: phrase for the subject or style.
        settings: of data and training, by name.
    """


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """The plan of a run.

    Attributes:
        steps: updates.
        epochs: how often each picture is seen.
        rank: of the LoRA.
        resolution: side in pixels of the square whose area pictures are scaled to.
        images: number of pictures.
        held_out: number of those that are held out for validation.
        parameters: number of trained parameters.
        memory_bytes: needed at the peak of a step, with `memory_settings`.
        fits: whether the device has it; null if its memory is unknown.
        memory_settings: that should be added to the run so that it fits; they are the cheapest ones.
        seconds_per_step, measured_at: measured on this device; null if it was not.
        seconds: of all steps.
        notes: remarks, one sentence each.
    """

    steps: int
    epochs: float
    rank: int
    resolution: int
    images: int
    held_out: int
    parameters: int
    memory_bytes: int | None
    fits: bool | None
    memory_settings: dict[str, Any] = field(default_factory=dict)
    seconds_per_step: float | None = None
    seconds: float | None = None
    measured_at: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MeasurementBody:
    """What to measure: some steps on a model, on made-up pictures."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobBody(DatasetSource):
    """The job to add to the queue.

    Attributes:
        kind: train.
        name: of the LoRA; that of the dataset if it is empty.
        model: its name in the list of models.
        dataset: name of a dataset.
        folder: path of a folder of images, in place of a dataset.
        trigger: phrase for the subject or style.
        settings: of data and training, by name.
        front: whether it goes before all others.
    """

    kind: Literal["train"] = "train"
    name: str = ""
    front: bool = False


@dataclass(frozen=True, kw_only=True)
class JobAnswer:
    """A job.

    Attributes:
        id: of the job.
        kind: graph, train or measure.
        state: pending, running, completed, failed, cancelled, paused or interrupted.
        number: order in the queue.
        title: what it is, in some words.
        name: of the LoRA that it trains; null for other jobs.
        model: that it is about; null for graphs.
        dataset: that it trains on; null for other folders and jobs.
        created, started, ended: in seconds since the epoch.
        outputs: of its nodes, by their ids.
        error: why it failed.
        run: id of the run that it trains or has trained.
        attempts: how often it was started.
        request: what it does.
    """

    id: str
    kind: str
    state: str
    number: float
    title: str
    name: str | None
    model: str | None
    dataset: str | None
    created: float
    started: float | None
    ended: float | None
    outputs: dict[str, Any]
    error: dict[str, Any] | None
    run: str | None
    attempts: int
    request: dict[str, Any] = field(default_factory=dict)


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
    """A run.

    Attributes:
        id: its folder, relative to the base folder.
        name: of its LoRA.
        state: how it ended; running if a process trains it, interrupted if it ended without saying so.
        started: in seconds since the epoch; null before the first step.
        seconds: of training.
        step, steps: updates taken and planned.
        model, family: names of the base model and its family.
        loss: training loss, as in the report.
        loss_label: what this number is.
        held_out: lowest loss on held-out images; null without them.
        cover: picture of it, a path among its files.
        job: id of the job that trains it.
    """

    id: str
    name: str
    state: RunState
    started: float | None
    seconds: float
    step: int
    steps: int | None
    model: str
    family: str
    loss: float | None
    loss_label: str
    held_out: float | None
    cover: str | None
    job: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunList:
    """All runs below the base folder, the newest first, and the folders that look like runs and cannot be read."""

    runs: tuple[RunRow, ...]
    damaged: tuple[SkippedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ValidationFacts:
    """A validation.

    Attributes:
        step: updates taken.
        loss, base_loss: with and without the LoRA.
        low, high: 95 % confidence interval of their difference.
        best: whether no loss is lower.
    """

    step: int
    loss: float | None
    base_loss: float | None
    low: float | None
    high: float | None
    best: bool


@dataclass(frozen=True, kw_only=True)
class PreviewFacts:
    """A picture of a preview: the step and strength of the LoRA, its prompt, and its path among the run's files."""

    step: int
    strength: float
    prompt: str
    file: str


@dataclass(frozen=True, kw_only=True)
class RunPicture:
    """A picture that was trained on.

    Attributes:
        file: its name.
        caption: for the text encoder.
        use: trained, held out or class.
        thumbnail: a small version among the run's files; null if there is none.
        standing: what its training losses say, in a word or two; empty if unknown.
    """

    file: str
    caption: str
    use: str = "trained"
    thumbnail: str | None = None
    standing: str = ""


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """A LoRA file: its path among the run's files, its size, and its name in models/loras if it was copied there."""

    file: str
    bytes: int
    installed: str | None


@dataclass(frozen=True, kw_only=True)
class SavedLora:
    """A LoRA of a step.

    Attributes:
        step: updates taken.
        file: its path among the run's files.
        bytes: its size.
        best: whether it is the best one on held-out images.
    """

    step: int
    file: str
    bytes: int
    best: bool = False


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
    """A run with all that its report says.

    Attributes:
        status: how it ended, in words.
        mood: good, fair or bad, for the colour of the status.
        settings: all of them.
        changed: those that differ from their defaults.
        trigger: phrase for the subject.
        losses: step and loss; of long runs a part of them, evenly spaced.
        smooth: step and mean of the losses before it; the last one is `loss`.
        rates: step and learning rate.
        validations: all of them.
        base_loss: of the held-out images without the LoRA.
        previews: pictures that were drawn.
        images: that were trained on.
        left_out: files that were not used.
        lora: the LoRA; null if none was saved.
        saves: all LoRAs that were saved.
        best_step: of the lowest loss on held-out images; null without them.
        verdict: interpretation of the run, in a sentence.
        facts: the most important numbers, by their names.
        sentences: summary, and notes of the run.
        use: how the LoRA is used, by program: what to do, and text to copy.
        command: that repeats the run; empty if it cannot be repeated by a command.
        commands: command lines to copy, by purpose.
        files: paths in the folder of the run.
        folder: of the run.
        is_trainable_on: whether it can be trained on from its end.
        dataset: name of the dataset that it was trained on; null if that is not one of the page's.
    """

    status: str
    mood: str
    settings: tuple[RunSetting, ...]
    changed: dict[str, Any]
    trigger: str
    losses: tuple[tuple[int, float | None], ...]
    smooth: tuple[tuple[int, float | None], ...]
    rates: tuple[tuple[int, float | None], ...]
    validations: tuple[ValidationFacts, ...]
    base_loss: float | None
    previews: tuple[PreviewFacts, ...]
    images: tuple[RunPicture, ...]
    left_out: tuple[SkippedFile, ...]
    lora: LoraFacts | None
    saves: tuple[SavedLora, ...]
    best_step: int | None
    verdict: str
    facts: dict[str, str]
    sentences: tuple[str, ...]
    notes: tuple[RunNote, ...]
    use: dict[str, tuple[str, str]]
    command: str
    commands: dict[str, str]
    files: tuple[str, ...]
    folder: str
    is_trainable_on: bool
    dataset: str | None


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
