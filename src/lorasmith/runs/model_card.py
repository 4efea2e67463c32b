"""A folder to pass a LoRA on with, as the Hugging Face hub expects a model.

    README.md                        the card: metadata for the hub, then what users need (`card_text`)
    NAME.safetensors                 the LoRA as it is, or converted if diffusers does not load it so
    NAME.png                         its first picture, where model browsers look for one
    NAME.civitai.info, NAME.json     metadata for model browsers (`runs.sidecars`)
    images/1.webp                    pictures that it drew, without what their files say
    training/1.webp                  small training pictures, on request alone

Facts are those of the run's record and of the LoRA's metadata, which any trainer may have written (`card_source`); what
neither says is left out. Both are untrusted, so they name no file here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from lorasmith.core.adapter_state import DIFFUSERS
from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import LoraError, ModelError, OptionError, OutputError
from lorasmith.core.files import atomic_folder, read_regular, write_atomic
from lorasmith.core.folders import RUN_RECORD, safe_name
from lorasmith.data.clips import open_still
from lorasmith.families.locating import BUILT_IN
from lorasmith.formats.acceptance import shortfalls
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.inspect import describe, main_layout
from lorasmith.formats.lora_file import read_lora_tensors
from lorasmith.formats.metadata import THUMBNAIL, private_entries, without_private
from lorasmith.report.pictures import encoded, webp
from lorasmith.runs.card_source import CardSource, DrawnPicture, card_source
from lorasmith.runs.card_text import TEMPLATE, card_text, licence_of
from lorasmith.runs.sidecars import write_sidecars
from lorasmith.toolbox.convert import convert_lora, named_lora
from lorasmith.toolbox.lora_files import free_target

CARD = "README.md"
_EDGE, _BROWSED_EDGE = 1024, 512  # longer edge in pixels of pictures, and of the one for model browsers
_MOST_PICTURES = 8


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


@typed_arguments
def write_card(
    source: Path | str,
    output: Path | str | None = None,
    *,
    repository: str = "",
    step: int | None = None,
    base_model: str = "",
    trigger: str = "",
    licence: str = "",
    model: str | None = None,
    pictures: Sequence[Path | str] = (),
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
        model: base model whose names tell whether diffusers loads the file; the released one of its family if None.
        pictures: further pictures; their prompts and seeds are read from the files, in A1111's form.
        private_captions: leave folders, captions, prompts and the unknown out of the file's metadata, and captions off
            the card.
        with_training_pictures: include small versions of a run's training pictures.
        overwrite: replace an earlier card.

    Raises OptionError, LoraError, ModelError, OutputError and, for a damaged record, TrainingError.
    """
    source = Path(source)
    facts = card_source(
        source,
        step=step,
        base_model=base_model,
        trigger=trigger,
        model=model,
        pictures=[Path(picture) for picture in pictures],
        with_training_pictures=with_training_pictures,
    )
    if output is None:
        is_run = (source / RUN_RECORD).is_file()
        output = source / "card" if is_run else source.with_name(f"{facts.title}-card")
    target = free_target(Path(output), overwrite=overwrite)
    if target.exists() and not is_card(target):
        raise OutputError(f"{target} is no card of a LoRA, and only a card is replaced; choose another --output")
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", licence):
        raise OptionError(f"a licence must be the hub's name of it, such as apache-2.0, got {licence!r}; correct it")
    shown = [picture for picture in facts.pictures if not (private_captions and picture.prompt in facts.captions)]
    stem, notes = safe_name(facts.title), list[str]()
    if facts.base.name == BUILT_IN:  # not the released model of its family
        model = model or BUILT_IN
    with atomic_folder(target) as folder:
        lora, loads = _put_lora(facts.lora, folder / f"{stem}.safetensors", model, notes, private=private_captions)
        if facts.controls and not with_training_pictures:
            _drop_thumbnail(lora)
        kept = _put_pictures(folder, stem, shown[:_MOST_PICTURES])
        training = _put_training(folder, facts.training)
        write_sidecars(lora, facts.family, trigger=facts.trigger)
        written = describe(lora)
        place = PurePosixPath(repository or target.name) / lora.name
        write_atomic(folder / CARD, card_text(facts, licence, kept, training, written, place, loads=loads))
    return Card(
        target,
        target / lora.name,
        facts.base.ids,
        facts.trigger,
        licence_of(facts.base, licence).get("license", ""),
        len(kept),
        tuple(_missing(facts, licence, kept)),
        tuple(notes),
        private_entries(written.metadata),
    )


def is_card(folder: Path) -> bool:
    """Whether the folder is one that `write_card` writes."""
    try:
        return f"- {TEMPLATE}" in read_regular(folder / CARD).decode("utf-8", "replace")
    except (OSError, ValueError):
        return False


def _put_lora(
    source: Path, target: Path, model: str | None, notes: list[str], *, private: bool
) -> tuple[Path, bool | None]:
    """Write the LoRA, and whether diffusers loads all of it; None if its model's names are not known."""
    loads: bool | None
    try:
        state, names = named_lora(source, model)
        layout = main_layout(list(read_lora_tensors(source)[0]))
        loads = not source.is_dir() and all(
            shortfall.program != DIFFUSERS for shortfall in shortfalls(state, layout, names)
        )
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


def _put_pictures(folder: Path, stem: str, pictures: Sequence[DrawnPicture]) -> list[DrawnPicture]:
    """Write pictures, drawn anew so that nothing of their files is left; paths are those in the folder."""
    kept = []
    for number, picture in enumerate(pictures, 1):
        file = PurePosixPath("images") / f"{number}.webp"
        (folder / "images").mkdir(exist_ok=True)
        opened = open_still(picture.path, _EDGE)
        write_atomic(folder / file, webp(opened))
        if number == 1:
            opened.thumbnail((_BROWSED_EDGE, _BROWSED_EDGE), Image.Resampling.LANCZOS)
            write_atomic(folder / f"{stem}.png", encoded(opened, "png"))
        kept.append(replace(picture, path=Path(file)))
    return kept


def _put_training(folder: Path, pictures: Sequence[Path]) -> list[str]:
    files = [f"training/{number}.webp" for number in range(1, len(pictures) + 1)]
    if files:
        (folder / "training").mkdir()
    for file, path in zip(files, pictures, strict=True):
        write_atomic(folder / file, webp(open_still(path, _BROWSED_EDGE)))
    return files


def _missing(source: CardSource, licence: str, pictures: Sequence[DrawnPicture]) -> list[str]:
    base = source.base
    known = f", and {base.name} is not one that is known" if base.name else ""
    lacking = [] if base.ids else [f"The base model's id on the hub is not known{known}; --base-model names it"]
    if base.is_usual:
        kind = source.summary.metadata["ss_base_model_version"]
        lacking = [
            f"The file names its kind of model alone, {kind}, so {base.ids[0]} is taken; --base-model names another"
        ]
    lacking += [] if source.trigger else ["No trigger is known; --trigger names it"]
    lacking += [] if licence_of(base, licence) else ["The licence of the base model is not known; --license names it"]
    return lacking + ([] if pictures else ["There are no pictures that it drew; --picture adds some"])
