"""A folder to pass a LoRA on with, as the Hugging Face hub expects a model.

    README.md                        the card: metadata for the hub, then what users need
    NAME.safetensors                 the LoRA as it is, or converted if diffusers does not load it so
    NAME.png                         its first picture, where model browsers look for one
    NAME.civitai.info, NAME.json     metadata for model browsers (`runs.sidecars`)
    images/1.webp                    pictures that it drew, without what their files say
    training/1.webp                  small training pictures, on request alone

Facts are those of the run's record and of the LoRA's metadata, which any trainer may have written; what neither says
is left out. Both are untrusted, so they name no file here, and their text is escaped.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from PIL import Image

from lorasmith.core.adapter_state import DIFFUSERS
from lorasmith.core.errors import LoraError, ModelError, OptionError, OutputError
from lorasmith.core.files import atomic_folder, read_regular, write_atomic
from lorasmith.core.folders import MODEL_EXTENSIONS, RUN_RECORD, safe_name
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import printable
from lorasmith.data.clips import open_still
from lorasmith.evaluation.evaluation_record import EVALUATION, read_evaluation
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.forms import letters
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.slots import Release
from lorasmith.formats.acceptance import shortfalls
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.inspect import LoraSummary, describe, main_layout
from lorasmith.formats.lora_file import read_lora_tensors
from lorasmith.formats.metadata import THUMBNAIL, private_entries, without_private
from lorasmith.report.pictures import UNREADABLE, encoded, webp
from lorasmith.runs.run_images import images_in, subject_words, thumbnail_of
from lorasmith.runs.run_log import LoggedRun, read_run
from lorasmith.runs.run_page import is_own, lora_of_run, loras_of_run
from lorasmith.runs.shelf import releases
from lorasmith.runs.sidecars import use_of, write_sidecars
from lorasmith.runs.view import preview_file
from lorasmith.toolbox.convert import convert_lora, named_lora
from lorasmith.toolbox.lora_files import free_target

CARD, TEMPLATE = "README.md", "template:sd-lora"
_OURS = "lorasmith.algorithm"  # an entry that all of ours have
_EDGE, _BROWSED_EDGE = 1024, 512  # longer edge in pixels of pictures, and of the one for model browsers
_MOST_PICTURES, _MOST_TRAINING = 8, 60
_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Card:
    """A folder that was written."""

    folder: Path
    lora: Path
    base_models: tuple[str, ...]  # ids on the hub, that which pictures are drawn with first
    trigger: str
    licence: str  # the hub's name for it; empty if unknown
    pictures: int
    missing: tuple[str, ...]  # what the card lacks, a sentence each with the remedy
    notes: tuple[str, ...]
    told: Mapping[str, str]  # entries of the file's metadata that tell of folders, captions, prompts or the unknown


@dataclass(frozen=True)
class _Picture:
    path: Path
    prompt: str
    seed: int | None


@dataclass(frozen=True)
class _Source:
    """A LoRA and what is known of it besides its file."""

    lora: Path
    title: str
    names: tuple[str, ...]  # of its base model, the surest first
    trigger: str = ""
    family: str = ""  # registered name; empty to recognise it by the file
    pipeline: str = ""
    controls: int = 0
    strengths: tuple[float, ...] = ()
    pictures: tuple[_Picture, ...] = ()
    training: tuple[Path, ...] = ()
    captions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Base:
    """A base model, as far as it is known."""

    name: str = ""
    ids: tuple[str, ...] = ()
    release: Release | None = None


def write_card(
    source: Path,
    output: Path | None = None,
    *,
    repository: str = "",
    step: int | None = None,
    base_model: str = "",
    trigger: str = "",
    licence: str = "",
    model: str | None = None,
    pictures: Sequence[Path] = (),
    private_captions: bool = False,
    with_training_pictures: bool = False,
    overwrite: bool = False,
) -> Card:
    """Write the folder for a run or for a LoRA file of any trainer.

    Args:
        source: the folder of a run, or a LoRA file or folder.
        output: the new folder; `card` in a run's, `NAME-card` beside a file if None.
        repository: where it will be on the hub, `owner/name`, for the example of use.
        step: which LoRA of a run; the recommended one, else the last one if None.
        base_model: id on the hub, where neither record nor file says it.
        trigger: likewise.
        licence: the hub's name for the licence, likewise.
        model: model whose names tell whether diffusers loads the file; the released one of its family if None.
        pictures: further pictures; their prompts and seeds are read from the files, in A1111's form.
        private_captions: leave folders, captions, prompts and the unknown out of the file's metadata, and captions off
            the card.
        with_training_pictures: include small versions of a run's training pictures.
        overwrite: replace an earlier card.

    Raises OptionError, LoraError, ModelError, OutputError and, for a damaged record, TrainingError.
    """
    found = _of_run(source, step, with_training_pictures) if (source / RUN_RECORD).is_file() else _of_file(source, step)
    if output is None:
        is_run = (source / RUN_RECORD).is_file()
        output = source / "card" if is_run else source.with_name(f"{found.title}-card")
    target = free_target(output, overwrite=overwrite)
    if target.exists() and not is_card(target):
        raise OutputError(f"{target} is no card of a LoRA, and only a card is replaced; choose another --output")
    if base_model and not _is_id(base_model):
        raise OptionError(f"a base model must be an id of the hub, such as owner/name, got {base_model!r}; correct it")
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", licence):
        raise OptionError(f"a licence must be the hub's name of it, such as apache-2.0, got {licence!r}; correct it")
    summary = describe(found.lora)
    # On one line, as a line of dashes ends the front matter, in a quotation too.
    trigger = _line(trigger or found.trigger or summary.metadata.get("modelspec.trigger_phrase", ""))
    base = _base_of((base_model, *found.names, *_named_in(found.lora, summary.metadata)))
    family = _family(found.family, summary.family)
    shown = [*found.pictures, *map(_given_picture, pictures)]
    if private_captions:
        shown = [one for one in shown if one.prompt not in found.captions]
    stem, notes = safe_name(found.title), list[str]()
    with atomic_folder(target) as folder:
        lora, loads = _put_lora(found.lora, folder / f"{stem}.safetensors", model, notes, private=private_captions)
        if found.controls and not with_training_pictures:
            _drop_thumbnail(lora)
        kept = _put_pictures(folder, stem, shown[:_MOST_PICTURES])
        training = _put_training(folder, found.training)
        write_sidecars(lora, family, trigger=trigger)
        written = describe(lora)
        is_ours = _OURS in written.metadata
        identity = _front_matter(found, base, family, trigger, licence, kept, loads=loads, is_ours=is_ours)
        place = PurePosixPath(repository or target.name) / lora.name
        body = _body(found, base, family, trigger, kept, training, written, place, loads=loads)
        text = yaml.safe_dump(identity, sort_keys=False, allow_unicode=True, width=1000)
        write_atomic(folder / CARD, f"---\n{text}---\n\n{body}")
    return Card(
        target,
        target / lora.name,
        base.ids,
        trigger,
        str(identity.get("license", "")),
        len(kept),
        tuple(_missing(base, trigger, identity, kept)),
        tuple(notes),
        private_entries(written.metadata),
    )


def is_card(folder: Path) -> bool:
    """Whether the folder is one that `write_card` writes."""
    try:
        return f"- {TEMPLATE}" in read_regular(folder / CARD).decode("utf-8", "replace")
    except (OSError, ValueError):
        return False


def _of_run(folder: Path, step: int | None, with_training: bool) -> _Source:
    run = read_run(folder)
    record = run.record
    lora, shown = _chosen(run, step)
    images = images_in(record.data)
    controls = 0 if record.consequences.are_pairs else max((one.controls for one in images), default=0)
    if controls and not with_training:  # they are edits of training pictures
        shown = ()
    small = [thumbnail_of(folder, index) for index, one in enumerate(images) if one.use == "trained"]
    given = record.source.get("model")
    return _Source(
        lora,
        record.title or lora.stem,
        tuple(one for one in (given, record.model.path, record.model.name) if isinstance(one, str) and one),
        subject_words(record),
        record.model.family,
        record.model.pipeline,
        controls,
        record.consequences.strengths,
        shown,
        tuple(one for one in small[:_MOST_TRAINING] if is_own(one, folder)) if with_training else (),
        frozenset({*(one.caption for one in images), *(sample.caption or "" for sample in record.samples)}),
    )


def _chosen(run: LoggedRun, step: int | None) -> tuple[Path, tuple[_Picture, ...]]:
    """The LoRA of a run, and what was drawn with it."""
    folder, record = run.folder, run.record
    saved = loras_of_run(folder, record.title)
    last = lora_of_run(folder, record)
    if last is None or not saved:
        raise OptionError(f"{folder} has no LoRA yet; train it first")
    found = read_evaluation(folder / EVALUATION)
    best = None if found is None or found.verdict.best is None else found.loras[found.verdict.best].file
    if step is not None:
        lora = next((path for path, of in saved if of == step), None)
        if lora is None:
            steps = ", ".join(f"{of:,}" for of in dict.fromkeys(of for _, of in saved))
            raise OptionError(f"{folder} has no LoRA of step {step:,}; choose one of {steps}")
    else:
        lora = next((path for path, _ in saved if path.name == best), last)
    drawn = None if found is None else next((one for one in found.loras if one.file == lora.name), None)
    if found is not None and drawn is not None:
        named = [
            (prompt, folder / EVALUATION / file) for prompt, file in zip(found.prompts, drawn.pictures, strict=True)
        ]
        seed: int | None = found.seed
    else:
        of = next(of for path, of in saved if path == lora) - record.steps_before
        event = run.view.previews.get((of, 1.0))
        pairs = [] if event is None else zip(event.prompts, event.paths, strict=False)
        named = [(prompt, folder / preview_file(path)) for prompt, path in pairs]
        recorded = record.config.get("seed")
        seed = recorded if isinstance(recorded, int) else None
    return lora, tuple(_Picture(path, prompt, seed) for prompt, path in named if is_own(path, folder))


def _of_file(path: Path, step: int | None) -> _Source:
    if step is not None:
        raise OptionError(f"--step chooses among the LoRAs of a run, and {path} is none; leave it out")
    if not path.exists():
        raise LoraError(f"there is no LoRA at {path}; name a file, or the folder of a run")
    return _Source(path, path.name if path.is_dir() else path.stem, ())


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
    return [one for one in found if isinstance(one, str) and one]


def _base_of(names: Sequence[str]) -> _Base:
    """The base model by the first of its names that tells it."""
    names = [one for one in names if one]
    for name in names:
        for release in (release for _, release in releases().values()):
            if release.distilled and _alike(name, release.distilled):
                return _Base(release.distilled, (release.distilled,), release)
            if _alike(name, release.file) or _alike(name, release.card):
                ids = (release.distilled, release.card) if release.distilled else (release.card,)
                return _Base(release.title, ids, release)
        if _is_id(name):
            return _Base(name, (name,))
    return _Base(PureWindowsPath(names[0]).name if names else "")


def _alike(name: str, known: str) -> bool:
    """Whether names of files or ids are one model's, in whatever number format."""

    def plain(text: str) -> str:
        last = PureWindowsPath(text).name
        stem = PurePath(last).stem if PurePath(last).suffix.casefold() in MODEL_EXTENSIONS else last
        return letters(_FORMAT.sub("", stem))

    return plain(name) == plain(known)


_FORMAT = re.compile(r"[._-](bf16|fp16|fp32|fp8|e4m3fn|e5m2|scaled|mixed|emaonly|pruned)(?=[._-]|$)", re.IGNORECASE)


def _is_id(name: str) -> bool:
    return (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
        and PurePath(name).suffix.casefold() not in MODEL_EXTENSIONS
        and not Path(name).exists()
    )


def _family(name: str, title: str | None) -> Family | None:
    """By the name in a record, else by the title that the file was recognised by."""
    if name in FAMILIES:
        return FAMILIES[name]
    return next((one for _, one in FAMILIES.items() if one.title == title), None)


def _given_picture(path: Path) -> _Picture:
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
    return _Picture(path, prompt.strip(), int(seed[1]) if seed else None)


def _put_lora(
    source: Path, target: Path, model: str | None, notes: list[str], *, private: bool
) -> tuple[Path, bool | None]:
    """Write the LoRA, and whether diffusers loads all of it; None if its model's names are not known."""
    loads: bool | None
    try:
        state, names = named_lora(source, model)
        layout = main_layout(list(read_lora_tensors(source)[0]))
        loads = not source.is_dir() and all(one.program != DIFFUSERS for one in shortfalls(state, layout, names))
    except (LoraError, ModelError) as error:
        if source.is_dir():
            raise
        loads = None
        notes.append(f"Whether diffusers loads it is not known: {error}")
    if loads is False:
        try:
            done = convert_lora(source, "diffusers", target, model, private=private)
            notes.append(f"It was converted into the layout of {done.layout}, which diffusers loads")
            return target, True
        except LoraError as error:
            if source.is_dir():
                raise
            notes.append(f"diffusers does not load it as it is, and it cannot be converted: {error}")
    if private:
        kept, metadata = read_safetensors(source)
        write_safetensors(target, kept, without_private(metadata))
    else:
        shutil.copyfile(source, target)
    return target, loads


def _drop_thumbnail(lora: Path) -> None:
    tensors, metadata = read_safetensors(lora)
    if THUMBNAIL in metadata:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        del tensors
        write_safetensors(lora, copies, {key: value for key, value in metadata.items() if key != THUMBNAIL})


def _put_pictures(folder: Path, stem: str, pictures: Sequence[_Picture]) -> list[_Picture]:
    """Write pictures, drawn anew so that nothing of their files is left; paths are those in the folder."""
    kept = []
    for number, one in enumerate(pictures, 1):
        file = PurePosixPath("images") / f"{number}.webp"
        (folder / "images").mkdir(exist_ok=True)
        opened = open_still(one.path, _EDGE)
        write_atomic(folder / file, webp(opened))
        if number == 1:
            opened.thumbnail((_BROWSED_EDGE, _BROWSED_EDGE), Image.Resampling.LANCZOS)
            write_atomic(folder / f"{stem}.png", encoded(opened, "png"))
        kept.append(replace(one, path=Path(file)))
    return kept


def _put_training(folder: Path, pictures: Sequence[Path]) -> list[str]:
    files = [f"training/{number}.webp" for number in range(1, len(pictures) + 1)]
    if files:
        (folder / "training").mkdir()
    for file, path in zip(files, pictures, strict=True):
        write_atomic(folder / file, webp(open_still(path, _BROWSED_EDGE)))
    return files


_LICENCES = {
    "Apache 2.0": "apache-2.0",
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
}
"""The hub's names of licences; all others are `other` there, with a name and a link."""


def _front_matter(
    found: _Source,
    base: _Base,
    family: Family | None,
    trigger: str,
    licence: str,
    pictures: Sequence[_Picture],
    *,
    loads: bool | None,
    is_ours: bool,
) -> dict[str, Any]:
    """The metadata that the hub reads, in its order of model cards."""
    draws_clips = family is not None and family.draws_clips
    task = f"{'image' if found.controls else 'text'}-to-{'video' if draws_clips else 'image'}"
    data: dict[str, Any] = {}
    if base.ids:
        data["base_model"] = base.ids[0] if len(base.ids) == 1 else list(base.ids)
    if loads is not False:
        data["library_name"] = "diffusers"
    data["pipeline_tag"] = task
    if licence:
        data["license"] = licence
    elif base.release is not None:
        title = base.release.licence
        data["license"] = _LICENCES.get(title, "other")
        if data["license"] == "other":
            data["license_name"] = re.sub(r"[^a-z0-9.]+", "-", title.casefold()).strip("-")
            data["license_link"] = f"{_HUB}/{base.release.card}"
    if trigger:
        data["instance_prompt"] = trigger
    library = ["diffusers"] if loads is not False else []
    data["tags"] = [task, *library, "lora", TEMPLATE, *(["lorasmith"] if is_ours else [])]
    if pictures:
        data["widget"] = [
            {
                "text": _line(one.prompt) or "-",
                **({} if one.seed is None else {"parameters": {"seed": one.seed}}),
                "output": {"url": one.path.as_posix()},
            }
            for one in pictures
        ]
    return data


def _body(
    found: _Source,
    base: _Base,
    family: Family | None,
    trigger: str,
    pictures: Sequence[_Picture],
    training: Sequence[str],
    written: LoraSummary,
    place: PurePosixPath,
    *,
    loads: bool | None,
) -> str:
    """The card below its metadata, in Markdown."""
    prompt = next((one.prompt for one in pictures if one.prompt), trigger or "a picture")
    where = base.ids[0] if base.ids else base.name
    use = use_of(
        Path(place),
        trigger=trigger,
        prompt=prompt,
        model=where or "the diffusers folder or hub id of the base model",
        model_title=base.name or (family.title if family else "its base model"),
        family=family.name if family else "",
        pipeline=found.pipeline,
        controls=found.controls,
    )
    parts = [f"# {_plain(found.title)}"]
    if pictures:
        parts.append("<Gallery />")
    about = [f"A LoRA for {_plain(family.title)}." if family else "A LoRA."]
    if base.ids:
        about.append(f"Base model: {', '.join(f'[{one}]({_HUB}/{one})' for one in base.ids)}.")
    elif base.name:
        about.append(f"Base model: {_code(base.name)}.")
    if len(base.ids) > 1:
        about.append(f"It was trained on {base.ids[-1]}; {base.ids[0]} is distilled from it and draws in few steps.")
    parts.append(" ".join(about))
    if trigger:
        parts += ["## Trigger", f"Write {_code(trigger)} in prompts."]
    strength = use.facts["Strength"]
    if found.strengths:
        strength = f"{min(found.strengths):g} to {max(found.strengths):g}; 0 changes nothing"
    parts += ["## Strength", f"{strength[:1].upper()}{strength[1:]}."]
    if pictures:
        parts += ["## Pictures", "\n".join(map(_picture_line, pictures))]
    parts.append("## Use")
    for program, (how, text) in use.programs.items():
        if program == "diffusers" and (loads is False or where == BUILT_IN):
            continue
        parts += [f"**{program}**: {_plain(how)}", _block(text, "python" if program == "diffusers" else "")]
    facts = _training_facts(written)
    if facts:
        parts += ["## Training", "\n".join(f"- {name}: {_plain(value)}" for name, value in facts.items())]
    if training:
        parts += ["## Training pictures", " ".join(f"![]({one})" for one in training)]
    lines = [f"- {_code(place.name)}, {written.size_bytes / 2**20:.1f} MiB"]
    lines += [f"- {name}: `{written.hashes[key]}`" for name, key in _HASHES.items()]
    parts += ["## File", "\n".join(lines)]
    if base.release is not None:
        link = f"[{base.release.card}]({_HUB}/{base.release.card})"
        parts += ["## Licence", f"The base model is under the {_plain(base.release.licence)} ({link})."]
    return "\n\n".join(parts) + "\n"


_HASHES = {"SHA-256": "sha256", "AutoV2": "autov2", "AutoV3": "autov3"}


def _picture_line(one: _Picture) -> str:
    seed = "" if one.seed is None else f", seed {one.seed}"
    return f"- ![]({one.path.as_posix()}) {_code(one.prompt) if one.prompt else 'no prompt recorded'}{seed}"


_RECORDED = {
    "Learning rate": ("ss_unet_lr", "ss_learning_rate"),
    "Optimizer": ("ss_optimizer",),
    "Schedule": ("ss_lr_scheduler",),
    "Batch size": ("ss_total_batch_size", "ss_batch_size_per_device"),
    "Resolution": ("ss_resolution", "modelspec.resolution"),
    "Pictures": ("ss_num_train_images",),
    "Epochs": ("ss_num_epochs",),
    "Seed": ("ss_seed",),
}
"""What headers say of a training that matters to who repeats it, the surest entry first."""


def _training_facts(written: LoraSummary) -> dict[str, str]:
    def listed(values: Mapping[Any, int]) -> str:
        return ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values if one is not None)

    facts = {"Algorithm": listed(written.algorithms), "Rank": listed(written.ranks), "Alpha": listed(written.alphas)}
    facts["Steps"] = f"{written.steps:,}" if written.steps else ""
    for name, keys in _RECORDED.items():
        values = (written.metadata.get(key, "") for key in keys)
        facts[name] = next((one for one in values if one and one != "None"), "")
    facts["Trainer"] = "Lorasmith" if _OURS in written.metadata else ""
    return {name: value for name, value in facts.items() if value}


def _missing(base: _Base, trigger: str, data: Mapping[str, Any], pictures: Sequence[_Picture]) -> list[str]:
    told = f", and {base.name} is not one that is known" if base.name else ""
    found = [] if base.ids else [f"The base model's id on the hub is not known{told}; --base-model names it"]
    found += [] if trigger else ["No trigger is known; --trigger names it"]
    found += [] if "license" in data else ["The licence of the base model is not known; --license names it"]
    found += [] if pictures else ["There are no pictures that it drew; --picture adds some"]
    return found


def _plain(text: str) -> str:
    """Text of any origin on one line, without a meaning in Markdown."""
    return re.sub(r"([\\`*_\[\]<>#|~&$])", r"\\\1", _line(text))


def _line(text: str) -> str:
    return " ".join(printable(text, keep="\n").split())


def _code(text: str) -> str:
    text = _line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text, keep=chr(10))}\n{fence}"
