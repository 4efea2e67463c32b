"""Models and parts of models in ComfyUI's folders, recognised by the headers of their files.

A model that lacks text encoders or an autoencoder is completed with files that fit it. Of several, the one with the
usual name is taken, then the one in the largest precision, then the first by name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.families.base import Family
from lorasmith.families.files.checkpoint import OriginalCheckpoint
from lorasmith.families.loading import family_of, load_model, recognise, with_parts
from lorasmith.families.locating import BUILT_IN, ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDERS, ModelFiles
from lorasmith.families.model import Model
from lorasmith.families.parts.autoencoders import recognised_autoencoder
from lorasmith.families.parts.embeddings import EmbeddingFiles
from lorasmith.families.parts.encoders import ENCODERS, recognised_encoder
from lorasmith.families.slots import AutoencoderSlot, EncoderSlot, encoder_title

# What reading an odd or damaged header may raise.
_UNREADABLE = (ModelError, ArithmeticError, LookupError, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class FoundFile:
    """A file in the model folders; at most one of `family`, `encoder` and `autoencoder` is set."""

    path: Path  # the file, or a diffusers folder
    place: str  # its folder, relative to the base folder if it is in it
    size_bytes: int = 0
    precision: str = ""  # number format of most of its weights, such as `bf16` or `Q4_K`; empty for folders
    bits: float = 0.0  # mean size of a number
    family: Family | None = None  # of its denoiser
    parts: frozenset[str] = frozenset()  # the components besides the denoiser that it holds
    encoder: str | None = None  # kind of the text encoder that it is
    autoencoder: tuple[str, int] | None = None  # kind and channels of the autoencoder that it is
    fault: str = ""  # why it is none of these, in a sentence; empty if it is one
    is_damaged: bool = False  # whether it cannot be read at all

    @cached_property
    def width(self) -> int | None:
        """Width of the text encoder's states; None if it is not an encoder that can be built."""
        if self.encoder is None:
            return None
        try:
            return ENCODERS[self.encoder].width_in(OriginalCheckpoint(self.path).shapes_under(""))
        except _UNREADABLE:
            return None


@dataclass(frozen=True)
class FoundPart:
    """A part that a model lacked, and the file that it is taken from."""

    component: str
    path: Path  # of the file, as in `FoundFile`
    place: str
    choices: int  # number of files that fit

    @property
    def title(self) -> str:
        """`text encoder`, `image encoder` or `autoencoder`."""
        return "autoencoder" if self.component == "vae" else encoder_title(self.component)

    @property
    def line(self) -> str:
        """The part and its file in words."""
        others = f", one of {self.choices} that fit" if self.choices > 1 else ""
        return f"{self.title}: {self.path.name} (found in {self.place}{others})"


@dataclass(frozen=True)
class Completed:
    """A model with the parts found for it."""

    model: Model
    files: ModelFiles  # where all its parts come from
    found: tuple[FoundPart, ...] = ()
    notes: tuple[str, ...] = ()  # files that could not be read, one sentence each


def load_completed(files: ModelFiles, folders: Folders | None = None) -> Completed:
    """Load a model, and the parts that it lacks from `folders`."""
    if folders is None:
        return Completed(_loaded(files), files)
    files = ModelFiles(
        in_folders(files.model, folders, MODEL_FOLDERS),
        tuple(in_folders(source, folders, ENCODER_FOLDERS) for source in files.text_encoders),
        files.vae and in_folders(files.vae, folders, VAE_FOLDERS),
        files.edit,
    )
    found = completed(_loaded(files), files, folders)
    return replace(found, model=replace(found.model, embeddings=EmbeddingFiles(folders)))


def _loaded(files: ModelFiles) -> Model:
    return load_model(files.model, text_encoders=files.text_encoders, vae=files.vae, edit=files.edit)


def in_folders(source: str, folders: Folders, kinds: Sequence[str]) -> str:
    """The path of a model that is named relative to folders of `kinds`; the source itself if it names none."""
    if source == BUILT_IN or Path(source).exists():
        return source
    for kind in kinds:
        try:
            return str(folders.find(kind, source))
        except ModelError:
            continue
    return source


def completed(model: Model, files: ModelFiles, folders: Folders) -> Completed:
    """The model with the text encoders and the autoencoder that it lacks, as far as `folders` has files that fit."""
    family, components = model.family, model.components
    slots, there_already = model.encoder_slots, components.modules()
    encoders = [name for name in slots if name not in there_already]
    kinds = [*(ENCODER_FOLDERS if encoders else ()), *(VAE_FOLDERS if components.vae is None else ())]
    if not kinds:
        return Completed(model, files)
    there = list(scanned(folders, kinds))
    found = []
    for component in encoders:
        width = family.encoder_width(components.denoiser, component)
        found.append(best_encoder(there, component, slots[component], width))
    if components.vae is None:
        found.append(best_autoencoder(there, family.autoencoder))
    parts = [part for part in found if part is not None]
    more = tuple(str(part.path) for part in parts if part.component != "vae")
    vae = next((str(part.path) for part in parts if part.component == "vae"), None)
    if parts:
        model = with_parts(model, text_encoders=more, vae=vae)
        files = replace(files, text_encoders=(*files.text_encoders, *more), vae=files.vae or vae)
    return Completed(
        model,
        files,
        tuple(parts),
        tuple(f"{file.path.name} in {file.place} is skipped: {file.fault}." for file in there if file.is_damaged),
    )


def best_encoder(files: Sequence[FoundFile], component: str, slot: EncoderSlot, width: int | None) -> FoundPart | None:
    """The file to take for a text encoder; None if none fits."""
    fitting = [file for file in files if file.encoder == slot.kind and (width is None or file.width == width)]
    return _preferred(fitting, component, slot.usual_file)


def best_autoencoder(files: Sequence[FoundFile], slot: AutoencoderSlot) -> FoundPart | None:
    """The file to take for the autoencoder of a family with this slot; None if none fits."""
    return _preferred(
        [file for file in files if file.autoencoder == (slot.kind, slot.channels)], "vae", slot.usual_file
    )


def scanned(folders: Folders, kinds: Sequence[str]) -> Iterator[FoundFile]:
    """The files in folders of `kinds`, each once, with what they are. No tensor is read, and no file is fatal."""
    seen: set[Path] = set()
    for kind in kinds:
        for name in folders.files(kind):
            try:
                path = folders.find(kind, name)
            except ModelError:  # a link whose file is gone
                continue
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield recognised_file(path, _place(path, folders))


def _preferred(fitting: Sequence[FoundFile], component: str, usual_file: str) -> FoundPart | None:
    if not fitting:
        return None
    usual = usual_file.casefold()
    best = min(fitting, key=lambda file: (file.path.name.casefold() != usual, -file.bits, file.path.name.casefold()))
    return FoundPart(component, best.path, best.place, len(fitting))


def _place(path: Path, folders: Folders) -> str:
    if path.is_relative_to(BUILT_IN_BASE):
        return "the package"
    base = folders.base
    return path.parent.relative_to(base).as_posix() if path.is_relative_to(base) else str(path.parent)


def recognised_file(path: Path, place: str) -> FoundFile:
    """A file or diffusers folder with what it is."""
    size = 0
    try:
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        if path.is_dir():
            family = family_of(path)
            there = frozenset(name for name in family.slots if (path / name).is_dir())
            return FoundFile(path, place, size, family=family, parts=there)
        checkpoint = OriginalCheckpoint(path)
        shapes = checkpoint.shapes_under("")
        encoder, autoencoder = recognised_encoder(shapes), recognised_autoencoder(shapes)
        channels = None if autoencoder is None else (autoencoder.name, autoencoder.channels(shapes))
    except _UNREADABLE as error:
        return FoundFile(path, place, size, fault=_sentence(error), is_damaged=True)
    precision, bits = _precision(checkpoint)
    found = FoundFile(path, place, size, precision, bits)
    if encoder is not None:
        return replace(found, encoder=encoder.name)
    if channels is not None:
        return replace(found, autoencoder=channels)
    try:
        family = recognise(checkpoint)
    except _UNREADABLE as error:
        return replace(found, fault=_sentence(error))
    inside = (name for name, slot in family.slots.items() if checkpoint.prefix_of(slot.prefixes) is not None)
    return replace(found, family=family, parts=frozenset(inside))


def _precision(checkpoint: OriginalCheckpoint) -> tuple[str, float]:
    """The number format of most of a file's bytes, and the mean bits of a number."""
    sizes: dict[str, int] = defaultdict(int)
    for number_format, size in checkpoint.file.stored.values():
        sizes[number_format] += size
    numbers = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    return max(sizes, key=lambda kind: sizes[kind], default=""), 8 * sum(sizes.values()) / max(1, numbers)


def _sentence(error: Exception) -> str:
    return str(error).removesuffix(".") if isinstance(error, ModelError) else "its header cannot be understood"
