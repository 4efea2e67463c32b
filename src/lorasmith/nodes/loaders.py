"""Nodes that load models, whole or in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lorasmith.adapters.frozen_layer import cast_weights
from lorasmith.core.folders import Folders, fingerprint
from lorasmith.families.loading import load_model
from lorasmith.families.model import Autoencoder, Denoiser, TextEncoder
from lorasmith.families.part_loading import load_autoencoder, load_text_encoder
from lorasmith.workflow import Input, NodeContext, Output, node

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


def _file(name: str, kind: str, tooltip: str) -> Input:
    return Input(name, "COMBO", options=lambda folders: folders.files(kind), tooltip=tooltip)


def _encoder_file(name: str) -> Input:
    return _file(name, "text_encoders", "A file in models/text_encoders.")


def _type(options: Sequence[str]) -> Input:
    return Input("type", "COMBO", options=options, accept=_any, tooltip="The model that the prompts are for.")


def _encoder_files(
    folders: Folders,
    clip_name: str = "",
    clip_name1: str = "",
    clip_name2: str = "",
    clip_name3: str = "",
    clip_name4: str = "",
) -> object:
    """Sizes and times of the files of a node's inputs."""
    names = (clip_name, clip_name1, clip_name2, clip_name3, clip_name4)
    return [fingerprint(folders.find("text_encoders", name)) for name in names if name]


_DEVICE = Input(
    "device",
    "COMBO",
    options=("default", "cpu"),
    optional=True,
    accept=_any,
    tooltip="Where prompts are encoded.",
)


@node(
    "CheckpointLoaderSimple",
    display_name="Load Checkpoint",
    category="model/loaders",
    inputs=[_file("ckpt_name", "checkpoints", "A checkpoint file, or a diffusers folder.")],
    outputs=[Output("MODEL"), Output("CLIP"), Output("VAE")],
    fingerprint=lambda folders, ckpt_name: fingerprint(folders.find("checkpoints", ckpt_name)),
)
def load_checkpoint(context: NodeContext, *, ckpt_name: str) -> tuple[Denoiser, TextEncoder, Autoencoder]:
    """Load a model.

    Weights stay on the memory-mapped file; training and sampling place copies on their device, in their own dtype.
    """
    model = load_model(context.folders.find("checkpoints", ckpt_name))
    return model.denoiser, model.text_encoder, model.autoencoder


@node(
    "UNETLoader",
    display_name="Load Diffusion Model",
    category="model/loaders",
    inputs=[
        _file("unet_name", "diffusion_models", "A file in models/diffusion_models, or a diffusers folder."),
        Input(
            "weight_dtype",
            "COMBO",
            options=tuple(_WEIGHT_DTYPES),
            tooltip="fp8 halves the memory of 16-bit weights, and rounds them.",
        ),
    ],
    outputs=[Output("MODEL")],
    fingerprint=lambda folders, unet_name: fingerprint(folders.find("diffusion_models", unet_name)),
)
def load_diffusion_model(context: NodeContext, *, unet_name: str, weight_dtype: str) -> tuple[Denoiser]:
    """Load a denoiser alone.

    In fp8 its matrices and kernels are rounded without scales, as in ComfyUI; those that the file has packed stay as
    they are. Products are computed in the dtype of training or sampling, with `fp8_e4m3fn_fast` too.
    """
    model = load_model(context.folders.find("diffusion_models", unet_name))
    code = _WEIGHT_DTYPES[weight_dtype]
    if code is not None:
        cast_weights(model.components.denoiser, code)
    if weight_dtype.endswith("_fast"):
        context.log("Weights are in fp8, but products are not: quantized_backward of Train LoRA has them in fp8.")
    return (model.denoiser,)


@node(
    "CLIPLoader",
    display_name="Load CLIP",
    category="model/loaders",
    inputs=[_encoder_file("clip_name"), _type(_TYPES), _DEVICE],
    outputs=[Output("CLIP")],
    fingerprint=_encoder_files,
)
def load_clip(context: NodeContext, *, clip_name: str, type: str, device: str = "default") -> tuple[TextEncoder]:
    """Load one text encoder; `type` decides between models that share it, and is ignored where it does not fit."""
    return (_encoders(context, [clip_name], type, device),)


@node(
    "DualCLIPLoader",
    display_name="Load CLIP (Dual)",
    category="model/loaders",
    inputs=[_encoder_file("clip_name1"), _encoder_file("clip_name2"), _type(_DUAL_TYPES), _DEVICE],
    outputs=[Output("CLIP")],
    fingerprint=_encoder_files,
)
def load_clip_dual(
    context: NodeContext, *, clip_name1: str, clip_name2: str, type: str, device: str = "default"
) -> tuple[TextEncoder]:
    """Load two text encoders in any order, such as clip_l and t5xxl for Flux.1."""
    return (_encoders(context, [clip_name1, clip_name2], type, device),)


@node(
    "TripleCLIPLoader",
    display_name="Load CLIP (Triple)",
    category="model/loaders",
    inputs=[_encoder_file(f"clip_name{number}") for number in (1, 2, 3)],
    outputs=[Output("CLIP")],
    fingerprint=_encoder_files,
)
def load_clip_triple(context: NodeContext, *, clip_name1: str, clip_name2: str, clip_name3: str) -> tuple[TextEncoder]:
    """Load three text encoders in any order."""
    return (_encoders(context, [clip_name1, clip_name2, clip_name3]),)


@node(
    "QuadrupleCLIPLoader",
    display_name="Load CLIP (Quadruple)",
    category="model/loaders",
    inputs=[_encoder_file(f"clip_name{number}") for number in (1, 2, 3, 4)],
    outputs=[Output("CLIP")],
    fingerprint=_encoder_files,
)
def load_clip_quadruple(
    context: NodeContext, *, clip_name1: str, clip_name2: str, clip_name3: str, clip_name4: str
) -> tuple[TextEncoder]:
    """Load four text encoders in any order."""
    return (_encoders(context, [clip_name1, clip_name2, clip_name3, clip_name4]),)


@node(
    "VAELoader",
    display_name="Load VAE",
    category="model/loaders",
    inputs=[_file("vae_name", "vae", "A file in models/vae.")],
    outputs=[Output("VAE")],
    fingerprint=lambda folders, vae_name: fingerprint(folders.find("vae", vae_name)),
)
def load_vae(context: NodeContext, *, vae_name: str) -> tuple[Autoencoder]:
    """Load an autoencoder."""
    return (load_autoencoder(context.folders.find("vae", vae_name)),)


def _encoders(
    context: NodeContext, names: Sequence[str], clip_type: str = ANY_TYPE, device: str = "default"
) -> TextEncoder:
    """Text encoders from files, for models of a type, on a device of the node's choices."""
    loaded = load_text_encoder([context.folders.find("text_encoders", name) for name in names], clip_type)
    return replace(loaded, device=torch.device("cpu")) if device == "cpu" else loaded
