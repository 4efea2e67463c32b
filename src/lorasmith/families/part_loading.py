"""Text encoders and autoencoders from files and folders of their own, recognised by their tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorasmith.core.errors import ModelError
from lorasmith.core.extras import model_packages
from lorasmith.core.folders import pipeline_index
from lorasmith.core.pretrained import prepare_libraries
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.files.checkpoint import (
    CheckpointShapes,
    OriginalCheckpoint,
    folder_source,
    open_tensors,
    weight_files,
)
from lorasmith.families.files.original_weights import PartSource
from lorasmith.families.known import looks_like
from lorasmith.families.locating import located
from lorasmith.families.model import Autoencoder, TextEncoder
from lorasmith.families.parts.autoencoders import AutoencoderKind, recognised_autoencoder
from lorasmith.families.parts.encoders import EMBEDDED, EncoderKind, TokenizerSource, recognised_encoder
from lorasmith.families.slots import IMAGE_ENCODER, EncoderSlot, TextEncoders, encoder_title


@model_packages("a text encoder")
def load_text_encoder(paths: Sequence[str | os.PathLike[str]], clip_type: str) -> TextEncoder:
    """Text encoders without a denoiser."""
    prepare_libraries()
    places = [located(path) for path in paths]
    family = encoded_family(places, clip_type)
    found = [encoders_in(path, family) for path in places]
    modules = {name: module for part in found for name, module in part.modules.items()}
    tokenizers = {name: tokenizer for part in found for name, tokenizer in part.tokenizers.items()}
    in_order = {name: modules[name] for name in family.text_encoders if name in modules}
    return TextEncoder(family, TextEncoders(in_order, tokenizers), " and ".join(path.stem for path in places))


def encoded_family(places: Sequence[Path], clip_type: str) -> Family:
    """The family that text encoders in files or folders encode for. Raises ModelError if no family has these.

    Headers alone are read.
    """
    encoders = {kind.name: (kind, shapes) for path in places for kind, shapes in encoder_kinds(path)}
    kinds = set(encoders)
    fitting = [
        family for _, family in FAMILIES.items() if kinds <= {slot.kind for slot in family.text_encoders.values()}
    ]
    sized = {slot.kind for candidate in fitting for slot in candidate.text_encoders.values() if slot.widths} & kinds
    found_widths = {name: encoders[name][0].width_in(encoders[name][1]) for name in sized}

    def is_released_size(family: Family) -> bool:
        return any(found_widths.get(slot.kind) in slot.widths for slot in family.text_encoders.values())

    # ComfyUI ignores a type that is not one of an encoder's.
    fitting.sort(
        key=lambda family: (not is_released_size(family), clip_type not in family.clip_types, len(family.text_encoders))
    )
    if not kinds or not fitting:
        names = " and ".join(path.name for path in places)
        held = f"the text encoders {' and '.join(sorted(kinds))}" if kinds else f"{title_of(places[0])}"
        raise ModelError(
            f"{names} must hold the text encoders of one model, but is {held}; choose the files that belong together"
        )
    return fitting[0]


@model_packages("an image encoder")
def load_image_encoder(path: Path) -> nn.Module:
    """An image encoder without a denoiser, from a file of its own."""
    prepare_libraries()
    for kind, part in ((recognised_encoder(part.shapes), part) for part in _parts(path, (IMAGE_ENCODER,), ())):
        if kind is not None and kind.title == encoder_title(IMAGE_ENCODER):
            return kind.build(part.source({}))
    raise ModelError(f"{path} must hold an image encoder, but is {title_of(path)}; choose clip_vision_h.safetensors")


@model_packages("an autoencoder")
def load_autoencoder(path: str | os.PathLike[str]) -> Autoencoder:
    """An autoencoder without a denoiser, from a file or folder of its own or a checkpoint."""
    prepare_libraries()
    place = located(path)
    slots = [family.autoencoder for _, family in FAMILIES.items()]
    for part in _parts(place, ("vae",), [prefix for slot in slots for prefix in slot.prefixes]):
        kind = recognised_autoencoder(part.shapes)
        if kind is not None:
            # Constants of its latents are the denoiser's affair, so any slot of its kind gives the right network.
            settings = next((slot.settings for slot in slots if slot.kind == kind.name), {})
            return Autoencoder(kind.build(part.source(settings)), kind.name, place.stem)
    raise ModelError(f"{place} must hold an autoencoder, but is {title_of(place)}; choose a file of models/vae")


def autoencoder_in(path: Path, family: Family) -> nn.Module:
    """The autoencoder of a family in a file or folder. Raises ModelError as `autoencoder_part`."""
    kind, part = autoencoder_part(path, family)
    return kind.build(part.source(family.autoencoder.settings))


def autoencoder_part(path: Path, family: Family) -> tuple[AutoencoderKind, PartCandidate]:
    """The autoencoder of a family in a file or folder, of which headers alone are read.

    Raises ModelError if it holds none, or that of another family.
    """
    slot = family.autoencoder
    for part in _parts(path, ("vae",), slot.prefixes):
        kind = recognised_autoencoder(part.shapes)
        if kind is None:
            continue
        channels = kind.channels(part.shapes)
        if (kind.name, channels) != (slot.kind, slot.channels):
            raise ModelError(
                f"{path} is {_autoencoder_title(kind.name, channels)}, but {family.title} has "
                f"{_autoencoder_title(slot.kind, slot.channels)} (its file is usually called {slot.usual_file})"
            )
        return kind, part
    raise ModelError(f"{path} must hold an autoencoder, but is {title_of(path)}; give the file {slot.usual_file}")


def encoders_in(path: Path, family: Family, slots: Mapping[str, EncoderSlot] | None = None) -> TextEncoders:
    """The encoders of a family in a file or folder; arguments and errors as for `encoder_parts`."""
    modules: dict[str, nn.Module] = {}
    tokenizers: dict[str, Any] = {}
    for component, (kind, part) in encoder_parts(path, family, slots).items():
        modules[component] = kind.build(part.source((slots or family.text_encoders)[component].settings))
        if component in family.text_encoders:
            tokenizers[component] = kind.tokenizer(modules[component], part.tokenizer)
    return TextEncoders(modules, tokenizers)


def encoder_parts(
    path: Path, family: Family, slots: Mapping[str, EncoderSlot] | None = None
) -> dict[str, tuple[EncoderKind, PartCandidate]]:
    """The encoders in a file or folder by component name; headers alone are read.

    `slots` are those of a model, by default the text encoders of the family. Raises ModelError if it holds none, or
    those of another family.
    """
    slots = slots or family.text_encoders
    prefixes = [prefix for slot in slots.values() for prefix in slot.prefixes]
    found: dict[str, tuple[EncoderKind, PartCandidate]] = {}
    for part in _parts(path, slots, prefixes):
        kind = recognised_encoder(part.shapes)
        if kind is None:
            continue
        component = next((name for name, slot in slots.items() if slot.kind == kind.name), None)
        if component is None:
            needed = " and ".join(f"{slot.kind} (usually {slot.usual_file})" for slot in slots.values())
            raise ModelError(
                f"{path} is the {kind.title} {kind.name}, but {family.title} has {needed}; give one of these"
            )
        found[component] = kind, part
    if not found:
        needed = " or ".join(slot.usual_file for slot in slots.values())
        raise ModelError(f"{path} must hold a text encoder, but is {title_of(path)}; give the file {needed}")
    return found


def encoder_kinds(path: Path) -> list[tuple[EncoderKind, CheckpointShapes]]:
    """The kinds of the text encoders that a file or folder holds, with the shapes of each."""
    slots = [slot for _, family in FAMILIES.items() for slot in family.text_encoders.values()]
    folders = [name for _, family in FAMILIES.items() for name in family.text_encoders]
    parts = _parts(path, dict.fromkeys(folders), [prefix for slot in slots for prefix in slot.prefixes])
    found = ((recognised_encoder(part.shapes), part.shapes) for part in parts)
    return [(kind, shapes) for kind, shapes in found if kind is not None]


def tokenizer_source(checkpoint: OriginalCheckpoint) -> TokenizerSource:
    """Where the tokenizer of an encoder in a file may be."""
    names = (name for name in checkpoint.shapes if name.rpartition(".")[2] in EMBEDDED)
    embedded = {name.rpartition(".")[2]: checkpoint.vector(name) for name in names}
    return TokenizerSource(file=checkpoint.path, embedded=embedded)


def tokenizer_folder(folder: Path, component: str) -> TokenizerSource:
    """The tokenizer of an encoder in a diffusers folder, which is in `tokenizer`, `tokenizer_2` and so on."""
    place = folder / component.replace("text_encoder", "tokenizer")
    if not place.is_dir():
        raise ModelError(f"{folder} must hold a folder {place.name} but does not; it is incomplete, so get it again")
    return TokenizerSource(folder=place)


def title_of(path: Path) -> str:
    """Description of a file's or folder's content, for messages that refuse it."""
    if path.is_dir():
        return "a folder without one"
    checkpoint = OriginalCheckpoint(path)
    family = next((family for _, family in FAMILIES.items() if family.recognises(checkpoint.denoiser_shapes)), None)
    if family is not None:
        return f"a model of the family {family.title}"
    if (part := part_title(checkpoint.shapes)) is not None:
        return part
    unsupported = looks_like(checkpoint.denoiser_shapes)
    return "of no known kind" if unsupported is None else unsupported.title


def part_title(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Description of a file with these tensors if it is a text encoder or autoencoder, else None."""
    if (encoder := recognised_encoder(shapes)) is not None:
        return f"the {encoder.title} {encoder.name}"
    if (autoencoder := recognised_autoencoder(shapes)) is not None:
        return _autoencoder_title(autoencoder.name, autoencoder.channels(shapes))
    return None


def _autoencoder_title(kind: str, channels: int) -> str:
    return f"an autoencoder of kind {kind} with {channels} channels"


@dataclass(frozen=True)
class PartCandidate:
    """Tensors in a file or folder that may be one part of a model."""

    shapes: CheckpointShapes
    source: Callable[[Mapping[str, Any]], PartSource]
    tokenizer: TokenizerSource


def _parts(path: Path, subfolders: Iterable[str], prefixes: Iterable[str]) -> Iterator[PartCandidate]:
    """Candidates in a diffusers folder under `subfolders`, or in a file without a prefix or with one of `prefixes`."""
    if path.is_dir():
        whole = pipeline_index(path) is not None
        for folder in [path / name for name in subfolders if (path / name).is_dir()] if whole else [path]:
            shapes = CheckpointShapes(open_tensors(*weight_files(folder)).shapes)
            place = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
            tokenizer = TokenizerSource(folder=place if place.is_dir() and place != folder else None)
            yield PartCandidate(shapes, lambda _, folder=folder: folder_source(folder), tokenizer)  # type: ignore[misc]
        return
    checkpoint = OriginalCheckpoint(path)
    tokenizer = tokenizer_source(checkpoint)
    for prefix in dict.fromkeys(("", *prefixes)):

        def source(settings: Mapping[str, Any], prefix: str = prefix) -> PartSource:
            return PartSource(str(path), checkpoint.load(prefix), settings)

        yield PartCandidate(checkpoint.shapes_under(prefix), source, tokenizer)
