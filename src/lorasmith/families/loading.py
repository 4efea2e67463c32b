"""Base models from files, folders and hubs. Families register themselves when this module is imported.

A model is parts: a denoiser, text encoders, an autoencoder. Each comes from a checkpoint that holds several of them, a
file of its own or a diffusers folder, and is recognised by its tensors. Weights stay on the memory-mapped files, in
their dtype, until they are placed on a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import ASSETS, MODEL_EXTENSIONS
from lorasmith.families.base import FAMILIES, Components, Defaults, Diffusion, Family
from lorasmith.families.files.checkpoint import LORA_MARKS, OriginalCheckpoint, Shapes
from lorasmith.families.files.diffusers_folder import PartFolder, read_json
from lorasmith.families.files.original_weights import PartSource, build, from_original_tensors
from lorasmith.families.known import looks_like
from lorasmith.families.model import Model
from lorasmith.families.parts.autoencoders import AUTOENCODERS, recognised_autoencoder
from lorasmith.families.parts.encoders import ENCODERS, recognised_encoder

__all__ = ["BUILT_IN", "built_in_models", "family_of", "load_model", "model_of_checkpoint", "recognise"]

BUILT_IN = "lorasmith-tiny"
"""Name of the small model in the package, for demonstrations and tests."""

_CHECKPOINTS = ASSETS / "models" / "checkpoints"
_SETTINGS = "lorasmith.json"  # in a diffusers folder: fields of `Defaults`


def built_in_models() -> dict[str, Path]:
    """Models in the package, by name."""
    return {path.stem: path for path in sorted(_CHECKPOINTS.glob("*.safetensors"))}


def load_model(
    source: str | os.PathLike[str],
    *,
    text_encoders: Sequence[str | os.PathLike[str]] = (),
    vae: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Load a base model.

    Weights stay on the memory-mapped files, in the files' dtype, so that loading costs no memory; training and sampling
    place copies on their device, in their dtype.

    Args:
        source: a single-file checkpoint or denoiser in the original layout, a diffusers folder, the name of a built-in
            model, or a hub id such as `stabilityai/stable-diffusion-2-1`, which needs a network.
        text_encoders: files, checkpoints or diffusers folders with text encoders that `source` lacks, or that replace
            its own.
        vae: the same for the autoencoder.
        dtype: converts the denoiser's weights to this dtype, in memory; None leaves them in the file and its dtype.

    Raises:
        ModelError: a file cannot be found, read or recognised, or a part belongs to another family.
    """
    _quieten()
    path = _located(source)
    if path.is_dir():
        model = _model_of_folder(path, title=path.name if Path(source).is_dir() else str(source))
    else:
        model = model_of_checkpoint(OriginalCheckpoint(path))
    for extra in text_encoders:
        model = _with_encoders(model, _located(extra))
    if vae is not None:
        model = _with_autoencoder(model, _located(vae))
    if dtype is not None:
        model.components.denoiser.to(dtype)
    return model


def recognise(checkpoint: OriginalCheckpoint) -> Family:
    """The family of a checkpoint. Raises ModelError when no family recognises it."""
    shapes = checkpoint.denoiser_shapes
    # First, because some LoRAs contain a few of their model's own tensors as well.
    if any(mark in name for name in checkpoint.shapes for mark in LORA_MARKS):
        raise ModelError(f"{checkpoint.path.name} is a LoRA, not a base model; give it as the LoRA and choose a model")
    for _, family in FAMILIES.items():
        if family.recognises(shapes):
            return family
    if (found := looks_like(shapes)) is not None:
        raise ModelError(
            f"{checkpoint.path.name} looks like {found}, which is not supported; supported are {_titles()}"
        )
    if (part := part_title(checkpoint.shapes)) is not None:
        raise ModelError(
            f"{checkpoint.path.name} is {part}, not a denoiser; give it beside the model that it belongs to"
        )
    raise ModelError(
        f"{checkpoint.path.name} is of no supported architecture (its first tensors are "
        f"{', '.join(sorted(shapes)[:3])}); supported are {_titles()}"
    )


def family_of(folder: Path) -> Family:
    """The family of a diffusers folder. Raises ModelError if it is not one, or of no supported family."""
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is no diffusers model (it has no model_index.json); "
            "give the folder that holds it, or a .safetensors file"
        )
    index = read_json(folder / "model_index.json")
    for _, family in FAMILIES.items():
        if family.recognises_folder(folder, index):
            return family
    raise ModelError(f"{folder} is a diffusers model of an unsupported architecture; supported are {_titles()}")


def model_of_checkpoint(checkpoint: OriginalCheckpoint) -> Model:
    """The model in a single file, with the parts that the file has. Raises ModelError; see `load_model`."""
    family = recognise(checkpoint)
    said = checkpoint.architecture
    tensors = checkpoint.load(checkpoint.denoiser_prefix)
    config = family.denoiser_config(checkpoint.denoiser_shapes) | said.get(family.denoiser_folder, {})
    denoiser = build(
        lambda: family.denoiser_class()(**config),
        lambda model: from_original_tensors(model, family.table(model), tensors),
        where=str(checkpoint.path),
    )
    encoders: dict[str, nn.Module] = {}
    for component, slot in family.text_encoders.items():
        if (prefix := checkpoint.prefix_of(slot.prefixes)) and checkpoint.shapes_under(prefix):
            settings = {**slot.settings, **said.get(component, {})}
            source = PartSource(str(checkpoint.path), checkpoint.load(prefix), settings)
            encoders[component] = ENCODERS[slot.kind].build(source)
    vae, slot_ = None, family.autoencoder
    if (prefix := checkpoint.prefix_of(slot_.prefixes)) and checkpoint.shapes_under(prefix):
        settings = {**slot_.settings, **said.get("vae", {})}
        vae = AUTOENCODERS[slot_.kind].build(PartSource(str(checkpoint.path), checkpoint.load(prefix), settings))
    components = _assembled(
        family, denoiser, family.diffusion(checkpoint), encoders, vae, overrides=said.get("defaults", {})
    )
    return Model(
        family,
        components,
        title=checkpoint.path.stem,
        path=checkpoint.path,
        files=dict.fromkeys(components.modules(), checkpoint.path),
    )


def _model_of_folder(folder: Path, *, title: str) -> Model:
    family = family_of(folder)
    try:
        denoiser = _denoiser_of_folder(family, PartFolder(folder / family.denoiser_folder))
        encoders = {}
        for component, slot in family.text_encoders.items():
            if (folder / component).is_dir():
                encoders[component] = ENCODERS[slot.kind].build(PartFolder(folder / component).source())
        vae = None
        if (folder / "vae").is_dir():
            vae = AUTOENCODERS[family.autoencoder.kind].build(PartFolder(folder / "vae").source())
        diffusion = family.diffusion_of_folder(folder)
        overrides = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
        components = _assembled(family, denoiser, diffusion, encoders, vae, overrides=overrides, folder=folder)
    except (OSError, ValueError, RuntimeError) as error:
        # json, diffusers and transformers put the reason at the start of their messages.
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder} cannot be read as a diffusers model: {reason}") from error
    subfolders = {"denoiser": family.denoiser_folder}
    files = {part: folder / subfolders.get(part, part) for part in components.modules()}
    return Model(family, components, title=title, path=folder, files=files)


def _denoiser_of_folder(family: Family, part: PartFolder) -> nn.Module:
    kind: Any = family.denoiser_class()
    source = part.source()
    return build(lambda: kind.from_config(source.config), lambda model: source.tensors, where=source.where)


def _assembled(
    family: Family,
    denoiser: nn.Module,
    diffusion: Diffusion,
    encoders: Mapping[str, nn.Module],
    vae: Any,
    *,
    overrides: Mapping[str, Any],
    folder: Path | None = None,
) -> Components:
    """Components of the given parts; `overrides` are fields of `Defaults`."""
    latent = family.latent_format(denoiser, vae)
    defaults: Defaults = replace(family.defaults(denoiser, latent, diffusion), **overrides)
    return Components(
        denoiser=denoiser,
        schedule=diffusion.schedule,
        parameterization=diffusion.parameterization,
        latent=latent,
        defaults=defaults,
        text_encoders=encoders,
        tokenizers={name: _tokenizer(family, name, encoder, folder) for name, encoder in encoders.items()},
        vae=vae,
    )


def _tokenizer(family: Family, component: str, encoder: nn.Module, folder: Path | None) -> Any:
    """The tokenizer of an encoder; a diffusers folder has it as `tokenizer`, `tokenizer_2` and so on."""
    place = None
    if folder is not None:
        place = folder / component.replace("text_encoder", "tokenizer")
        if not place.is_dir():
            raise ModelError(
                f"{folder} must hold a folder {place.name} but does not; it is incomplete, so get it again"
            )
    return ENCODERS[family.text_encoders[component].kind].tokenizer(encoder, place)


def _with_encoders(model: Model, path: Path) -> Model:
    """The model with the text encoders that a file or folder holds."""
    family, slots = model.family, model.family.text_encoders
    prefixes = [prefix for slot in slots.values() for prefix in slot.prefixes]
    found: dict[str, nn.Module] = {}
    for part in _parts(path, slots, prefixes):
        kind = recognised_encoder(part.shapes)
        if kind is None:
            continue
        component = next((name for name, slot in slots.items() if slot.kind == kind.name), None)
        if component is None:
            needed = " and ".join(f"{slot.kind} (usually {slot.usual_file})" for slot in slots.values())
            raise ModelError(
                f"{path} is the text encoder {kind.name}, but {family.title} has {needed}; give one of these"
            )
        found[component] = kind.build(part.source(slots[component].settings))
    if not found:
        needed = " or ".join(slot.usual_file for slot in slots.values())
        raise ModelError(f"{path} must hold a text encoder, but is {_title_of(path)}; give the file {needed}")
    components = model.components
    encoders = {**components.text_encoders, **found}
    tokenizers = {**components.tokenizers, **{name: _tokenizer(family, name, one, None) for name, one in found.items()}}
    in_order = {name: encoders[name] for name in slots if name in encoders}
    return replace(
        model,
        components=replace(components, text_encoders=in_order, tokenizers=tokenizers),
        files={**model.files, **dict.fromkeys(found, path)},
    )


def _with_autoencoder(model: Model, path: Path) -> Model:
    """The model with the autoencoder that a file or folder holds."""
    family, slot = model.family, model.family.autoencoder
    for part in _parts(path, ("vae",), family.autoencoder.prefixes):
        kind = recognised_autoencoder(part.shapes)
        if kind is None:
            continue
        channels = kind.channels(part.shapes)
        if (kind.name, channels) != (slot.kind, slot.channels):
            raise ModelError(
                f"{path} is {_autoencoder_title(kind.name, channels)}, but {family.title} has "
                f"{_autoencoder_title(slot.kind, slot.channels)} (its file is usually called {slot.usual_file})"
            )
        vae = kind.build(part.source(slot.settings))
        latent = family.latent_format(model.components.denoiser, vae)
        components = replace(model.components, vae=vae, latent=latent)
        return replace(model, components=components, files={**model.files, "vae": path})
    raise ModelError(f"{path} must hold an autoencoder, but is {_title_of(path)}; give the file {slot.usual_file}")


@dataclass(frozen=True)
class _Part:
    """Tensors in a file or folder that may be one part of a model."""

    shapes: Shapes
    source: Callable[[Mapping[str, Any]], PartSource]


def _parts(path: Path, subfolders: Iterable[str], prefixes: Iterable[str]) -> Iterator[_Part]:
    """Candidates in a diffusers folder under `subfolders`, or in a file without a prefix or with one of `prefixes`."""
    if path.is_dir():
        whole = (path / "model_index.json").is_file()
        folders = [path / name for name in subfolders if (path / name).is_dir()] if whole else [path]
        yield from (_Part(part.shapes, lambda _, part=part: part.source()) for part in map(PartFolder, folders))  # type: ignore[misc]
        return
    checkpoint = OriginalCheckpoint(path)
    for prefix in dict.fromkeys(("", *prefixes)):

        def source(settings: Mapping[str, Any], prefix: str = prefix) -> PartSource:
            return PartSource(str(path), checkpoint.load(prefix), settings)

        yield _Part(checkpoint.shapes_under(prefix), source)


def _title_of(path: Path) -> str:
    """Description of a file's or folder's content, for messages that refuse it."""
    if path.is_dir():
        return "a folder without one"
    checkpoint = OriginalCheckpoint(path)
    family = next((one for _, one in FAMILIES.items() if one.recognises(checkpoint.denoiser_shapes)), None)
    if family is not None:
        return f"a model of the family {family.title}"
    return part_title(checkpoint.shapes) or "of no known kind"


def part_title(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Description of a file with these tensors if it is a text encoder or autoencoder, else None."""
    if (encoder := recognised_encoder(shapes)) is not None:
        return f"the text encoder {encoder.name}"
    if (autoencoder := recognised_autoencoder(shapes)) is not None:
        return _autoencoder_title(autoencoder.name, autoencoder.channels(shapes))
    return None


def _autoencoder_title(kind: str, channels: int) -> str:
    return f"an autoencoder of kind {kind} with {channels} channels"


def _located(source: str | os.PathLike[str]) -> Path:
    """The file or folder of a source, downloaded if it is a hub id."""
    path = built_in_models().get(str(source), Path(source))
    # By extension, because names on hubs have dots too (FLUX.1-dev).
    if path.exists() or path.suffix.casefold() in MODEL_EXTENSIONS:
        return path
    if str(source).count("/") == 1:
        return _downloaded(str(source))
    raise ModelError(
        f"there is no model at {source}; give a .safetensors checkpoint, a diffusers folder, "
        f"a hub id such as owner/name, or {', '.join(built_in_models())} for a first try"
    )


def _titles() -> str:
    return ", ".join(family.title for _, family in FAMILIES.items())


def _quieten() -> None:
    """Disable progress bars of transformers and diffusers, which would interrupt a training run's own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _downloaded(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # The default variant of each part; repositories often hold half-precision and non-EMA copies beside it.
    wanted = ["*.json", "*.txt", "*.model", "*/*.safetensors"]
    unwanted = ["*.fp16.*", "*.bf16.*", "*non_ema*", "safety_checker/*"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise ModelError(
            f"the model {repository} could not be downloaded ({type(error).__name__}); "
            "check the name and the network, or give a file that is already on this computer"
        ) from error
