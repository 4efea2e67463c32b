"""Base models from files, folders and hubs. Families register themselves when this module is imported.

A model is parts: a denoiser, text encoders, an autoencoder. Each comes from a checkpoint that holds several of them, a
file of its own or a diffusers folder, and is recognised by its tensors. Weights stay on the memory-mapped files, in
their dtype, until they are placed on a device. A single file may have diffusers' names, as ComfyUI's loaders take it:
a family's table of its released model gives each tensor its original name.

Commands that need names and shapes alone get models without weights: of a file, or as released, built on the meta
device from the published settings, so that files of different layouts can be matched without a model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import CONVOLUTIONS
from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import ModelError
from lorasmith.core.extras import MissingPackageError, model_packages
from lorasmith.core.folders import Folders, pipeline_index
from lorasmith.core.placement import FULL_PRECISION
from lorasmith.core.pretrained import prepare_libraries
from lorasmith.core.printable import described
from lorasmith.core.quantization import Packed
from lorasmith.families.base import FAMILIES, Family
from lorasmith.families.files.checkpoint import (
    LORA_MARKS,
    CheckpointShapes,
    OriginalCheckpoint,
    PipelineConfigs,
    folder_source,
    read_json,
    source_of_module,
)
from lorasmith.families.files.original_weights import PartSource, build, from_original_tensors
from lorasmith.families.forms import Diffusion
from lorasmith.families.known import looks_like
from lorasmith.families.locating import located, named_path
from lorasmith.families.model import Model
from lorasmith.families.part_loading import (
    autoencoder_in,
    encoded_family,
    encoder_kinds,
    encoder_parts,
    encoders_in,
    part_title,
    tokenizer_folder,
    tokenizer_source,
)
from lorasmith.families.parts.autoencoders import AUTOENCODERS
from lorasmith.families.parts.embeddings import EmbeddingFiles
from lorasmith.families.parts.encoders import ENCODERS, EncoderKind
from lorasmith.families.slots import IMAGE_ENCODER, Components, TextEncoders, encoder_title
from lorasmith.formats.names import ModelNames, OriginalName, matches

_SETTINGS = "lorasmith.json"  # in a diffusers folder: fields of `Defaults`
_LARGEST_SETTING = 65_536

_WHICH_ARE = "lorasmith models --known lists the models that are"


class DiffusersPipeline(Protocol):
    """A loaded pipeline of diffusers, whose parts are its attributes."""

    @property
    def components(self) -> Mapping[str, Any]:
        """The parts by name."""

    @property
    def config(self) -> Any:
        """Its configuration."""


@typed_arguments
@model_packages("a base model")
def load_model(
    source: str | os.PathLike[str] | DiffusersPipeline,
    *,
    text_encoders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    vae: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    edit: str | None = None,
    embeddings: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a base model.

    Weights stay on the memory-mapped files, in the files' dtype, so that loading costs no memory; training and sampling
    place copies on their device, in their dtype. Those of a loaded pipeline are shared with it: the model has its own
    modules on the pipeline's tensors, so that nothing of the pipeline changes (weights, gradients, modes, hooks), and
    what later changes its weights in place changes the model's.

    Args:
        source: a single-file checkpoint or denoiser in the original layout, a diffusers folder, the name of a built-in
            model, a hub id such as `stabilityai/stable-diffusion-2-1`, which needs a network, or a loaded pipeline of
            diffusers. Of a diffusers folder with two experts, its subfolder `transformer_2` is the second one with the
            rest of the folder; the folder itself is the first one.
        text_encoders: one or more files, checkpoints or diffusers folders with text encoders that `source` lacks, or
            that replace its own.
        vae: the same for the autoencoder.
        dtype: converts the denoiser's weights to this dtype, in memory; None leaves them in the file and its dtype.
        edit: the edit variant that it is, such as `kontext`, or `none`; None if the name of its file or folder says so.
        embeddings: folder of the embedding files that prompts name by `embedding:NAME`; None reads that as text.

    Raises:
        OptionError: an argument is of another type, or the family has no such variant.
        ModelError: a file cannot be found, read or recognised, a part belongs to another family, or the weights of a
            pipeline are quantized, offloaded to nowhere, or have LoRAs on them.
    """
    if isinstance(text_encoders, str | os.PathLike):
        text_encoders = [text_encoders]
    if not isinstance(source, str | os.PathLike):
        model = model_of_pipeline(source)
    else:
        prepare_libraries()
        path = located(source)
        if path.is_dir():
            model = _model_of_folder(*expert_in(path), title=path.name if Path(source).is_dir() else str(source))
        else:
            model = model_of_checkpoint(OriginalCheckpoint(path))
    model = with_parts(model.as_edit(edit), text_encoders=text_encoders, vae=vae)
    if embeddings is not None:
        model = replace(model, embeddings=EmbeddingFiles(Folders.of("embeddings", Path(embeddings))))
    if dtype is not None:
        model.components.denoiser.to(dtype)
    return model


def with_parts(
    model: Model, *, text_encoders: Sequence[str | os.PathLike[str]] = (), vae: str | os.PathLike[str] | None = None
) -> Model:
    """The model with text encoders and an autoencoder from files of their own."""
    for extra in text_encoders:
        model = _with_encoders(model, located(extra))
    if vae is None:
        return model
    module = autoencoder_in(path := located(vae), model.family)
    latent = model.family.latent_format(model.components.denoiser, module)
    components = replace(model.components, vae=module, latent=latent)
    return replace(model, components=components, files={**model.files, "vae": path})


def check_encoders(model: Model, paths: Sequence[Path], clip_type: str | None) -> None:
    """Raise ModelError unless text encoders that a graph loads apart from the model are the model's.

    Headers alone are read. Further encoders than the model has are accepted; `clip_type` is None for those of a
    checkpoint.
    """
    family = model.family
    needed = {slot.kind: component for component, slot in family.text_encoders.items()}
    kinds = {kind.name for path in paths for kind, _ in encoder_kinds(path)}
    missing = [component for kind, component in needed.items() if kind not in kinds]
    if missing and (family.needs_each_encoder or not kinds & needed.keys()):
        for path in paths:
            encoder_parts(path, family)
        family.text_encoder(TextEncoders(), missing[0])
    for path in paths:
        for kind, shapes in encoder_kinds(path):
            if kind.name in needed:
                _check_width(model, needed[kind.name], path, kind.width_in(shapes))
    if clip_type is None or clip_type in family.clip_types or kinds != needed.keys():  # which families may share
        return
    if (other := encoded_family(paths, clip_type)) is not family:
        names = " and ".join(path.name for path in paths)
        raise ModelError(
            f"{names} must be loaded for {model.title} ({family.title}), but type {clip_type} is {other.title}; "
            f"choose type {' or '.join(family.clip_types)}"
        )


def recognise(checkpoint: OriginalCheckpoint) -> Family:
    """The family of a checkpoint. Raises ModelError when no family recognises it."""
    return _recognised(checkpoint)[0]


def _recognised(checkpoint: OriginalCheckpoint) -> tuple[Family, CheckpointShapes, bool]:
    """The family of a checkpoint, its denoiser's shapes by original names, and whether it has diffusers' names."""
    shapes = checkpoint.denoiser_shapes
    # First, because some LoRAs contain a few of their model's own tensors as well.
    if any(mark in name for name in checkpoint.shapes for mark in LORA_MARKS):
        raise ModelError(f"{checkpoint.path.name} is a LoRA, not a base model; give it as the LoRA and choose a model")
    for _, family in FAMILIES.items():
        if family.recognises(shapes):
            return family, shapes, False
    if (renamed := recognised_by_diffusers_names(shapes)) is not None:
        return *renamed, True
    if (found := looks_like(shapes)) is not None:
        raise ModelError(
            f"{checkpoint.path.name} looks like {found.title}, which is not supported; {found.remedy or _WHICH_ARE}"
        )
    if (part := part_title(checkpoint.shapes)) is not None:
        raise ModelError(
            f"{checkpoint.path.name} is {part}, not a denoiser; give it beside the model that it belongs to"
        )
    raise ModelError(
        f"{checkpoint.path.name} is of no supported architecture (its first tensors are "
        f"{', '.join(sorted(shapes)[:3])}); {_WHICH_ARE}"
    )


def family_of(folder: Path) -> Family:
    """The family of a diffusers folder. Raises ModelError if it is not one, or of no supported family."""
    return _family_of(PipelineConfigs.of_folder(folder), f"{folder} is a diffusers model")


def _family_of(configs: PipelineConfigs, what: str) -> Family:
    for _, family in FAMILIES.items():
        if family.recognises_pipeline(configs):
            return family
    raise ModelError(f"{what} of an unsupported architecture; {_WHICH_ARE}")


def model_of_checkpoint(checkpoint: OriginalCheckpoint) -> Model:
    """The model in a single file, with the parts that the file has. Raises ModelError; see `load_model`."""
    try:
        family, shapes, is_renamed = _recognised(checkpoint)
        config = family.denoiser_config(shapes)
    except (ArithmeticError, ValueError) as error:
        raise ModelError(
            f"{checkpoint.path} has tensors of other sizes than its architecture ({error}); get the file again"
        ) from error
    architecture = checkpoint.architecture
    config |= architecture.get(family.denoiser_folder, {})
    tensors = {
        name: tensor
        for name, tensor in checkpoint.load(checkpoint.denoiser_prefix).items()
        if not matches(name, family.unused_tensors)
    }
    denoiser = _precise(
        build(
            lambda: family.denoiser_class()(**config),
            lambda model: tensors if is_renamed else from_original_tensors(model, family.table(model), tensors),
            where=str(checkpoint.path),
        )
    )
    components = _built(
        family,
        denoiser,
        family.diffusion(checkpoint),
        {
            name: PartSource(
                str(checkpoint.path), checkpoint.load(prefix), {**slot.settings, **architecture.get(name, {})}
            )
            for name, slot in family.slots.items()
            if (prefix := checkpoint.prefix_of(slot.prefixes)) and checkpoint.shapes_under(prefix)
        },
        lambda _component, kind, encoder: kind.tokenizer(encoder, tokenizer_source(checkpoint)),
        overrides=architecture.get("defaults", {}),
    )
    return Model(
        family,
        components,
        title=checkpoint.path.stem,
        path=checkpoint.path,
        files=dict.fromkeys(components.modules(), checkpoint.path),
        titles=tuple(filter(None, map(checkpoint.metadata.get, _TITLES))),
    )


_TITLES = ("modelspec.title", "general.name")
"""Entries of metadata that name a model, in safetensors and GGUF."""


def expert_in(path: Path) -> tuple[Path, str | None]:
    """The diffusers folder of a path, and the name of the expert's subfolder if the path is that."""
    if pipeline_index(path) is None and pipeline_index(path.parent) is not None:
        family = family_of(path.parent)
        if any(expert.folder == path.name for expert in family.experts):
            return path.parent, path.name
    return path, None


def _model_of_folder(folder: Path, part: str | None, *, title: str) -> Model:
    """The model in a diffusers folder."""
    configs = PipelineConfigs.of_folder(folder)
    family = family_of(folder)
    denoiser = part or family.denoiser_folder
    title = _of_expert(family, title if part is None else folder.name, denoiser, lambda name: (folder / name).is_dir())
    names = [*family.denoiser_parts, *family.slots]
    folders = {family.denoiser_folder: folder / denoiser} | {name: folder / name for name in names}
    try:
        sources = {name: folder_source(path) for name, path in folders.items() if path.is_dir()}
        components = _built(
            family,
            _denoiser_of(family, configs, sources),
            family.diffusion_of_pipeline(configs),
            sources,
            lambda component, kind, encoder: kind.tokenizer(encoder, tokenizer_folder(folder, component)),
            overrides=read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {},
        )
    except (OSError, ValueError, RuntimeError) as error:
        # json, diffusers and transformers put the reason at the start of their messages.
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder} cannot be read as a diffusers model: {reason}") from error
    files = {name: folder / (denoiser if name == "denoiser" else name) for name in components.modules()}
    path = folder if part is None else folder / part
    return Model(family, components, title=title, path=path, files=files, made_for=configs.classes[0])


def _of_expert(family: Family, title: str, denoiser: str, has: Callable[[str], bool]) -> str:
    """The title of a model of diffusers, with the expert that its denoiser is, where the pipeline has several."""
    experts = {expert.folder: expert.name for expert in family.experts if has(expert.folder)}
    return f"{title} ({experts[denoiser]})" if len(experts) > 1 and denoiser in experts else title


def model_of_pipeline(pipeline: DiffusersPipeline) -> Model:
    """A model on the tensors of a loaded diffusers pipeline, which stays as it is. Raises ModelError; see `load_model`.

    The model's modules are its own, without hooks, in eval mode and without gradients; only tensors are shared.
    """
    if not isinstance(getattr(pipeline, "components", None), Mapping):
        raise ModelError(
            f"a model must be a path, a name or a loaded pipeline of diffusers, got {described(pipeline)}; give "
            "the whole pipeline, with its text encoders and its scheduler"
        )
    title = _title_of(pipeline)
    configs = PipelineConfigs.of_pipeline(pipeline, title)
    family = _family_of(configs, f"{title} ({type(pipeline).__name__}) is")
    names = (family.denoiser_folder, *family.denoiser_parts, *family.slots)
    parts = {name: getattr(pipeline, name, None) for name in names}

    def tokenizer(component: str, kind: EncoderKind, encoder: nn.Module) -> Any:
        attribute = getattr(pipeline, component.replace("text_encoder", "tokenizer"), None)
        if attribute is None:
            attribute = getattr(pipeline, "processor", None)
        attribute = getattr(attribute, "tokenizer", attribute)  # of a processor, which has one for pictures as well
        if attribute is None:
            raise ModelError(f"{title} must have the tokenizer of its {component} but has none; load it with all parts")
        return copy.deepcopy(attribute)  # calls change its padding

    sources = {name: source_of_module(part, title, name) for name, part in parts.items() if part is not None}
    denoiser = _denoiser_of(family, configs, sources)
    components = _built(family, denoiser, family.diffusion_of_pipeline(configs), sources, tokenizer)
    channels = components.latent.channels, family.autoencoder.channels
    if components.vae is not None and channels[0] != channels[1]:
        raise ModelError(
            f"the denoiser of {title} must take latents of {channels[1]} channels as {family.title} does, got "
            f"{channels[0]}; models with further inputs, such as those for inpainting, are not supported"
        )
    title = _of_expert(family, title, family.denoiser_folder, lambda name: getattr(pipeline, name, None) is not None)
    return Model(family, components, title=title, made_for=configs.classes[0])


def _title_of(pipeline: DiffusersPipeline) -> str:
    """Name of a pipeline: that of its folder or repository, else of its class."""
    source = getattr(pipeline, "name_or_path", None) or getattr(pipeline.config, "_name_or_path", None)
    return Path(str(source)).name if source else type(pipeline).__name__


def _denoiser_of(family: Family, configs: PipelineConfigs, sources: Mapping[str, PartSource]) -> nn.Module:
    """The denoiser of a diffusers pipeline."""
    for name in (family.denoiser_folder, *family.denoiser_parts):
        if name not in sources:
            raise ModelError(f"{configs.title} must have a {name} but has none; get the model again")
    main = sources[family.denoiser_folder]
    config, tensors = dict(main.config or {}), dict(main.tensors)
    for name in family.denoiser_parts:
        config[name] = sources[name].config
        tensors |= {f"{name}.{tensor}": weight for tensor, weight in sources[name].tensors.items()}
    kind: Any = family.denoiser_class()
    return _precise(build(lambda: kind.from_config(config), lambda model: tensors, where=main.where))


def _precise(denoiser: nn.Module) -> nn.Module:
    """The denoiser, with the modules marked whose parameters and buffers diffusers keeps in fp32.

    diffusers names modules or parameters; what is inside of these is meant as well. Layers that multiply are left out,
    since adapters and quantized weights have one dtype with their input.
    """
    names = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    for path, layer in denoiser.named_modules():
        own = [*layer._parameters, *layer._buffers]
        multiplies = isinstance(layer, (nn.Linear, *CONVOLUTIONS))
        if own and not multiplies and names & {*path.split("."), *own}:
            setattr(layer, FULL_PRECISION, True)
    return denoiser


def _built(
    family: Family,
    denoiser: nn.Module,
    diffusion: Diffusion,
    sources: Mapping[str, PartSource],
    tokenizer: Callable[[str, EncoderKind, nn.Module], Any],
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Components:
    """Components with the parts in `sources`; `overrides` are fields of `Defaults`, as a model's files say them."""
    kinds = {name: ENCODERS[slot.kind] for name, slot in family.text_encoders.items() if name in sources}
    encoders = {name: kind.build(sources[name]) for name, kind in kinds.items()}
    tokenizers = {name: tokenizer(name, kind, encoders[name]) for name, kind in kinds.items()}
    vae = None
    if (source := sources.get("vae")) is not None:
        if source.config is not None:
            source = replace(source, settings=family.autoencoder.in_pipelines)
        vae = AUTOENCODERS[family.autoencoder.kind].build(source)
    image_encoder = None
    if (slot := family.image_encoder) is not None and IMAGE_ENCODER in sources:
        image_encoder = ENCODERS[slot.kind].build(sources[IMAGE_ENCODER])
    latent = family.latent_format(denoiser, vae)
    defaults = family.defaults(denoiser, latent, diffusion)
    for name, value in overrides.items():
        known = getattr(defaults, name, None)
        is_number = isinstance(value, int | float) and isinstance(known, int | float) and 0 < value <= _LARGEST_SETTING
        is_alike = isinstance(value, type(known)) or (isinstance(known, float) and is_number)
        if not (is_alike and (is_number or isinstance(value, str))):
            raise ModelError(
                f"a model may say defaults for {', '.join(field.name for field in fields(defaults))}, as text or as "
                f"numbers up to {_LARGEST_SETTING:,}, and this one says {str(value)[:40]!r} for {name}; get it again"
            )
    defaults = replace(defaults, **overrides)
    return Components(
        denoiser=denoiser,
        schedule=diffusion.schedule,
        parameterization=diffusion.parameterization,
        latent=latent,
        defaults=defaults,
        text_encoders=encoders,
        tokenizers=tokenizers,
        vae=vae,
        image_encoder=image_encoder,
    )


def _with_encoders(model: Model, path: Path) -> Model:
    """The model with the encoders that a file or folder holds."""
    family, components = model.family, model.components
    slots = model.encoder_slots
    separate = encoders_in(path, family, slots)
    for component, encoder in separate.modules.items():
        _check_width(model, component, path, ENCODERS[slots[component].kind].width(encoder))
    encoders = {**components.text_encoders, **separate.modules}
    return replace(
        model,
        components=replace(
            components,
            text_encoders={name: encoders[name] for name in family.text_encoders if name in encoders},
            tokenizers={**components.tokenizers, **separate.tokenizers},
            image_encoder=separate.modules.get(IMAGE_ENCODER, components.image_encoder),
        ),
        files={**model.files, **dict.fromkeys(separate.modules, path)},
    )


def _check_width(model: Model, component: str, path: Path, width: int) -> None:
    """Raise ModelError unless an encoder's states have the width that the denoiser needs."""
    family, slot = model.family, model.encoder_slots[component]
    needed = family.encoder_width(model.components.denoiser, component)
    if needed is not None and width != needed:
        raise ModelError(
            f"{path} is the {encoder_title(component)} {slot.kind} of width {width}, but {model.title} "
            f"({family.title}) needs one of width {needed} (its file is usually called {slot.usual_file})"
        )


def recognised_by_diffusers_names(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Family, CheckpointShapes] | None:
    """The family of a denoiser, and its shapes by original names; None if no family has these names."""
    for _, family in FAMILIES.items():
        if family.released is None or not any(name.startswith(family.diffusers_start) for name in shapes):
            continue
        original = original_shapes(_released_table(family), shapes)
        if original is not None and family.recognises(original):
            return family, original
    return None


@cache
def _released_table(family: Family) -> Mapping[str, OriginalName]:
    return family.table(family.released_denoiser())


def original_shapes(
    table: Mapping[str, OriginalName], shapes: Mapping[str, tuple[int, ...]]
) -> CheckpointShapes | None:
    """Shapes of a denoiser's tensors by original names; None if a tensor is not in the table."""
    original = CheckpointShapes()
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        place = table.get(path)
        if place is None:
            return None
        key = place.tensor(leaf)
        rows = original[key][0] if key in original else 0
        original[key] = (rows + shape[0], *shape[1:])
    return original


@model_packages("a base model")
def load_structure(source: str | os.PathLike[str]) -> Model:
    """A model whose denoiser's matrices are on the meta device, with no text encoder and no autoencoder.

    Of a single file the header and the vectors are read, which takes a second or two for any size. Folders and hub
    ids are loaded by `load_model`, with the same errors.
    """
    path = named_path(source)
    return model_of_checkpoint(_Outline(path)) if path.is_file() else load_model(source)


class _Outline(OriginalCheckpoint):
    """A checkpoint's denoiser, of which only vectors have values: some determine the parameterization."""

    def shapes_under(self, prefix: str) -> CheckpointShapes:
        return super().shapes_under(prefix) if prefix == self.denoiser_prefix else CheckpointShapes()

    def load(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {
            name: torch.empty(shape, device="meta") if len(shape) > 1 else self.vector(f"{prefix}{name}")
            for name, shape in self.shapes_under(prefix).items()
        }


@cache
def released_names(title: str, *, needed: bool = False) -> ModelNames | None:
    """The name table of a family's released model. None for unsupported families.

    Where the packages of the extra `models` are missing it is None as well, and with `needed` a ModelError.
    """
    family = next((family for _, family in FAMILIES.items() if family.title == title), None)
    if family is None or family.released is None:
        return None
    try:
        return family.names(family.released_denoiser(), {})
    except MissingPackageError:
        if needed:
            raise
        return None
