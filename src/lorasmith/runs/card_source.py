"""What is known of a LoRA that gets a card: from the record of its run, or from its file, by any trainer.

Both are untrusted: names in them lead to no file outside the run's folder.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath

from PIL import Image

from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.files import read_regular
from lorasmith.core.folders import MODEL_EXTENSIONS, RUN_RECORD
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import printable
from lorasmith.evaluation.evaluation_record import EVALUATION, read_evaluation
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.forms import letters
from lorasmith.families.slots import Release
from lorasmith.formats.inspect import LoraSummary, describe
from lorasmith.report.pictures import UNREADABLE
from lorasmith.runs.run_images import images_in, subject_words, thumbnail_of
from lorasmith.runs.run_log import LoggedRun, read_run
from lorasmith.runs.run_page import is_own, lora_of_run, loras_of_run
from lorasmith.runs.shelf import releases
from lorasmith.runs.view import preview_file

_MOST_TRAINING = 60  # pictures


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that a LoRA drew."""

    path: Path
    prompt: str
    seed: int | None


@dataclass(frozen=True)
class BaseModel:
    """A base model, as far as it is known."""

    name: str = ""
    ids: tuple[str, ...] = ()  # on the hub, that which pictures are drawn with first
    release: Release | None = None
    is_usual: bool = False  # whether the file names the kind of model alone, of which this is the usual one


@dataclass(frozen=True)
class CardSource:
    """A LoRA and what is known of it."""

    lora: Path
    title: str
    summary: LoraSummary
    base: BaseModel
    family: Family | None
    trigger: str  # on one line; empty if unknown
    pictures: tuple[DrawnPicture, ...] = ()
    pipeline: str = ""  # class of diffusers; empty for the family's
    controls: int = 0  # number of pictures that it edits
    strengths: tuple[float, ...] = ()
    training: tuple[Path, ...] = ()  # small training pictures
    captions: frozenset[str] = frozenset()


def card_source(
    path: Path,
    *,
    step: int | None = None,
    base_model: str = "",
    trigger: str = "",
    model: str | None = None,
    pictures: Sequence[Path] = (),
    with_training_pictures: bool = False,
) -> CardSource:
    """What is known of the LoRA of a run, or of a LoRA file or folder; arguments as those of `write_card`.

    Raises OptionError, LoraError and, for a damaged record, TrainingError.
    """
    if base_model and not is_hub_id(base_model):
        raise OptionError(f"a base model must be an id of the hub, such as owner/name, got {base_model!r}; correct it")
    added = tuple(map(_given_picture, pictures))
    if (path / RUN_RECORD).is_file():
        return _of_run(path, step, base_model, trigger, added, with_training_pictures)
    if step is not None:
        raise OptionError(f"--step chooses among the LoRAs of a run, and {path} is none; leave it out")
    if not path.exists():
        raise LoraError(f"there is no LoRA at {path}; name a file, or the folder of a run")
    summary = describe(path)
    return CardSource(
        path,
        path.name if path.is_dir() else path.stem,
        summary,
        _base_of((base_model, *_named_in(path, summary.metadata), model or ""), summary.metadata),
        _family("", summary.family),
        _trigger(trigger, summary.metadata),
        added,
    )


def _of_run(
    folder: Path,
    step: int | None,
    base_model: str,
    trigger: str,
    added: tuple[DrawnPicture, ...],
    with_training: bool,
) -> CardSource:
    run = read_run(folder)
    record = run.record
    lora, shown = _chosen(run, step)
    images = images_in(record.data)
    controls = 0 if record.consequences.are_pairs else max((image.controls for image in images), default=0)
    if controls and not with_training:  # they are edits of training pictures
        shown = ()
    small = [thumbnail_of(folder, index) for index, image in enumerate(images) if image.use == "trained"]
    summary = describe(lora)
    named = (record.source.get("model"), record.model.path, record.model.name)
    names = (base_model, *(name for name in named if isinstance(name, str)), *_named_in(lora, summary.metadata))
    return CardSource(
        lora,
        record.title or lora.stem,
        summary,
        _base_of(names, summary.metadata),
        _family(record.model.family, summary.family),
        _trigger(trigger or subject_words(record), summary.metadata),
        (*shown, *added),
        record.model.pipeline,
        controls,
        record.consequences.strengths,
        tuple(thumbnail for thumbnail in small[:_MOST_TRAINING] if is_own(thumbnail, folder)) if with_training else (),
        frozenset({*(image.caption for image in images), *(sample.caption or "" for sample in record.samples)}),
    )


def _chosen(run: LoggedRun, step: int | None) -> tuple[Path, tuple[DrawnPicture, ...]]:
    """The LoRA of a run, and what was drawn with it."""
    folder, record = run.folder, run.record
    saved = loras_of_run(folder, record.title)
    last = lora_of_run(folder, record)
    if last is None or not saved:
        raise OptionError(f"{folder} has no LoRA yet; train it first")
    evaluation = read_evaluation(folder / EVALUATION)
    best = (
        None
        if evaluation is None or evaluation.verdict.best is None
        else evaluation.loras[evaluation.verdict.best].file
    )
    if step is not None:
        lora = next((path for path, of in saved if of == step), None)
        if lora is None:
            steps = ", ".join(f"{of:,}" for of in dict.fromkeys(of for _, of in saved))
            raise OptionError(f"{folder} has no LoRA of step {step:,}; choose one of {steps}")
    else:
        lora = next((path for path, _ in saved if path.name == best), last)
    drawn = (
        None
        if evaluation is None
        else next((evaluated for evaluated in evaluation.loras if evaluated.file == lora.name), None)
    )
    if evaluation is not None and drawn is not None:
        named = [
            (prompt, folder / EVALUATION / file)
            for prompt, file in zip(evaluation.prompts, drawn.pictures, strict=True)
        ]
        seed: int | None = evaluation.seed
    else:
        of = next(of for path, of in saved if path == lora) - record.steps_before
        event = run.view.previews.get((of, 1.0))
        pairs = [] if event is None else zip(event.prompts, event.paths, strict=False)
        named = [(prompt, folder / preview_file(path)) for prompt, path in pairs]
        recorded = record.config.get("seed")
        seed = recorded if isinstance(recorded, int) else None
    return lora, tuple(DrawnPicture(path, prompt, seed) for prompt, path in named if is_own(path, folder))


def _named_in(lora: Path, metadata: Mapping[str, str]) -> list[str]:
    """What a file, or PEFT's configuration beside it, calls its base model."""
    found: list[object] = [metadata.get("ss_sd_model_name")]
    texts = [metadata.get("lora_adapter_metadata", "")]
    if lora.is_dir():
        with contextlib.suppress(OSError):
            texts.append(read_regular(lora / "adapter_config.json").decode("utf-8", "replace"))
    for text in texts:
        try:
            fields = parse_foreign_json(text) if text else {}
        except ValueError:
            continue
        if isinstance(fields, dict):
            found += [value for key, value in fields.items() if key.rpartition(".")[2] == "base_model_name_or_path"]
    return [name for name in found if isinstance(name, str) and name]


def _base_of(names: Sequence[str], metadata: Mapping[str, str]) -> BaseModel:
    """The base model by the first of its names that tells it, else the usual one of the kind that ai-toolkit wrote."""
    names = [name for name in names if name]
    kind = _AI_TOOLKIT_KINDS.get(metadata.get("ss_base_model_version", ""))
    if not names and kind is not None:
        release = releases()[kind][1]
        return BaseModel(release.title, _ids(release), release, is_usual=True)
    for name in names:
        for release in (release for _, release in releases().values()):
            if release.distilled and _alike(name, release.distilled):
                return BaseModel(release.distilled, (release.distilled,), release)
            if _alike(name, release.file) or _alike(name, release.card):
                return BaseModel(release.title, _ids(release), release)
        if is_hub_id(name):
            return BaseModel(name, (name,))
    return BaseModel(PureWindowsPath(names[0]).name if names else "")


_AI_TOOLKIT_KINDS = {
    "anima": "anima",
    "chroma": "chroma1-hd",
    "flux.1": "flux.1-dev",
    "flux2_klein_4b": "flux.2-klein-4b",
    "krea2": "krea-2",
    "qwen_image": "qwen-image",
    "sd_1.5": "sd1.5",
    "sdxl_1.0": "sdxl",
}
"""Names of releases by `ss_base_model_version` of ai-toolkit, whose files do not name the model itself."""


def _ids(release: Release) -> tuple[str, ...]:
    return (release.distilled, release.card) if release.distilled else (release.card,)


def _alike(name: str, known: str) -> bool:
    """Whether names of files or ids are one model's, in whatever number format."""

    def plain(text: str) -> str:
        last = PureWindowsPath(text).name
        stem = PurePath(last).stem if PurePath(last).suffix.casefold() in MODEL_EXTENSIONS else last
        return letters(_FORMAT.sub("", stem))

    return plain(name) == plain(known)


_FORMAT = re.compile(r"[._-](bf16|fp16|fp32|fp8|e4m3fn|e5m2|scaled|mixed|emaonly|pruned)(?=[._-]|$)", re.IGNORECASE)


def is_hub_id(name: str) -> bool:
    """Whether it is an id of the hub, and not a file."""
    return (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
        and PurePath(name).suffix.casefold() not in MODEL_EXTENSIONS
        and not Path(name).exists()
    )


def _family(name: str, title: str | None) -> Family | None:
    """By the name in a record, else by the title that the file was recognised by."""
    if name in FAMILIES:
        return FAMILIES[name]
    return next((family for _, family in FAMILIES.items() if family.title == title), None)


def _trigger(known: str, metadata: Mapping[str, str]) -> str:
    """The trigger on one line: in the front matter, a line of dashes would end it even within a quotation."""
    return one_line(known or metadata.get("modelspec.trigger_phrase", "") or _ai_toolkit_trigger(metadata))


def _ai_toolkit_trigger(metadata: Mapping[str, str]) -> str:
    """ai-toolkit's trigger, which it writes as the only tag of the only folder."""
    try:
        frequencies = parse_foreign_json(metadata.get("ss_tag_frequency", ""))
    except ValueError:
        return ""
    if not ("software" in metadata and isinstance(frequencies, dict) and len(frequencies) == 1):
        return ""
    folder, tags = frequencies.popitem()
    word = folder.removeprefix("1_")
    return word if tags == {word: 1} else ""


def one_line(text: str) -> str:
    """Text of any origin on one line."""
    return " ".join(printable(text, keep="\n").split())


def _given_picture(path: Path) -> DrawnPicture:
    """A picture with the prompt and the seed in its file, as A1111 writes them."""
    try:
        with Image.open(path) as opened:
            text = opened.info.get("parameters", "")
    except UNREADABLE as error:
        raise OptionError(f"--picture must be a picture, but {path} cannot be read; choose another one") from error
    text = text if isinstance(text, str) else ""
    prompt, _, rest = text.partition("\nNegative prompt:")
    if not rest:
        prompt, _, rest = text.rpartition("\nSteps:")
    seed = re.search(r"\bSeed: (\d{1,20})\b", rest)
    return DrawnPicture(path, prompt.strip(), int(seed[1]) if seed else None)
