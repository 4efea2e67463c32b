"""The JSON of runs: msgspec validates and describes it. Numbers are finite, or null if unknown.

The server imports this module, so it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lorasmith.evaluation.evaluation_record import Evaluation, Grid
from lorasmith.server.datasets.dataset_shapes import SkippedFile

Taught = Literal["subject", "style", "edit", "slider", ""]
RunPhase = Literal["running", "finished", "stopped", "cancelled", "failed", "interrupted"]


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


_SUBJECT = "what prompts call what was learnt: the trigger, else the words that all captions share; empty without any"


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
    cover: Annotated[
        str | None, "its newest picture, or one with the LoRA that an evaluation recommends; a path among its files"
    ]
    subject: Annotated[str, _SUBJECT] = ""
    teaches: Annotated[Taught, "what its pictures teach, as it was said or guessed; empty for preferences"] = ""
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


@dataclass(frozen=True, kw_only=True)
class DrawnPrompt:
    """A prompt that was drawn while a run trained, without and with its LoRA."""

    id: Annotated[str, "of the request"]
    prompt: str
    strength: Annotated[float, "of the LoRA"]
    seed: Annotated[int, "of the noise"]
    lora: Annotated[str, "name of the file that was drawn with; empty for the weights of the step"]
    pictures: Annotated[tuple[str, ...], "files of the run, without the LoRA and with it; empty if it failed"]
    step: int
    note: Annotated[str, "parts of the LoRA that do not apply, in a sentence"]
    error: Annotated[str, "why it failed, in a sentence"]


@dataclass(frozen=True, kw_only=True)
class AskedPrompt:
    """A prompt that a run which trains was asked for, and will draw after the step that it takes."""

    id: Annotated[str, "of the request"]
    prompt: str
    strength: Annotated[float, "of the LoRA"]
    seed: Annotated[int, "of the noise"]
    lora: Annotated[str, "name of the file that is drawn with; empty for the weights of the step"]


@dataclass(frozen=True, kw_only=True)
class RunAnswer(RunRow):
    """A run with all that its report says."""

    status: Annotated[str, "how it ended, in words"]
    mood: Annotated[str, "good, fair or bad, for the colour of the status"]
    settings: Annotated[tuple[RunSetting, ...], "all of them"]
    changed: Annotated[dict[str, Any], "those that differ from their defaults"]
    trigger: Annotated[str, "phrase for the subject"]
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
    drawn: Annotated[tuple[DrawnPrompt, ...], "prompts that were drawn while it trained, as they were asked for"]
    asked: Annotated[tuple[AskedPrompt, ...], "prompts that it will draw while it trains"] = ()
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
class HubFolderBody:
    """What the folder to share a LoRA with holds; what the run does not say is left out where it is empty."""

    step: Annotated[int | None, "of the LoRA; null for the recommended one, else the last one"] = None
    trigger: str = ""
    base_model: Annotated[str, "its id on the hub"] = ""
    licence: Annotated[str, "the hub's name of it; that of the base model if empty"] = ""
    private_captions: Annotated[bool, "leave folders, captions and prompts out of the LoRA's metadata"] = True
    with_training_pictures: Annotated[bool, "include small versions of the training pictures"] = False


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of the folder."""

    path: Annotated[str, "in the folder"]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """A folder to share a LoRA with, as it was written."""

    folder: Annotated[str, "its path in the base folder"]
    files: tuple[HubFile, ...]
    base_models: Annotated[tuple[str, ...], "ids on the hub, that which pictures are drawn with first"]
    trigger: Annotated[str, "empty if it is not known"]
    licence: Annotated[str, "the hub's name of it; empty if it is not known"]
    pictures: Annotated[int, "that the LoRA drew"]
    notes: Annotated[tuple[str, ...], "about its conversion for diffusers"]
    told: Annotated[
        dict[str, str], "entries of the LoRA's metadata that tell of folders, captions or prompts, shortened"
    ]
    can_upload: Annotated[bool, "whether there is a login at the hub, which requests may use"]


@dataclass(frozen=True, kw_only=True)
class HubUploadBody:
    """Where the folder goes, and what was agreed to."""

    repository: Annotated[str, "`owner/name`, or a name, whose owner is the account that is logged in"]
    folder: HubFolderBody
    told: Annotated[tuple[str, ...], "names of the metadata's entries that were listed; more are refused"] = ()
    public: Annotated[bool, "let everybody see it"] = False


@dataclass(frozen=True, kw_only=True)
class HubUpload:
    """A repository of the hub."""

    repository: Annotated[str, "`owner/name`"]
    address: str
    is_private: bool


@dataclass(frozen=True, kw_only=True)
class DrawingFacts:
    """What drawing with the LoRA of a run takes."""

    control: Annotated[Literal["none", "optional", "required"], "whether its model takes or needs a picture to edit"]
    least_strength: Annotated[float, "of the LoRA: 0, or -2 of a slider"] = 0.0
    strengths: Annotated[tuple[float, ...], "at which its LoRA is usually looked at"] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationAnswer:
    """What was found out about the LoRAs of a run."""

    evaluation: Annotated[Evaluation | None, "null if they were not evaluated yet"]
    folder: Annotated[str, "of its pictures, among the files of the run"]
    subject: Annotated[str, _SUBJECT] = ""
    pictures: Annotated[int, "that an evaluation draws"] = 0
    seconds: Annotated[float | None, "that it takes, by the previews of the run; null if that is not known"] = None


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
    strengths: Annotated[
        tuple[float, ...], "further ones, at most 8, which are drawn after it; a run that trains draws none"
    ] = ()


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
    evaluate: Annotated[bool, "whether its LoRAs are evaluated at its end, by a job behind all others"] = False
