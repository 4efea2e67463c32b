"""Nodes that load models, whole or in parts, and LoRAs; and a check that the files which a graph trains with fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorasmith.adapters.catalogue import STRENGTH
from lorasmith.adapters.frozen_layer import cast_weights
from lorasmith.core.folders import Folders
from lorasmith.families.loading import check_encoders, load_model, load_structure
from lorasmith.families.model import Autoencoder, Denoiser, TextEncoder
from lorasmith.families.part_loading import autoencoder_part, load_autoencoder, load_text_encoder
from lorasmith.training.lora_handle import Lora
from lorasmith.workflow import Input, NodeContext, Output, node, socket
from lorasmith.workflow.graph import Graph, Link
from lorasmith.workflow.sockets import ANY, MATCH

E = TypeVar("E", TextEncoder, None)

_WEIGHT_DTYPES = {
    "default": None,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
ANY_TYPE = "stable_diffusion"  # ComfyUI's type of text encoders for nodes without a choice

# fmt: off
_TYPES = (
    "stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "cosmos", "lumina2", "wan",
    "hidream", "chroma", "ace", "omnigen2", "qwen_image", "hunyuan_image", "flux2", "ovis", "longcat_image",
    "cogvideox", "lens", "pixeldit", "ideogram4", "boogu", "krea2", "joyimage", "mage", "minimax",
)
_DUAL_TYPES = (
    "sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image", "hunyuan_video_15", "kandinsky5",
    "kandinsky5_image", "ltxv", "newbie", "ace",
)
# fmt: on


def _any(name: str, folders: Folders) -> str:
    """Accept every name, as ComfyUI does: unknown ones act like the default."""
    return name.casefold()


def _file(kind: str, tooltip: str) -> Any:
    return socket(
        "COMBO",
        options=lambda folders: folders.files(kind),
        file=lambda folders, name: folders.find(kind, name),
        tooltip=tooltip,
    )


_ENCODER_FILE = _file("text_encoders", "A file in models/text_encoders.")


def _type(options: Sequence[str]) -> Any:
    return socket("COMBO", options=options, accept=_any, tooltip="The model that the prompts are for.")


_DEVICE = socket("COMBO", options=("default", "cpu"), optional=True, accept=_any, tooltip="Where prompts are encoded.")


@node("CheckpointLoaderSimple", "Load Checkpoint", "model/loaders", outputs=["MODEL", "CLIP", "VAE"])
def load_checkpoint(
    context: NodeContext, *, ckpt_name: str = _file("checkpoints", "A checkpoint file, or a diffusers folder.")
) -> tuple[Denoiser, TextEncoder, Autoencoder]:
    """Load a model.

    Weights stay on the memory-mapped file; training and sampling place copies on their device, in their own dtype.
    """
    model = load_model(context.folders.find("checkpoints", ckpt_name))
    return model.denoiser, model.text_encoder, model.autoencoder


@node("UNETLoader", "Load Diffusion Model", "model/loaders", outputs=["MODEL"])
def load_diffusion_model(
    context: NodeContext,
    *,
    unet_name: str = _file("diffusion_models", "A file in models/diffusion_models, or a diffusers folder."),
    weight_dtype: str = socket(
        "COMBO", options=tuple(_WEIGHT_DTYPES), tooltip="fp8 halves the memory of 16-bit weights, and rounds them."
    ),
) -> tuple[Denoiser]:
    """Load a denoiser alone.

    In fp8 its matrices and kernels are rounded without scales, as in ComfyUI; those that the file has packed stay as
    they are. Products are computed in the dtype of training or sampling, with `fp8_e4m3fn_fast` too.
    """
    model = load_model(context.folders.find("diffusion_models", unet_name))
    code = _WEIGHT_DTYPES[weight_dtype]
    if code is not None:
        cast_weights(model.components.denoiser, code)
    if weight_dtype.endswith("_fast"):
        context.log("Weights are in fp8, but products are not: products of Train LoRA has them in fp8.")
    return (model.denoiser,)


@node("CLIPLoader", "Load CLIP", "model/loaders", outputs=["CLIP"])
def load_clip(
    context: NodeContext, *, clip_name: str = _ENCODER_FILE, type: str = _type(_TYPES), device: str | None = _DEVICE
) -> tuple[TextEncoder]:
    """Load one text encoder; `type` decides between models that share it, and is ignored where it does not fit."""
    return (_encoders(context, [clip_name], type, device),)


@node("DualCLIPLoader", "Load CLIP (Dual)", "model/loaders", outputs=["CLIP"])
def load_clip_dual(
    context: NodeContext,
    *,
    clip_name1: str = _ENCODER_FILE,
    clip_name2: str = _ENCODER_FILE,
    type: str = _type(_DUAL_TYPES),
    device: str | None = _DEVICE,
) -> tuple[TextEncoder]:
    """Load two text encoders in any order, such as clip_l and t5xxl for Flux.1."""
    return (_encoders(context, [clip_name1, clip_name2], type, device),)


@node("TripleCLIPLoader", "Load CLIP (Triple)", "model/loaders", outputs=["CLIP"])
def load_clip_triple(
    context: NodeContext,
    *,
    clip_name1: str = _ENCODER_FILE,
    clip_name2: str = _ENCODER_FILE,
    clip_name3: str = _ENCODER_FILE,
) -> tuple[TextEncoder]:
    """Load three text encoders in any order."""
    return (_encoders(context, [clip_name1, clip_name2, clip_name3]),)


@node("QuadrupleCLIPLoader", "Load CLIP (Quadruple)", "model/loaders", outputs=["CLIP"])
def load_clip_quadruple(
    context: NodeContext,
    *,
    clip_name1: str = _ENCODER_FILE,
    clip_name2: str = _ENCODER_FILE,
    clip_name3: str = _ENCODER_FILE,
    clip_name4: str = _ENCODER_FILE,
) -> tuple[TextEncoder]:
    """Load four text encoders in any order."""
    return (_encoders(context, [clip_name1, clip_name2, clip_name3, clip_name4]),)


@node("VAELoader", "Load VAE", "model/loaders", outputs=["VAE"])
def load_vae(context: NodeContext, *, vae_name: str = _file("vae", "A file in models/vae.")) -> tuple[Autoencoder]:
    """Load an autoencoder."""
    return (load_autoencoder(context.folders.find("vae", vae_name)),)


def _encoders(
    context: NodeContext, names: Sequence[str], clip_type: str = ANY_TYPE, device: str | None = None
) -> TextEncoder:
    """Text encoders from files, for models of a type, on a device of the node's choices."""
    loaded = load_text_encoder([context.folders.find("text_encoders", name) for name in names], clip_type)
    return replace(loaded, device=torch.device("cpu")) if device == "cpu" else loaded


def _strength(step: float | None = None) -> Any:
    return Input.from_option(STRENGTH, min=-100.0, max=100.0, step=step)


_LORA_NAME = _file("loras", "A LoRA file.")
_STRENGTH = _strength(step=0.01)


@node("LoraLoader", "Load LoRA (Model and CLIP)", "model/loaders", outputs=["MODEL", "CLIP"])
def lora_loader(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    clip: TextEncoder = socket("CLIP"),
    lora_name: str = _LORA_NAME,
    strength_model: float = _STRENGTH,
    strength_clip: float = _STRENGTH,
) -> tuple[Denoiser, TextEncoder]:
    """Apply a LoRA file to a model and its text encoders."""
    return _with_lora(context, model, clip, lora_name, strength_model, strength_clip)


@node("LoraLoaderBypass", "Load LoRA (Bypass) (For debugging)", "model/loaders", outputs=["MODEL", "CLIP"])
def lora_loader_bypass(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    clip: TextEncoder = socket("CLIP"),
    lora_name: str = _LORA_NAME,
    strength_model: float = _STRENGTH,
    strength_clip: float = _STRENGTH,
) -> tuple[Denoiser, TextEncoder]:
    """Apply a LoRA file to a model, beside its weights, and to its text encoders; the pictures are the same."""
    return _with_lora(context, model, clip, lora_name, strength_model, strength_clip, bypass=True)


@node("LoraLoaderModelOnly", "Load LoRA", "model/loaders", outputs=["MODEL"])
def lora_loader_model_only(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    lora_name: str = _LORA_NAME,
    strength_model: float = _STRENGTH,
) -> tuple[Denoiser]:
    """Apply a LoRA file to a model."""
    return (_with_lora(context, model, None, lora_name, strength_model)[0],)


@node("LoraLoaderBypassModelOnly", "Load LoRA (Bypass, Model Only) (for debugging)", "model/loaders", outputs=["MODEL"])
def lora_loader_bypass_model_only(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    lora_name: str = _LORA_NAME,
    strength_model: float = _STRENGTH,
) -> tuple[Denoiser]:
    """Apply a LoRA file to a model, beside its weights; the pictures are the same."""
    return (_with_lora(context, model, None, lora_name, strength_model, bypass=True)[0],)


@node("LoraModelLoader", "Load LoRA Model", "model/loaders", outputs=[Output("MODEL", "model")])
def lora_model_loader(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    lora: Lora = socket("LORA_MODEL"),
    strength_model: float = _strength(),
    bypass: bool = socket(
        "BOOLEAN", default=False, tooltip="Run the LoRA beside the weights; the pictures are the same."
    ),
) -> tuple[Denoiser]:
    """Apply a LoRA from Train LoRA to a model."""
    # Into packed weights it cannot be merged, so that without bypass the weights decide.
    applied = lora.applied(model, None, strength=strength_model, bypass=bypass or None)
    _tell(context, applied.note)
    return (applied.denoiser,)


def _with_lora(
    context: NodeContext,
    model: Denoiser,
    clip: E,
    name: str,
    strength_model: float,
    strength_clip: float = 0.0,
    *,
    bypass: bool | None = None,
) -> tuple[Denoiser, E]:
    """Model and text encoders with a LoRA file, run beside the weights with `bypass`, else merged where possible."""
    if not strength_model and not strength_clip:
        return model, clip
    # The text encoders may be of another file than the model, with other modules.
    names = model.base if clip is None else replace(model.base.names, text_encoders=clip.names.text_encoders)
    lora = Lora.load(context.folders.find("loras", name), names)
    applied = lora.applied(model, clip, strength=strength_model, text_strength=strength_clip, bypass=bypass)
    _tell(context, applied.note)
    return applied.denoiser, applied.encoder


def _tell(context: NodeContext, note: str) -> None:
    """Warn of parts of a LoRA that do not apply."""
    if note:
        context.warn(note)


_LOADERS = {
    "CheckpointLoaderSimple": ("checkpoints", ("ckpt_name",)),
    "UNETLoader": ("diffusion_models", ("unet_name",)),
    "CLIPLoader": ("text_encoders", ("clip_name",)),
    "DualCLIPLoader": ("text_encoders", ("clip_name1", "clip_name2")),
    "TripleCLIPLoader": ("text_encoders", ("clip_name1", "clip_name2", "clip_name3")),
    "QuadrupleCLIPLoader": ("text_encoders", ("clip_name1", "clip_name2", "clip_name3", "clip_name4")),
    "VAELoader": ("vae", ("vae_name",)),
}
"""Kind of folder and inputs with names of files, by node."""


@dataclass(frozen=True)
class _Loaded:
    """Files that a node loads, and the type of text encoders that are loaded apart."""

    paths: tuple[Path, ...]
    clip_type: str | None


def check_part_files(
    graph: Graph, folders: Folders, *, model: Link, conditioning: Link, latents: Link, loras: Sequence[Path]
) -> None:
    """Check that a model is trained on its own encoders' encodings, and continues LoRAs of its own.

    Links are followed to the nodes that load, of whose files the headers are read. What cannot be followed (a file name
    from another node, a choice among several models) is checked by the node that uses it. ModelError or LoraError if a
    file is for another model.
    """
    base = _loaded(graph, model, "MODEL", folders)
    if base is None:
        return

    def loaded_by(link: Link, carried: str, wanted: str) -> set[_Loaded]:
        found = (_loaded(graph, maker, wanted, folders) for maker in _makers(graph, link, carried, wanted))
        return {
            checkpoint for checkpoint in found if checkpoint is not None and checkpoint != base
        }  # a checkpoint's own parts fit it

    encoders, autoencoders = loaded_by(conditioning, "CONDITIONING", "CLIP"), loaded_by(latents, "LATENT", "VAE")
    if not (encoders or autoencoders or loras):
        return
    structure = load_structure(base.paths[0])
    for encoder in encoders:
        check_encoders(structure, encoder.paths, encoder.clip_type)
    for autoencoder in autoencoders:
        autoencoder_part(autoencoder.paths[0], structure.family)
    for path in loras:
        Lora.load(path, structure)


def _loaded(graph: Graph, link: Link, wanted: str, folders: Folders) -> _Loaded | None:
    """The files of the node that a model or a part of it comes from; None if unknown until it runs."""
    while (member := graph.nodes[link.node_id]).node.id not in _LOADERS:
        onward = [link for _, link in member.links() if _link_type(graph, link) in (wanted, ANY, MATCH)]
        if len(onward) != 1:
            return None
        (link,) = onward
    kind, inputs = _LOADERS[member.node.id]
    names = [member.inputs[name] for name in inputs]
    if any(isinstance(name, Link) for name in names):
        return None
    clip_type = member.inputs.get("type", ANY_TYPE) if kind == "text_encoders" else None
    return _Loaded(tuple(folders.find(kind, name) for name in names), clip_type)


def _makers(graph: Graph, link: Link, carried: str, wanted: str) -> Iterator[Link]:
    """The links of type `wanted` into the nodes that make what comes through a link of type `carried`."""
    waiting, seen = [link], {link}
    while waiting:
        for _, one in graph.nodes[waiting.pop().node_id].links():
            if (received := _link_type(graph, one)) == wanted:
                yield one
            elif received in (carried, ANY, MATCH) and one not in seen:
                seen.add(one)
                waiting.append(one)


def _link_type(graph: Graph, link: Link) -> str:
    return graph.nodes[link.node_id].node.outputs[link.output].type
