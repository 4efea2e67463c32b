"""The models in ComfyUI's folders by family, with the parts that each has or lacks; families that can be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import Folders
from lorasmith.families import loading  # noqa: F401  registers the families
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.files.checkpoint import PipelineConfigs
from lorasmith.families.forms import NO_CONTROLS, ControlForm, ControlSource, Defaults
from lorasmith.families.loading import load_structure
from lorasmith.families.locating import ENCODER_FOLDERS, MODEL_FOLDERS, VAE_FOLDERS
from lorasmith.families.model_search import FoundFile, FoundPart, best_autoencoder, best_encoder, scanned
from lorasmith.families.parts.encoders import ENCODERS
from lorasmith.families.slots import HubFolder


@dataclass(frozen=True)
class ListedFile:
    """A file that is not a denoiser, or that is not recognised."""

    path: Path
    place: str  # its folder, relative to the base folder if inside
    what: str  # what it is, or why it is not recognised
    size_bytes: int
    precision: str = ""  # number format of most weights; empty if not recognised


@dataclass(frozen=True)
class ListedPart:
    """A part of a model."""

    component: str  # such as `text_encoder_2`
    kind: str  # registered kind of encoder or autoencoder
    path: Path | None  # of the file that would be used, which may be the model's own
    usual_file: str  # common name of the file to get
    hub: HubFolder | None = None  # where that file is, if that is known


@dataclass(frozen=True)
class ListedModel:
    """A denoiser, alone or in a full checkpoint; fields are those of `ListedFile`."""

    path: Path
    place: str
    size_bytes: int
    precision: str
    family: str  # title of its family
    parts: tuple[ListedPart, ...]
    edits: tuple[str, ...] = ()  # edit variants of its family, which have its tensors
    edit: str = ""  # the one of them that it is
    edit_recognised_by: Literal["name", "tensors"] = "name"
    controls: ControlSource | None = None  # where the pictures come from that it edits or draws from; None without
    also: Mapping[str, ControlSource] = field(default_factory=dict)  # where else, by the edit variant that says so

    weights: int = 0  # of the denoiser, in millions; 0 where its file does not say, or holds other parts
    makes_clips: bool = False

    @property
    def form(self) -> ControlForm:
        """Its controls, of which only the source is known."""
        return NO_CONTROLS if self.controls is None else ControlForm(source=self.controls)

    @property
    def is_whole(self) -> bool:
        return all(part.path is not None for part in self.parts)

    @property
    def missing(self) -> tuple[ListedPart, ...]:
        return tuple(part for part in self.parts if part.path is None)


@dataclass(frozen=True)
class ModelList:
    """The files in the model folders."""

    models: tuple[ListedModel, ...]  # by family, then by name
    unused: tuple[ListedFile, ...]  # text encoders and autoencoders that fit none of these models
    unknown: tuple[ListedFile, ...]  # not recognised, or cannot be read


def list_models(folders: Folders) -> ModelList:
    """The models in `folders`. Only headers are read, and the vectors of denoisers without encoders."""
    files = list(scanned(folders, (*MODEL_FOLDERS, *ENCODER_FOLDERS, *VAE_FOLDERS)))
    models, unknown = [], [_unknown(file, file.fault) for file in files if file.fault]
    used: set[Path] = set()
    for file in files:
        if file.family is None:
            continue
        try:
            listed, fitting = _listed(file, file.family, files)
        except ModelError as error:
            unknown.append(_unknown(file, str(error)))
            continue
        models.append(listed)
        used |= fitting
    parts = [file for file in files if file.encoder is not None or file.autoencoder is not None]
    return ModelList(
        tuple(sorted(models, key=lambda model: (model.family, model.path.name.casefold()))),
        tuple(_part(part) for part in parts if part.path not in used),
        tuple(unknown),
    )


def _listed(file: FoundFile, family: Family, files: Sequence[FoundFile]) -> tuple[ListedModel, set[Path]]:
    """A model with its parts, and all files that fit it. ModelError if the model is an unsupported variant."""
    slots, form = family.text_encoders, NO_CONTROLS
    edits: tuple[str, ...] = ()
    recognised_by: Literal["name", "tensors"] = "name"
    widths: dict[str, int | None] = {}
    if family.controls or any(name not in file.parts for name in slots):
        model = load_structure(file.path)
        denoiser, form, slots = model.components.denoiser, model.control_form, model.encoder_slots
        edits = model.edits
        recognised_by = "name" if family.controls_of(denoiser, ()) is None else "tensors"
        widths = {name: family.encoder_width(denoiser, name) for name in slots if name not in file.parts}
    parts = []
    fitting = {
        file.path
        for name, slot in slots.items()
        for file in files
        if file.encoder == slot.kind and (widths.get(name) is None or file.width == widths[name])
    }
    for name, slot in slots.items():
        encoder = None if name in file.parts else best_encoder(files, name, slot, widths[name])
        parts.append(ListedPart(name, slot.kind, _path(file, name, encoder), slot.usual_file, slot.hub))
    vae = family.autoencoder
    fitting |= {file.path for file in files if file.autoencoder == (vae.kind, vae.channels)}
    encoder = None if "vae" in file.parts else best_autoencoder(files, vae)
    parts.append(ListedPart("vae", vae.kind, _path(file, "vae", encoder), vae.usual_file, vae.hub))
    of_frames = {control.name: control.source for control in family.controls if control.name and control.frames}
    listed = ListedModel(
        file.path,
        file.place,
        file.size_bytes,
        file.precision,
        family.title,
        tuple(parts),
        tuple(name for name in edits if name not in of_frames),
        "" if form.name in of_frames else form.name,
        recognised_by,
        form.source if form.most else None,
        {name: source for name, source in of_frames.items() if form.name != name},
        0 if file.parts or not file.bits else round(8 * file.size_bytes / file.bits / 1e6),
        family.makes_clips,
    )
    return listed, fitting


def _path(file: FoundFile, component: str, found: FoundPart | None) -> Path | None:
    if component in file.parts:
        return file.path
    return None if found is None else found.path


def _part(file: FoundFile) -> ListedFile:
    if file.autoencoder is not None:
        what = f"autoencoder {file.autoencoder[0]} with {file.autoencoder[1]} channels"
    else:
        width = "" if file.width is None else f" of width {file.width}"
        what = f"{ENCODERS[str(file.encoder)].title} {file.encoder}{width}"
    return ListedFile(file.path, file.place, what, file.size_bytes, file.precision)


def _unknown(file: FoundFile, fault: str) -> ListedFile:
    return ListedFile(file.path, file.place, fault.removeprefix(f"{file.path} "), file.size_bytes)


_SCHEDULER = {"beta_schedule": "scaled_linear"}
"""What releases of Stable Diffusion say of their noise schedule; other families ask for nothing."""


@dataclass(frozen=True)
class KnownPart:
    """A text encoder or an autoencoder: its registered kind, and the common name of its file."""

    kind: str
    usual_file: str


@dataclass(frozen=True)
class KnownModel:
    """A model family, by its released denoiser."""

    name: str  # registered name of the family
    title: str
    parameters: int  # of the denoiser
    text_encoders: tuple[KnownPart, ...]  # in the order of the pipeline
    autoencoder: KnownPart
    defaults: Defaults  # settings that training starts from
    lora_layout: str  # in which its LoRAs are written
    distilled_names: tuple[str, ...]  # parts of file names of distilled variants, not to be trained on
    clip_types: tuple[str, ...]  # its names in ComfyUI's nodes that load text encoders
    releases: tuple[str, ...]  # names of the released models that `lorasmith models --get` downloads


def known_models() -> list[KnownModel]:
    """Every family whose released model is known, by title. Denoisers are built without weights."""
    found = [_known(name, family) for name, family in FAMILIES.items() if family.released is not None]
    return sorted(found, key=lambda model: model.title.casefold())


def _known(name: str, family: Family) -> KnownModel:
    denoiser = family.released_denoiser()
    configs_of: dict[str, Any] = {family.denoiser_folder: denoiser.config, "scheduler": _SCHEDULER}
    configs = PipelineConfigs(family.title, (family.pipeline,), lambda part: configs_of[part])
    latent = family.latent_format(denoiser, None)
    return KnownModel(
        name=name,
        title=family.title,
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        text_encoders=tuple(KnownPart(slot.kind, slot.usual_file) for slot in family.text_encoders.values()),
        autoencoder=KnownPart(family.autoencoder.kind, family.autoencoder.usual_file),
        defaults=family.defaults(denoiser, latent, family.diffusion_of_pipeline(configs)),
        lora_layout=family.names(denoiser, {}).portable,
        distilled_names=tuple(family.distilled),
        clip_types=family.clip_types,
        releases=tuple(release.name for release in family.releases),
    )
